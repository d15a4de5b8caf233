"""`shoal parity` by its real command: equal runs pass, a difference is found and is the exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.parity import Outcome, _beside
from launch.strategy import Strategy

ROOT = Path(__file__).parents[1]
OWN = Path(__file__).with_name("own_recipe.py")


def shoal(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user in `folder` does."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SHOAL_CACHE": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"recipe: {OWN}\ntrain: {{global_batch_size: 8, max_steps: 4}}\nparallel: {{device: cpu}}\n")
    return path


def verdicts(stdout: str) -> dict[tuple[str, str], str]:
    rows = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines()]
    return {(row[0], row[1]): row[-1] for row in rows if row[0] in set(map(str, Strategy))}


@pytest.mark.dist
@pytest.mark.slow
def test_equal_runs_are_told_so_and_compared_with_what_they_left(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "parity"
    done = shoal(
        tmp_path, "parity", str(run_file), "--strategies", "fsdp2,zero3", "--worlds", "1,2,3", "--out", str(out)
    )
    assert done.returncode == 8, done.stdout + done.stderr
    found = verdicts(done.stdout)
    assert found["single", "1"] == "reference"
    assert found["fsdp2", "2"] == found["zero3", "2"] == "same", done.stdout
    assert "does not divide over 3 processes" in done.stdout
    assert done.stderr.splitlines()[-1] == (f"shoal: not the same numbers: fsdp2 on 3, zero3 on 3; runs: {out}")
    assert {path.name for path in out.iterdir()} == {"single-1", "fsdp2-2", "zero3-2"}
    config = json.loads((out / "zero3-2/deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == 3

    # What one of them left is changed by hand, one thing after the other.
    one, other = out / "single-1", out / "fsdp2-2"
    assert _beside(Strategy.FSDP2, 2, other, one).equal
    metrics = other / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for changes, field in (
        ({"loss": lines[1]["loss"] + 1e-4}, "loss"),
        ({"learning_rate": 1.0}, "same_rates"),
        ({"consumed": 1}, "same_samples"),
    ):
        spoiled = [{**line, **changes} if position == 1 else line for position, line in enumerate(lines)]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in spoiled))
        outcome = _beside(Strategy.FSDP2, 2, other, one)
        assert not outcome.equal
        assert getattr(outcome, field) in (False, pytest.approx(1e-4, rel=0.1))
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert not _beside(Strategy.FSDP2, 2, other, one).equal, "an evaluation is missing"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change_one_weight(other / "export/model.safetensors")
    outcome = _beside(Strategy.FSDP2, 2, other, one)
    assert not outcome.equal and outcome.weight == pytest.approx(0.01, rel=0.1)


def change_one_weight(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    state = load_file(path)
    name = max(state)
    state[name] = state[name].copy()
    state[name].flat[0] += 0.01
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--strategies", "ddp,fsdp"],
            "command line: --strategies fsdp: no such strategy; there are ddp, fsdp2, fsdp2_offload, zero1, zero2, "
            "zero3, zero2_offload, zero3_offload",
        ),
        (["--worlds", "1,two"], "command line: --worlds 1,two: must be numbers of processes, such as 1,2,3"),
        (["--worlds", "0"], "command line: --worlds 0: must be numbers of processes, such as 1,2,3"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(
    arguments: list[str], message: str, run_file: Path, tmp_path: Path
) -> None:
    done = shoal(tmp_path, "parity", str(run_file), *arguments)
    assert (done.returncode, done.stderr) == (2, f"shoal: {message}\n")


def test_a_run_that_failed_is_not_equal() -> None:
    assert Outcome(Strategy.DDP, 2, loss=1e-6, weight=1e-6).equal
    assert not Outcome(Strategy.DDP, 2, problem="killed").equal


@pytest.mark.dist
@pytest.mark.slow
def test_the_cpu_twin_keeps_the_strategy_and_says_what_differs(run_file: Path, tmp_path: Path) -> None:
    planned = ["parallel.device=cuda", "parallel.devices=8", "parallel.strategy=fsdp2"]
    twin = ["--debug-cpu", "2", "--out", str(tmp_path / "twin")]
    # A variable left over from something else may not turn the run into another one.
    done = shoal(tmp_path, "run", str(run_file), *planned, *twin, FSDP_VERSION="1", ACCELERATE_USE_DEEPSPEED="true")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == (
        "shoal: not passed on from the environment, because the run file decides it: ACCELERATE_USE_DEEPSPEED, "
        "FSDP_VERSION"
    )
    start = lines.index("CPU twin of this run, strategy fsdp2; what differs:")
    assert lines[start + 1 : start + 4] == [
        "  parallel.device: cuda → cpu",
        "  parallel.devices: 8 → 2",
        "  communication: nccl → gloo",
    ]
    plan = json.loads((tmp_path / "twin/plan.json").read_text())["plan"]
    assert (plan["processes"]["strategy"], plan["processes"]["world_size"]) == ("fsdp2", 2)
