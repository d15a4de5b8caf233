"""The states of all random generators of a rank, as tensors: a resumed run draws the numbers it would have drawn."""

from __future__ import annotations

import random

import numpy as np
import torch

from launch.engine.devices import xla_in_use


def random_states() -> dict[str, torch.Tensor]:
    """Of Python, numpy and torch, and of this rank's GPU."""
    version, words, spare = random.getstate()
    _, keys, position, has_spare, numpy_spare = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.tensor([position, has_spare, *np.asarray(keys).tolist()], dtype=torch.int64),
        "numpy_spare": torch.tensor([numpy_spare], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    if xla_in_use():
        from launch.engine import xla

        states["xla"] = xla.random_state()
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Put them back. One that this machine has no generator for is left out."""
    version, *words = states["python"].tolist()
    spare = states["python_spare"].tolist()
    random.setstate((version, tuple(words), spare[0] if spare else None))
    position, has_spare, *keys = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_spare, states["numpy_spare"].item()))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
    if "xla" in states and xla_in_use():
        from launch.engine import xla

        xla.restore_random_state(states["xla"])
