from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.engine.precision import LossScale, check, forward_dtypes, names, optimizer_dtypes
from launch.errors import TopologyError
from launch.strategy import Dtypes
from recipes.causal_lm import loss
from recipes.head_loss import with_head_loss
from tests import tiny


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_patience() -> None:
    scale = LossScale(8.0, patience=3)
    assert scale.after_overflow()
    assert scale.value == 4.0
    for expected in (4.0, 4.0, 8.0, 8.0):
        scale.after_update()
        assert scale.value == expected
    assert scale.after_overflow()
    scale.after_update()
    assert scale.value == 4.0, "patience starts anew after an overflow"
    assert [scale.after_overflow() for _ in range(4)] == [True, True, False, False]
    assert scale.value == 1.0


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_format_of_products_is_seen_at_the_head(build: Any, dtype: torch.dtype) -> None:
    model = build()
    ids = torch.ones(1, 4, dtype=torch.int64)
    with_head_loss(model, loss)
    with forward_dtypes(model) as seen, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert loss(model, {"input_ids": ids, "labels": ids}).dtype == torch.float32
    assert seen == {dtype}, "of a head that gives the loss"
    with forward_dtypes(model) as seen, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(input_ids=ids)
    assert seen == {dtype}
    model.to(torch.float64)(input_ids=ids)
    assert seen == {dtype}, "no longer looked at"


def test_the_formats_of_an_optimizer_are_those_of_its_state() -> None:
    layer = torch.nn.Linear(2, 2).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert optimizer_dtypes(optimizer) == ("bfloat16", "bfloat16")
    assert names([torch.float32, torch.bfloat16, torch.float32]) == "bfloat16+float32"


PLANNED = Dtypes("bfloat16", "float32", "float32", "float32", "float32")


def test_a_format_other_than_planned_is_refused() -> None:
    check(PLANNED, PLANNED)
    check(PLANNED, Dtypes("bfloat16", "float32", "float32", "float32", ""))  # plain SGD remembers nothing
    with pytest.raises(TopologyError) as caught:
        check(PLANNED, Dtypes("float32", "float32", "bfloat16", "float32", "float32"))
    assert str(caught.value).startswith(
        "the number formats are not as planned: forward float32 instead of bfloat16, reduction bfloat16 instead of "
        "float32; a recipe must build its model in fp32"
    )
