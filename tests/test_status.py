"""What `shoal status`, `logs` and `cancel` say of run folders where there is no scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.config import load
from launch.errors import RunFolderError
from launch.plan import make_plan
from launch.recipe import Preview
from launch.record import create_run_folder, held, write_json
from launch.root_cause import Cause, write_cause
from launch.slurm import Queued
from launch.status import Status, _status, everything, log_of, status
from launch.sweep import compare, write_comparison, write_sweep
from launch.topology import Machine, World
from tests.commands import shoal


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Makes run folders of a hundred updates."""

    def make(name: str = "run", done: int = 0) -> Path:
        loaded = load(None, ["recipe=causal_lm", "train.max_steps=100", "parallel.device=cpu"])
        folder = tmp_path / name
        create_run_folder(make_plan(loaded, Machine("here", 2, 0), World(), Preview(), folder))
        lines = [
            json.dumps({"kind": "train", "update": update, "loss": 5 - update / 100, "time": 1000 + 3 * update})
            for update in range(1, done + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"kind": "tr')
        return folder

    return make


def only(folder: Path) -> Status:
    (found,) = status(folder)
    return found


def test_a_run_that_was_left(run: Callable[..., Path]) -> None:
    found = only(run(done=40))
    assert (found.state, found.because) == ("begun", "nothing was saved")
    assert found.progress == "update 40 of 100, loss 4.6000", "the line that is being written does not count"


def test_a_run_that_works_here(run: Callable[..., Path]) -> None:
    folder = run(done=40)
    with held(folder):
        found = only(folder)
    assert (found.state, found.because) == ("running", "on this machine")
    assert found.progress == "update 40 of 100, loss 4.6000, about 3 min left"
    assert found.seconds_left == pytest.approx(180)


def test_a_rank_that_keeps_the_others_waiting_is_told_while_it_does(run: Callable[..., Path]) -> None:
    folder = run(done=40)

    def told(**record: Any) -> str:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"update": 40, "time": 1.0, **record}))
        with held(folder):
            return only(folder).progress

    slow = "rank 3 (n2) keeps the others waiting: data 0.4 s per update, others 0.01 s; it costs 40 % of the time"
    assert told(kind="straggler", rank=3, message=slow).endswith(f", about 3 min left, {slow}")
    assert "waiting" not in told(kind="straggler", message="rank 3 (n2) no longer keeps the others waiting")
    assert told(kind="straggler", rank=3, message=slow).endswith(slow)
    assert "waiting" not in only(folder).progress, "nobody works on it"
    assert "waiting" not in told(kind="resume", checkpoint="step-000040"), "it may be another host now"


def test_how_runs_end(run: Callable[..., Path]) -> None:
    stopped = run("stopped", 7)
    write_json(stopped / "stopped.json", {"signal": "SIGUSR1", "update": 7, "checkpoint": None})
    failed = run("failed", 7)
    for rank, time in ((0, 12.0), (3, 11.0)):
        content = {"rank": rank, "host": "n2", "time": time, "message": f"rank {rank} (n2): ValueError: no\nmore"}
        content |= {"exit_code": 1, "traceback": ""}
        write_json(failed / f"failure-{rank}.json", content)
    known = run("known", 7)
    write_cause(known, Cause(1, "rank 1 (n1) was killed by SIGKILL\nafter update 7"))
    evaluated = run("evaluated")
    write_json(evaluated / "result.json", {"metrics": {"loss": 4.5, "perplexity": 90.0171}})
    finished = run("finished", 100)
    write_json(finished / "result.json", {"summary": "validation loss: 5 → 4\nmodel: there"})
    found = {Path(each.run).name: (each.state, each.because) for each in everything(failed.parent)}
    assert found == {
        "stopped": ("stopped", "SIGUSR1 after update 7; nothing was saved"),
        "failed": ("failed", "rank 3 (n2): ValueError: no"),
        "known": ("failed", "rank 1 (n1) was killed by SIGKILL"),
        "finished": ("finished", "validation loss: 5 → 4"),
        "evaluated": ("finished", "loss: 4.5000, perplexity: 90.0171"),
    }


