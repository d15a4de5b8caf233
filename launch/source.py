"""Reads run files and `section.key=value` overrides, remembers where each value came from, and writes run files.

Knows nothing of what the keys mean. Run files are YAML by the rules of YAML 1.2: `1e-3` is a number and `off`, `no`
and `on` are text (PyYAML's default is YAML 1.1, where `1e-3` is text and `off` is false). Files of other programs
are read as those programs read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.dotted import NOTHING, drop, get, put
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
    source: str = COMMAND_LINE
    """The run file, where there is one: the place of what is stated nowhere."""


def read_run_file(path: Path) -> Layer:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, not YAML, not a mapping, states a key twice, or holds what a
            configuration cannot (dates, binary data, a value within itself).
    """
    return _read_yaml_file(path, "a run file", "it needs at least `recipe: <name>`", _Loader)


def read_yaml_1_1_file(path: Path, kind: str, needs: str) -> Layer:
    """The same by the rules of YAML 1.1, in which `yes`, `on`, `no` and `off` are true and false.

    `kind` is what messages call the file (`a run file`), `needs` what an empty one lacks.
    """
    return _read_yaml_file(path, kind, needs, yaml.SafeLoader)


def _read_yaml_file(path: Path, kind: str, needs: str, loader: type[yaml.SafeLoader]) -> Layer:
    text = _read_text(path, kind)
    try:
        values, lines = _read_yaml(text, loader)
    except _NotPlainData as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    if values is _NOTHING:
        raise ConfigError(f"{path}: empty {_noun(kind)}; {needs}")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: {kind} is a mapping of `section:` entries")
    return _layer(path, values, lines)


def read_json_file(path: Path, kind: str) -> Layer:
    """Read one JSON object; `kind` is what messages call the file (`a DeepSpeed file`).

    Raises:
        ConfigError: the file is missing, not JSON, not an object, or states a key twice.
    """
    text = _read_text(path, kind)
    try:
        values = json.loads(text)
        lines = _json_lines(text)
    except json.JSONDecodeError as error:
        problem = error.msg[:1].lower() + error.msg[1:]
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {problem} (column {error.colno})") from None
    except _NotPlainData as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a nesting of thousands of levels
        raise ConfigError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{path}:1: {kind} is one JSON object: {{"key": value, …}}')
    return _layer(path, values, lines)


_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]')
"""What matters for the place of a key: texts, which are keys where a colon follows, and brackets."""


def _json_lines(text: str) -> dict[str, int]:
    """The line of each dotted key that objects alone lead to, of a text that is valid JSON.

    Raises:
        _NotPlainData: a key is stated twice.
    """
    lines: dict[str, int] = {}
    around: list[tuple[str, ...] | None] = []  # for each open bracket the keys that lead to it; None within a list
    keys: tuple[str, ...] | None = ()
    for token in _JSON_TOKEN.finditer(text):
        if token[2]:
            line = text.count("\n", 0, token.start()) + 1
            keys = (*around[-1], json.loads(token[1])) if around[-1] is not None else None
            dotted = ".".join(keys or ())
            if dotted in lines:
                raise _NotPlainData(f"{dotted} is stated twice (first in line {lines[dotted]}); keep one", line)
            if keys is not None:
                lines[dotted] = line
        elif token[0] in ("{", "["):
            within_list = bool(around) and around[-1] is None
            around.append(None if token[0] == "[" or within_list else keys)
        elif token[0] in ("}", "]"):
            around.pop()
    return lines


