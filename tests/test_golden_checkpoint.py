"""Checkpoints that earlier releases wrote load for ever, and the run goes on as it did then.

`python -m tests.test_golden_checkpoint --write` makes the one of this release, if there is none of its format yet.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import FORMAT, checkpoint_folder, damage
from tests.gloo import run_ranks

GOLDENS = Path(__file__).parent / "goldens" / "checkpoints"
SAVED, LAST = 4, 10


def attempt(strategy: str, world_size: int, folder: str, stop_at: int | None) -> list[float]:
    """Begin or go on with the run of the goldens; the losses of this attempt."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from launch.engine.data import open_data
    from launch.engine.progress import Display
    from launch.engine.run import Run
    from launch.engine.sharding import make_accelerator
    from launch.recipe import Prepared
    from launch.topology import read_world
    from recipes.causal_lm import collate, count, loss
    from tests import tiny
    from tests.test_engine_export import tokenizer
    from tests.test_engine_sharding import plan_for

    overrides = (f"train.max_steps={LAST}", "train.micro_batch_size=1", "save.export=false", "eval.every_steps=5")
    plan = plan_for(strategy, world_size, Path(folder), *overrides)
    sizes = {"vocab_size": tiny.VOCABULARY, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    train, validation = tiny.sequences(20), tiny.sequences(7, seed=1)
    prepared = Prepared(lambda: GPT2LMHeadModel(config), tokenizer(), train, validation, collate, loss, count)
    data = open_data(plan, prepared, read_world().rank)
    accelerator = make_accelerator(plan)

    def signal() -> int | None:
        return 15 if stop_at is not None and run.updates_done >= stop_at - 1 else None

    run = Run(plan, Path(folder), prepared, data, accelerator, Display(False), signal)
    run.train()
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if accelerator.is_main_process else []
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def write(golden: Path) -> None:
    """Two ranks with sharded weights make the checkpoint; one process alone, undisturbed, what is expected of it."""
    with tempfile.TemporaryDirectory() as name:
        first, whole = Path(name) / "first", Path(name) / "whole"
        for folder in (first, whole):
            folder.mkdir()
        run_ranks(2, attempt, "fsdp2", 2, str(first), SAVED)
        (losses,) = run_ranks(1, attempt, "single", 1, str(whole), None)
        golden.mkdir(parents=True)
        shutil.copytree(checkpoint_folder(first, SAVED), golden / f"step-{SAVED:06d}")
    (golden / "losses.json").write_text(json.dumps(losses) + "\n")


@pytest.mark.dist
@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("fsdp2", 2), ("zero2", 2)])
@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_a_checkpoint_of_an_earlier_release_goes_on(
    version: int, strategy: str, world_size: int, tmp_path: Path
) -> None:
    golden = GOLDENS / f"format-{version}"
    folder = checkpoint_folder(tmp_path, SAVED)
    shutil.copytree(golden / folder.name, folder)
    assert damage(folder) is None
    losses: list[Any] = run_ranks(world_size, attempt, strategy, world_size, str(tmp_path), None)[0]
    assert len(losses) == LAST - SAVED, "it did not begin anew"
    assert losses == pytest.approx(json.loads((golden / "losses.json").read_text())[SAVED:], abs=1e-4)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write(GOLDENS / f"format-{FORMAT}")
