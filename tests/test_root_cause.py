"""The cause of a failure is told, and not what it led to: who, where, what, after which update, and in which log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.hangs import Heard
from launch.pulse import Beat
from launch.rollcall import Gone
from launch.root_cause import Cause, End, find_cause, is_noise, read_cause, write_cause
from tests.commands import shoal
from tests.own_recipe import ALL_RANKS
from tests.processes import launched

HERE = socket.gethostname()
WHEN = r"after update \d; log: \S+/rank-1.log"
GLOO = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2048",
    "RuntimeError: [unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation to complete",
    "DistBackendError: NCCL communicator was aborted on rank 1",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    for rank in (0, 1):
        (tmp_path / f"logs/rank-{rank}.log").write_text(f"line of rank {rank}\n")
    return tmp_path


def failure(run: Path, rank: int, message: str, time: float, exit_code: int = 1, **more: Any) -> None:
    content = {"rank": rank, "host": f"n{rank}", "exit_code": exit_code, "time": time, "traceback": "Traceback …"}
    content |= {"message": f"rank {rank} (n{rank}): {message}", "update": 7, **more}
    (run / f"failure-{rank}.json").write_text(json.dumps(content))


def cause(run: Path, *ends: End, gone: tuple[Gone, ...] = ()) -> Cause:
    return find_cause(run, ends, gone)


@pytest.mark.parametrize("noise", GLOO)
def test_who_only_lost_another_is_not_the_cause(noise: str, run: Path) -> None:
    assert is_noise(noise)
    failure(run, 0, noise, 10.0)
    failure(run, 1, "ValueError: odd", 10.5)  # clocks of hosts differ
    found = cause(run, End(1, 0, "n0"), End(1, 1, "n1"))
    assert found.message == f"rank 1 (n1): ValueError: odd\nafter update 7; log: {run}/logs/rank-1.log"
    assert (found.rank, found.host, found.update, found.exit_code) == (1, "n1", 7, 1)


def test_a_time_out_that_strikes_is_told_as_such(run: Path) -> None:
    failure(run, 2, GLOO[0], 9.0)  # by the clock of another host
    failure(run, 0, GLOO[1], 10.0)
    beat = Beat(7, "in the training step", "mine.py:3 in loss", waits=False, asked_by_recipe=False, seconds=20.0)
    heard = {0: Heard("n0", beat, 1.0), 1: Heard("n1", beat, 1.0), 2: Heard("n2", replace(beat, waits=True), 1.0)}
    told = "rank 0 (n0) waited 20 s for the others in an exchange, and gave up"
    when = f"\nafter update 7; log: {run}/logs/rank-0.log"
    late = "; rank 1 (n1) was last seen in the training step, mine.py:3 in loss"
    assert find_cause(run, [End(1, 0, "n0"), End(1, 2, "n2")], (), heard).message == told + late + when
    assert find_cause(run, [End(1, 0, "n0"), End(1, 2, "n2")], ()).message == told + when
    # NCCL says so in the log, and crashes.
    nccl = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, Timeout(ms)=600000) ran"
    (run / "logs/rank-1.log").write_text(f"line\n{nccl}\nterminate called\n")
    crashed = cause(run, End(-signal.SIGABRT, 1, "n1")).message
    assert crashed.startswith(
        "rank 1 (n1) waited 600 s for the others in an exchange, and gave up; after update 7; log: "
    )


def test_the_first_of_several_is_the_cause(run: Path) -> None:
    failure(run, 0, "ValueError: late", 11.0)
    failure(run, 1, "ValueError: early", 10.0)
    assert "early" in cause(run, End(1, 0, "n0"), End(1, 1, "n1")).message


def test_what_a_user_got_wrong_needs_no_log(run: Path) -> None:
    failure(run, 0, "column text: is not there", 10.0, exit_code=3, traceback="")
    found = cause(run, End(3, 0, "n0"))
    assert (found.exit_code, found.message) == (3, "rank 0 (n0): column text: is not there")


def test_a_rank_that_could_write_nothing_is_the_cause(run: Path) -> None:
    failure(run, 0, GLOO[0], 10.0)
    segfault = cause(run, End(1, 0, "n0"), End(-signal.SIGSEGV, 1, "n1"))
    assert segfault.message == (
        f"rank 1 (n1) was ended by SIGSEGV, a crash of compiled code; after update 7; log: {run}/logs/rank-1.log"
    )
    assert segfault.traceback == "  line of rank 1"
    left = cause(run, End(1, 0, "n0"), End(3, 1, "n1"))
    assert left.message.startswith("rank 1 (n1) ended without a word (exit code 3); after update 7; log: ")
    # Those that were asked to leave are not.
    assert "Connection closed" in cause(run, End(1, 0, "n0"), End(-signal.SIGTERM, 1, "n1")).message
    assert "Connection closed" in cause(run, End(1, 0, "n0"), End(75, 1, "n1")).message


@pytest.mark.parametrize(
    ("kills", "why"),
    [
        (2, ": the kernel has killed 2 processes for lack of memory; "),
        (1, ": the kernel has killed 1 process for lack of memory; "),
        (0, ", but not by the kernel for lack of memory: a person or a scheduler did it; "),
        (None, ", as the kernel does when the machine's memory runs out; "),
    ],
)
def test_a_kill_says_whether_the_kernel_did_it(kills: int | None, why: str, run: Path) -> None:
    failure(run, 0, GLOO[0], 10.0)
    found = cause(run, End(1, 0, "n0", 5), End(-signal.SIGKILL, 1, "n1", kills))
    assert found.message == f"rank 1 (n1) was killed by SIGKILL{why}after update 7; log: {run}/logs/rank-1.log"
    assert found.killed and found.out_of_memory_kills == kills and found.update == 7


def test_where_nobody_could_say_after_which_update_the_record_does(run: Path) -> None:
    ends = [End(-signal.SIGKILL, rank, "n0") for rank in (0, 1)]
    assert "; before the first update; log: " in cause(run, *ends).message
    records = [{"kind": "train", "update": 12, "loss": 1.0}, {"kind": "eval", "update": 13}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "tr')
    assert "; after update 12; log: " in cause(run, *ends).message


def test_a_rank_whose_data_worker_the_kernel_has_killed_says_so(run: Path) -> None:
    failure(run, 1, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.", 10.0)
    found = cause(run, End(1, 1, "n1", 1))
    assert found.message.splitlines()[-1] == "the kernel has killed 1 process for lack of memory meanwhile"
    assert found.out_of_memory_kills == 1 and not found.killed


def test_a_host_that_does_not_answer_is_the_cause(run: Path) -> None:
    failure(run, 0, GLOO[1], 10.0)
    gone = (Gone(0, "n0", silent=False), Gone(3, "n1", silent=True), Gone(2, "n1", silent=True))
    found = cause(run, End(1, 0, "n0"), gone=gone)
    assert found.message.startswith("no answer from n1 (rank 2, 3): the host is down, or the network between; logs: ")
    assert found.unreachable


def test_without_any_word_the_logs_must_do(run: Path) -> None:
    found = cause(run, End(1))
    assert found.message == f"the workers ended without a word (exit code 1); before the first update; logs: {run}/logs"
    assert found.traceback == "  line of rank 0\n  line of rank 1"


def test_a_cause_is_kept(run: Path) -> None:
    assert read_cause(run) is None
    found = cause(run, End(-signal.SIGKILL, 1, "n1"))
    write_cause(run, found)
    assert read_cause(run) == found


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raising", rf"shoal: rank 1 \({HERE}\): ValueError: the fifth batch is odd"),
        ("segfault", rf"shoal: rank 1 \({HERE}\) was ended by SIGSEGV, a crash of compiled code; {WHEN}"),
        ("exit", rf"shoal: rank 1 \({HERE}\) ended without a word \(exit code 3\); {WHEN}"),
        ("killing", rf"shoal: rank 1 \({HERE}\) was killed by SIGKILL"),
    ],
)
def test_the_last_lines_name_rank_host_and_fault(how: str, told: str, tmp_path: Path) -> None:
    _write_run_file(tmp_path, how)
    with launched(tmp_path, "launch", "run", "run.yaml", "--out", "run") as launcher:
        assert launcher.end(90) == 1
    last = launcher.said().splitlines()[-15:]
    (line,) = [line for line in last if line.startswith("shoal: ") and "rank " in line]
    assert re.match(told, line), last
    found = read_cause(tmp_path / "run")
    assert found is not None and (found.rank, found.host) == (1, HERE)
    if how == "raising":
        assert last[-1] == f"shoal: after update {found.update}; log: {tmp_path}/run/logs/rank-1.log"
        assert found.update in (1, 2, 3, 4) and "raise ValueError" in found.traceback
    if how == "segfault":
        assert any("Fatal Python error: Segmentation fault" in line or "own_recipe.py" in line for line in last)


@pytest.mark.dist
@pytest.mark.slow
def test_one_of_several_ranks_that_fail_alike_is_named(tmp_path: Path) -> None:
    _write_run_file(tmp_path, "raising", ALL_RANKS)
    with launched(tmp_path, "launch", "run", "run.yaml", "--out", "run") as launcher:
        assert launcher.end(90) == 1
    last = launcher.said().splitlines()[-15:]
    found = read_cause(tmp_path / "run")
    assert found is not None and found.rank in (0, 1)
    assert last[-2:] == [
        f"shoal: rank {found.rank} ({HERE}): ValueError: the fifth batch is odd",
        f"shoal: after update {found.update}; log: {tmp_path}/run/logs/rank-{found.rank}.log",
    ]
    assert not any(noise in line for line in last for noise in ("Connection closed", "Gloo"))


def test_a_recipe_that_cannot_be_imported_is_told_by_file_and_line_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from launch.recipe import Prepared\nimport not_installed\n")
    (tmp_path / "run.yaml").write_text("recipe: mine.py\ntrain: {max_steps: 1}\n")
    done = shoal(tmp_path, "run", "run.yaml", "--out", "run")
    why = "the recipe cannot be imported: ModuleNotFoundError: No module named 'not_installed'"
    assert (done.returncode, done.stderr) == (2, f"shoal: {tmp_path}/mine.py:2: {why}\n")
    assert not (tmp_path / "run").exists()


def _write_run_file(folder: Path, how: str, rank: int = 1) -> None:
    recipe = Path(__file__).with_name("own_recipe.py")
    (folder / "run.yaml").write_text(
        f"recipe: {recipe}\nrecipe_args: {{failing_rank: {rank}, failing_by: {how}}}\neval: {{at_start: false}}\n"
        "train: {max_steps: 12, global_batch_size: 8}\nparallel: {devices: 2, device: cpu}\n"
    )


@contextlib.contextmanager
def limited_group(size_bytes: int) -> Iterator[Path]:
    """A control group of ours with so much memory; skips where none can be made."""
    groups = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    paths = {controllers: path for _, controllers, path in groups if controllers in ("", "memory")}
    old = "memory" in paths
    around = Path("/sys/fs/cgroup", "memory" if old else "", paths["memory" if old else ""].lstrip("/"))
    group = around / f"shoal-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(size_bytes))
        except OSError as error:
            pytest.skip(f"no control group with a limit of memory can be made here: {error}")
        yield group
    finally:
        group.rmdir()


@pytest.mark.dist
@pytest.mark.slow
def test_a_kill_by_the_kernel_is_counted(tmp_path: Path) -> None:
    """A container's limit, met by one rank of two."""
    _write_run_file(tmp_path, "eating")
    run = launched(tmp_path, "launch", "run", "run.yaml", "--out", "run")
    with limited_group(2 * 2**30) as group, run as launcher:
        (group / "cgroup.procs").write_text(str(launcher.process.pid))
        assert launcher.end(90) == 1, launcher.said()
    (line,) = [line for line in launcher.said().splitlines()[-15:] if line.startswith("shoal: rank ")]
    kernel = "the kernel has killed 1 process for lack of memory"
    assert re.fullmatch(rf"shoal: rank 1 \({HERE}\) was killed by SIGKILL: {kernel}; {WHEN}", line), line
    found = read_cause(tmp_path / "run")
    assert found is not None and (found.rank, found.host, found.out_of_memory_kills) == (1, HERE, 1)
