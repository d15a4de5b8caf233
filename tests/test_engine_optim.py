from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.engine.optim import adamw, parameter_groups
from tests import tiny


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama])
def test_matrices_decay_and_vectors_do_not_and_each_weight_is_there_once(build: Any) -> None:
    model = build()
    decaying, other = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in decaying["params"]} == {2}
    assert {parameter.dim() for parameter in other["params"]} == {1}
    identities = [id(parameter) for group in (decaying, other) for parameter in group["params"]]
    assert sorted(identities) == sorted({id(parameter) for parameter in model.parameters()})
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (build is tiny.gpt2)


def test_frozen_weights_are_left_out() -> None:
    model = tiny.gpt2()
    for parameter in model.transformer.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    (group,) = parameter_groups(model, 0.1)
    assert [id(parameter) for parameter in group["params"]] == [id(model.lm_head.weight)]


def test_one_step_is_the_one_of_the_paper() -> None:
    """AdamW, first step, by hand (Loshchilov & Hutter 2019, algorithm 2): the bias-corrected moments are g and g²."""
    matrix = torch.nn.Linear(2, 2)
    before = {name: parameter.detach().clone() for name, parameter in matrix.named_parameters()}
    optimizer = adamw(matrix, weight_decay=0.1, betas=(0.8, 0.9), epsilon=0.5, fused=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    gradient = 3.0
    for parameter in matrix.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    step = 0.01 * gradient / (gradient + 0.5)
    assert torch.allclose(matrix.weight, before["weight"] * (1 - 0.01 * 0.1) - step)
    assert torch.allclose(matrix.bias, before["bias"] - step)
