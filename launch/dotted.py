"""Nested mappings by dotted keys: `train.max_steps` is `values["train"]["max_steps"]`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOTHING: Any = object()
"""The value of a key that is not there."""


def get(values: Any, key: str) -> Any:
    """The value of a key, or `NOTHING`."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return NOTHING
        values = values[name]
    return values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key in place; what is no mapping on the way to it becomes one."""
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[name] = value


def drop(values: dict[str, Any], key: str) -> Any:
    """Take a key out in place; its value."""
    section, _, name = key.rpartition(".")
    within = get(values, section) if section else values
    return within.pop(name)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key that leads to a plain value, and the value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def keys_of(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections too."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")
