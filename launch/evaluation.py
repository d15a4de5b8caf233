"""Evaluates a run again, without training: its final model, or one of its checkpoints, on any processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import local
from launch.checkpoint_export import choose
from launch.errors import EndedError, RunFolderError
from launch.plan import Plan, decide
from launch.record import create_run_folder, held, is_finished, read_json, read_plan, refuse_results
from launch.topology import World

EXPORT = "export"
"""What the final model of a finished run is called among its checkpoints."""


def evaluate(
    run: Path, which: str | None, data: list[str], overrides: list[str], out: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate a run's model; what came out.

    `which` is `export`, `newest`, `best` or the name of a checkpoint; None: the final model, or of a run that is not
    finished the newest checkpoint. `data` are files to evaluate on in place of the validation data.

    Raises:
        LaunchError: there are no such weights, settings or data, or the workers did not end well.
    """
    run, which = _named(run, which)
    weights = _weights(run, which)
    stated = (
        [f"recipe_args.validation_files={json.dumps([str(Path(path).absolute()) for path in data])}"] if data else []
    )
    folder = out or run / "eval" / f"{weights.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if weights.name == EXPORT and read_plan(run).config.recipe_args.get("lora") is not None:
        stated.append("recipe_args.lora=null")  # what is exported is merged
    decided = decide(str(run / "run.yaml"), [*stated, *overrides], folder, World(), evaluates=True)
    plan = _with_weights(decided.plan, weights)
    refuse_results(folder)
    with held(create_run_folder(plan)):
        say(f"evaluating {weights}")
        ending = local.run(plan, folder, restarts=False)
    if ending.exit_code:
        if ending.traceback:
            say(ending.traceback)
        raise EndedError(ending.message, ending.exit_code)
    result: dict[str, Any] = read_json(folder / "result.json")
    return result


def _named(run: Path, which: str | None) -> tuple[Path, str | None]:
    """The run and its checkpoint, where the folder of a checkpoint was given."""
    if run.parent.name == "checkpoints" and not (run / "plan.json").is_file():
        return run.parent.parent, which or run.name
    return run, which


def _weights(run: Path, which: str | None) -> Path:
    read_plan(run)  # which says what is wrong where this is no run
    export = run / EXPORT
    if which == EXPORT or (which is None and is_finished(run) and export.is_dir()):
        if not export.is_dir():
            raise RunFolderError(f"{run}: has no export/ (yet); choose another --checkpoint, such as newest")
        return export.absolute()
    return choose(run, which or "newest").absolute()


def _with_weights(plan: Plan, weights: Path) -> Plan:
    return plan.model_copy(update={"command": (*plan.command, "--weights", str(weights))})
