"""All that is special about XLA devices, by torch_xla: nothing else of shoal imports it.

One process drives all devices of a host, as one program over parts of each batch (SPMD): operations are collected, and
compiled for the shapes they have once their results are needed. A backend that takes the place of torch_xla has to
offer what this module does: `start`, `moved`, `on_cpu`, `fetched`, the random state, and `XlaDevices`.

The workarounds were found with torch_xla 2.9.0 and accelerate 1.15.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch_xla.debug import metrics
from torch_xla.distributed import spmd
from transformers import masking_utils

from launch.engine.devices import Devices
from launch.errors import TopologyError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from launch.engine.pieces import Piece
    from launch.recipe import Batch

PARTS = "data"
"""Name of the one axis of the devices: parts of a batch."""


def start(devices: int) -> None:
    """Before anything else is done with a device: have one program for all of them.

    Raises:
        TopologyError: there is another number of devices, or there are other hosts.
    """
    if devices > 1:
        xr.use_spmd()
    _read_no_masks()
    if xr.process_count() > 1:
        raise TopologyError(
            f"this host is one of {xr.process_count()} of a TPU slice; shoal trains on the TPUs of one host: use a "
            "slice that is one (such as v5litepod-8), or parallel.device=cpu"
        )
    found = xr.global_runtime_device_count()
    if found != devices:
        raise TopologyError(
            f"the plan says {devices} XLA devices, torch_xla finds {found} ({xr.device_type()}); use "
            f"parallel.devices={found}, for one process has all of a host"
        )


def _read_no_masks() -> None:
    """Let transformers build its attention masks without looking at their values.

    It leaves out a mask that masks nothing (transformers 5.23, masking_utils.py, `_ignore_causal_mask_sdpa` and the
    like), except while a program is recorded: here that is always, but it does not ask. Each look would wait for the
    device, and batches with and without padding would be two programs.
    """
    asked = getattr(masking_utils, "is_tracing", None)
    if asked is None or hasattr(asked, "of_xla"):
        return  # another release; that programs are compiled anew will be told

    def is_tracing(tensor: torch.Tensor | None = None) -> bool:
        return (tensor is not None and tensor.device.type == "xla") or bool(asked(tensor))

    is_tracing.of_xla = True  # type: ignore[attr-defined]
    masking_utils.is_tracing = is_tracing


def moved(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on the device. `Module.to` makes new parameters there, one for each name of a tied weight."""
    owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    model = model.to(device)
    for (first, name), *others in owners.values():
        for module, other in others:
            module._parameters[other] = first._parameters[name]
    return model


