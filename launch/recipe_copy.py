"""Copies a recipe with its run file, as the beginning of a user's own."""

from __future__ import annotations

import re
from pathlib import Path

from launch.errors import ConfigError
from launch.registry import load_module


def copy_recipe(name: str, target: Path) -> Path:
    """Copy the module of a recipe to `target`, and its run file to one beside it that names it; the latter's path.

    Raises:
        ConfigError: no such recipe or folder, a name that is none for a module, or a file that is there already.
    """
    source = Path(load_module(name, "command line").__file__ or "")
    run_file = target.with_suffix(".yaml")
    if target.suffix != ".py":
        raise ConfigError(f"command line: {target}: a recipe is a Python file; name it {target.name or 'my_recipe'}.py")
    if not target.parent.is_dir():
        raise ConfigError(f"command line: {target}: there is no folder {target.parent}; make it first")
    for path in (target, run_file):
        if path.exists():
            raise ConfigError(f"command line: {path}: exists already, and is not overwritten; give another name")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    run_file.write_text(_renamed(source.with_suffix(".yaml"), target, run_file), encoding="utf-8")
    return run_file


def _renamed(source: Path, target: Path, run_file: Path) -> str:
    """The text of a run file that names `target` in place of the recipe beside `source`."""
    line = f"recipe: ./{target.name}"
    if not source.is_file():
        return f"{line}\n"
    text = source.read_text(encoding="utf-8").replace(f"recipes/{source.name}", run_file.name)
    return re.sub(r"^recipe:.*$", lambda _: line, text, count=1, flags=re.MULTILINE)
