"""How rank 0 finishes a run: what was exported is checked in a fresh process, and the result is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ExportError
from launch.follower import ARTIFACT_SECONDS, END_SECONDS
from launch.model_card import facts_of, write_card
from launch.plan import python_environment
from launch.record import summary, write_json
from launch.stop import ignore_signals
from launch.topology import is_supervised, worker_environment
from launch.versions import versions

if TYPE_CHECKING:
    from launch.engine.run import Run


def finish(run: Run) -> None:
    """Check the export in a fresh process and write the result. Rank 0; the others may have left.

    Raises:
        ExportError: the exported model is not the trained one; there is no result then.
    """
    assert run.tracker is not None, "rank 0 has a tracker"
    result = run.result()
    if run.plan.config.save.export:
        run.display.say("checking the export in a fresh process")
        answer = check_export(run)
        run.tracker.write("export", run.updates_done, difference=answer["difference"])
        result |= answer
        for folder in filter(None, (answer["export"], answer.get("adapter"))):
            write_card(Path(folder), facts_of(Path(folder), run.plan, result, versions()))
    result["summary"] = summary(result)
    write_json(run.folder / "result.json", result)
    run.tracker.close(ARTIFACT_SECONDS if run.plan.config.track.artifacts else END_SECONDS)
    if not is_supervised():
        print(result["summary"], flush=True)


def check_export(run: Run) -> dict[str, Any]:
    """Load what was exported in fresh processes, the adapter alone too where there is one; what to tell of it."""
    from launch.engine.export import has_adapters

    export, adapter, probe = run.folder / "export", run.folder / "adapter", run.folder / "probe.safetensors"
    prompt, found = run.prepared.sample_prompt or "", {"export": str(export)}
    if has_adapters(run.model):
        _check(run, adapter, probe, "")
        found["adapter"] = str(adapter)
        answer = _check(run, export, probe, prompt, str(adapter))
    else:
        answer = _check(run, export, probe, prompt)
    probe.unlink()
    return {**found, **answer}


def _check(run: Run, folder: Path, probe: Path, *more: str) -> dict[str, Any]:
    """Have a folder checked against the probe; `more` is what else the process takes."""
    from launch.engine.exported import BF16_TOLERANCE, TOLERANCE

    plan = run.plan
    # A sharded model cannot leave bf16 for its last forward pass; any other compares in fp32.
    in_bf16 = plan.config.train.precision == "bf16" and plan.processes.strategy.shards
    tolerance = BF16_TOLERANCE if in_bf16 else TOLERANCE
    command = [sys.executable, "-m", "launch.engine.exported", "check", str(folder), str(probe)]
    device = run.accelerator.device.type
    # A TPU is one process's alone, and each length of the sample would be compiled for.
    command += ["cpu" if device == "xla" else device, *more]
    environment = worker_environment(python_environment() | {"USE_TORCH_XLA": "0"})
    checked = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, preexec_fn=ignore_signals
    )
    if checked.returncode:
        raise ExportError(f"{folder}: does not load again:\n{checked.stderr.strip()}")
    answer: dict[str, Any] = json.loads(checked.stdout.splitlines()[-1])
    if unlike := answer.pop("unlike"):
        shown = ", ".join(unlike[:3]) + (f" and {len(unlike) - 3} more" if len(unlike) > 3 else "")
        raise ExportError(
            f"{folder}: weights of the trained model are missing in it, or are others: {shown}; both are kept for "
            f"inspection, see {probe.name}"
        )
    if untied := answer.pop("untied"):
        raise ExportError(f"{folder}: weights tied in the trained model no longer are: {', '.join(untied)}")
    # `not <=`: a difference that is not a number is a failure too.
    if not answer["difference"] <= tolerance:
        raise ExportError(
            f"{folder}: the reloaded model's logits differ from the trained model's by {answer['difference']:.2e} "
            f"(allowed {tolerance:.0e}); both are kept for inspection, see {probe.name}"
        )
    return answer
