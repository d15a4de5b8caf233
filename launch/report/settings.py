"""What a run was set to, and which of it is not the usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from launch.config import load
from launch.dotted import leaves
from launch.errors import LaunchError
from launch.plan import Plan
from launch.registry import find_run_file, load_recipe, shipped_recipes
from launch.sections import RunConfig

ABSENT = object()
"""The value of a key that a run does not have, for its recipe takes no such argument."""


@dataclass(frozen=True)
class Setting:
    """One key, and its value in each of several runs."""

    key: str
    values: tuple[Any, ...]
    """`ABSENT` where a run does not have it."""
    usual: tuple[Any, ...]
    """What each would be where nobody says otherwise; `ABSENT` where that is not known."""

    @property
    def differs(self) -> bool:
        """Whether the runs that have it differ in it."""
        there = [value for value in self.values if value is not ABSENT]
        return any(value != there[0] for value in there)

    @property
    def unusual(self) -> bool:
        """Whether it was set otherwise than usual in any run; what is not known counts unless it is empty."""
        return any(
            value is not ABSENT and value != usual and not (usual is ABSENT and value in (None, False, [], {}))
            for value, usual in zip(self.values, self.usual, strict=True)
        )


def settings(plans: Sequence[Plan]) -> list[Setting]:
    """Every key of these runs, in the order of a run file."""
    values = [flat(plan) for plan in plans]
    usual = [usual_settings(plan.config.recipe)[1] for plan in plans]
    keys = dict.fromkeys(key for each in values for key in each)
    order = {section: place for place, section in enumerate(RunConfig.model_fields)}
    return [
        Setting(key, tuple(each.get(key, ABSENT) for each in values), tuple(each.get(key, ABSENT) for each in usual))
        for key in sorted(keys, key=lambda key: order.get(key.partition(".")[0], len(order)))
    ]


def flat(plan: Plan) -> dict[str, Any]:
    """The settings of a run by dotted keys."""
    return dict(leaves(plan.config.model_dump(mode="json")))


@cache
def usual_settings(recipe: str) -> tuple[str, dict[str, Any]]:
    """What is usual for a recipe, and by what that is known: of a shipped one its run file, else the defaults.

    A recipe of a user's own is not imported to be told of: it may have changed since, or do anything. So the defaults
    of its arguments are not known.
    """
    if recipe in shipped_recipes():
        try:
            loaded = load(find_run_file(recipe), [])
            args = load_recipe(loaded).args.model_dump(mode="json")
        except LaunchError:  # another package hides ours
            pass
        else:
            return f"recipes/{recipe}.yaml", dict(leaves(loaded.with_recipe_args(args).config.model_dump(mode="json")))
    plain = load(None, [f"recipe={recipe}"]).config
    return "default", dict(leaves(plain.model_dump(mode="json", exclude={"recipe_args"})))
