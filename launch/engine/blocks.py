"""What is done to a model before it is spread over ranks: activation checkpointing, and compiling its blocks."""

from __future__ import annotations

from typing import Any

import torch

from launch.errors import ConfigError


def checkpoint_activations(model: Any) -> None:
    """Let each block compute its activations again in the backward pass instead of keeping them.

    Raises:
        ConfigError: the model cannot do it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"train.activation_checkpointing = true: {type(model).__name__} does not support it; "
            "use train.activation_checkpointing=false"
        )
    # transformers 5 has renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the other kind loses gradients of inputs that need none


def compile_blocks(model: torch.nn.Module) -> None:
    """Compile the forward of each repeated block, or of the whole model where it names none.

    Blocks rather than the whole: all of them share one compilation, so the first update comes much sooner, and hooks
    that shard weights stay outside of what is compiled.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names] or [model]
    for block in blocks:
        # The forward alone: compiling the module itself (`module.compile()`) would take its hooks in.
        block.forward = torch.compile(block.forward)
