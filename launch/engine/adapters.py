"""What is particular to models with adapters (PEFT): the adapter alone, and the model it is merged into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer

from launch.engine.export import Sums, aside, on_main, plain_name, sum_of
from launch.engine.gathering import trained_state


def write_adapted(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, run: Path, build: Callable[[], Any]
) -> Sums:
    """Write the adapter alone to `adapter/` and the merged model to `export/`; as `write_model` in all else.

    Frozen weights are not gathered: `build` makes the model once more, on the CPU of rank 0, and it gets the trained
    ones.
    """
    state = trained_state(accelerator, model)

    def write() -> Sums:
        whole = build()
        whole.load_state_dict(state, strict=False)
        sums = {name: sum_of(value) for name, value in whole.named_parameters() if ".original_module." not in name}
        write_adapter(whole, tokenizer, run / "adapter")
        write_merged(whole, tokenizer, run / "export")
        return sums

    return on_main(accelerator, run / "export", write)


def write_adapter(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what was trained in PEFT's format, with tokenizer, and the configuration that the base has got here."""
    config = copy.deepcopy(model.get_base_model().config)
    config.architectures = [type(model.get_base_model()).__name__]
    with aside(folder) as written:
        # It would ask the Hub whether the vocabulary has grown; we never let it.
        model.save_pretrained(written, save_embedding_layers=False)
        config.save_pretrained(written)
        tokenizer.save_pretrained(written)


def write_merged(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Write the model with its adapters merged into its weights, which takes `model` itself; the merged model."""
    merged = model.merge_and_unload()
    with aside(folder) as written:
        merged.save_pretrained(written)
        tokenizer.save_pretrained(written)
    return merged


def merged_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights that the model must have once its LoRA adapters are merged: W + s·B·A, and all others as they are.

    Computed from the definition, not by PEFT's own merging.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    found: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        plain = plain_name(name)
        if plain is None:
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        found[plain] = value.detach() if layer is None else value.detach() + _change(layer)
    return found


def _change(layer: Any) -> torch.Tensor:
    """s·B·A in the layout of the layer's weight: A is `(r, in)` and B `(out, r)`, as parameters for an embedding."""
    embedding = "default" in layer.lora_embedding_A
    first, second = (
        (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
        if embedding
        else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    change: torch.Tensor = layer.scaling["default"] * (second.detach() @ first.detach())
    return change.T if embedding or layer.fan_in_fan_out else change


def unlike_merged(merged: Any, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of weights that a merged model lacks, has besides, or with other values than `merged_weights` expected."""
    found = dict(merged.named_parameters(remove_duplicate=False))
    wrong = sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name].detach()
        largest = float(ours.abs().max()) if ours.numel() else 0.0
        if ours.shape != theirs.shape or not torch.allclose(theirs, ours, rtol=0.0, atol=1e-6 * largest):
            wrong.append(name)
    return wrong
