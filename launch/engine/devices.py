"""How a rank uses its devices: where batches go, and how numbers come back. Here those that compute when told to.

`engine.xla` has those that compute later, and are compiled for each shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, send_to_device

from launch.engine.batching import Collate
from launch.engine.loss import precise_dtype
from launch.engine.pieces import Piece
from launch.plan import Plan
from launch.recipe import Batch, Prepared


class Devices:
    """The CPU or a GPU of this rank."""

    fills = False
    """Whether a batch may have more rows than samples."""

    def place(self, accelerator: Accelerator, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch from the CPU, on the device."""
        placed: dict[str, torch.Tensor] = send_to_device(batch, accelerator.device, non_blocking=True)
        return placed

    def settle(self) -> None:
        """Compute all that was asked for; a device that computes later is not to hold two steps in one program."""

    def precise(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scalars as one tensor of shape `(sums,)`, in the format to add up losses in."""
        together = torch.stack(list(sums))
        return together.to(precise_dtype(together.device))

    def facts(self) -> dict[str, int]:
        """What a record of an update says of the device."""
        return {}

    def news(self) -> str | None:
        """What the user should know of the device after an update."""
        return None

    def excuse(self) -> None:
        """What the device has done until now had a reason, such as an evaluation, and is no news."""


def devices_of(accelerator: Accelerator, plan: Plan) -> Devices:
    """Those of this rank."""
    if is_xla(accelerator):
        from launch.engine.xla import XlaDevices

        return XlaDevices(plan.processes.devices, plan.config.parallel.xla_widths, {plan.rows, plan.eval_rows})
    return Devices()


def is_xla(accelerator: Accelerator) -> bool:
    """Whether its devices are XLA's."""
    return bool(accelerator.distributed_type == DistributedType.XLA)


def xla_in_use() -> bool:
    """The same of the process, for those who have no accelerator at hand."""
    return bool(PartialState._shared_state) and bool(PartialState().distributed_type == DistributedType.XLA)


def moved(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model on the device of this rank, tied weights still tied. An optimizer is to be made of these weights."""
    if is_xla(accelerator):
        from launch.engine.xla import moved

        return moved(model, accelerator.device)
    return model.to(accelerator.device)


@contextlib.contextmanager
def on_host(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[torch.device]:
    """Where to run the model with inputs of any shape; on XLA devices with a copy of its weights on the CPU."""
    if not is_xla(accelerator):
        yield accelerator.device
        return
    from launch.engine.xla import on_cpu

    with on_cpu(model):
        yield torch.device("cpu")


def fetched(accelerator: Accelerator, held: list[Piece]) -> list[Piece]:
    """Pieces whose values may be cut up: where that would be compiled, they are copies on the CPU."""
    if not is_xla(accelerator):
        return held
    from launch.engine.xla import fetched

    return fetched(held)


@dataclass(frozen=True)
class Filled:
    """A recipe's `collate` that gives `rows` rows of any number of samples: the last one again, without targets."""

    prepared: Prepared
    rows: int

    def __call__(self, samples: list[object]) -> dict[str, torch.Tensor]:
        """What `collate` gives."""
        without, missing = self.prepared.without_targets, self.rows - len(samples)
        if without is None or missing <= 0:
            return self.prepared.collate(samples)
        return self.prepared.collate([*samples, *[without(samples[-1])] * missing])


def collate_of(plan: Plan, prepared: Prepared, rows: int) -> Collate:
    """How batches of `rows` samples are made on the planned device."""
    return Filled(prepared, rows) if plan.processes.device == "xla" else prepared.collate
