"""What one rank knows and all must act on: every decision that could split the ranks is made here."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from launch.errors import LaunchError

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


def raise_together(accelerator: Accelerator, error: LaunchError | None) -> None:
    """If any rank brings an error, raise the one of the lowest such rank everywhere. Every rank must call this."""
    own = None if error is None else (accelerator.process_index, socket.gethostname(), str(error), type(error))
    errors = [entry for entry in gathered([own]) if entry is not None]
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


def summed(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks. Every rank must call this."""
    if accelerator.num_processes == 1:
        return tensor
    total: torch.Tensor = accelerator.reduce(tensor, "sum")
    return total


def gathered(values: list[Value]) -> list[Value]:
    """What all ranks bring, in their order. Every rank must call this."""
    if PartialState().num_processes == 1:
        return values  # Accelerate 1.15 refuses to gather objects with XLA
    together: list[Value] = gather_object(values)
    return together


def any_rank(accelerator: Accelerator, local: bool) -> bool:
    """Whether it is true of any rank. Every rank must call this."""
    if accelerator.num_processes == 1:
        return local
    return bool(summed(accelerator, torch.tensor([int(local)], device=accelerator.device)).item())
