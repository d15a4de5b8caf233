"""What every contender is given: one model, one set of rows, one batch and one number of updates, as files in a folder.

`model/` is a Hugging Face folder without weights (configuration and tokenizer): each contender builds the model anew.
`train.jsonl` and `validation.jsonl` hold rows; of running text there is `train.txt` too, and the same as token ids,
end to end, in `train.bin` (int32), for those who do not tokenise. Only `make` needs more than the standard library.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

COLUMNS = {
    "blocks": ("text",),
    "classification": ("text", "label"),
    "translation": ("source", "target"),
    "instruction": ("prompt", "completion"),
}
"""By task, the columns of its rows."""

SIZES = {"tiny": (2, 128, 4, 344), "small": (4, 256, 4, 688), "medium": (8, 384, 6, 1024)}
"""Layers, width, heads and width of the feed-forward layers."""

VALIDATION_ROWS = 400
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"


@dataclass(frozen=True)
class Workload:
    """What to train on what, how long; the same for all contenders."""

    task: str
    folder: Path
    length: int
    """Tokens in a block, or in the longest row."""
    batch: int
    """Rows in one update, over all ranks."""
    updates: int
    ranks: int = 1
    threads: int = 1
    """Of each rank."""
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    evaluations: int = 0
    """How often the validation rows are evaluated before training, texts being generated where the task has them."""
    save_after: int | None = None
    """After which update all that it takes to go on is saved; none: nothing is saved in between."""
    new_tokens: int = 32
    """Most tokens of a generated text."""

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / "model"

    @property
    def config(self) -> dict[str, Any]:
        """The content of the model's config.json."""
        found: dict[str, Any] = json.loads((self.model / "config.json").read_text())
        return found

    @property
    def batch_of_a_rank(self) -> int:
        """Rows of one rank in one update."""
        return self.batch // self.ranks

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of a split."""
        with (self.folder / f"{split}.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write(self, path: Path) -> None:
        """For the contender's processes."""
        path.write_text(json.dumps(dataclasses.asdict(self), default=str))

    @staticmethod
    def read(path: str | Path) -> Workload:
        """What `write` wrote."""
        found = json.loads(Path(path).read_text())
        return Workload(**{**found, "folder": Path(found["folder"])})


def make(
    task: str, folder: Path, size: str, vocabulary: int | None, tokenizer: Path | None, rows: Path | None, length: int
) -> None:
    """Write the files of a task, from `rows` (a text; two columns of a tsv file without a header) or embedded ones."""
    found = list(_read(task, rows) if rows else _embedded(task))
    random.Random(0).shuffle(found) if task != "blocks" else None
    held = min(VALIDATION_ROWS, len(found) // 10)
    splits = {"train": found[held:], "validation": found[:held]}
    for split, its_rows in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in its_rows)
    tokens = _tokenizer(task, itertools.chain.from_iterable(row.values() for row in found), tokenizer)
    tokens.save_pretrained(folder / "model")
    config = _config(task, SIZES[size], vocabulary or len(tokens), tokens, length)
    config.save_pretrained(folder / "model")
    if task == "blocks":
        _write_running_text(folder, splits, tokens)


def _read(task: str, path: Path) -> Iterator[dict[str, str]]:
    columns = COLUMNS[task]
    with path.open(encoding="utf-8") as file:
        for line in file:
            values = line.rstrip("\n").split("\t", len(columns) - 1) if task != "blocks" else [line]
            if len(values) == len(columns) and all(value.strip() for value in values):
                yield dict(zip(columns, values, strict=True))


def _embedded(task: str) -> Iterator[dict[str, str]]:
    from recipes import embedded, translation
    from recipes.embedded_chats import EMBEDDED_CHATS
    from recipes.embedded_docstrings import DOCSTRINGS

    match task:
        case "blocks":
            yield from ({"text": text} for text in embedded.paragraphs())
        case "classification":
            yield from DOCSTRINGS.make()
        case "translation":
            yield from translation.dates()
        case _:
            yield from EMBEDDED_CHATS["instruction"].make()


def _tokenizer(task: str, texts: Iterable[str], given: Path | None) -> PreTrainedTokenizerFast:
    """The given one, with a token that pads; or byte-level BPE of these texts, which ends sources and targets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if given and task != "translation":
        found: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(given)
        found.pad_token = found.pad_token or found.eos_token
        return found
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=[PADDING, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if task == "translation":
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, backend.token_to_id(END_OF_TEXT))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PADDING,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _config(
    task: str, size: tuple[int, int, int, int], vocabulary: int, tokens: PreTrainedTokenizerFast, length: int
) -> PretrainedConfig:
    """Without dropout, so that all contenders compute the same."""
    from transformers import BertConfig, LlamaConfig, T5Config

    layers, width, heads, inner = size
    ids = {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id}
    if task == "translation":
        return T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=width // heads,
            num_heads=heads,
            d_ff=inner,
            num_layers=layers,
            dropout_rate=0.0,
            decoder_start_token_id=tokens.pad_token_id,
            **ids,
        )
    common = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": length,
    }
    if task == "classification":
        return BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **ids)
    return LlamaConfig(**common, tie_word_embeddings=False, bos_token_id=tokens.bos_token_id, **ids)


def _write_running_text(folder: Path, splits: dict[str, Any], tokens: PreTrainedTokenizerFast) -> None:
    from array import array

    for split, rows in splits.items():
        texts = [row["text"] for row in rows]
        (folder / f"{split}.txt").write_text("".join(texts), encoding="utf-8")
        ids = array("i")
        for encoded in tokens(texts, add_special_tokens=False)["input_ids"]:
            ids.extend(encoded)
        with (folder / f"{split}.bin").open("wb") as file:
            ids.tofile(file)
