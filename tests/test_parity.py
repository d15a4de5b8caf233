"""`shoal parity` by its real command: equal runs pass, a difference is found and is the exit code; what it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from launch.cli_proofs import _strategies, _world_sizes
from launch.parity import NOTHING_TO_COMPARE_WITH, TOLERANCES, Outcome, _beside, _progress, cases
from launch.parity_plot import COLOURS, _draw_differences, draw, floor_of
from launch.parity_report import as_json
from launch.strategy import Strategy
from tests.commands import ROOT, shoal

LOSS = TOLERANCES["fp32"].loss
OWN = Path(__file__).with_name("own_recipe.py")


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
        tmp_path, "parity", str(run_file), "--strategies", "fsdp2, zero3", "--worlds", "1,2,2,3", "--out", str(out)
    )
    assert done.returncode == 8, done.stdout + done.stderr
    found = verdicts(done.stdout)
    assert found["single", "1"] == "reference"
    assert found["fsdp2", "2"] == found["zero3", "2"] == "same", done.stdout
    assert "does not divide over 3 processes" in done.stdout
    assert done.stderr.splitlines()[-1] == (f"shoal: not the same numbers: fsdp2 on 3, zero3 on 3; runs: {out}")
    assert {path.name for path in out.iterdir()} == {"single-1", "fsdp2-2", "zero3-2", "parity.json", "parity.png"}
    assert done.stdout.splitlines()[-3:] == [f"plot: {out}/parity.png", f"data: {out}/parity.json", f"runs: {out}"]
    assert re.findall(r"^\d/5  \S+ on \d", done.stderr, re.MULTILINE) == [
        *("1/5  single on 1", "2/5  fsdp2 on 2", "3/5  zero3 on 2", "4/5  fsdp2 on 3", "5/5  zero3 on 3")
    ]
    assert re.search(r"^5/5 .* \(\d+ s a case, about \d+ s left\)$", done.stderr, re.MULTILINE)
    check_report(out)
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


def check_report(out: Path) -> None:
    """What is told of the runs is what they recorded."""
    report = json.loads((out / "parity.json").read_text())
    assert [(each["strategy"], each["world_size"], each["verdict"]) for each in report["outcomes"]] == [
        ("single", 1, "reference"),
        *(
            (strategy, size, verdict)
            for size, verdict in ((2, "same"), (3, "failed"))
            for strategy in ("fsdp2", "zero3")
        ),
    ]
    single, fsdp2, *_, failed = report["outcomes"]
    recorded = [
        [json.loads(line)["loss"] for line in (out / name / "metrics.jsonl").open() if '"train"' in line]
        for name in ("single-1", "fsdp2-2")
    ]
    assert [single["training_losses"], fsdp2["training_losses"]] == recorded
    assert fsdp2["updates"] == list(range(1, 13))
    assert fsdp2["training_loss_differences"] == [abs(a - b) for a, b in zip(*recorded, strict=True)]
    assert fsdp2["loss_difference"] >= max(fsdp2["training_loss_differences"])
    assert "does not divide over 3 processes" in failed["problem"] and failed["updates"] == []
    assert report["tolerances"] == {"loss": 1e-5, "weight": 1e-4, "metric": 1e-5}
    assert report["complete"] and {"torch", "accelerate"} <= set(report["versions"])
    assert report["arguments"][1] == "parity"
    assert report["config"]["train"]["global_batch_size"] == 8 and report["config"]["recipe_args"]["width"] == 16


def change_one_weight(path: Path) -> None:
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
            "zero3, zero2_offload, zero3_offload, xla",
        ),
        (["--worlds", "1,two"], "command line: --worlds 1,two: must be numbers of processes, such as 1,2,3"),
        (["--worlds", "0"], "command line: --worlds 0: must be numbers of processes, such as 1,2,3"),
        (
            ["--worlds", "2", "--strategies", "ddp"],
            "command line: --strategies ddp --worlds 2: is one run, with none to compare; use --worlds 1,2",
        ),
        (["train.max_step=1"], "command line: train.max_step = 1: unknown key; did you mean train.max_steps?"),
        (
            ["recipe_args.width=0"],
            "command line: recipe_args.width = 0: must be greater than or equal to 1",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(
    arguments: list[str], message: str, run_file: Path, tmp_path: Path
) -> None:
    done = shoal(tmp_path, "parity", str(run_file), *arguments)
    assert (done.returncode, done.stderr) == (2, f"shoal: {message}\n")


def test_results_are_never_overwritten(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "parity"
    out.mkdir()
    (out / "parity.json").write_text("precious")
    done = shoal(tmp_path, "parity", str(run_file), "--out", str(out))
    assert (done.returncode, done.stderr) == (
        5,
        f"shoal: {out}: is not empty, and a run is never overwritten; choose another --out\n",
    )
    assert (out / "parity.json").read_text() == "precious"


def test_lists_may_have_spaces_and_say_a_thing_twice() -> None:
    assert _strategies("ddp, zero2,ddp ") == [Strategy.DDP, Strategy.ZERO2]
    assert _world_sizes("1, 3,03,2") == [1, 3, 2]


def test_a_run_that_failed_or_has_no_loss_in_common_is_not_equal() -> None:
    assert Outcome(Strategy.DDP, 2, loss=1e-6, weight=1e-6).verdict == "same"
    assert Outcome(Strategy.DDP, 2, loss=1e-3, weight=1e-2).verdict == "DIFFERENT"
    assert Outcome(Strategy.DDP, 2, loss=1e-3, weight=1e-2, tolerances=TOLERANCES["bf16"]).verdict == "same"
    assert Outcome(Strategy.DDP, 2, loss=1e-1, weight=1e-2, tolerances=TOLERANCES["bf16"]).verdict == "DIFFERENT"
    assert Outcome(Strategy.DDP, 2, problem="killed", loss=0.0).verdict == "failed"
    assert Outcome(Strategy.DDP, 2).verdict == "DIFFERENT"
    assert Outcome(Strategy.SINGLE, 1, reference=True).verdict == "reference"
    assert Outcome(Strategy.SINGLE, 1, "killed", reference=True).verdict == "failed"


def test_without_a_reference_nothing_is_started_and_nothing_is_equal(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "parity"
    done = shoal(
        tmp_path, "parity", str(run_file), "--strategies", "ddp,zero1", "--worlds", "3,2", "--out", str(out), "--json"
    )
    assert done.returncode == 8
    assert done.stderr.splitlines()[-1] == (
        f"shoal: not the same numbers: ddp on 3, zero1 on 3, ddp on 2, zero1 on 2; runs: {out}"
    )
    report = json.loads(done.stdout)
    assert report == json.loads((out / "parity.json").read_text())
    first, *others = report["outcomes"]
    assert "does not divide over 3 processes" in first["problem"]
    assert [other["problem"] for other in others] == [NOTHING_TO_COMPARE_WITH] * 3
    assert {each["verdict"] for each in report["outcomes"]} == {"failed"}
    assert report["plot"] is None
    assert [path.name for path in out.iterdir()] == ["parity.json"]


# --- runs by hand: what they left is written here --------------------------------------------------------


def left(folder: Path, losses: list[float], weights: dict[str, Any] | None = None) -> Path:
    """A run folder as far as it is compared."""
    folder.mkdir()
    lines = [{"kind": "train", "update": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if weights is not None:
        (folder / "export").mkdir()
        save_file(weights, folder / "export/model.safetensors")
    return folder


def test_runs_that_export_nothing_are_compared_by_their_losses(tmp_path: Path) -> None:
    first, same, other = (left(tmp_path / name, [3.0, loss]) for name, loss in (("a", 2.0), ("b", 2.0), ("c", 2.1)))
    outcome = _beside(Strategy.DDP, 2, same, first)
    assert (outcome.verdict, outcome.weight) == ("same", None)
    assert _beside(Strategy.DDP, 2, other, first).verdict == "DIFFERENT"


ZEROS = {"a": numpy.zeros(2), "b": numpy.zeros(2)}


@pytest.mark.parametrize(
    "weights",
    [
        None,
        {**ZEROS, "b": numpy.zeros(3)},
        {"a": numpy.zeros(2), "c": numpy.zeros(2)},
        {**ZEROS, "b": numpy.array([0.0, numpy.nan])},
    ],
    ids=["none", "another shape", "another name", "not a number"],
)
def test_exports_that_cannot_be_the_same_are_not(weights: dict[str, Any] | None, tmp_path: Path) -> None:
    first = left(tmp_path / "first", [3.0], ZEROS)
    assert _beside(Strategy.DDP, 2, left(tmp_path / "same", [3.0], ZEROS), first).equal
    own = left(tmp_path / "own", [3.0], weights)
    assert _beside(Strategy.DDP, 2, own, first).verdict == _beside(Strategy.DDP, 2, first, own).verdict == "DIFFERENT"


def test_updates_are_compared_by_their_number_also_where_one_is_missing(tmp_path: Path) -> None:
    first, own = left(tmp_path / "first", [3.0, 2.0, 1.0]), left(tmp_path / "own", [3.0, 2.5])
    outcome = _beside(Strategy.DDP, 2, own, first)
    assert outcome.differences == {1: 0.0, 2: 0.5}
    assert not outcome.same_samples


def test_a_difference_beyond_all_bounds_is_null_because_json_has_no_infinity() -> None:
    plain = as_json(Outcome(Strategy.DDP, 2, loss=float("inf"), losses={1: 2.0}))
    assert json.loads(json.dumps(plain, allow_nan=False))["loss_difference"] is None
    assert plain["verdict"] == "DIFFERENT"


def test_progress_says_how_long_the_rest_takes_from_the_cases_that_ran() -> None:
    before = [Outcome(Strategy.SINGLE, 1, reference=True, seconds=20.0), Outcome(Strategy.DDP, 2, "does not divide")]
    assert _progress(Strategy.SINGLE, 1, 17, []) == "1/17  single on 1 process"
    assert _progress(Strategy.ZERO2, 2, 17, before) == "3/17  zero2 on 2 processes  (20 s a case, about 5 min left)"


# --- the plot --------------------------------------------------------------------------------------------


def seventeen() -> list[Outcome]:
    every = [strategy for strategy in Strategy if strategy not in (Strategy.SINGLE, Strategy.XLA)]
    losses = {update: 8.0 - update / 10 for update in range(1, 13)}
    return [
        Outcome(
            *case,
            reference=position == 0,
            losses=losses,
            differences={} if position == 0 else {update: 1e-7 * (update - 1) for update in losses},
        )
        for position, case in enumerate(cases(every, [1, 2, 3]))
    ]


def test_seventeen_runs_are_drawn_without_a_complaint_and_alone_in_their_legend(tmp_path: Path) -> None:
    outcomes = seventeen()
    assert len(outcomes) == 17
    assert len(set(COLOURS.values())) == len(Strategy), "a colour of its own for each"
    for number, drawn in enumerate((outcomes, outcomes[:2], outcomes[:1])):
        path = tmp_path / f"{number}.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(path, "recipe, global batch 12 samples, fp32", "on cpu", [*drawn, Outcome(Strategy.DDP, 4, "failed")])
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000


def test_differences_are_drawn_at_their_values_and_zeros_on_the_line_called_0() -> None:
    axes = Figure().subplots()
    _draw_differences(axes, seventeen(), [1, 2, 3])
    tolerance, zero, *curves = axes.lines
    floor = floor_of([LOSS, 0.0, 1e-7])
    assert floor == pytest.approx(1e-8)
    assert (tolerance.get_ydata()[0], zero.get_ydata()[0]) == (LOSS, floor)
    assert len(curves) == 16
    for curve in curves:
        assert list(curve.get_ydata()) == [floor, *(1e-7 * update for update in range(1, 12))]
        assert [round(x) for x in curve.get_xdata()] == list(range(1, 13)), "beside its update, not beside the next one"
    assert len({(curve.get_color(), str(curve._dash_pattern)) for curve in curves}) == 16
    assert {text.get_text() for text in axes.texts} == {"tolerance $10^{-5}$", "exactly 0, drawn on this line"}
    assert axes.get_yticklabels()[0].get_text() == "0"
    low, high = axes.get_ylim()
    assert low < floor < LOSS < high


@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 9.9e-8, 1e-15, 1e-300])
def test_the_line_of_zeros_lies_below_everything(smallest: float) -> None:
    assert 0 < floor_of([LOSS, 0.0, smallest]) < min(smallest, LOSS) / 2


@pytest.mark.dist
@pytest.mark.slow
def test_ctrl_c_ends_the_comparison_and_keeps_what_was_done(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "parity"
    command = [sys.executable, "-m", "launch", "parity", str(run_file), "--strategies", "ddp", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHOAL_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        until = time.monotonic() + 120
        while not (out / "ddp-2/logs/launcher.log").exists():
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("shoal: stopped by Ctrl-C before the first update; ")
    assert verdicts(stdout) == {("single", "1"): "reference"}
    report = json.loads((out / "parity.json").read_text())
    assert not report["complete"] and len(report["outcomes"]) == 1


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
    start = lines.index("CPU twin of this run, strategy fsdp2")
    assert lines[start + 1].startswith(
        "the run is planned as on a machine with 8 GPUs (parallel.devices), otherwise as "
    )
    told = dict(line.strip().split(": ", 1) for line in lines[start + 3 :] if line.startswith("  "))
    expected = {
        "config.parallel.device": "cuda → cpu",
        "config.parallel.devices": "8 → 2",
        "processes.device": "cuda → cpu",
        "processes.world_size": "8 → 2",
        "batch.micro_batch_size": "1 → 4",
        "communication": "nccl → gloo",
    }
    assert expected.items() <= told.items()
    assert [key for key in told if "strategy" in key or "folder" in key] == []
    plan = json.loads((tmp_path / "twin/plan.json").read_text())["plan"]
    assert (plan["processes"]["strategy"], plan["processes"]["world_size"]) == ("fsdp2", 2)
