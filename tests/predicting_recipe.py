"""The recipe of `own_recipe`, which also predicts: how many next numbers of a row are right."""

from __future__ import annotations

import dataclasses
from typing import Any

from launch.recipe import Batch, Inference, Prepared, RecipeContext, Scoring
from tests import own_recipe


class Args(own_recipe.Args):
    """What a run file may set."""


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """The same data and model."""
    prepared = own_recipe.prepare(args, context)

    def predict(model: Inference, batch: Batch) -> tuple[Any, list[Any]]:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        right = logits.argmax(-1) == batch["input_ids"][:, 1:]
        return prepared.loss(model, batch), right.sum(1).tolist()  # type: ignore[arg-type]

    def measure(rows: list[int]) -> dict[str, Any]:
        return {"right": sum(rows) / (7 * len(rows)), "rows": rows}

    return dataclasses.replace(prepared, scoring=Scoring(predict, measure))
