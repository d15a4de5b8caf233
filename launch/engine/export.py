"""Writes the trained model as a plain Hugging Face folder, and what is needed to see that it loads again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file

from launch.engine.agree import raise_together
from launch.engine.sharding import full_state, tied_names, unwrapped
from launch.engine.streams import first_samples
from launch.errors import RunFolderError
from launch.recipe import Prepared

PROBE_COLUMNS = 64
"""Length to which the probe's sequences are cut: enough to notice any wrong weight."""


Sums = dict[str, tuple[list[int], float]]
"""Of each weight its shape and the sum of its absolute values, by which a copy is told from the original."""


def write_model(accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, folder: Path) -> Sums:
    """Write weights, configuration and tokenizer to `folder`, aside first: under its name the folder is whole.

    Of a model with adapters (PEFT) these alone are written. Returns, on rank 0, what `write_probe` keeps of the live
    weights. Every rank must call this.

    Raises:
        RunFolderError: the disk is full, gone or broken.
    """
    state = full_state(accelerator, model)
    problem = None
    sums: Sums = {}
    if accelerator.is_main_process:
        sums = {name: sum_of(state[name]) for name, _ in unwrapped(model).named_parameters()}
        try:
            _write(unwrapped(model), state, tokenizer, folder)
        except (OSError, SafetensorError) as error:
            problem = RunFolderError(
                f"{folder}: cannot be written: {error}; make space and start the run again: it goes on from its newest "
                "checkpoint"
            )
    raise_together(accelerator, problem)
    return sums


def sum_of(weight: torch.Tensor) -> tuple[list[int], float]:
    """Shape, and sum of absolute values in float64."""
    return list(weight.shape), float(weight.detach().cpu().double().abs().sum())


def _write(model: Any, state: dict[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside, state_dict=state)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that ended before it was checked
    aside.rename(folder)


def write_probe(accelerator: Accelerator, model: torch.nn.Module, prepared: Prepared, sums: Sums, path: Path) -> None:
    """Write one short validation sample and the logits of the live model, to compare the reloaded model with.

    With it go the sums of its weights and the names of tied ones. Every rank must call this: with sharded weights a
    forward pass is a collective.
    """
    live = model if accelerator.distributed_type == DistributedType.DEEPSPEED else unwrapped(model)
    live.eval()
    batch = prepared.collate(first_samples(prepared.validation, 1))
    inputs = {
        name: tensor[:, :PROBE_COLUMNS].contiguous() if tensor.dim() > 1 else tensor
        for name, tensor in batch.items()
        if name not in prepared.targets
    }
    with torch.no_grad():
        output = live(**send_to_device(inputs, accelerator.device))
    if accelerator.is_main_process:
        told = {"tied": json.dumps(tied_names(unwrapped(model))), "sums": json.dumps(sums)}
        save_file({**inputs, **logits_of(output)}, path, metadata=told)


def logits_of(output: Any) -> dict[str, torch.Tensor]:
    """What a model says, on the CPU in fp32: `logits`, or `start_logits` and `end_logits` of an extractive one."""
    return {
        name: value.detach().float().cpu().contiguous()
        for name, value in output.items()
        if name.endswith("logits") and isinstance(value, torch.Tensor)
    }
