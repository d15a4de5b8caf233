"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay; biases and normalisation weights (fewer than 2 dimensions) do not.

    A tied weight appears once, because `parameters()` names each tensor once.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    model: torch.nn.Module, *, weight_decay: float, betas: tuple[float, float], epsilon: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its learning rate is set before each update."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=fused or None)
