"""Brings the weights of a model together on rank 0, whatever spreads them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from launch.engine.devices import is_xla
from launch.engine.sharding import unwrapped


def full_state(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights, unsharded, in the precision they are trained in (fp32); of use on rank 0 only.

    Tied weights are one tensor under several names, so that they are saved once. Every rank must call this.
    """
    bare = unwrapped(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = _deepspeed_state(bare, keep=accelerator.is_main_process)
    elif accelerator.distributed_type == DistributedType.FSDP:
        state = dict(accelerator.get_state_dict(model))
    else:
        state = _whole_state(accelerator, bare)
    names: dict[int, str] = {}
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in state:
            state[name] = state[first]
    return state


def trained_state(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, and buffers, as `full_state` has them. Every rank must call this."""
    bare = unwrapped(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = _deepspeed_state(bare, keep=accelerator.is_main_process, frozen=False)
    elif accelerator.distributed_type == DistributedType.FSDP:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        gathered: Any = get_model_state_dict(model, options=options)
        state = dict(gathered)
    else:
        state = _whole_state(accelerator, bare)
    frozen = {name for name, value in bare.named_parameters(remove_duplicate=False) if not value.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def _whole_state(accelerator: Accelerator, bare: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each rank has all of; from XLA devices brought over, for what is done with it there would be compiled."""
    state = dict(bare.state_dict())
    return {name: value.cpu() for name, value in state.items()} if is_xla(accelerator) else state


def _deepspeed_state(bare: torch.nn.Module, *, keep: bool, frozen: bool = True) -> dict[str, torch.Tensor]:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    state = dict(bare.state_dict()) if keep else {}
    for name, parameter in bare.named_parameters():
        if not parameter.requires_grad and not frozen:
            continue
        if not parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
            continue
        weights = safe_get_full_fp32_param(parameter)  # the master copy, of which `parameter` may be a bf16 image
        if keep:
            state[name] = weights.detach().cpu()
    return state
