"""Gradients become other weights, bit by bit as torch alone would change them."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from launch.engine.updating import updates


def models(gradient: float) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two that are equal, with gradients of some norm."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    model[2].bias.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * gradient
    twin = copy.deepcopy(model)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()
    return model, twin


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)


@pytest.mark.parametrize("share", [None, 0.5, 1 - 1e-9, 1.0, 1 + 1e-7, 1 + 1e-6, 2.0])
def test_gradients_are_clipped_as_torch_clips_them(share: float | None) -> None:
    """`share` of the norm that the gradient has; where it is enough torch multiplies by one, and we do not."""
    model, twin = models(1.0)
    norm = float(torch.nn.utils.get_total_norm([each.grad for each in twin.parameters() if each.grad is not None]))
    most = None if share is None else share * norm
    accelerator = Accelerator(cpu=True)
    made = updates(accelerator, model, accelerator.prepare_optimizer(optimizer_of(model)), most)
    assert made.apply() == norm
    torch.nn.utils.clip_grad_norm_(twin.parameters(), most or math.inf)
    optimizer_of(twin).step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert mine.grad is None, "it is forgotten"


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_changes_nothing(gradient: float) -> None:
    model, twin = models(gradient)
    accelerator = Accelerator(cpu=True)
    made = updates(accelerator, model, accelerator.prepare_optimizer(optimizer_of(model)), 1.0)
    assert not math.isfinite(made.apply())
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.grad is None


def test_no_folder_is_searched_for_a_package_to_make_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Accelerate's optimizer does, twice in each step; on a cluster these folders are on a network."""
    searched: list[str] = []

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            searched.append(name)

    model, _ = models(1.0)
    accelerator = Accelerator(cpu=True)
    made = updates(accelerator, model, accelerator.prepare_optimizer(optimizer_of(model)), 1.0)
    made.apply()
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    made.apply()
    made.discard()
    assert searched == []
