from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.engine.optim import make_optimizer, parameter_groups
from launch.sections import TrainSection
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


def test_its_steps_are_those_of_the_paper() -> None:
    """AdamW by hand, several steps with changing gradients and rates (Loshchilov & Hutter 2019, algorithm 2)."""
    layer = torch.nn.Linear(2, 2).double()
    expected = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = make_optimizer(
        layer, TrainSection(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=0.5), fused=False
    )
    first = second = 0.0
    for step, (gradient, rate) in enumerate([(3.0, 0.01), (-1.0, 0.02), (0.5, 0.03)], start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        change = rate * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)) ** 0.5 + 0.5)
        for name, weights in expected.items():
            decay = 0.1 if name == "weight" else 0.0
            expected[name] = weights * (1 - rate * decay) - change
    for name, parameter in layer.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-12), name


def test_the_other_optimizers_take_their_settings_and_the_same_groups() -> None:
    layer = torch.nn.Linear(2, 2)
    sgd = make_optimizer(layer, TrainSection(optimizer="sgd", sgd_momentum=0.9, weight_decay=0.1), fused=False)
    assert isinstance(sgd, torch.optim.SGD)
    assert [(group["momentum"], group["weight_decay"]) for group in sgd.param_groups] == [(0.9, 0.1), (0.9, 0.0)]
    adafactor = make_optimizer(layer, TrainSection(optimizer="adafactor", weight_decay=0.1), fused=False)
    assert isinstance(adafactor, torch.optim.Adafactor)
    assert [group["weight_decay"] for group in adafactor.param_groups] == [0.1, 0.0]
