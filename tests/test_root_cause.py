"""The cause of a failure is told, and not what it led to: who, where, what, after which update, and in which log."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from launch.rollcall import Gone
from launch.root_cause import Cause, End, count_out_of_memory_kills, find_cause, is_noise, read_cause, write_cause
from tests.processes import launched

HERE = socket.gethostname()
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


def cause(run: Path, *ends: End, gone: tuple[Gone, ...] = (), kills: int | None = 0) -> Cause:
    return find_cause(run, ends, gone, kills)


@pytest.mark.parametrize("noise", GLOO)
def test_who_only_lost_another_is_not_the_cause(noise: str, run: Path) -> None:
    assert is_noise(noise)
    failure(run, 0, noise, 10.0)
    failure(run, 1, "ValueError: odd", 10.5)  # clocks of hosts differ
    found = cause(run, End(1, 0, "n0"), End(1, 1, "n1"))
    assert found.message == f"rank 1 (n1): ValueError: odd\nafter update 7; log: {run}/logs/rank-1.log"
    assert (found.rank, found.host, found.update, found.exit_code) == (1, "n1", 7, 1)


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
        f"rank 1 (n1) was ended by SIGSEGV, a crash of compiled code; log: {run}/logs/rank-1.log"
    )
    assert segfault.traceback == "  line of rank 1"
    left = cause(run, End(1, 0, "n0"), End(3, 1, "n1"))
    assert left.message.startswith("rank 1 (n1) ended without a word (exit code 3); log: ")
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
    found = cause(run, End(1, 0, "n0"), End(-signal.SIGKILL, 1, "n1"), kills=kills)
    assert found.message == f"rank 1 (n1) was killed by SIGKILL{why}log: {run}/logs/rank-1.log"
    assert found.killed and found.out_of_memory_kills == kills


def test_a_host_that_does_not_answer_is_the_cause(run: Path) -> None:
    failure(run, 0, GLOO[1], 10.0)
    gone = (Gone(0, "n0", silent=False), Gone(3, "n1", silent=True), Gone(2, "n1", silent=True))
    found = cause(run, End(1, 0, "n0"), gone=gone)
    assert found.message.startswith("no answer from n1 (rank 2, 3): the host is down, or the network between; logs: ")
    assert found.unreachable


def test_without_any_word_the_logs_must_do(run: Path) -> None:
    found = cause(run, End(1))
    assert found.message == f"the workers ended without a word (exit code 1); logs: {run}/logs"
    assert found.traceback == "  line of rank 0\n  line of rank 1"


def test_a_cause_is_kept(run: Path) -> None:
    assert read_cause(run) is None
    found = cause(run, End(-signal.SIGKILL, 1, "n1"))
    write_cause(run, found)
    assert read_cause(run) == found


def test_the_kernels_count(tmp_path: Path) -> None:
    file = tmp_path / "vmstat"
    file.write_text("pgfault 12\noom_kill 3\noom_kill_other 9\n")
    assert count_out_of_memory_kills(file) == 3
    file.write_text("pgfault 12\n")
    assert count_out_of_memory_kills(file) is None and count_out_of_memory_kills(tmp_path / "none") is None


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raising", rf"shoal: rank 1 \({HERE}\): ValueError: the fifth batch is odd"),
        ("segfault", rf"shoal: rank 1 \({HERE}\) was ended by SIGSEGV, a crash of compiled code; log: \S+/rank-1.log"),
        ("exit", rf"shoal: rank 1 \({HERE}\) ended without a word \(exit code 3\); log: \S+/rank-1.log"),
    ],
)
def test_the_last_lines_name_rank_host_and_fault(how: str, told: str, tmp_path: Path) -> None:
    recipe = Path(__file__).with_name("own_recipe.py")
    (tmp_path / "run.yaml").write_text(
        f"recipe: {recipe}\nrecipe_args: {{failing_rank: 1, failing_by: {how}}}\neval: {{at_start: false}}\n"
        "train: {max_steps: 12, global_batch_size: 8}\nparallel: {devices: 2, device: cpu}\n"
    )
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
