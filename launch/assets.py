"""Finds the files shipped beside the code, in a wheel, an editable install or a bare checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def code_root() -> Path:
    """The folder that holds the packages `launch` and `recipes`."""
    return _PACKAGE.parent


def shipped_folder(name: str) -> Path:
    """`accelerate_configs`, `ds_configs` or `slurm`: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / "_assets" / name
    return inside if inside.is_dir() else code_root() / name


def recipes_folder() -> Path:
    """The package of shipped recipes and their run files."""
    return code_root() / "recipes"
