"""Rows of a batch laid end to end where a model computes most: no block of it ever computes padding.

The model is called as ever, on padded rows, and its head gets padded rows too. Only its stack of blocks is given fewer
rows, each of several documents that see themselves alone: hooks lay them so before the first block and apart behind the
last. So it goes with any head and any wrapper, and gives the same numbers but for the order of sums.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from launch.engine.layout import Layout, rows_of_documents, seen_by, widths_of
from launch.engine.streams import first_samples, is_stream
from launch.recipe import IGNORED

if TYPE_CHECKING:
    from launch.recipe import Batch, Lengths, Samples, Stream

Side = Literal["source", "target"]
"""The tokens a block computes: those that are attended to by a decoder, or of any model without one; or its own."""

WORTH = 64
"""How many tokens of padding it must save: the millisecond it takes is what small blocks need for as many."""

SAME = 1e-5
"""How far what blocks compute in fp32 may be from what they compute padded, of its greatest."""

OWN = ("attention_mask", "attn_mask")
"""What blocks call the mask of their own tokens, `(1|batch, 1, seq, seq)`: what is added, or true where one is seen."""

OTHERS = "encoder_attention_mask"
"""What decoders call that of the source, shape `(1|batch, 1, 1|target, source)`."""

OF_TOKENS = ("position_embeddings", "position_ids")
"""What blocks are given besides for each token: tensors of shape `(1|batch, seq, …)`, or tuples of such."""


@dataclass
class _Laid:
    """The batch that is being computed."""

    sides: dict[Side, Layout]
    """Less one whose blocks have been given something else."""
    masks: dict[tuple[Side, str, int], tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)
    """Of each mask what it has become, once for all blocks; kept with the mask, so that its id is no other's."""


class PaddingFree:
    """Lays the rows of a batch end to end for the blocks of one model, while `laid` says so."""

    def __init__(self, model: Any) -> None:
        """`model` is bare: what wraps it comes around these hooks."""
        self.stacks = _stacks(model)
        self._now: _Laid | None = None
        self._handles: list[Any] = []
        for side, blocks in self.stacks.items():
            parameters = tuple(inspect.signature(type(blocks[0]).forward).parameters)[1:]
            causal = side == "target" or any(getattr(part, "is_causal", False) for part in blocks[0].modules())
            for block in blocks:
                before = functools.partial(
                    self._before, side=side, first=block is blocks[0], parameters=parameters, causal=causal
                )
                self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(blocks[-1].register_forward_hook(functools.partial(self._behind, side=side)))

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def laid(self, batch: Batch, rows: list[list[int]] | None = None) -> Iterator[None]:
        """Meanwhile the model computes this batch, of CPU tensors, forward and backward.

        `rows` say which documents lie in one row; None: as is fastest, or padded if nothing is saved.
        """
        masks = {side: mask for side, mask in _masks(batch).items() if side in self.stacks}
        if len(masks) == len(self.stacks):
            rows = rows or _worth_it(masks)
            self._now = _Laid({side: Layout.of(mask, rows) for side, mask in masks.items()}) if rows else None
        try:
            yield
        finally:
            self._now = None

    def _before(
        self, _: Any, args: Any, kwargs: Any, *, side: Side, first: bool, parameters: tuple[str, ...], causal: bool
    ) -> tuple[Any, Any] | None:
        """What a block is given, laid."""
        now, hidden = self._now, parameters[0]
        if now is None or side not in now.sides:
            return None
        own, source = now.sides[side], now.sides.get("source")
        given = dict(zip(parameters, args, strict=False)) | kwargs
        if first and (source is None or given[hidden].shape[:2] != own.shape):
            del now.sides[side]  # not the tokens of the batch; the blocks behind this one compute them as they are
            return None
        assert source is not None, "the first block has seen to it"
        for name, value in given.items():
            if name == hidden:
                given[name] = own.laid(value) if first else value
            elif name in OWN:
                given[name] = self._mask(value, (side, name, id(value)), own, own, causal=causal)
            elif name == OTHERS and side == "target":
                given[name] = self._mask(value, (side, name, id(value)), own, source, causal=False)
            elif name == "encoder_hidden_states" and side == "target":
                given[name] = source.laid(value)
            elif name in OF_TOKENS and value is not None:
                given[name] = tuple(map(own.laid, value)) if isinstance(value, tuple) else own.laid(value)
        return tuple(given.pop(name) for name in parameters[: len(args)]), given

    def _mask(
        self, mask: torch.Tensor | None, key: tuple[Side, str, int], seeing: Layout, seen: Layout, *, causal: bool
    ) -> torch.Tensor:
        assert self._now is not None
        if key not in self._now.masks:
            self._now.masks[key] = mask, seen_by(mask, seeing, seen, causal=causal)
        return self._now.masks[key][1]

    def _behind(self, _: Any, __: Any, output: Any, *, side: Side) -> Any:
        """What the last block gives, padded."""
        if self._now is None or side not in self._now.sides:
            return None
        apart = self._now.sides[side].apart
        return (apart(output[0]), *output[1:]) if isinstance(output, tuple) else apart(output)


