"""The run folder: what a run was, what it did, how it ended. The only thing that goes from launcher to worker.

run.yaml        the resolved configuration, itself a run file
deepspeed.json  DeepSpeed's configuration, where it is used
accelerate.yaml starts the same workers by plain `accelerate launch`
plan.json       the plan, and where it was made: versions, git commit, environment (without secrets)
logs/           rank-N.log, one per process
metrics.jsonl   one object a line
wandb.json      id and team of the run in Weights & Biases; wandb/: the run, where it was offline
tensorboard/    event files; mlflow.json, trackio.json: how far the run was sent there
checkpoints/    step-000100/ …
report.html     the page about it, by the launcher
profile/        traces of updates; memory-rank-N.json: what held the memory of rank N when it ran out
export/         the trained model as a Hugging Face folder
adapter/        where adapters were trained, these alone
result.json     how it ended well
stopped.json    which signal stopped it, and after which update
failure-N.json  how rank N failed; failure.json: why the run has
attempts/       logs and endings of earlier starts
job.sbatch      the script of a SLURM job; slurm-N.log: what it says
submitted.json  the jobs that were submitted; slurm.json: each start of one
.lock           held by the launcher that works on it
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from launch.assets import code_root
from launch.config import dump_yaml
from launch.disk import size_in_words
from launch.errors import RunFolderError
from launch.plan import Plan, as_json
from launch.render import accelerate_yaml
from launch.resume import harmless_changes
from launch.secret import argument_without_secrets
from launch.topology import recorded_environment
from launch.versions import versions


def create_run_folder(plan: Plan) -> Path:
    """Make the folder of a plan and write down what was decided. Never touches a folder with something in it.

    Raises:
        RunFolderError: the folder holds something already, or cannot be written.
    """
    folder = Path(plan.run_folder)
    try:
        refuse_results(folder)
        (folder / "logs").mkdir(parents=True)
        _write_down(plan, folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def continue_run_folder(plan: Plan) -> list[str]:
    """Write down what was decided for another start of the run in its folder; the settings that have changed.

    Raises:
        RunFolderError: the folder cannot be written.
        ConfigError: the run was begun with settings that mean other numbers.
    """
    folder = Path(plan.run_folder)
    changed = changed_settings(plan)
    try:
        put_aside(folder)
        _write_down(plan, folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return changed


def _write_down(plan: Plan, folder: Path) -> None:
    write_text(folder / "run.yaml", dump_yaml(plan.config))
    if plan.deepspeed is not None:
        write_json(folder / "deepspeed.json", plan.deepspeed)
    write_text(folder / "accelerate.yaml", accelerate_yaml(plan))
    write_json(folder / "plan.json", {"plan": as_json(plan), **surroundings()})


def _unwritable(folder: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{folder}: the run folder cannot be written: {error.strerror or error}")


def is_run_folder(folder: Path) -> bool:
    """Whether a run was begun there."""
    return (folder / "plan.json").is_file()


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has ended well."""
    return (folder / "result.json").is_file()


def changed_settings(plan: Plan) -> list[str]:
    """What is set otherwise than at the last start of the run in the folder of this plan, `key: old → new`.

    Raises:
        ConfigError: the run was begun with settings that mean other numbers.
    """
    before = read_plan(Path(plan.run_folder)).config.model_dump(mode="json")
    return harmless_changes(f"{plan.run_folder}: was begun", before, plan.config)


def put_aside(folder: Path) -> None:
    """Move what belongs to an earlier start alone, logs, endings, what held the memory, and plan, into attempts/N/."""
    logs = folder / "logs"
    told = [*folder.glob("failure*.json"), *folder.glob("stopped.json"), *folder.glob("profile/memory-rank-*")]
    if not told and not (logs.is_dir() and any(logs.iterdir())):
        return
    attempts = folder / "attempts"
    aside = attempts / str(1 + len(list(attempts.iterdir())) if attempts.is_dir() else 1)
    aside.mkdir(parents=True)
    for path in [*told, logs]:
        path.replace(aside / path.name)
    shutil.copy2(folder / "plan.json", aside / "plan.json")
    logs.mkdir()


