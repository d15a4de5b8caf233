"""Data and model as the examples of transformers make them: datasets.map over 1,000 rows at once, padding collators.

For contenders in the environment `transformers`; nothing of shoal is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import COLUMNS, Workload

datasets.disable_progress_bars()

PROMPT = "user: {}\nassistant:"
"""What shoal's default template makes of a prompt; a space and the completion follow."""


def rows_of(workload: Workload, split: str) -> datasets.Dataset:
    """As they are in the file; they are kept in the cache, as is what map makes of them."""
    # Not load_dataset("json"): it takes a column of dates for one of times, and of "1979-07-05" it makes, even if it is
    # told that texts are wanted, "1979-07-05 00:00:00".
    texts = datasets.Features({name: datasets.Value("string") for name in COLUMNS[workload.task]})
    return datasets.Dataset.from_generator(
        lines, features=texts, gen_kwargs={"path": str(workload.folder / f"{split}.jsonl")}
    )


def lines(path: str) -> Iterator[dict[str, str]]:
    """The rows of a file, one by one."""
    with Path(path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class Task:
    """Tokenizer, model, rows as features, and how they become batches."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(workload.model)
        self.features = {split: self._features(split) for split in ("train", "validation")}

    def model(self) -> PreTrainedModel:
        """With random weights."""
        name, labels = self.workload.task, {}
        if name == "classification":
            labels = {"num_labels": len(self._labels)}
        config = AutoConfig.from_pretrained(self.workload.model, **labels)
        kinds = {"classification": AutoModelForSequenceClassification, "translation": AutoModelForSeq2SeqLM}
        return kinds.get(name, AutoModelForCausalLM).from_config(config)

    def collator(self, model: PreTrainedModel) -> Any:
        """Of samples a batch."""
        if self.workload.task == "blocks":
            return default_data_collator
        if self.workload.task == "classification":
            return DataCollatorWithPadding(self.tokenizer)
        return DataCollatorForSeq2Seq(self.tokenizer, model if self.workload.task == "translation" else None)

    def _features(self, split: str) -> datasets.Dataset:
        rows = rows_of(self.workload, split)
        if self.workload.task == "classification" and split == "train":
            self._labels = sorted(rows.unique("label"))
        tokenise = getattr(self, f"_{self.workload.task}")
        found = rows.map(tokenise, batched=True, remove_columns=rows.column_names)
        return found.map(self._group, batched=True) if self.workload.task == "blocks" else found

    def _blocks(self, rows: dict[str, list[Any]]) -> Any:
        return self.tokenizer(rows["text"], add_special_tokens=False)

    def _group(self, features: dict[str, list[Any]]) -> dict[str, Any]:
        """Texts of 1,000 rows end to end, cut into blocks; what does not fill one is dropped."""
        size = self.workload.length
        ends = {name: [token for row in rows for token in row] for name, rows in features.items()}
        most = len(ends["input_ids"]) // size * size
        cut = {name: [row[start : start + size] for start in range(0, most, size)] for name, row in ends.items()}
        return {**cut, "labels": [list(block) for block in cut["input_ids"]]}

    def _classification(self, rows: dict[str, list[Any]]) -> Any:
        found = self.tokenizer(rows["text"], truncation=True, max_length=self.workload.length)
        return {**found, "labels": [self._labels.index(label) for label in rows["label"]]}

    def _translation(self, rows: dict[str, list[Any]]) -> Any:
        most = self.workload.length
        found = self.tokenizer(rows["source"], truncation=True, max_length=most)
        labels = self.tokenizer(text_target=rows["target"], truncation=True, max_length=most)["input_ids"]
        return {**found, "labels": labels}

    def _instruction(self, rows: dict[str, list[Any]]) -> Any:
        """Laid out as shoal's default template does; only the completion is a target."""
        most, end = self.workload.length, self.tokenizer.eos_token
        asked = self.tokenizer([PROMPT.format(text) for text in rows["prompt"]], add_special_tokens=False)
        told = self.tokenizer([f" {text}{end}" for text in rows["completion"]], add_special_tokens=False)
        pairs = list(zip(asked["input_ids"], told["input_ids"], strict=True))
        ids = [[*prompt, *answer][:most] for prompt, answer in pairs]
        labels = [[*[-100] * len(prompt), *answer][:most] for prompt, answer in pairs]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}


def written(rows: list[list[int]], end: int, most: int) -> int:
    """Tokens that were generated, after the first, which a row begins with; one without an end went on to the most."""
    return sum(row.index(end) if end in row else most for row in rows)


class Counted:
    """Counts input tokens that are no padding, where they reach the model."""

    def __init__(self, model: PreTrainedModel, ticks: Ticks) -> None:
        self.tokens, self._before, self._ticks = 0, 0, ticks
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, __: Any, named: dict[str, Any]) -> None:
        if named.get("labels") is not None:  # which a call to write a text has not
            mask = named.get("attention_mask")
            self.tokens += named["input_ids"].numel() if mask is None else int(mask.sum())

    def restart(self) -> None:
        """What was counted until now belongs to no update."""
        self._before = self.tokens

    def update(self) -> None:
        """An update is over."""
        self._ticks.update(self.tokens - self._before)
        self.restart()
