"""Labelled text that needs no download: docstrings of Python's own standard library, each with the area it is from.

Every CPython carries them; their wording differs a little between versions. The areas are eight that all versions have.
Files are read and parsed, never imported.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.errors import DataError
from recipes.rows import EmbeddedRows

AREAS = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
"""Packages whose docstrings are read; their names are the labels."""

SHORTEST = 40
"""Characters of a docstring that says enough to tell where it is from."""

_TESTS = {"test", "tests"}


def _rows() -> Iterator[dict[str, Any]]:
    """Rows `{"text": docstring, "label": area}`, each docstring once.

    Raises:
        DataError: this Python came without the source of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for area in AREAS:
        for path in sorted((library / area).rglob("*.py")):
            if _TESTS & set(path.relative_to(library).parts):
                continue
            for docstring in _docstrings(path):
                if len(docstring) >= SHORTEST and docstring not in seen:
                    seen.add(docstring)
                    yield {"text": docstring, "label": area}
    if not seen:
        raise DataError(
            f"{library}: holds no docstrings, the text of the embedded default (a Python without its source files); "
            "install the full standard library, or set recipe_args.train_files"
        )


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


DOCSTRINGS = EmbeddedRows("docstrings", {"python": list(sys.version_info[:3]), "version": 1}, _rows)
"""About 2,160 rows of eight labels."""
