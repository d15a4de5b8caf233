"""Builds the model of a checkpoint that holds what was trained alone once more, through its recipe, and exports it.

python -m launch.rebuild CHECKPOINT FOLDER merged|adapter

Prints one JSON object: `problem`, or how much was written and compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launch.errors import LaunchError
from launch.prepare import prepare
from launch.record import read_plan
from launch.registry import recipe_of


def main(arguments: list[str]) -> None:
    """Answer one call from the command line."""
    checkpoint, folder, what = Path(arguments[0]), Path(arguments[1]), arguments[2]
    try:
        answer: dict[str, Any] = {"problem": None, **_export(checkpoint, folder, adapter=what == "adapter")}
    except LaunchError as error:
        answer = {"problem": str(error)}
    except OSError as error:
        answer = {"problem": f"{folder}: cannot be written: {error.strerror or error}"}
    print(json.dumps(answer))


def _export(checkpoint: Path, folder: Path, *, adapter: bool) -> dict[str, Any]:
    from accelerate.utils import set_seed

    from launch.engine.from_adapted import export
    from launch.engine.progress import Display

    config = read_plan(checkpoint.parent.parent).config
    prepared, _ = prepare(recipe_of(config), config, Display(False))
    set_seed(config.train.seed)
    return export(checkpoint, prepared.build_model(), prepared.tokenizer, folder, adapter=adapter)


if __name__ == "__main__":
    main(sys.argv[1:])
