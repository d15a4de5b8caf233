"""A look at prepared data before it is trained on: sizes, lengths, targets, labels, overlap, and one batch as text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from rich.text import Text

from launch.engine.streams import first_samples, is_stream
from launch.recipe import IGNORED, Batch, Prepared, Samples, Stream

QUICK, THOROUGH = 500, 100_000
"""Samples that are looked at in each split, at the start of a run and when a person asks."""

LABELS_SHOWN = 12
TOKENS_SHOWN = 160


@dataclass(frozen=True)
class Lengths:
    """Input tokens of a sample, without padding."""

    median: int
    p95: int
    longest: int


@dataclass
class Split:
    """What was found in one split."""

    samples: int | None
    """None: a stream, of which only the end tells."""
    examined: int = 0
    lengths: Lengths | None = None
    """None: the batches hold no `input_ids`."""
    without_targets: int = 0
    """Samples, of those examined, that the loss says nothing about."""
    ignored_share: float | None = None
    """Share of the labels of real tokens that are no targets; None where labels do not stand for tokens."""
    unknown_share: float | None = None
    """Share of the input tokens that stand for what the tokenizer does not know; None: it has no such token."""
    labels: dict[str, int] | None = None
    """How often each label occurs, where a sample has one; the most frequent first."""


@dataclass
class Preflight:
    """What was found in the data of a run."""

    splits: dict[str, Split]
    overlap: int
    """Validation samples, of those examined, with the same inputs as an examined training sample."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the recipe has counted while preparing."""

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """All of it in words; what deserves a second look begins with `warning:`."""
        found = [_in_words(name, split) for name, split in self.splits.items()]
        for name, split in self.splits.items():
            if split.labels:
                found.append(f"{name} labels: {_balance(split)}")
        found += [f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in self.facts.items()]
        return [*found, *(f"warning: {text}" for text in self._warnings())]

    def _warnings(self) -> Iterator[str]:
        for name, split in self.splits.items():
            if split.without_targets:
                yield f"{split.without_targets:,} of {split.examined:,} {name} samples have no target: nothing to learn"
            if split.labels and max(split.labels.values()) > 0.9 * split.examined:
                yield f"{next(iter(split.labels))} is the label of more than 9 in 10 {name} samples"
            if split.unknown_share and split.unknown_share > 0.01:
                yield f"{split.unknown_share:.0%} of the {name} tokens are unknown to the tokenizer"
        for where, name, share in _cut_short(self.facts):
            if share > 0.1:
                yield f"{where}: {name}: {share:.0%}; what is cut is not learnt from; raise the length it is cut at"
        if self.overlap:
            examined = self.splits["validation"].examined
            yield f"{self.overlap:,} of {examined:,} validation samples are in the training data too"


def look(prepared: Prepared, most: int = THOROUGH) -> Preflight:
    """Look at up to `most` samples of each split, spread evenly; of a stream, at the first ones."""
    seen: dict[str, set[bytes]] = {}
    splits = {}
    for name, data in (("training", prepared.train), ("validation", prepared.validation)):
        splits[name], seen[name] = _look_at(prepared, data, most)
    return Preflight(splits, len(seen["training"] & seen["validation"]), prepared.facts)


def _look_at(prepared: Prepared, data: Samples | Stream, most: int) -> tuple[Split, set[bytes]]:
    split = Split(None if is_stream(data) else len(data))
    lengths: list[int] = []
    labels: Counter[str] = Counter()
    ignored = real = unknown = 0
    unknown_id = prepared.tokenizer.unk_token_id
    if unknown_id in (prepared.tokenizer.pad_token_id, prepared.tokenizer.eos_token_id):
        unknown_id = None  # GPT-2 has one token for all
    seen = set()
    for sample in _spread(data, most):
        batch = prepared.collate([sample])
        split.examined += 1
        split.without_targets += prepared.count(batch) == 0
        if "input_ids" in batch:
            lengths.append(_length(batch))
            unknown += int((batch["input_ids"] == unknown_id).sum()) if unknown_id is not None else 0
            seen.add(_digest(batch, prepared.targets))
        for values in (batch[name] for name in prepared.targets if name in batch):
            if _stands_for_tokens(values, batch):
                ignored += int((_real(values, batch) == IGNORED).sum())
                real += len(_real(values, batch))
        label = batch.get("labels")
        if label is not None and label.shape == (1,) and not label.is_floating_point():
            labels[str(int(label))] += 1
    if lengths:
        split.lengths = Lengths(*(_quantile(lengths, share) for share in (0.5, 0.95, 1.0)))
    if lengths and unknown_id is not None:
        split.unknown_share = unknown / max(sum(lengths), 1)
    split.ignored_share = ignored / real if real else None
    split.labels = _named(labels, prepared.facts) if labels else None
    return split, seen


