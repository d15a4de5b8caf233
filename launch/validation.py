"""Checks what a file or a command line states, and says of each problem where, what, and what would be right."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launch.dotted import NOTHING, get, keys_of
from launch.errors import ConfigError
from launch.keys import names_of, section_of
from launch.nearest import listed, nearest_keys
from launch.secret import is_secret_key, is_secret_value
from launch.sections import RunConfig, Section
from launch.source import DEFAULT, Layer, place_of, shown

Model = TypeVar("Model", bound=BaseModel)


def validate(
    model: type[Model],
    values: dict[str, Any],
    layer: Layer,
    prefix: str = "",
    root: type[Section] = RunConfig,
    also: Callable[[], list[str]] = list,
) -> Model:
    """Build `model` from `values`; `prefix` is the dotted key under which they stand in a file of `root`.

    `also` gives keys that such a file may have beyond `root`, for suggestions.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        # From JSON, because strict mode there still takes a list for a tuple.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        checked = _Checked(model, layer, tuple(prefix.split(".")) if prefix else (), root, also)
        raise ConfigError("\n".join(checked.lines(error.errors()))) from None


@dataclass(frozen=True)
class _Checked:
    """What was checked, as far as messages need it."""

    model: type[BaseModel]
    layer: Layer
    start: tuple[str, ...]
    """The keys that lead to what was checked."""
    root: type[Section]
    also: Callable[[], list[str]]

    def lines(self, errors: list[ErrorDetails]) -> Iterator[str]:
        """One line per key: a union of kinds reports each kind it is not."""
        rules: dict[str, list[str]] = {}
        unknown, missing = set[str](), dict[str, str]()
        for details in errors:
            location = _without_union_tags(self.model, details["loc"])
            dotted = ".".join((*self.start, *location))
            if details["type"] == "missing":
                missing[dotted] = self._missing(dotted)
                continue
            if details["type"] == "extra_forbidden":
                near = self._near(dotted, location)
                unknown.update(near)
                rule = self._unknown(location, near)
            else:
                rule = rule_of(details)
            told = rules.setdefault(self._head(dotted, details["input"]), [])
            if rule not in told:
                told.append(rule)
        # A key that must be there and is mistyped is one mistake, not two.
        yield from (line for dotted, line in missing.items() if dotted not in unknown)
        yield from (head + " or ".join(told) for head, told in rules.items())

    def _missing(self, dotted: str) -> str:
        stated = [key for key in keys_of(self.layer.values) if key.rpartition(".")[2] == dotted.rpartition(".")[2]]
        if stated:
            got = shown(get(self.layer.values, stated[0]))
            return f"{place_of(self.layer, stated[0])}: {stated[0]} = {got}: did you mean {dotted}, which must be set?"
        place = place_of(self.layer, dotted)
        return f"{self.layer.source if place == DEFAULT else place}: {dotted}: must be set"

    def _head(self, dotted: str, got: Any) -> str:
        stated = get(self.layer.values, dotted)  # as it was written: a check may have changed it before it failed
        return f"{place_of(self.layer, dotted)}: {dotted} = {shown(got if stated is NOTHING else stated)}: "

    def _section(self, location: tuple[str, ...]) -> type[BaseModel]:
        return _field(self.model, list(location[:-1])) or self.model

    def _near(self, dotted: str, location: tuple[str, ...]) -> list[str]:
        siblings = [".".join((*self.start, *location[:-1], name)) for name in self._section(location).model_fields]
        return nearest_keys(dotted, siblings, [*names_of(self.root), *self.also()], set(keys_of(self.layer.values)))

    def _unknown(self, location: tuple[str, ...], near: list[str]) -> str:
        section, _, name = location[-1].rpartition(".")
        if section:
            return f"unknown key; dots are for the command line: in a file, write `{name}:` within `{section}:`"
        if near:
            return f"unknown key; did you mean {listed(near)}?"
        where = ".".join((*self.start, *location[:-1])) or self.root.file
        names = ", ".join(self._section(location).model_fields)
        return f"unknown key; {where} has {names}" if names else f"unknown key; {where} has no keys yet"


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


def rule_of(details: ErrorDetails) -> str:
    """What a value must be, in our words."""
    if details["type"] in _TYPE_NAMES:
        return f"must be {_TYPE_NAMES[details['type']]}" + _quoting_hint(details)
    text = details["msg"].removeprefix("Value error, ")
    text = re.sub(r"^Input should be ", "must be ", text)
    return text[:1].lower() + text[1:]


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
