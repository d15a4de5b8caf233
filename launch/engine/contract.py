"""Sees at the start of a run that a recipe's loss and count are sums, and its lengths are of all samples.

No number of a run would tell later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from launch.engine.agree import raise_together
from launch.engine.devices import on_host
from launch.engine.randomness import random_states, restore_random_states
from launch.engine.streams import first_samples
from launch.errors import ConfigError
from launch.recipe import Batch, Prepared, Samples

if TYPE_CHECKING:
    from launch.recipe import Lengths

Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]

LOOKED_AT = 16
"""Samples among which one with a target is looked for."""


def checked(loss: Loss) -> Loss:
    """A recipe's loss that refuses to return what is no loss: anything but a scalar tensor, or one without gradient."""

    def call(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        summed = loss(model, batch)
        if not (isinstance(summed, torch.Tensor) and summed.dim() == 0 and summed.is_floating_point()):
            raise ConfigError(
                f"{_place(loss)}: loss() returned {_kind(summed)}; it must return a scalar tensor: return the sum over "
                "all targets (reduction='sum')"
            )
        if torch.is_grad_enabled() and not summed.requires_grad:
            raise ConfigError(
                f"{_place(loss)}: loss() returned a tensor without gradient; leave out detach(), item() and "
                "torch.no_grad() on the way from the model to it"
            )
        return summed

    return call


def checked_lengths(prepared: Prepared, split: str, samples: Samples) -> Lengths | None:
    """What the recipe says of the lengths of these samples, int32; None where it says nothing.

    Raises:
        ConfigError: it gives no whole number for each.
    """
    if prepared.lengths is None:
        return None
    found = np.asarray(prepared.lengths(samples))
    if found.shape != (len(samples),) or (len(samples) and found.dtype.kind not in "iu"):
        raise ConfigError(
            f"{_place(prepared.lengths)}: lengths() gave an array of shape {found.shape}, {found.dtype}, for the "
            f"{len(samples)} {split} samples; it must give one whole number for each"
        )
    return found.astype(np.int32, copy=False)


def check_sums(accelerator: Accelerator, model: torch.nn.Module, prepared: Prepared, loss: Loss) -> None:
    """Compare loss and count of a sample with those of the same sample twice: they must be twice as large.

    `loss` is the recipe's in the run's number format. Every rank must call this: with sharded weights a forward pass
    is a collective. No random number of the run is used up.

    Raises:
        ConfigError: on all ranks; names the recipe's function, what it gave and what it must give.
    """
    states = random_states()
    once = _batch_with_targets(prepared)
    restore_random_states(states)
    if once is None:
        return  # an empty stream; its reader says so
    raise_together(accelerator, _problem_of_count(prepared, once))
    was_training = model.training
    model.eval()
    # Whatever it gives, every rank makes both passes. To compile for two more batch sizes would take minutes.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), on_host(accelerator, model) as device:
        given = [float(loss(model, send_to_device(batch, device))) for batch in (once, _twice(once))]
    model.train(was_training)
    raise_together(accelerator, _problem_of_loss(prepared, *given))


def _batch_with_targets(prepared: Prepared) -> dict[str, Any] | None:
    """A batch of one sample: the first that has a target, if there is one among the first. None without any sample."""
    batch = None
    for sample in first_samples(prepared.train, LOOKED_AT):
        batch = prepared.collate([sample])
        count: Any = prepared.count(batch)
        if not isinstance(count, int) or count:
            break
    return batch


def _twice(batch: dict[str, Any]) -> dict[str, Any]:
    """The same samples again behind themselves. Not collated: that may draw random numbers."""
    return {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in batch.items()
    }


def _problem_of_count(prepared: Prepared, once: dict[str, Any]) -> ConfigError | None:
    counts: list[Any] = [prepared.count(once), prepared.count(_twice(once))]
    place = _place(prepared.count)
    for given in counts:
        if not isinstance(given, int):
            return ConfigError(
                f"{place}: count() returned {_kind(given)}; it must return an int, the number of targets"
            )
    if counts[1] != 2 * counts[0]:
        return ConfigError(
            f"{place}: count() of a sample is {counts[0]}, and of the same sample twice {counts[1]}; it must be "
            f"{2 * counts[0]}, the number of targets in the batch"
        )
    return None


def _problem_of_loss(prepared: Prepared, once: float, twice: float) -> ConfigError | None:
    # What is not finite is told, with the samples, by the first update. Rounding in bf16 is far from a half.
    if once == 0 or not math.isfinite(twice / once) or twice / once >= 1.5:
        return None
    return ConfigError(
        f"{_place(prepared.loss)}: loss() of a sample is {once:.6g}, and of the same sample twice {twice:.6g}: that is "
        "a mean, with which targets do not count alike; return the sum (reduction='sum')"
    )


def _kind(given: Any) -> str:
    if not isinstance(given, torch.Tensor):
        return f"{given!r} ({type(given).__name__})"
    return f"a tensor of shape {tuple(given.shape)}, {str(given.dtype).removeprefix('torch.')}"


def _place(function: Callable[..., Any]) -> str:
    """The file and line of a recipe's function."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