def _spread(data: Samples | Stream, most: int) -> Iterator[Any]:
    if is_stream(data):
        yield from first_samples(data, min(most, QUICK))
        return
    wanted = min(most, len(data))
    yield from (data[index * len(data) // wanted] for index in range(wanted))


def _length(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.dim() == 2 else batch["input_ids"].shape[-1]


def _digest(batch: Batch, targets: tuple[str, ...]) -> bytes:
    """Of what the model is given."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(batch):
        if name not in targets and name != "decoder_input_ids":
            digest.update(name.encode() + batch[name].contiguous().numpy().tobytes())
    return digest.digest()


def _stands_for_tokens(values: torch.Tensor, batch: Batch) -> bool:
    """Whether there is a label for each token, of the input or of a text to be generated."""
    return values.dim() == 2 and "input_ids" in batch and not values.is_floating_point()


def _real(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The labels that do not belong to padding of the input."""
    mask = batch.get("attention_mask")
    return values[mask.bool()] if mask is not None and mask.shape == values.shape else values.flatten()


def _quantile(values: list[int], share: float) -> int:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _named(labels: Counter[str], facts: dict[str, Any]) -> dict[str, int]:
    """Labels by the names that the recipe knows for them (`facts["labels"]`, in the order of their numbers)."""
    names = facts.get("labels")
    known = names if isinstance(names, list) else []
    return {
        str(known[int(label)]) if label.isdigit() and int(label) < len(known) else label: number
        for label, number in labels.most_common()
    }


# --- telling ---------------------------------------------------------------------------------------------


def _in_words(name: str, split: Split) -> str:
    size = "a stream" if split.samples is None else f"{split.samples:,} samples"
    parts = [f"{name}: {size}"]
    if split.lengths:
        lengths = split.lengths
        parts.append(f"tokens median {lengths.median:,}, 95 % up to {lengths.p95:,}, longest {lengths.longest:,}")
    if split.ignored_share:
        parts.append(f"{split.ignored_share:.1%} of labels ignored")
    if split.samples is None or split.examined < split.samples:
        parts.append(f"{split.examined:,} looked at")
    return "; ".join(parts)


def _balance(split: Split) -> str:
    assert split.labels is not None
    shown = [f"{label} {number / split.examined:.1%}" for label, number in islice(split.labels.items(), LABELS_SHOWN)]
    more = len(split.labels) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        told = {name.replace("_", " "): each for name, each in value.items()}
        return ", ".join(f"{name} {_share(each) if 'share' in name else _plain(each)}" for name, each in told.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:LABELS_SHOWN])) + (" …" if len(value) > LABELS_SHOWN else "")
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _share(value: float) -> str:
    return f"{value:.1%}"


def _cut_short(facts: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """By split and name, the share of what had to be cut (`rows: 200, texts cut short: 30`; `share of source cut`)."""
    for split, counted in facts.items():
        if not isinstance(counted, dict):
            continue
        for name, value in counted.items():
            if "cut" in name and isinstance(value, (int, float)):
                share = value if isinstance(value, float) else value / max(counted.get("rows", 0), value, 1)
                yield split, name.replace("_", " ").removeprefix("share of "), share


def preview(prepared: Prepared, samples: int = 2) -> list[Text]:
    """The first training samples, as the model gets them: tokens as text, targets in ‹ › and in colour."""
    found = first_samples(prepared.train, samples)
    batch = prepared.collate(found) if found else {}
    if "input_ids" not in batch:
        return []
    lines = [Text("first training samples, targets in ‹ ›:")]
    for row in range(len(batch["input_ids"])):
        lines += _sample(prepared, batch, row)
    return lines


def _sample(prepared: Prepared, batch: Batch, row: int) -> Iterator[Text]:
    tokenizer: Any = prepared.tokenizer
    ids = batch["input_ids"][row]
    targets = {name: batch[name][row] for name in prepared.targets if name in batch}
    marked = torch.zeros(len(ids), dtype=torch.bool)
    rest: list[Text] = []
    for name, values in targets.items():
        if values.shape == ids.shape:
            marked |= values != IGNORED
        elif values.dim() == 1 and not values.is_floating_point():
            rest.append(Text(f"    {name}: ") + _tokens(tokenizer, values[values != IGNORED], None))
        elif name.endswith("_positions"):
            rest.append(Text(f"    {name}: {int(values)}"))
        else:
            rest.append(Text(f"    {name}: {_label(values, prepared.facts)}"))
    if {"start_positions", "end_positions"} <= targets.keys():
        marked[int(targets["start_positions"]) : int(targets["end_positions"]) + 1] = True
    mask = batch.get("attention_mask")
    padding = int((mask[row] == 0).sum()) if mask is not None and mask[row].shape == ids.shape else 0
    real = mask[row].bool() if mask is not None and padding else torch.ones(len(ids), dtype=torch.bool)
    yield Text("  ") + _tokens(tokenizer, ids[real], marked[real]) + (f" + {padding} padding" if padding else "")
    yield from rest


def _label(values: torch.Tensor, facts: dict[str, Any]) -> str:
    names = facts.get("labels")
    if values.dim() == 0 and isinstance(names, list) and not values.is_floating_point() and int(values) < len(names):
        return str(names[int(values)])
    return str(values.tolist())


def _tokens(tokenizer: Any, ids: torch.Tensor, marked: torch.Tensor | None) -> Text:
    """Tokens as text, those that are `marked` between ‹ and ›; special ones in another colour."""
    text = Text()
    special, inside = set(tokenizer.all_special_ids), False
    for position, token in enumerate(ids[:TOKENS_SHOWN].tolist()):
        target = marked is not None and bool(marked[position])
        if target != inside:
            text.append("‹" if target else "›", style="dim")
            inside = target
        style = "magenta" if token in special else "bold green" if target else ""
        piece = _token_as_text(tokenizer, token)
        text.append(piece if position else piece.lstrip(), style=style)
    if inside:
        text.append("›", style="dim")
    return text + (f" … {len(ids) - TOKENS_SHOWN} more" if len(ids) > TOKENS_SHOWN else "")


def _token_as_text(tokenizer: Any, token: int) -> str:
    """A token as it stands within a text: with a space before it where it begins a word, as its tokenizer has it."""
    alone, twice = str(tokenizer.decode([token])), str(tokenizer.decode([token, token]))
    found = twice[len(alone) :] if twice.startswith(alone) else alone
    return found.replace("\n", "⏎")
