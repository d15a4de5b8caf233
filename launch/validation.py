"""Checks what a file or a command line states, and says of each problem where, what, and what would be right."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launch.dotted import NOTHING, get
from launch.errors import ConfigError
from launch.keys import names_of, section_of
from launch.secret import is_secret_key, is_secret_value
from launch.sections import RunConfig, Section
from launch.source import DEFAULT, Layer, place_of, shown

Model = TypeVar("Model", bound=BaseModel)


def validate(
    model: type[Model], values: dict[str, Any], layer: Layer, prefix: str = "", root: type[Section] = RunConfig
) -> Model:
    """Build `model` from `values`; `prefix` is the dotted key under which they stand in a file of `root`.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        # From JSON, because strict mode there still takes a list for a tuple.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        start = tuple(prefix.split(".")) if prefix else ()
        # One line per key: a union of kinds reports each kind it is not.
        lines: dict[str, list[str]] = {}
        for details in error.errors():
            head, rule = _message(model, details, layer, start, root)
            if rule not in lines.setdefault(head, []):
                lines[head].append(rule)
        raise ConfigError("\n".join(head + " or ".join(rules) for head, rules in lines.items())) from None


_TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of `key: value` entries",
    "model_type": "a mapping of `key: value` entries",
    "model_attributes_type": "a mapping of `key: value` entries",
    "finite_number": "a finite number",
}


def _message(
    model: type[BaseModel], details: ErrorDetails, layer: Layer, start: tuple[str, ...], root: type[Section]
) -> tuple[str, str]:
    """`("place: key = value: ", "the rule that it breaks")`."""
    location = _without_union_tags(model, details["loc"])
    keys = (*start, *location)
    dotted = ".".join(keys)
    if details["type"] == "missing":
        place = place_of(layer, dotted)
        return f"{layer.source if place == DEFAULT else place}: {dotted}: ", "must be set"
    stated = get(layer.values, dotted)  # as it was written: a check may have changed it before it failed
    head = f"{place_of(layer, dotted)}: {dotted} = {shown(details['input'] if stated is NOTHING else stated)}: "
    if details["type"] == "extra_forbidden":
        return head, _unknown_key(model, location, start, root)
    if details["type"] in _TYPE_NAMES:
        return head, f"must be {_TYPE_NAMES[details['type']]}" + _quoting_hint(details)
    text = details["msg"].removeprefix("Value error, ")
    text = re.sub(r"^Input should be ", "must be ", text)
    return head, text[:1].lower() + text[1:]


def _quoting_hint(details: ErrorDetails) -> str:
    got = details["input"]
    if details["type"] == "string_type" and isinstance(got, (int, float, bool)):
        return f"; quote it to keep it text: '\"{shown(got)}\"'"
    if isinstance(got, str) and details["type"] in ("int_type", "float_type", "bool_type"):
        return ", not text; remove the quotes" if re.fullmatch(r"[-+.\deE]+|true|false", got) else ", got text"
    return ""


def _without_union_tags(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Pydantic adds a member's name (`int`, `literal[…]`) behind a field that is a union: leave it out."""
    keys: list[str] = []
    for part in location:
        if keys and isinstance(part, str) and _UNION_TAG.match(part) and _field(model, keys) is None:
            continue
        keys.append(str(part))
    return tuple(keys)


_UNION_TAG = re.compile(r"(constrained-)?(literal|int|str|float|bool|list|dict|tuple|function-)")


def _field(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The section that `keys` lead to, or None where they lead to a plain value."""
    current: type[BaseModel] | None = model
    for key in keys:
        if current is None or key not in current.model_fields:
            return None
        current = section_of(current.model_fields[key].annotation)
    return current


def _unknown_key(model: type[BaseModel], location: tuple[str, ...], start: tuple[str, ...], root: type[Section]) -> str:
    section = _field(model, list(location[:-1])) or model
    siblings = [".".join((*start, *location[:-1], name)) for name in section.model_fields]
    key = ".".join((*start, *location))
    right = nearest_key(key, siblings, names_of(root))
    if right:
        return f"unknown key; did you mean {right}?"
    where = ".".join((*start, *location[:-1])) or root.file
    names = ", ".join(section.model_fields)
    return f"unknown key; {where} has {names}" if names else f"unknown key; {where} has no keys yet"


def nearest_key(key: str, siblings: list[str], everywhere: list[str]) -> str | None:
    """The key most likely meant: a similar one of the same section, else the same name elsewhere."""
    by_name = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
    name = key.rpartition(".")[2]
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
    if close:
        return by_name[close[0]]
    elsewhere = [other for other in everywhere if other.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[0]
    as_deep = [other for other in everywhere if other.count(".") >= key.count(".")]
    close = difflib.get_close_matches(key, as_deep, n=1, cutoff=0.75)
    return close[0] if close else None


def refuse_unrecordable(layer: Layer) -> None:
    """See that a record of this can be kept: no secrets, and nothing that JSON cannot hold.

    Raises:
        ConfigError: one line per value that cannot be.
    """
    refused = [*_secrets(layer.values, layer), *_unrecordable(layer.values, layer)]
    if refused:
        raise ConfigError("\n".join(refused))


def _secrets(values: Any, layer: Layer, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """One line per value that looks like a secret; the value is never shown."""
    dotted = ".".join(keys)
    named = bool(keys) and is_secret_key(keys[-1]) and values not in (None, "", [], {})
    if named or (isinstance(values, str) and is_secret_value(values)):
        yield (
            f"{place_of(layer, dotted)}: {dotted}: looks like a secret (value not shown); a run file and a "
            "command line are recorded, so put it into the environment instead (HF_TOKEN, WANDB_API_KEY, …)"
        )
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _secrets(value, layer, (*keys, str(key)))
    elif isinstance(values, list):
        for value in values:
            yield from _secrets(value, layer, keys)


def _unrecordable(values: Any, layer: Layer, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """One line per value that JSON and a log cannot hold."""
    key = ".".join(keys)
    head = f"{place_of(layer, key)}: {key} = {shown(values)}: "
    if isinstance(values, float) and not math.isfinite(values):
        yield head + "must be a finite number"
    elif isinstance(values, str) and not _is_unicode(values):
        yield head + "must be valid Unicode text; rename the file, if it is one"
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _unrecordable(value, layer, (*keys, name))
    elif isinstance(values, list):
        for value in values:
            yield from _unrecordable(value, layer, keys)


def _is_unicode(text: str) -> bool:
    """Python makes lone surrogates of bytes on the command line that are not UTF-8 (PEP 383)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