def _stacks(model: Any) -> dict[Side, list[torch.nn.Module]]:
    """The blocks of each side in their order; none if it is not known which they are, or some are left out at random.

    transformers' blocks are of one class, for the sake of activation checkpointing.
    """
    config = getattr(model, "config", None)
    if any(getattr(config, name, 0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")):
        return {}
    sides: dict[Side, Any] = {"source": model}
    if getattr(config, "is_encoder_decoder", False):
        sides = {"source": model.get_encoder(), "target": model.get_decoder()}
    found: dict[Side, list[torch.nn.Module]] = {}
    for side, part in sides.items():
        lists = [list(module) for module in part.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
        stacks = [each for each in lists if all(isinstance(block, GradientCheckpointingLayer) for block in each)]
        if len(stacks) != 1:
            return {}
        found[side] = stacks[0]
    return found


def _masks(batch: Batch) -> dict[Side, torch.Tensor]:
    """Where a batch has tokens, shape `(batch, seq)`; nothing of a batch that does not say."""
    if "attention_mask" not in batch:
        return {}
    masks: dict[Side, torch.Tensor] = {"source": batch["attention_mask"] != 0}
    if "decoder_attention_mask" in batch:
        masks["target"] = batch["decoder_attention_mask"] != 0
    elif "decoder_input_ids" in batch:  # all up to the last target: what comes behind is seen by none
        masks["target"] = (batch["labels"] != IGNORED).flip(1).cummax(1).values.flip(1)
    return masks


def _worth_it(masks: dict[Side, torch.Tensor]) -> list[list[int]] | None:
    """Which documents lie in one row, or None where that would save next to nothing."""
    lengths = torch.stack([mask.sum(1) for mask in masks.values()], 1).numpy()
    padded = sum(mask.numel() for mask in masks.values()) - WORTH
    if padded < lengths.sum() or not lengths.any(0).all():
        return None
    rows = rows_of_documents(lengths)
    return rows if padded >= len(rows) * widths_of(lengths, rows).sum() else None


# --- whether a model can do it ---------------------------------------------------------------------------


TRIED = 4
"""Samples that a model is tried with."""


def some_rows(
    samples: Samples | Stream, lengths: Lengths | None, collate: Callable[[list[Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """A batch of the first samples that differ in length, or where no lengths are known of the first.

    None if none of it is padded, or it does not say.
    """
    if lengths is None or is_stream(samples):
        found = first_samples(samples, TRIED)
    else:
        places = np.sort(np.unique(lengths, return_index=True)[1])[:TRIED]
        found = [samples[int(place)] for place in places]
    batch = collate((found * TRIED)[:TRIED]) if found else {}
    return batch if "attention_mask" in batch and len(set(batch["attention_mask"].sum(1).tolist())) > 1 else None


def padding_free(model: Any, loss: Callable[[Any, Batch], torch.Tensor], batch: Batch) -> PaddingFree | None:
    """What lays rows of this model end to end; None where it would not compute the same.

    It would not where blocks are told of positions or masks in other ways (ALiBi, states that run through a row), or
    a head looks at padding. So it is tried, with `batch` of TRIED rows as `some_rows` finds them, two in each row.
    """
    hooks = PaddingFree(model)
    if not hooks.stacks:
        return None
    training = model.training
    model.eval()
    same = False
    # What is given to blocks laid may be impossible in any way; what fails padded too will fail in training.
    with torch.no_grad(), torch.random.fork_rng(devices=[]), contextlib.suppress(Exception):
        ordinary = _computed(hooks, model, loss, batch, None)
        laid = _computed(hooks, model, loss, batch, [[0, 3], [1, 2]])
        same = bool(ordinary) and all(_close(each, laid[what]) for what, each in ordinary.items())
    model.train(training)
    if not same:
        hooks.remove()
    return hooks if same else None


def _computed(
    hooks: PaddingFree,
    model: Any,
    loss: Callable[[Any, Batch], torch.Tensor],
    batch: Batch,
    rows: list[list[int]] | None,
) -> dict[str, torch.Tensor]:
    """What the last block of each stack gives for the tokens of a batch, and the loss; laid as `rows` say, or padded.

    Nothing if the loss calls for a stack more than once: the batch does not say what the other rows are.
    """
    masks, found = _masks(batch), list[tuple[str, torch.Tensor]]()

    def keep(_: Any, __: Any, output: Any, side: Side) -> None:
        found.append((side, (output[0] if isinstance(output, tuple) else output)[masks[side]]))

    with contextlib.ExitStack() as ends:
        for side, blocks in hooks.stacks.items():
            ends.callback(blocks[-1].register_forward_hook(functools.partial(keep, side=side)).remove)
        if rows:
            ends.enter_context(hooks.laid(batch, rows))
        found.append(("loss", loss(model, batch)))
        complete = len(found) == len(hooks.stacks) + 1
    return dict(found) if complete else {}


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= SAME * float(one.abs().max())