@contextlib.contextmanager
def on_cpu(model: torch.nn.Module) -> Iterator[None]:
    """Let the model have its weights on the CPU for a while: what has many shapes would be compiled for each."""
    torch_xla.sync()
    copies: dict[int, torch.Tensor] = {}
    replaced: list[tuple[Any, str, torch.Tensor]] = []
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    replaced.append((held, name, tensor))
                    if id(tensor) not in copies:
                        copy = tensor.detach().cpu()
                        is_weight = isinstance(tensor, torch.nn.Parameter)
                        copies[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if is_weight else copy
    for held, name, tensor in replaced:
        held[name] = copies[id(tensor)]
    try:
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor


def fetched(held: list[Piece]) -> list[Piece]:
    """The pieces with copies of their values on the CPU. Whole tensors are brought over without being compiled for."""
    torch_xla.sync()
    return [replace(piece, values=piece.values.detach().cpu()) for piece in held]


def peak_memory() -> int | None:
    """Bytes taken of the device at the highest point; None where the runtime does not tell: of CPUs, and of several."""
    try:
        return int(xm.get_memory_info()["peak_bytes_used"])
    except (RuntimeError, KeyError):
        return None


def random_state() -> torch.Tensor:
    """Of the devices' generator, shape `(1,)`, int64."""
    return torch.from_numpy(np.array([xm.get_rng_state()], dtype=np.uint64).view(np.int64))


def restore_random_state(state: torch.Tensor) -> None:
    """Put it back."""
    xm.set_rng_state(int(state.numpy().view(np.uint64)[0]))


@dataclass(frozen=True)
class _Shape:
    """Of a batch: name, dimensions and number format of each tensor."""

    tensors: tuple[tuple[str, tuple[int, ...], str], ...]

    @property
    def rows(self) -> int | None:
        """Samples."""
        return next((size[0] for _, size, _ in self.tensors if size), None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What batches for one purpose have in common: names and rows."""
        return tuple((name, size[:1], dtype) for name, size, dtype in self.tensors)

    def __str__(self) -> str:
        return ", ".join(f"{name} {' × '.join(map(str, size))}" for name, size, _ in self.tensors)


class XlaDevices(Devices):
    """All XLA devices of this host."""

    fills = True

    def __init__(self, devices: int, widths: int, rows: set[int]) -> None:
        """Batches have one of these numbers of rows; those of the same names and rows have `widths` shapes at most."""
        self._mesh = spmd.Mesh(np.arange(devices), (devices,), (PARTS,)) if devices > 1 else None
        self._widths, self._rows = widths, rows
        self._shapes: dict[_Shape, None] = {}
        self._told: set[_Shape] = set()
        self._compiles = 0
        self._fallbacks: dict[str, int] = {}
        self._calm = 0
        self._placed, self._numbers = 0, set[bool]()
        self._uses: set[tuple[_Shape, bool, bool]] = set()

    def place(self, accelerator: Accelerator, batch: Batch) -> dict[str, torch.Tensor]:
        """As above; each device gets a part of the rows. What was asked for before is computed first."""
        self.settle()
        self._placed += 1
        self._look_at(batch)
        placed = {}
        for name, tensor in batch.items():
            placed[name] = tensor.to(accelerator.device)
            if self._mesh is not None and tensor.dim():
                whole = tensor.shape[0] % self._mesh.size()
                spec = (None if whole else PARTS, *[None] * (tensor.dim() - 1))
                spmd.mark_sharding(placed[name], self._mesh, spec)
        return placed

    def settle(self) -> None:
        """As above."""
        torch_xla.sync()

    def precise(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """As above, on the CPU: to stack them would be compiled for each number of them, and TPUs have no float64."""
        torch_xla.sync()
        return torch.tensor([each.item() for each in sums], dtype=torch.float64)

    # --- what is compiled ------------------------------------------------------------------------------------

    def _look_at(self, batch: Batch) -> None:
        """A shape is compiled for in training and in evaluation, as the first micro-batch and one that adds to it."""
        shape = _Shape(tuple((name, tuple(value.shape), str(value.dtype)) for name, value in sorted(batch.items())))
        self._shapes.setdefault(shape)
        use = (shape, torch.is_grad_enabled(), self._placed == 1)
        if use not in self._uses:
            self._uses.add(use)
            self._calm = -1  # it is compiled for now, and once more where the optimizer has only begun to remember

    def facts(self) -> dict[str, int]:
        """As above: programs that were compiled, and shapes of batches that were seen."""
        return {"compiles": compiles(), "shapes": len(self._shapes)}

    def excuse(self) -> None:
        """As above."""
        self._compiles, self._fallbacks, self._placed = compiles(), _fallbacks(), 0

    def news(self) -> str | None:
        """As above: more shapes than planned, or a program compiled anew for a shape that was compiled for."""
        several = self._placed > 1
        if several not in self._numbers:  # gradients of one micro-batch are other inputs than sums of several
            self._numbers.add(several)
            self._calm = -1
        before, self._calm = self._calm, self._calm + 1
        line = self._of_shapes() or (self._of_values() if before >= 1 else None)
        self.excuse()
        return line

    def _of_shapes(self) -> str | None:
        kinds: dict[tuple[Any, ...], list[_Shape]] = {}
        for shape in self._shapes:
            kinds.setdefault(shape.kind, []).append(shape)
        odd = {each for shapes in kinds.values() for each in shapes[self._widths :]}
        odd |= {each for each in self._shapes if each.rows not in self._rows}
        new = [each for each in self._shapes if each in odd - self._told]
        if not new:
            return None
        self._told.update(new)
        return (
            f"XLA compiles for one more shape: {new[-1]}; {len(self._shapes)} so far. A recipe keeps "
            "them few with RecipeContext.width and Prepared.without_targets; parallel.xla_widths is how many lengths "
            "it may use"
        )

    def _of_values(self) -> str | None:
        new = compiles() - self._compiles
        if new <= 0:
            return None
        grown = [name for name, count in _fallbacks().items() if count > self._fallbacks.get(name, 0)]
        cause = f"; on the CPU instead: {', '.join(grown)}" if grown else ""
        return (
            f"XLA has compiled {new} program{'s' if new > 1 else ''} anew though no shape is new: what "
            f"is computed depends on values, in the recipe's loss perhaps{cause}"
        )


def compiles() -> int:
    """Programs compiled by this process."""
    found: Any = metrics.metric_data("CompileTime")
    return int(found[0]) if found else 0


_FETCHES = ("aten::_local_scalar_dense",)
"""What brings a number to the CPU, as every update does."""


def _fallbacks() -> dict[str, int]:
    """Operations that XLA has not, by name, and how often they were done."""
    names = [name for name in metrics.counter_names() if name.startswith("aten::") and name not in _FETCHES]
    return {name: metrics.counter_value(name) for name in names}
