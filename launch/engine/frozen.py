"""The weights beneath adapters (PEFT): what they are, and whether they still are what the recipe built.

The recipe loads them again from the same files, so a checkpoint holds, of those that are as they were built, nothing
but a hash. Those that have changed all the same, by whatever a recipe does to them, are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from launch.engine.agree import gathered
from launch.engine.export import has_adapters
from launch.engine.pieces import Piece
from launch.errors import DataError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hashes(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of each weight beneath adapters, of a model on CPU, under the name of its piece.

    Of no other weights that are not trained: a recipe may have drawn them at random, and another version of torch would
    draw others. So does PEFT's own copy of a new head as it was before training.
    """
    if not has_adapters(model):
        return {}
    return {
        f"model/{name}": hashlib.sha256(
            parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        ).hexdigest()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.numel() and ".original_module." not in name
    }


class Frozen:
    """Knows which weights are still as the recipe built them."""

    def __init__(self, built: dict[str, str], held: Iterable[Piece]) -> None:
        """`built` is what `hashes` said of the whole model, `held` what this rank has of it before anything changes."""
        self._hashes = built
        self._sums = self._now(held)

    def _now(self, held: Iterable[Piece]) -> dict[str, int]:
        """Of each such piece the sum of its bits, read as whole numbers: the same in whatever order it is added up."""
        return {piece.name: _sum_of_bits(piece.values) for piece in held if piece.name in self._hashes}

    def unchanged(self, held: Iterable[Piece]) -> dict[str, str]:
        """Hashes of those weights that are as they were built on every rank. Collective where there are any."""
        if not self._hashes:
            return {}
        changed = {name for name, value in self._now(held).items() if value != self._sums[name]}
        elsewhere = set().union(*gathered([changed]))
        return {name: value for name, value in self._hashes.items() if name not in elsewhere}

    def contradiction(self, folder: Path, state: dict[str, Any]) -> DataError | None:
        """What is wrong where a checkpoint was made with other weights beneath it than the recipe builds now."""
        return contradiction(folder, state, self._hashes)


def contradiction(folder: Path, state: dict[str, Any], built: dict[str, str]) -> DataError | None:
    """The same, of what `hashes` says of a model."""
    others = [name for name, value in state.get("frozen", {}).items() if built.get(name) != value]
    if not others:
        return None
    shown = ", ".join(name.removeprefix("model/") for name in others[:3])
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return DataError(
        f"{folder.name} was made on another base: {shown}{more} are not the weights that it was trained with; put the "
        "base model back as it was, or begin a new run with another --out"
    )


def _sum_of_bits(values: torch.Tensor) -> int:
    flat = values.detach().reshape(-1)
    return int(flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64))
