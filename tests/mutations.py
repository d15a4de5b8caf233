"""Files with one mistake each: whatever is mistaken in a file of keys must be told, with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.errors import ConfigError

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


def typos(name: str) -> Iterator[str]:
    """A letter left out and two letters swapped, at three places each."""
    for i in {0, len(name) // 2, len(name) - 1}:
        yield name[:i] + name[i + 1 :]
    for i in {0, len(name) // 2, len(name) - 2}:
        yield name[:i] + name[i + 1] + name[i] + name[i + 2 :]


def wrong_types(value: Any) -> list[Any]:
    """Values of another type, a number as text among them."""
    if isinstance(value, bool):
        return ["maybe", [True], 3]
    if isinstance(value, int | float):
        return [str(value), [value], True]
    if value == "auto":
        return ["automatic", {"auto": True}]
    if isinstance(value, str):
        return [7, ["a"], False]
    return [3, True] if isinstance(value, list | dict) else []


class Mutations:
    """Counts what is said about files with one mistake each."""

    def __init__(
        self,
        read: Callable[[Path], Any],
        path: Path,
        dump: Callable[[dict[str, Any]], str],
        start: Callable[[int, str], str],
    ) -> None:
        """`dump` writes one key per line, which begins with `start` of its depth (counted from 1) and name."""
        self._read, self._path, self._dump, self._start = read, path, dump, start
        self.tried = 0
        self.right = 0
        """How many were answered with the key that was meant."""
        self.unnoticed: list[Keys] = []
        """Those that were not refused in one line with the right place."""

    def try_one(self, values: dict[str, Any], at: Keys, meant: str | None = None) -> None:
        """Read `values`, of which the key `at` is a mistake."""
        text = self._dump(values)
        self._path.write_text(text, encoding="utf-8")
        self.tried += 1
        try:
            self._read(self._path)
        except ConfigError as error:
            lines = str(error).splitlines()
            where = f"{self._path}:{self._line(text, at)}: {'.'.join(at)} = "
            if len([line for line in lines if line.startswith(where)]) == len(lines) == 1:
                self.right += lines[0].endswith(f"did you mean {meant}?")
                return
        self.unnoticed.append(at)

    def _line(self, text: str, at: Keys) -> int:
        lines, number = text.splitlines(), 0
        for depth, name in enumerate(at, start=1):
            start = self._start(depth, name)
            number = next(n for n in range(number, len(lines)) if lines[n].startswith(start))
        return number + 1
