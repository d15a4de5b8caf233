"""Writes the trained model as a plain Hugging Face folder, and what is needed to see that it loads again."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file

from launch.engine.agree import raise_together
from launch.engine.devices import on_host
from launch.engine.gathering import full_state
from launch.engine.sharding import tied_names, unwrapped
from launch.engine.streams import first_samples
from launch.errors import LaunchError, RunFolderError
from launch.recipe import Prepared

PROBE_COLUMNS = 64
"""Length to which the probe's sequences are cut: enough to notice any wrong weight."""


_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model that gets adapters."""

Sums = dict[str, tuple[list[int], float]]
"""Of each weight its shape and the sum of its absolute values, by which a copy is told from the original."""


def write_all(
    accelerator: Accelerator, model: torch.nn.Module, prepared: Prepared, run: Path, build: Callable[[], Any]
) -> None:
    """Write export/ of a run, with adapters also adapter/, and what they are checked by. Every rank must call this.

    `build` makes the recipe's model once more.

    Raises:
        RunFolderError: the disk is full, gone or broken.
    """
    if has_adapters(model):
        from launch.engine.adapters import write_adapted  # needs PEFT

        sums = write_adapted(accelerator, model, prepared.tokenizer, run, build)
    else:
        sums = write_model(accelerator, model, prepared.tokenizer, run / "export")
    write_probe(accelerator, model, prepared, sums, run / "probe.safetensors")


def write_model(accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, folder: Path) -> Sums:
    """Write weights, configuration and tokenizer to `folder`, aside first: under its name the folder is whole.

    Returns, on rank 0, what `write_probe` keeps of the live weights. Every rank must call this.

    Raises:
        RunFolderError: the disk is full, gone or broken.
    """
    state = full_state(accelerator, model)

    def write() -> Sums:
        bare = unwrapped(model)
        sums = {name: sum_of(state[name]) for name, _ in bare.named_parameters()}
        with aside(folder) as written:
            bare.save_pretrained(written, state_dict=state)
            tokenizer.save_pretrained(written)
        return sums

    return on_main(accelerator, folder, write)


def on_main(accelerator: Accelerator, folder: Path, write: Callable[[], Sums]) -> Sums:
    """Let rank 0 write, and all ranks hear of it if that fails. Every rank must call this."""
    problem: LaunchError | None = None
    sums: Sums = {}
    if accelerator.is_main_process:
        try:
            sums = write()
        except (OSError, SafetensorError) as error:
            problem = RunFolderError(
                f"{folder}: cannot be written: {error}; make space and start the run again: it goes on from its newest "
                "checkpoint"
            )
        except LaunchError as error:
            problem = error
    raise_together(accelerator, problem)
    return sums


@contextlib.contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Where to write what becomes `folder` if all goes well."""
    written = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    yield written
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that ended before it was checked
    written.rename(folder)


def sum_of(weight: torch.Tensor) -> tuple[list[int], float]:
    """Shape, and sum of absolute values in float64."""
    return list(weight.shape), float(weight.detach().cpu().double().abs().sum())


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether PEFT has put adapters around the recipe's model."""
    return hasattr(unwrapped(model), "get_base_model")


def plain_name(name: str) -> str | None:
    """What the merged model calls a weight; None for one that it has not."""
    if not name.startswith(_PREFIX):
        return name
    if ".lora_" in name or ".original_module." in name:
        return None
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def write_probe(accelerator: Accelerator, model: torch.nn.Module, prepared: Prepared, sums: Sums, path: Path) -> None:
    """Write one short validation sample and the logits of the live model, to compare the reloaded model with.

    With it go the sums of its weights, and the names of tied ones as they are without adapters. Every rank must call
    this: with sharded weights a forward pass is a collective.
    """
    live = model if accelerator.distributed_type == DistributedType.DEEPSPEED else unwrapped(model)
    live.eval()
    batch = prepared.collate(first_samples(prepared.validation, 1))
    inputs = {
        name: tensor[:, :PROBE_COLUMNS].contiguous() if tensor.dim() > 1 else tensor
        for name, tensor in batch.items()
        if name not in prepared.targets
    }
    with torch.no_grad(), on_host(accelerator, live) as device:
        output = live(**send_to_device(inputs, device))
    if accelerator.is_main_process:
        tied = [[plain_name(name) for name in group] for group in tied_names(unwrapped(model))]
        told = {"tied": json.dumps(tied), "sums": json.dumps(sums)}
        save_file({**inputs, **logits_of(output)}, path, metadata=told)


def logits_of(output: Any) -> dict[str, torch.Tensor]:
    """What a model says, on the CPU in fp32: `logits`, or `start_logits` and `end_logits` of an extractive one."""
    return {
        name: value.detach().float().cpu().contiguous()
        for name, value in output.items()
        if name.endswith("logits") and isinstance(value, torch.Tensor)
    }
