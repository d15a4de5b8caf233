"""What a rank holds of weights and optimizer, as flat pieces of named tensors: the same names whatever shards them.

Every way of sharding that we have keeps, of each tensor, a range of its elements in row-major order: all of them
(one process, DDP), some rows (FSDP2), or a range of the flattened tensor (ZeRO). So a checkpoint that stores ranges
can be written by one strategy and world size and read by any other, without an exchange between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launch.engine.sharding import innermost, unwrapped


@dataclass(frozen=True)
class Piece:
    """A range of one named tensor."""

    name: str
    """`model/<parameter>`, `buffer/<buffer>` or `optimizer/<state>/<parameter>`."""
    values: torch.Tensor
    """The live values, in any shape; their row-major order is that of the range."""
    start: int
    """First element of the range, in the row-major order of the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    shared: bool
    """Whether every rank holds the same."""


@dataclass(frozen=True)
class _Holding:
    """What this rank has of a parameter, and where the optimizer keeps its memory of it."""

    name: str
    weights: Piece
    slot: torch.Tensor | None
    """The tensor under which the optimizer files its state; None for a weight that is not trained."""
    offset: int | None = None
    """Where in the flat `slot` the range begins; None where the slot is this parameter alone."""


def pieces(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Piece]:
    """All that this rank holds: trained weights in fp32, other weights, persistent buffers, the optimizer's memory."""
    inner = innermost(optimizer)
    found = []
    for holding in _holdings(accelerator, model):
        found.append(holding.weights)
        if holding.slot is not None:
            found += _remembered(holding, inner.state.get(holding.slot, {}))
    return [*found, *_buffers(model)]


def _buffers(model: torch.nn.Module) -> Iterator[Piece]:
    bare = unwrapped(model)
    parameters = {name for name, _ in bare.named_parameters(remove_duplicate=False)}
    for name, value in bare.state_dict().items():
        if name not in parameters and isinstance(value, torch.Tensor):
            yield Piece(f"buffer/{name}", value, 0, tuple(value.shape), shared=True)


def _holdings(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[_Holding]:
    bare = unwrapped(model)
    engine: Any = model
    for module in bare.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else, after a forward pass alone, the outermost weights are still gathered
    for name, parameter in bare.named_parameters():
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            yield from _held_by_zero(name, parameter, engine.optimizer, accelerator)
            continue
        slot = parameter if parameter.requires_grad else None
        values, start, shared = parameter.detach(), 0, True
        if isinstance(parameter, DTensor):
            values, start, shared = parameter.to_local().detach(), _first_element(parameter), False
        yield _Holding(name, Piece(f"model/{name}", values, start, tuple(parameter.shape), shared=shared), slot)


def _first_element(tensor: DTensor) -> int:
    """Of the rows that this rank holds; fully_shard splits over the first dimension alone."""
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert not any(offsets[1:]), "sharded by rows"
    row = 1
    for size in tensor.shape[1:]:
        row *= size
    return offsets[0] * row if offsets else 0


def _held_by_zero(name: str, parameter: Any, zero: Any, accelerator: Accelerator) -> Iterator[_Holding]:
    """ZeRO trains flat fp32 copies: of all parameters of a group (stages 1, 2), or of a sub-group's parts (3)."""
    if hasattr(parameter, "ds_tensor"):
        whole, part = int(parameter.ds_numel), int(parameter.ds_tensor.numel())
        start = part * accelerator.process_index
        count = max(0, min(part, whole - start))  # the last parts may be padding
        if not count:
            return
        shape = tuple(parameter.ds_shape)
        if not parameter.requires_grad:
            values = parameter.ds_tensor.detach().narrow(0, 0, count)
            yield _Holding(name, Piece(f"model/{name}", values, start, shape, shared=False), None)
            return
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        slot = zero.fp32_partitioned_groups_flat[group]
    else:
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            yield _Holding(name, Piece(f"model/{name}", parameter.detach(), 0, shape, shared=True), None)
            return
        mapping = parameter._hp_mapping
        if mapping is None:
            return  # all of it lies in other ranks' parts
        start, count = mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        slot = _flat_groups(zero)[mapping.param_group_index]
    values = slot.detach().narrow(0, offset, count)
    yield _Holding(name, Piece(f"model/{name}", values, start, shape, shared=False), slot, offset)


def _flat_groups(zero: Any) -> list[torch.Tensor]:
    """This rank's part of each group's fp32 weights; DeepSpeed has two classes for stages 1 and 2."""
    name = "single_partition_of_fp32_groups"
    groups: list[torch.Tensor] = getattr(zero, name, None) or zero.fp32_groups_flat_partition
    return groups


def _remembered(holding: _Holding, state: dict[str, Any]) -> Iterator[Piece]:
    """The optimizer's memory of one parameter; what has another shape than the weights belongs to all of them."""
    weights = holding.weights
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        assert holding.slot is not None
        name = f"optimizer/{key}/{holding.name}"
        if value.shape != holding.slot.shape or not value.dim():
            yield Piece(name, value, 0, tuple(value.shape), shared=weights.shared)
            continue
        if isinstance(value, DTensor):
            value = value.to_local()
        elif holding.offset is not None:
            value = value.narrow(0, holding.offset, weights.values.numel())
        yield replace(weights, name=name, values=value)


# --- loading ---------------------------------------------------------------------------------------------


def remember(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Give a new optimizer the memory, of zeros, that one has which has trained already.

    `shapes` are those of the stored tensors by name. A parameter that never had a gradient has none.
    """
    inner = innermost(optimizer)
    kinds = sorted({name.split("/")[1] for name in shapes if name.startswith("optimizer/")})
    for holding in _holdings(accelerator, model):
        if holding.slot is None:
            continue
        state = inner.state[holding.slot]
        for kind in kinds:
            shape = shapes.get(f"optimizer/{kind}/{holding.name}")
            if shape is None or kind in state:
                continue
            if shape == holding.weights.shape and shape:
                state[kind] = torch.zeros_like(holding.slot, requires_grad=False)
            else:
                state[kind] = torch.zeros(shape, device=_device_of_scalar(inner, holding.slot))


def _device_of_scalar(optimizer: torch.optim.Optimizer, slot: torch.Tensor) -> torch.device:
    """Where torch's optimizers keep their counters (torch 2.13, optim/optimizer.py, `_process_value_...`)."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return slot.device if on_device or slot.device.type == "cpu" else torch.device("cpu")


def after_loading(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Let ZeRO compute with the weights that were put into its fp32 copies. Every rank must call this."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    engine: Any = model
    zero = engine.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    # What DeepSpeed 0.19 does after an optimizer step of stage 3 (`step`, `_post_step`).
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
