"""Prepares the data of a run into the cache: for the workers, and by itself as a job for a machine without devices.

python -m launch.prepare [--json] FILE [key=value …]    (what `shoal prepare` becomes)
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from launch.cache import Cache
from launch.config import load
from launch.errors import ConfigError, DataError, LaunchError
from launch.printing import complain
from launch.recipe import MULTIPLE, Prepared, Progress, RecipeContext, Samples, Stream
from launch.registry import Recipe, find_run_file, load_recipe
from launch.schedule import check_stream
from launch.sections import RunConfig
from launch.stop import StopRequest, StopSignal, exit_code, spoken, uncovered
from launch.topology import cache_folder

if TYPE_CHECKING:
    from launch.engine.progress import Display


def prepare(
    recipe: Recipe, config: RunConfig, display: Display, buckets: int | None = None, multiple: int = MULTIPLE
) -> tuple[Prepared, Cache]:
    """Prepare what is not in the cache yet, and look at it. Needs no process group: waiting is for a file here.

    `buckets` and `multiple` say to what widths batches are padded, as `RecipeContext` has it, where there will be any.

    Raises:
        LaunchError: the data cannot be had, or is none.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    display.say(f"preparing {config.recipe}")
    cache = Cache(cache_folder(), display.say)
    progress = Progress(display.start, display.advance, display.finish)
    prepared = recipe.prepare(RecipeContext(cache, config.train.seed, progress, buckets, multiple))
    check_data(config, prepared)
    return prepared, cache


def check_data(config: RunConfig, prepared: Prepared) -> None:
    """Look at the data as far as no sample need be read.

    Raises:
        ConfigError: it is no data, or the length of the run depends on that of a stream.
        DataError: there is no sample.
    """
    from launch.engine.streams import is_stream

    for name, data in (("training", prepared.train), ("validation", prepared.validation)):
        if not is_stream(data):
            if not len(data):
                raise DataError(f"recipe = {config.recipe}: its {name} data holds no sample")
        elif not hasattr(data, "__iter__") or hasattr(data, "__next__"):
            raise ConfigError(
                f"recipe = {config.recipe}: its {name} data is a {type(data).__name__}; it must have __len__ and "
                "__getitem__, or an __iter__ that begins with the first sample each time it is called"
            )
    if is_stream(prepared.train):
        check_stream(config)


# --- by itself -------------------------------------------------------------------------------------------


def main() -> None:
    """Prepare, and say what is there."""
    arguments = _read_arguments(sys.argv[1:])

    def work() -> str:
        found, prepared = _prepare_file(arguments.file, arguments.overrides)
        if arguments.look:
            return _look(prepared, as_json=arguments.json, in_colour=arguments.colour)
        return json.dumps(found) if arguments.json else _in_words(found)

    answer(work)


def answer(work: Callable[[], str]) -> None:
    """Print what `work` returns, alone on stdout; or end with the exit code of its failure."""
    StopRequest().install()
    results = _keep_stdout_for_results()
    try:
        with uncovered():
            found = work()
    except LaunchError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except StopSignal as stopped:
        complain(f"stopped by {spoken(stopped.number)}; what was not finished is not kept")
        sys.exit(exit_code(stopped.number))
    print(found, file=results, flush=True)


def _read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.prepare", description="Prepares the data of a run.")
    parser.add_argument("file", metavar="FILE", help="a run file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of the run file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--look", action="store_true", help="look at the data, and show the first samples")
    parser.add_argument("--colour", action="store_true", help="with --look: for a terminal")
    return parser.parse_args(arguments)


def _keep_stdout_for_results() -> IO[str]:
    """Send what anything else prints to stderr, at the level of file descriptors; where results go now."""
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return results


def _look(prepared: Prepared, *, as_json: bool, in_colour: bool) -> str:
    """What the data look like, all of them, and the first samples."""
    from launch.engine.preflight import look, preview

    found = look(prepared)
    if as_json:
        return json.dumps(found.as_json())
    shown = io.StringIO()
    console = Console(file=shown, highlight=False, soft_wrap=True, force_terminal=in_colour)
    for line in [*found.lines(), "", *preview(prepared)]:
        console.print(line, markup=False)
    return shown.getvalue().rstrip()


def _prepare_file(file: str, overrides: list[str]) -> tuple[dict[str, Any], Prepared]:
    """Prepare the data of a run file, whatever devices it asks for; what is there now."""
    loaded = load(find_run_file(file), overrides)
    recipe = load_recipe(loaded)
    recipe.preview(RecipeContext(Cache(cache_folder()), loaded.config.train.seed))  # what it finds wrong, it finds soon
    from launch.engine.progress import Display

    display = Display(True)
    try:
        prepared, cache = prepare(recipe, loaded.config, display)
    finally:
        display.close()
    found = {
        "recipe": loaded.config.recipe,
        "samples": {"train": _size(prepared.train), "validation": _size(prepared.validation)},
        "cache": str(cache.root),
        "folders": [str(folder) for folder in cache.folders],
        "prepared": [str(folder) for folder, by_us in cache.folders.items() if by_us],
    }
    return found, prepared


def _size(data: Samples | Stream) -> int | None:
    """None for a stream, of which only the end tells."""
    from launch.engine.streams import is_stream

    return None if is_stream(data) else len(data)


def _in_words(found: dict[str, Any]) -> str:
    samples = {name: "a stream" if size is None else f"{size:,}" for name, size in found["samples"].items()}
    if found["prepared"]:
        done = ", ".join(found["prepared"])
    elif found["folders"]:
        done = f"nothing, all was there: {', '.join(found['folders'])}"
    else:
        done = f"nothing to keep: {found['recipe']} uses no cache"
    return "\n".join(
        [
            f"training samples: {samples['train']}",
            f"validation samples: {samples['validation']}",
            f"cache: {found['cache']}",
            f"prepared: {done}",
        ]
    )


if __name__ == "__main__":
    main()
