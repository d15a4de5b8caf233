"""Imports a recipe that is a file of the user's, and says in one line what is wrong with it."""

from __future__ import annotations

import ast
import importlib.util
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType

from launch.errors import ConfigError, LaunchError
from launch.printing import complain

HEAVY = ("torch", "transformers", "datasets", "accelerate")
"""What takes seconds to import, and what no command that only plans needs."""


def import_file(path: Path, place: str) -> ModuleType:
    """The module in a file. It may import other files beside it, now and later, here and in data workers.

    Raises:
        ConfigError: no such file, or it cannot be imported. The traceback of what is not plainly a slip goes to stderr.
    """
    if not path.is_file():
        raise ConfigError(f"{place}: recipe = {path}: no such file")
    path = path.absolute()
    _refuse_hidden_files(path)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that no file there hides a package from anybody else
    name = f"shoal_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling its samples to data workers needs it there
    before, start = set(sys.modules), time.perf_counter()
    try:
        spec.loader.exec_module(module)
    except LaunchError:
        raise
    except (Exception, SystemExit) as error:
        if not isinstance(error, (SyntaxError, ImportError)):
            traceback.print_exception(type(error), error, _from_file_on(error.__traceback__, path))
        # Some versions of Python give `sys.exit()` a code, others none.
        words = "" if isinstance(error, SystemExit) else str(error)
        what = f"{type(error).__name__}: {words}".removesuffix(": ")
        raise ConfigError(f"{_place_of(error, path)}: the recipe cannot be imported: {what}") from error
    if heavy := [package for package in HEAVY if package in set(sys.modules) - before]:
        complain(
            f"{path}: to import it takes {time.perf_counter() - start:.1f} s each time, because {heavy[0]} is imported "
            "at the top; import it inside the functions that use it"
        )
    return module


def _refuse_hidden_files(path: Path) -> None:
    """See that a file beside the recipe that it imports by name is the one it gets, and not a package of that name.

    Raises:
        ConfigError: names the line of the import and the file to be renamed.
    """
    for name, line in _imported(path):
        mine = next((file for file in (path.with_name(f"{name}.py"), path.parent / name) if file.exists()), None)
        spec = importlib.util.find_spec(name) if mine else None
        if mine is None or spec is None:
            continue
        found = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        if not any(Path(each).absolute().is_relative_to(mine) for each in found):
            raise ConfigError(
                f"{path}:{line}: `import {name}` gives {', '.join(found)} and not {mine}, which has the same name; "
                "rename yours"
            )


def _imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names that a file imports anywhere in it, and the line of each; none of what Python cannot read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # importing it will tell
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0], node.lineno


def _place_of(error: BaseException, path: Path) -> str:
    """The innermost line, of the recipe or of a file beside it, at which importing came to its end."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{frame.filename}:{frame.lineno}" for frame in frames if Path(frame.filename).parent == path.parent]
    return own[-1] if own else str(path)


def _from_file_on(trace: TracebackType | None, path: Path) -> TracebackType | None:
    """The part of a traceback that is not the business of whoever imports."""
    while trace and trace.tb_frame.f_code.co_filename != str(path):
        trace = trace.tb_next
    return trace
