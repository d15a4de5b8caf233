"""What the keys of a configuration are: their names, kinds, defaults and meanings, read from its class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from launch.sections import RunConfig
from launch.source import shown


@dataclass(frozen=True)
class Key:
    """One documented key."""

    name: str
    kind: str
    default: str
    description: str


def describe(model: type[BaseModel], prefix: str = "") -> list[Key]:
    """Every key of a model, depth first, in the order it is written in."""
    keys: list[Key] = []
    for name, info in model.model_fields.items():
        dotted = f"{prefix}{name}"
        section = section_of(info.annotation)
        if section:
            keys += describe(section, f"{dotted}.")
            continue
        default = "required" if info.is_required() else shown(info.get_default(call_default_factory=True))
        keys.append(Key(dotted, _kind(info.annotation), default, info.description or ""))
    return keys


def _kind(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    literal = re.sub(r"typing\.Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", "|"), text)
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join("null" if member is NoneType else _kind(member) for member in get_args(annotation))
    plain = literal.replace("typing.", "").replace("'", "")
    plain = re.sub(r"dict(\[.*\])?", "mapping", plain)
    for python, word in (
        ("int", "whole number"),
        ("float", "number"),
        ("bool", "true|false"),
        ("str", "text"),
    ):
        plain = re.sub(rf"\b{python}\b", word, plain)
    return plain


def names_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every section and key."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        names += [f"{prefix}{name}", *(names_of(section, f"{prefix}{name}.") if section else ())]
    return names


def all_keys() -> list[str]:
    """Dotted names of every key a run file may hold outside `recipe_args`."""
    return [key.name for key in describe(RunConfig)]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type is; one that may be null too is one."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    sections = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    return sections[0] if sections else None
