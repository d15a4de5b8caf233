"""What one rank knows and all must act on: every decision that could split the ranks is made here."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from launch.engine.batching import Window
from launch.errors import LaunchError, NonFiniteError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Requests:
    """What ranks want besides the next update: of one rank 0 or 1, of all together how many do.

    They travel with the counts of each update, so that to agree on them costs nothing.
    """

    stop: int = 0
    """A signal has come."""
    save: int = 0
    """It is time for a checkpoint."""
    written: int = 0
    """This rank's part of an asynchronous save is on the disk, or has failed."""


NONE = Requests()


def raise_if_loss_is_not_finite(accelerator: Accelerator, window: Window, local: torch.Tensor, total: float) -> None:
    """Stop all ranks, before the weights are touched, when the loss of an update is not a finite number.

    `local`, shape `(micro_batches,)`, holds this rank's summed losses; `total` is the same on every rank, so either
    all raise or none. Every rank must call this.

    Raises:
        NonFiniteError: names the rank, host and sample indices that reproduce it.
    """
    if math.isfinite(total):
        return
    bad = [
        f"rank {accelerator.process_index} ({socket.gethostname()}) samples {list(micro_batch.samples)}"
        for micro_batch, value in zip(window.micro_batches, local.tolist(), strict=True)
        if not math.isfinite(value) and not micro_batch.filler
    ]
    found = "; ".join(line for line in gather_object(bad) if line)
    raise _not_finite(window, f"loss is {total}: {found or _samples_of(window)}")


def raise_if_norm_is_not_finite(window: Window, norm: float) -> None:
    """The same for the gradient: `norm` is the global one, the same on every rank.

    Raises:
        NonFiniteError: names the window of samples.
    """
    if not math.isfinite(norm):
        raise _not_finite(window, f"gradient norm is {norm} although the loss is finite: {_samples_of(window)}")


def _samples_of(window: Window) -> str:
    return f"samples of epoch {window.epoch} up to {window.consumed}"


def _not_finite(window: Window, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"update {window.update}: {what}; the weights are those of update {window.update - 1}; "
        "try a lower train.learning_rate, a lower train.max_grad_norm or train.precision=fp32"
    )


def raise_together(accelerator: Accelerator, error: LaunchError | None) -> None:
    """If any rank brings an error, raise the one of the lowest such rank everywhere. Every rank must call this."""
    own = None if error is None else (accelerator.process_index, socket.gethostname(), str(error), type(error))
    errors = [entry for entry in gather_object([own]) if entry is not None]
    if not errors:
        return
    rank, host, message, kind = errors[0]
    everywhere = len(errors) == accelerator.num_processes
    raise kind(message if everywhere else f"rank {rank} ({host}): {message}")


def from_main(accelerator: Accelerator, value: Value | None) -> Value:
    """Rank 0's `value`, on every rank; what the others bring is dropped. Every rank must call this."""
    holder = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(holder)
    assert holder[0] is not None, "rank 0 gives a value"
    return holder[0]


def any_rank(accelerator: Accelerator, local: bool) -> bool:
    """Whether it is true of any rank. Every rank must call this."""
    if accelerator.num_processes == 1:
        return local
    flag = torch.tensor([int(local)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())