def job(state: str, **facts: Any) -> Queued:
    given = {"id": "12", "reason": "", "nodes": "", "start": "Unknown", "exit_code": "1:0", "restarts": 0}
    return Queued(state=state, **{**given, **facts})


@pytest.mark.parametrize(
    ("queued", "expected"),
    [
        (job("PENDING", reason="Priority"), ("queued", "Priority")),
        (
            job("PENDING", reason="BeginTime", start="2026-01-01T10:00:00", restarts=2),
            ("queued", "start 3, BeginTime, not before 2026-01-01T10:00:00"),
        ),
        (job("RUNNING", nodes="n[1-2]"), ("running", "")),
        (job("COMPLETING"), ("running", "completing")),
        (job("CANCELLED"), ("cancelled", "nothing was saved")),
        (job("TIMEOUT"), ("failed", "TIMEOUT, exit code 1:0; nothing was saved")),
        (job("OUT_OF_MEMORY", exit_code="0:125"), ("failed", "OUT_OF_MEMORY, exit code 0:125; nothing was saved")),
    ],
    ids=lambda value: value.state if isinstance(value, Queued) else "",
)
def test_what_a_scheduler_says_counts(queued: Queued, expected: tuple[str, str], run: Callable[..., Path]) -> None:
    found = _status(run(done=3), queued)
    assert (found.state, found.because, found.job, found.nodes) == (*expected, "12", queued.nodes)
    assert (found.seconds_left is not None) == (found.state == "running")


def test_a_sweep_is_compared_as_far_as_it_is(run: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("many/000", "many/001", "many/002"):
        run(name, 1)
    many = tmp_path / "many"
    write_sweep(many, {"000": ("a=1", "b=x"), "001": ("a=2", "b=x"), "002": ("a=3", "b=x")})
    for name, loss in (("000", 0.5), ("002", 0.25)):
        write_json(many / name / "result.json", {"summary": "done", "validation": {"after": {"loss": loss}}})
    assert compare(many) == [["run", "a", "b", "loss"], ["000", "1", "x", "0.5"], ["002", "3", "x", "0.25"]]
    write_comparison(many)
    assert (many / "comparison.tsv").read_text() == "run\ta\tb\tloss\n000\t1\tx\t0.5\n002\t3\tx\t0.25\n"
    assert [each.state for each in status(many)] == ["finished", "begun", "finished"]
    assert len(everything(tmp_path)) == 3


def test_logs(run: Callable[..., Path]) -> None:
    folder = run()
    with pytest.raises(RunFolderError, match="no job has written a log"):
        log_of(folder, None)
    (folder / "slurm-7.log").write_text("seven\n")
    (folder / "logs/rank-0.log").write_text("zero\n")
    assert log_of(folder, None).name == "slurm-7.log" and log_of(folder, 0).read_text() == "zero\n"
    with pytest.raises(RunFolderError, match=r"rank-5.log: no such log \(yet\); there are: rank-0.log"):
        log_of(folder, 5)
    assert shoal(folder.parent, "logs", "run", "--rank", "0").stdout == "zero\n"


def test_what_is_no_run_is_refused(tmp_path: Path, run: Callable[..., Path]) -> None:
    with pytest.raises(RunFolderError, match=r"is not a run folder .*, nor that of a sweep"):
        status(tmp_path)
    folder = run()
    refused = shoal(tmp_path, "cancel", "run")
    assert refused.returncode == 5
    assert refused.stderr == (
        "shoal: run: no job was submitted for it; a run on this machine is stopped by Ctrl-C or SIGTERM\n"
    )
    neither = shoal(tmp_path, "status")
    assert (neither.returncode, neither.stderr) == (2, "shoal: command line: name a run folder, or give --all\n")
    shown = json.loads(shoal(tmp_path, "status", str(folder), "--json").stdout)
    assert [each["state"] for each in shown] == ["begun"]
