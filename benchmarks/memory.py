"""Compares what the plan says a run needs of memory with what it took, setting by setting, on CPU processes.

    python -m benchmarks.memory [--write docs/memory.md] [NAME …]

Each setting is run twice by `shoal run`, for three updates. Once glibc is told to give memory back at once
(MALLOC_MMAP_THRESHOLD_): what is resident then is what was asked for, and that is what the plan is held against. Once
it does as it likes, which is what a user sees in `top`. Both are the highest resident memory of the fullest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.disk import size_in_words
from launch.topology import usable_cores

AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
"""mallopt(3): larger pieces are mapped one by one, and unmapped when they are freed."""

ALWAYS = (
    *("train.max_steps=3", "eval.at_start=false", "eval.max_samples=2", "eval.batch_size=1"),
    *("save.export=false", "save.every_minutes=null"),
)


@dataclass(frozen=True)
class Setting:
    """A run that is planned and made."""

    name: str
    what: str
    recipe: str
    overrides: tuple[str, ...]
    model: Callable[[Path], None] | None = None
    """Writes a model to a folder, which `recipe_args.model` then names."""


# --- models and data -------------------------------------------------------------------------------------


def _configured(**config: Any) -> Callable[[Path], None]:
    """A folder with a configuration and the tokenizer that shoal makes of Python's language reference."""

    def write(folder: Path) -> None:
        from launch.cache import Cache
        from launch.topology import cache_folder
        from recipes.embedded import LANGUAGE_MODEL

        made = LANGUAGE_MODEL.folder(Cache(cache_folder()))
        folder.mkdir()
        for path in made.glob("tokenizer*"):
            shutil.copy(path, folder)
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        (folder / "config.json").write_text(json.dumps({**config, **ends}), encoding="utf-8")

    return write


def _with_weights(**config: Any) -> Callable[[Path], None]:
    """The same with random weights, for adapters, which need some to be added to."""
    configure = _configured(**config)

    def write(folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        configure(folder)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)

    return write


GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
WIDE = {**LLAMA, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
TIED = {**WIDE, "vocab_size": 49152, "tie_word_embeddings": True}
BERT = (
    "{hidden_size: 768, num_hidden_layers: 8, num_attention_heads: 12, intermediate_size: 3072, vocab_size: 30522, "
    "max_position_embeddings: 512}"
)
T5 = "{d_model: 512, d_kv: 64, num_heads: 8, d_ff: 2048, num_layers: 6, num_decoder_layers: 6, vocab_size: 32128}"
SCRATCH = ("recipe_args.from_scratch=true",)
BLOCKS = (*SCRATCH, "recipe_args.block_size=256", "train.global_batch_size=4")
TWO = ("parallel.devices=2",)


def _long_pairs(folder: Path) -> Path:
    """Texts that are longer than any sample may be, so that all samples have the greatest length."""
    path = folder / "pairs.jsonl"
    line = json.dumps({"source": "a long text to be read " * 60, "target": "a long text to be written " * 30})
    path.write_text((line + "\n") * 64, encoding="utf-8")
    return path


SETTINGS = (
    Setting(
        "gpt2",
        "GPT-2 small, one process, 4 × 256 tokens",
        "causal_lm",
        (*BLOCKS, "train.micro_batch_size=4"),
        _configured(**GPT2),
    ),
    Setting(
        "gpt2-checkpointed",
        "the same, activations checkpointed",
        "causal_lm",
        (*BLOCKS, "train.micro_batch_size=4", "train.activation_checkpointing=true"),
        _configured(**GPT2),
    ),
    Setting(
        "gpt2-accumulated",
        "the same, 1 × 256 tokens four times",
        "causal_lm",
        (*BLOCKS, "train.micro_batch_size=1"),
        _configured(**GPT2),
    ),
    Setting(
        "llama-bf16",
        "Llama type, one process, bf16, 4 × 256 tokens",
        "causal_lm",
        (*BLOCKS, "train.micro_batch_size=4", "train.precision=bf16"),
        _configured(**LLAMA),
    ),
    Setting(
        "bert",
        "BERT, masked, one process, 8 × 256 tokens, padded",
        "masked_lm",
        (
            *(*SCRATCH, f"recipe_args.config_overrides={BERT}", "recipe_args.max_length=256"),
            *("train.global_batch_size=8", "train.epochs=null"),
        ),
    ),
    Setting(
        "t5",
        "T5 small, one process, 4 × 384 tokens read, 128 written",
        "translation",
        (
            *(*SCRATCH, f"recipe_args.config_overrides={T5}", "recipe_args.max_source_length=384"),
            *("recipe_args.max_target_length=128", "recipe_args.metrics=[]", "eval.best_metric=loss"),
            *("train.global_batch_size=4", "train.micro_batch_size=4", "train.epochs=null"),
            *("recipe_args.train_files=PAIRS", "recipe_args.validation_files=PAIRS"),
        ),
    ),
    Setting(
        "lora",
        "GPT-2 small with adapters, one process, 4 × 256 tokens",
        "causal_lm",
        (*BLOCKS[1:], "train.micro_batch_size=4", "recipe_args.lora={r: 16}"),
        _with_weights(**GPT2),
    ),
    Setting(
        "ddp",
        "Llama type, tied head, DDP on 2, 1 × 256 tokens twice",
        "causal_lm",
        (*BLOCKS, *TWO, "train.micro_batch_size=1"),
        _configured(**TIED),
    ),
    Setting(
        "fsdp2",
        "the same, FSDP2",
        "causal_lm",
        (*BLOCKS, *TWO, "train.micro_batch_size=1", "parallel.strategy=fsdp2"),
        _configured(**TIED),
    ),
    Setting(
        "fsdp2-bf16-checkpointed",
        "Llama type, FSDP2 on 2, bf16, checkpointed, 2 × 256",
        "causal_lm",
        (
            *(*BLOCKS, *TWO, "train.micro_batch_size=2", "parallel.strategy=fsdp2"),
            *("train.precision=bf16", "train.activation_checkpointing=true"),
        ),
        _configured(**LLAMA),
    ),
    Setting(
        "zero1",
        "Llama type, ZeRO-1 on 2, 1 × 256 tokens twice",
        "causal_lm",
        (*BLOCKS, *TWO, "train.micro_batch_size=1", "parallel.strategy=zero1"),
        _configured(**LLAMA),
    ),
    Setting(
        "zero2-bf16",
        "Llama type, ZeRO-2 on 2, bf16, 2 × 256 tokens",
        "causal_lm",
        (*BLOCKS, *TWO, "train.micro_batch_size=2", "parallel.strategy=zero2", "train.precision=bf16"),
        _configured(**LLAMA),
    ),
    Setting(
        "zero3",
        "Llama type, tied head, ZeRO-3 on 2, 2 × 256 tokens",
        "causal_lm",
        (*BLOCKS, *TWO, "train.micro_batch_size=2", "parallel.strategy=zero3"),
        _configured(**TIED),
    ),
)


# --- running ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Bytes of the fullest rank."""

    setting: Setting
    planned: int
    needed: int
    """Where what is freed is given back at once."""
    seen: int
    """As glibc does it by default."""

    @property
    def off(self) -> float:
        """By how much the plan is too high, as a share."""
        return self.planned / self.needed - 1

    def row(self) -> str:
        """A line of the table."""
        sizes = " | ".join(size_in_words(size) for size in (self.planned, self.needed))
        return f"| {self.setting.what} | {sizes} | {self.off:+.1%} | {size_in_words(self.seen)} |"


def measure(setting: Setting, folder: Path) -> Found:
    """Run it both ways.

    Raises:
        subprocess.CalledProcessError: a run failed; its output was shown.
    """
    overrides = [each.replace("PAIRS", str(_long_pairs(folder))) for each in setting.overrides]
    if setting.model:
        setting.model(folder / "model")
        overrides.append(f"recipe_args.model={folder / 'model'}")
    peaks, plan = [], {}
    for variables in (AT_ONCE, {}):
        out = folder / f"run-{len(peaks)}"
        command = [sys.executable, "-m", "launch", "run", setting.recipe, *overrides, *ALWAYS, "--out", str(out)]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            done.check_returncode()
        peaks.append(max(json.loads((out / "result.json").read_text(encoding="utf-8"))["peak_memory"]))
        plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["plan"]
        shutil.rmtree(out)
    memory, strategy = plan["memory"], plan["processes"]["strategy"]
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    planned = sum(memory["needs"][strategy][part] for part in parts) + memory["libraries"]
    return Found(setting, planned, *peaks)


BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    """Print the table, and write it into a document if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="settings to run; none: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put the table between {BEGIN} and {END}")
    arguments = parser.parse_args()
    names = {setting.name for setting in SETTINGS}
    if unknown := set(arguments.names) - names:
        parser.error(f"no such setting: {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    lines = ["| setting | planned | measured | off by | as glibc leaves it |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    worst = 0.0
    for setting in SETTINGS:
        if arguments.names and setting.name not in arguments.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measure(setting, Path(folder))
        worst = max(worst, abs(found.off))
        lines.append(found.row())
        print(lines[-1], flush=True)
    memory = size_in_words(psutil.virtual_memory().total)
    where = f"{platform.machine()}, {usable_cores()} cores, {memory}, Python {platform.python_version()}"
    lines += ["", f"Off by {worst:.1%} at most. {where}."]
    print(lines[-1])
    if arguments.write:
        text = arguments.write.read_text(encoding="utf-8")
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        arguments.write.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
