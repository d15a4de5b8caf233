"""Files with one mistake each: whatever is mistaken in a file of keys must be told, with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.source import write_yaml

Keys = tuple[str, ...]


def paths_of(values: dict[str, Any], around: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every key at every depth, and its value."""
    for name, value in values.items():
        yield (*around, name), value
        if isinstance(value, dict):
            yield from paths_of(value, (*around, name))


def with_change(values: dict[str, Any], path: Keys, name: str, value: Any) -> dict[str, Any]:
    """The same, in the same order, with another name and value where `path` leads."""
    first, *rest = path
    return {
        (name if key == first and not rest else key): (
            inner if key != first else with_change(inner, tuple(rest), name, value) if rest else value
        )
        for key, inner in values.items()
    }


def moved(values: dict[str, Any], path: Keys, section: Keys) -> dict[str, Any]:
    """The same, with the key that `path` leads to in another section."""
    result: dict[str, Any] = json.loads(json.dumps(values))
    origin = result
    for name in path[:-1]:
        origin = origin[name]
    value = origin.pop(path[-1])
    target = result
    for name in section:
        target = target.setdefault(name, {})
    target[path[-1]] = value
    return result


def typos(name: str) -> list[str]:
    """One from the middle of each kind, then each letter left out, and each two neighbours swapped.

    A name of one letter is doubled.
    """
    if len(name) == 1:
        return [name * 2]
    dropped = [name[:i] + name[i + 1 :] for i in range(len(name))]
    swapped = [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)]
    first = [dropped[len(name) // 2], swapped[(len(name) - 1) // 2]]
    return [typo for typo in dict.fromkeys([*first, *dropped, *swapped]) if typo != name]


def wrong_types(value: Any) -> list[Any]:
    """Values of another type, a number as text among them."""
    if isinstance(value, bool):
        return ["maybe", str(value).lower(), [True], 3]
    if isinstance(value, int | float):
        return [str(value), [value], {"a": value}, True, "many"]
    if value is None:
        return []  # of which the type is not known
    if value == "auto":
        return ["automatic", {"auto": True}]
    if isinstance(value, str):
        return [7, ["a"], {"a": "b"}, False]
    return [3, True, "3"] if isinstance(value, dict) else [3, True, {"a": 1}]


@dataclass
class Tally:
    """What is said about files with one mistake each."""

    read: Callable[[Path], Any]
    path: Path
    prefix: str = ""
    """What messages put in front of a key."""
    tried: int = 0
    right: int = 0
    """How many were answered with the key that was meant."""
    unnoticed: list[str] = field(default_factory=list)
    """Those that were not refused in one line with the right place, and what was said."""
    mistaken: list[str] = field(default_factory=list)
    """Those that were answered with no other key, or a wrong one."""

    @property
    def share(self) -> float:
        """Of those tried, how many were answered with the key that was meant."""
        return self.right / self.tried

    def try_values(self, values: dict[str, Any], at: Keys, meant: Keys | None = None) -> None:
        """Read `values`, of which the key `at` is a mistake, from a file with a key to a line."""
        text = self._dump(values)
        self.try_text(text, at, self._line(text, at), meant)

    def try_twice(self, values: dict[str, Any], at: Keys) -> None:
        """Read `values`, of which the key `at` is stated once more, with nothing, in the line before it."""
        text = self._dump(values)
        lines, number = text.splitlines(), self._line(text, at)
        again = " " * len(at) + f'"{at[-1]}": null,' if self._is_json else "  " * (len(at) - 1) + f"{at[-1]}: null"
        lines.insert(number - 1, again)
        rule = rf" is stated twice \(first in line {number}\); keep one"
        prefix, self.prefix = self.prefix, ""  # it is not known yet what the file is for
        self.try_text("\n".join(lines), at, number + 1, rule=rule)
        self.prefix = prefix

    def try_text(self, text: str, at: Keys, line: int, meant: Keys | None = None, rule: str = " = .+: .+") -> None:
        """Read a text, of which the key `at` in this line is a mistake; `rule` is what must be said of it."""
        self.path.write_text(text, encoding="utf-8")
        self.tried += 1
        key = self.prefix + ".".join(at)
        try:
            self.read(self.path)
            said = "nothing"
        except ConfigError as error:
            said = str(error)
            if re.fullmatch(re.escape(f"{self.path}:{line}: {key}") + rule, said):
                answers = re.split(r", | or ", said.rpartition("did you mean ")[2].removesuffix("?"))
                if meant and self.prefix + ".".join(meant) in answers:
                    self.right += 1
                else:
                    self.mistaken.append(said)
                return
        self.unnoticed.append(f"{key}: {said}")

    @property
    def _is_json(self) -> bool:
        return self.path.suffix == ".json"

    def _dump(self, values: dict[str, Any]) -> str:
        return json.dumps(values, indent=1) if self._is_json else write_yaml(values)

    def _line(self, text: str, at: Keys) -> int:
        """The line of a key; each deeper one is indented by one more (JSON) or two (YAML)."""
        lines, number = text.splitlines(), 0
        for depth, name in enumerate(at):
            start = " " * (depth + 1) + json.dumps(name) + ":" if self._is_json else "  " * depth + f"{name}:"
            number = next(n for n in range(number, len(lines)) if lines[n].startswith(start))
        return number + 1