def _read_text(path: Path, kind: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {_noun(kind)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as {kind}: {error}") from None


def _noun(kind: str) -> str:
    return kind.partition(" ")[2]


def _layer(path: Path, values: dict[str, Any], lines: dict[str, int]) -> Layer:
    return Layer(values, {key: f"{path}:{line}" for key, line in lines.items()}, str(path))


def read_overrides(overrides: list[str]) -> Layer:
    """Turn `["train.max_steps=20", …]` into a layer; a later override of a key wins over an earlier one.

    Raises:
        ConfigError: an item is not of the form `key=value`, or its value is an unfinished list, mapping or
            quoted text, or what a configuration cannot hold.
    """
    layer = Layer()
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"{COMMAND_LINE}: {without_secrets(item)!r} is not an override; write section.key=value, "
                "for example train.max_steps=20"
            )
        try:
            value, inner_keys = _read_value(text)
        except _NotPlainData as error:
            raise ConfigError(f"{COMMAND_LINE}: {without_secrets(item)!r}: the value is {error}") from None
        put(layer.values, key, value)
        layer.places.update(dict.fromkeys((key, *(f"{key}.{inner}" for inner in inner_keys)), COMMAND_LINE))
    return layer


def _read_value(text: str) -> tuple[Any, Iterable[str]]:
    """Numbers, true/false, null, [lists], {mappings} and "quoted text" as in YAML; all else is plain text.

    With the value come the keys within it, where it is a mapping.
    """
    if text[:1] in ("[", "{", '"', "'"):
        return _read_yaml(text)
    loader = _Loader("")
    return loader.construct_object(yaml.ScalarNode(_tag_of(loader, text), text)), ()


def _tag_of(loader: yaml.SafeLoader, text: str) -> str:
    """What unquoted text is taken for."""
    return str(loader.resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]


class _NotPlainData(Exception):  # noqa: N818  (becomes a ConfigError, once the place is known)
    """YAML that cannot be read, or that holds more than mappings, lists, text, numbers, true, false and null."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


_NOTHING = object()
"""A text without a value in it: empty, or comments only."""

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def _read_yaml(text: str, kind: type[yaml.SafeLoader] = _Loader) -> tuple[Any, dict[str, int]]:
    """The one document of a text as plain data (`_NOTHING` where there is none), and the line of each dotted key.

    Raises:
        _NotPlainData: with the line, counted from 1.
    """
    try:
        loader = kind(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return _NOTHING, {}
            lines: dict[str, int] = {}
            _check(loader, root, (), (), lines)
            return loader.construct_document(root), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _NotPlainData(f"not valid YAML: {error.problem or error}", mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotPlainData(f"not valid YAML: the character {chr(error.character)!r} is not allowed", line) from None


def _check(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    within: tuple[yaml.Node, ...],
    keys: tuple[str, ...] | None,
    lines: dict[str, int],
) -> None:
    """Refuse what is not plain data; note the line of each key that mappings alone lead to (`keys`; None in a list)."""
    line = node.start_mark.line + 1
    if node in within:
        raise _NotPlainData("not valid YAML here: a value cannot be part of itself", line)
    if node.tag not in _PLAIN_TAGS:
        name = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _NotPlainData(f"not valid YAML here: {name} is no kind of value a configuration can hold", line)
    if isinstance(node, yaml.MappingNode):
        _check_mapping(loader, node, (*within, node), keys, lines)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _check(loader, inner, (*within, node), None, lines)
    elif node.tag != "tag:yaml.org,2002:str":
        # Only an explicit tag can contradict the text: !!int foo
        if _tag_of(loader, node.value) not in (node.tag, _NARROWER.get(node.tag)):
            name = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise _NotPlainData(f"not valid YAML here: {node.value!r} is no {name}", line)


_NARROWER = {"tag:yaml.org,2002:float": "tag:yaml.org,2002:int"}


def _check_mapping(
    loader: yaml.SafeLoader,
    node: yaml.MappingNode,
    within: tuple[yaml.Node, ...],
    keys: tuple[str, ...] | None,
    lines: dict[str, int],
) -> None:
    own_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _NotPlainData("a key must be plain text", line)
        if key_node.tag != "tag:yaml.org,2002:str":
            raise _NotPlainData(f"{key_node.value}: a key must be text; quote it if it is meant", line)
        path = (*(keys or ()), key_node.value)
        if key_node.value in own_lines:
            first = own_lines[key_node.value]
            raise _NotPlainData(f"{'.'.join(path)} is stated twice (first in line {first}); keep one", line)
        own_lines[key_node.value] = line
        if keys is not None:
            lines[".".join(path)] = line
        _check(loader, value_node, within, path if keys is not None else None, lines)


def merge(lower: Layer, upper: Layer, exclusive: tuple[tuple[str, ...], ...] = ()) -> Layer:
    """Lay `upper` over `lower`, mappings key by key.

    `exclusive` names groups of dotted keys of which one replaces the others: setting `train.max_steps` above
    removes a `train.epochs` from below.
    """
    values = _merged(lower.values, upper.values)
    places = {**lower.places, **upper.places}
    for group in exclusive:
        stated_above = [key for key in group if get(upper.values, key) not in (NOTHING, None)]
        if not stated_above:
            continue
        for key in group:
            if key not in stated_above and key in lower.places:
                drop(values, key)
                del places[key]
    return Layer(values, places, lower.source)


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


class _Dumper(yaml.SafeDumper):
    """Quotes any text that YAML 1.2 or YAML 1.1 (other programs) would take for something else."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012  (PyYAML's own class attribute)
        first: [
            *_Loader.yaml_implicit_resolvers.get(first, []),
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*_Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }


def write_yaml(values: dict[str, Any]) -> str:
    """Plain data as a run file, which `read_run_file` reads back to the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


DEFAULT = "default"
"""The place of a value that is stated nowhere."""


def place_of(layer: Layer, key: str) -> str:
    """Where a key is stated; else a key within it; else the nearest section around it; else "default"."""
    within = (place for other, place in layer.places.items() if other.startswith(f"{key}."))
    names = key.split(".")
    around = (layer.places.get(".".join(names[:length])) for length in range(len(names) - 1, 0, -1))
    return layer.places.get(key) or next(within, None) or next(filter(None, around), DEFAULT)


def shown(value: Any) -> str:
    """A value as it would be written in a run file, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "…"
