"""What may change between the attempts of one run: settings that leave its numbers alone, and no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from launch.dotted import leaves
from launch.errors import ConfigError
from launch.sections import RunConfig

HARMLESS_SECTIONS = ("track", "save", "parallel", "cluster")
"""Where the numbers go, what is kept, and who computes: none of it changes what is computed."""

HARMLESS_KEYS = (
    *("train.micro_batch_size", "train.group_by_length", "train.padding_free"),
    *("train.activation_checkpointing", "train.compile"),
    *("train.early_stopping_patience", "train.early_stopping_min_delta"),
    *("train.on_nonfinite", "train.on_spike", "train.spike_deviations"),  # all other updates are as they were
    *("eval.batch_size", "eval.every_steps", "eval.every_epochs", "eval.at_start"),
)


def changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of two configurations as plain data: the harmless differences and the dangerous ones, `key: old → new`.

    A key that a release did not know yet is no difference.
    """
    harmless: list[str] = []
    dangerous: list[str] = []
    for key, old, new in _differences(before, now):
        line = f"{key}: {json.dumps(old, ensure_ascii=False)} → {json.dumps(new, ensure_ascii=False)}"
        (harmless if _is_harmless(key, before, now) else dangerous).append(line)
    return harmless, dangerous


def harmless_changes(begun: str, before: dict[str, Any], now: RunConfig) -> list[str]:
    """What is set otherwise now and leaves the numbers alone; `begun` says what was made with the settings before.

    Raises:
        ConfigError: something is set otherwise that does not.
    """
    harmless, dangerous = changes(before, now.model_dump(mode="json"))
    if dangerous:
        raise ConfigError(
            f"{begun} with other settings, and to go on with these would give the numbers of neither: "
            f"{'; '.join(dangerous)}; set them back, or begin a new run with another --out"
        )
    return harmless


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    old, new = dict(leaves(before)), dict(leaves(now))
    for key in sorted(old.keys() | new.keys()):
        known = (key in old and key in new) or key.startswith("recipe_args.")
        if known and old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _is_harmless(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    if key == "save.every_steps" and {each["train"].get("on_spike") for each in (before, now)} == {"rewind"}:
        return False  # it decides which weights a run goes back to
    if key.split(".")[0] in HARMLESS_SECTIONS or key in HARMLESS_KEYS:
        return True
    # The length bends every schedule but this one.
    return key in ("train.max_steps", "train.epochs") and now["train"]["schedule"] == "constant"