def refuse_results(folder: Path) -> None:
    """See that a folder for results holds none yet.

    Raises:
        RunFolderError: there is something in it.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder}: is not empty, and a run is never overwritten; choose another --out")


def lock(folder: Path) -> FileLock:
    """Keep others from working on a run folder, until the lock is released or this process has ended.

    Raises:
        RunFolderError: one does already, or the folder cannot be written.
    """
    mine = FileLock(folder / ".lock")
    try:
        mine.acquire(blocking=False)
    except Timeout:
        raise RunFolderError(
            f"{folder}: another launcher works on it (and holds {folder / '.lock'}); wait for its end, or stop it"
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from None
    return mine


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the `lock` of a run folder.

    Raises:
        RunFolderError: another launcher does, or the folder cannot be written.
    """
    mine = lock(folder)
    try:
        yield
    finally:
        mine.release()


def read_plan(folder: Path) -> Plan:
    """The plan a run folder was made from.

    Raises:
        RunFolderError: the folder is not one of a run.
    """
    path = folder / "plan.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["plan"]
        return Plan.model_validate_json(json.dumps(content))  # from JSON, strict mode takes a list for a tuple
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: is not a run folder (no plan.json in it)") from None
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None


def model_folder(run: Path, *, adapter: bool = False) -> Path:
    """The exported model of a run folder, or the folder itself where it is a Hugging Face model.

    With `adapter`, that of the adapter alone, which is used with the model that it was trained for.

    Raises:
        RunFolderError: there is no model.
    """
    if adapter:
        if (run / "adapter/adapter_config.json").is_file():
            return run / "adapter"
        raise RunFolderError(f"{run}: has no adapter/; runs with recipe_args.lora write one. Leave --adapter out")
    for folder in (run / "export", run):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    state = "this run has exported no model (yet)" if (run / "plan.json").is_file() else "no such run or model folder"
    raise RunFolderError(f"{run}: {state}; give a finished run folder, as printed by `shoal run`")


def summary(result: dict[str, Any]) -> str:
    """The last words of a run, for people."""
    lines = []
    validation = result["validation"]
    for name in validation["after"]:
        values = [f"{validation[when][name]:,.4f}" for when in ("before", "after") if when in validation]
        lines.append(f"validation {name}: {' → '.join(values)}")
    if result.get("sample"):
        lines.append(f"sample: {result['sample']!r}")
    if "export" in result:
        lines.append(f"model: {result['export']} (reloaded and checked)")
    if "adapter" in result:
        lines.append(f"adapter alone: {result['adapter']} (reloaded and checked)")
    if spent := result.get("seconds"):
        lines.append(f"time: {shares(spent)}")
    if peaks := [peak for peak in result.get("peak_memory", ()) if peak]:
        planned = result.get("planned_memory")
        told = f"; planned {size_in_words(planned)}" if planned else ""
        lines.append(f"memory: {size_in_words(max(peaks))} for the fullest process at its peak{told}")
    lines.append(f"run folder: {result['run_folder']}")
    return "\n".join(lines)


def shares(seconds: dict[str, float]) -> str:
    """What took how much of the time, the most first; what took less than half a percent is left out."""
    whole = sum(seconds.values()) or 1.0
    parts = sorted(((spent / whole, what) for what, spent in seconds.items()), reverse=True)
    return ", ".join(f"{what} {100 * share:.0f} %" for share, what in parts if share >= 0.005)


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write whole or not at all: aside, then renamed."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(content, encoding="utf-8")
    aside.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def surroundings() -> dict[str, Any]:
    """Where and with what a command runs: versions, git commit, arguments and environment without secrets."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "arguments": [argument_without_secrets(argument) for argument in sys.argv],
        "versions": versions(),
        "git": _git_commit(code_root()),
        "environment": recorded_environment(),
    }


def _git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout the code runs from, and whether files differ from it; None outside a checkout."""
    if not (folder / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "modified": bool(status.strip())}
