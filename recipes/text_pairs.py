"""From rows with a source and a target text to batches for an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.errors import DataError
from launch.recipe import Width
from recipes.batches import IGNORED, marks, padded
from recipes.rows import RowStream, Splits

if TYPE_CHECKING:
    import torch

    from recipes.sequence_to_sequence import SequenceArgs

Texts = list[str]
Columns = dict[str, list[Any]]
Pairs = Callable[[Columns], tuple[list[Any], list[Any]]]
"""Sources and targets of a batch of rows, as they stand there."""


@dataclass(frozen=True)
class Encoder:
    """Makes samples of rows; one with an empty source or target makes none."""

    args: SequenceArgs
    tokenizer: Any
    pairs: Pairs

    def samples(self, rows: Columns) -> Columns:
        """Columns `input_ids`, `labels`, and whether each was cut short: `source_cut`, `target_cut`."""
        sources, references = self.texts(rows)
        return self._encoded(sources, references)

    def samples_with_texts(self, rows: Columns) -> Columns:
        """The same, with the texts: `source`, without prefix, and `references`, a list for each."""
        sources, references = self.texts(rows)
        return {**self._encoded(sources, references), "source": sources, "references": references}

    def texts(self, rows: Columns) -> tuple[Texts, list[Texts]]:
        """Sources, and for each its targets, of rows where neither is empty.

        Raises:
            DataError: a value that is no text.
        """
        sources, references = [], []
        for source, target in zip(*self.pairs(rows), strict=True):
            text = _joined(source, "source_column")
            several = isinstance(target, list) and self.args.target_lists == "references"
            given = [_joined(each, "target_column") for each in (target if several else [target])]
            if text and (given := [each for each in given if each]):
                sources.append(text)
                references.append(given)
        return sources, references

    def _encoded(self, sources: Texts, references: list[Texts]) -> Columns:
        args = self.args
        inputs, source_cut = self._tokens(
            "text", [args.source_prefix + text for text in sources], args.max_source_length
        )
        labels, target_cut = self._tokens("text_target", [row[0] for row in references], args.max_target_length)
        return {"input_ids": inputs, "labels": labels, "source_cut": source_cut, "target_cut": target_cut}

    def _tokens(self, side: str, texts: Texts, most: int) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each text, at most so many, and whether it was cut short."""
        if not texts:
            return [], []
        ids = self.tokenizer(**{side: texts}, return_attention_mask=False)["input_ids"]
        cut = [len(tokens) > most for tokens in ids]
        if any(cut):
            long = [text for text, is_cut in zip(texts, cut, strict=True) if is_cut]
            short = iter(self.tokenizer(**{side: long}, truncation=True, max_length=most)["input_ids"])
            ids = [next(short) if is_cut else tokens for tokens, is_cut in zip(ids, cut, strict=True)]
        return ids, cut


def _joined(value: Any, key: str) -> str:
    parts = value if isinstance(value, list) else [] if value is None else [value]
    for part in parts:
        if not isinstance(part, str):
            raise DataError(
                f"recipe_args.{key}: holds {part!r}, which is no text; name a column of texts, or of lists of texts"
            )
    return " ".join(part.strip() for part in parts if part.strip())


def facts(splits: Splits, encoded: Splits) -> dict[str, Any]:
    """By split: rows, samples, and the share of them whose source or target was cut short. Nothing of a stream."""
    found: dict[str, Any] = {}
    for name, rows, samples in (
        ("train", splits.train, encoded.train),
        ("validation", splits.validation, encoded.validation),
    ):
        if isinstance(rows, RowStream) or isinstance(samples, RowStream):
            continue
        made = len(samples)
        cut = {f"{side}_cut": sum(samples[f"{side}_cut"]) for side in ("source", "target")}
        shares = {f"share_of_{side}": number / max(made, 1) for side, number in cut.items()}
        found[name] = {"rows": len(rows), "samples": made, "left_out": len(rows) - made, **shares}
    return found


@dataclass(frozen=True)
class Collate:
    """Samples to a batch, padded on the right.

    Where there are only a few widths, source and target take the same place among theirs: else there would be as many
    shapes as there are pairs of widths.
    """

    pad: int
    start: int
    source: Width
    target: Width

    def __call__(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """int64: `input_ids`, `attention_mask` (batch, source); `decoder_input_ids`, `labels` (batch, target)."""
        sources, targets = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
        before = [[self.start, *self._given(target)] for target in targets]
        source, target = self._widths(max(map(len, sources)), max(map(len, targets)))
        return {
            "input_ids": padded(sources, self.pad, source),
            "attention_mask": marks(sources, source),
            "decoder_input_ids": padded(before, self.pad, target),
            "labels": padded(targets, IGNORED, target),
        }

    def _given(self, target: list[int]) -> list[int]:
        return [self.pad] * (len(target) - 1) if target[0] == IGNORED else target[:-1]

    def _widths(self, source: int, target: int) -> tuple[Callable[[int], int], Callable[[int], int]]:
        if not self.source.few:
            return self.source, self.target
        bucket = min(self.source.bucket(source), self.target.bucket(target))
        return self._fixed(self.source, bucket), self._fixed(self.target, bucket)

    @staticmethod
    def _fixed(width: Width, bucket: int) -> Callable[[int], int]:
        return lambda longest: max(width.of(bucket), longest)
