"""Checks what metrics are told beyond the rows, before anything is started and without any heavy import."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.errors import ConfigError
from launch.nearest import listed, nearest_keys
from recipes import metrics

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "None": ((type(None),), "null"),
}


def check_options(names: Sequence[str], options: Mapping[str, Mapping[str, Any]], key: str) -> None:
    """See that options go with a metric that is asked for, which takes them; `key` is where they were stated.

    Only what the file of a metric says can be checked: of one on the Hub nothing is known yet.

    Raises:
        ConfigError: one line for each that is wrong.
    """
    lines = [line for name, given in options.items() for line in _problems(names, name, given, key)]
    if lines:
        raise ConfigError("\n".join(lines))


def _problems(names: Sequence[str], name: str, given: Mapping[str, Any], key: str) -> Iterator[str]:
    at = f"{key}.{name}"
    if name not in names:
        near = nearest_keys(at, [f"{key}.{each}" for each in names], [])
        hint = f"did you mean {listed(near)}?" if near else f"there are {', '.join(names) or 'none'}"
        yield f"{at} = {json.dumps(given)}: is not among the metrics; {hint}"
        return
    taken = _taken(name)
    if taken is None:
        return
    for option, value in given.items():
        head = f"{at}.{option} = {json.dumps(value)}: "
        if option not in taken:
            near = nearest_keys(f"{at}.{option}", [f"{at}.{each}" for each in taken], [])
            allowed = f"{name} has {', '.join(taken)}" if taken else f"{name} has none"
            yield head + "unknown option; " + (f"did you mean {listed(near)}?" if near else allowed)
        elif rule := _broken_rule(taken[option], value):
            yield head + f"must be {rule}"


def _taken(name: str) -> dict[str, ast.expr | None] | None:
    """The options of a metric and their kinds; None where that is not known, or it takes any."""
    path = metrics.file_of(name)
    if path is None:
        return None
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "_compute":
            if node.args.kwarg:
                return None
            arguments = [*node.args.args, *node.args.kwonlyargs]
            return {
                each.arg: each.annotation for each in arguments if each.arg not in ("self", "predictions", "references")
            }
    return None


def _broken_rule(annotation: ast.expr | None, value: Any) -> str | None:
    """What a value must be, and is not; None too where the annotation does not say."""
    members = _members(annotation) if annotation else []
    rules = []
    for member in members:
        text = ast.unparse(member)
        if text.startswith("Literal["):
            words = ast.literal_eval(f"({text[8:-1]},)")
            if value in words:
                return None
            rules.append(listed([repr(word) for word in words]))
        elif text in _KINDS:
            kinds, rule = _KINDS[text]
            if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
                return None
            rules.append(rule)
        else:
            return None
    return listed(rules) if rules else None


def _members(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return [*_members(annotation.left), *_members(annotation.right)]
    return [annotation]
