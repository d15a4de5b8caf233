"""Reads run files and `section.key=value` overrides, and remembers where each value came from.

Knows nothing of what the keys mean. YAML is read by the rules of YAML 1.2: `1e-3` is a number and `off`, `no`
and `on` are text (PyYAML's default is YAML 1.1, where `1e-3` is text and `off` is false).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.errors import ConfigError
from launch.secret import without_secrets

COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if text.lstrip("+-").startswith(("0o", "0x")):
        return int(text, 0)
    return int(text)  # PyYAML would read 010 as octal, YAML 1.2 does not


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class Layer:
    """Nested values and, for each dotted key, the place it was written at."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


def read_run_file(path: Path) -> Layer:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, not YAML, not a mapping, or states a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a run file: {error}") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{path}: empty run file; it needs at least `recipe: <name>`")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:1: a run file is a mapping of `section:` entries")
        places: dict[str, str] = {}
        _note_places(root, path, (), places)
        return Layer(loader.construct_document(root), places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _note_places(node: yaml.MappingNode, path: Path, prefix: tuple[str, ...], places: dict[str, str]) -> None:
    for key_node, value_node in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be plain text")
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{place}: {key_node.value}: a key must be text; quote it if it is meant")
        keys = (*prefix, key_node.value)
        dotted = ".".join(keys)
        if dotted in places:
            raise ConfigError(f"{place}: {dotted} is stated twice (first at {places[dotted]}); keep one")
        places[dotted] = place
        if isinstance(value_node, yaml.MappingNode):
            _note_places(value_node, path, keys, places)


def read_overrides(overrides: list[str]) -> Layer:
    """Turn `["train.max_steps=20", …]` into a layer; a later override of a key wins over an earlier one.

    Raises:
        ConfigError: an item is not of the form `key=value`, or its value is an unfinished list, mapping or
            quoted text.
    """
    layer = Layer()
    for item in overrides:
        key, equals, text = item.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"{COMMAND_LINE}: {without_secrets(item)!r} is not an override; write section.key=value, "
                "for example train.max_steps=20"
            )
        target = layer.values
        for part in parts[:-1]:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                inner = target[part] = {}
            target = inner
        target[parts[-1]] = _read_value(item, text)
        layer.places[key] = COMMAND_LINE
    return layer


def _read_value(item: str, text: str) -> Any:
    """Numbers, true/false, null, [lists], {mappings} and "quoted text" as in YAML; all else is plain text."""
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise ConfigError(
                f"{COMMAND_LINE}: {without_secrets(item)!r}: the value is not valid YAML: {problem}"
            ) from None
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return loader.construct_object(yaml.ScalarNode(tag, text))


def merge(lower: Layer, upper: Layer, exclusive: tuple[tuple[str, ...], ...] = ()) -> Layer:
    """Lay `upper` over `lower`, mappings key by key.

    `exclusive` names groups of dotted keys of which one replaces the others: setting `train.max_steps` above
    removes a `train.epochs` from below.
    """
    values = _merged(lower.values, upper.values)
    places = {**lower.places, **upper.places}
    for group in exclusive:
        stated_above = [key for key in group if _find(upper.values, key) is not None]
        if not stated_above:
            continue
        for key in group:
            if key not in stated_above and key in lower.places:
                _remove(values, key.split("."))
                del places[key]
    return Layer(values, places)


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _find(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _remove(values: dict[str, Any], keys: list[str]) -> None:
    for key in keys[:-1]:
        values = values[key]
    values.pop(keys[-1], None)
