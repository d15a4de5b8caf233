"""The roll call of ranks: they meet, or are told why they cannot. Real sockets; a thread for each rank."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from launch import meeting, rollcall
from launch.errors import TopologyError
from launch.meeting import UNANSWERED_BEATS, Meeting, answer
from launch.pulse import Beat
from launch.rollcall import LOOPBACK, RollCall, hosts_of_this_machine
from launch.supervise import _compare_cpus

HERE = socket.gethostname()


@pytest.fixture
def call() -> Iterator[Callable[[int], RollCall]]:
    calls: list[RollCall] = []

    def make(world_size: int) -> RollCall:
        calls.append(RollCall(world_size, [LOOPBACK]))
        return calls[-1]

    yield make
    for each in calls:
        each.close()


def until(roll: RollCall, what: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        roll.look()
        time.sleep(0.01)


def meet(roll: RollCall, *ranks: tuple[int, int]) -> list[Future[Meeting]]:
    """Have ranks `(rank, world size)` answer, each in a thread."""
    pool = ThreadPoolExecutor(len(ranks))
    return [pool.submit(answer, roll.announcement, rank, size, 2) for rank, size in ranks]


def test_all_ranks_meet_at_a_port_that_rank_0_holds(call: Callable[[int], RollCall]) -> None:
    roll = call(3)
    found = meet(roll, (2, 3), (0, 3), (1, 3))
    until(roll, lambda: all(each.done() for each in found))
    meetings = [each.result() for each in found]
    (port,) = {meeting.port for meeting in meetings}
    assert {meeting.address for meeting in meetings} == {LOOPBACK}
    holders = [meeting.listener for meeting in meetings]
    assert holders[0] is None and holders[2] is None and holders[1] is not None
    assert holders[1].getsockname()[1] == port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    assert roll.problem is None
    assert [(each.rank, each.cpus) for each in roll.met] == [(0, 2), (1, 2), (2, 2)]


def test_nobody_meets_before_all_have_come(call: Callable[[int], RollCall]) -> None:
    roll = call(2)
    (first,) = meet(roll, (0, 2))
    with pytest.raises(AssertionError):
        until(roll, first.done, 0.5)
    (second,) = meet(roll, (1, 2))
    until(roll, lambda: first.done() and second.done())


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        (((0, 2), (1, 1)), f"rank 1 ({HERE}) was started in a world of 1, but the plan says 2"),
        (((0, 2), (0, 2)), f"both {HERE} and {HERE} say that they are rank 0"),
    ],
)
def test_a_wrong_world_is_told_to_all(
    ranks: tuple[tuple[int, int], ...], problem: str, call: Callable[[int], RollCall]
) -> None:
    roll = call(2)
    found = meet(roll, *ranks)
    until(roll, lambda: all(each.done() for each in found))
    assert roll.problem == problem
    assert [str(each.exception()) for each in found] == [problem, problem]


def test_who_comes_late_is_told_as_well(call: Callable[[int], RollCall]) -> None:
    roll = call(3)
    (early,) = meet(roll, (1, 1))
    until(roll, early.done)
    (late,) = meet(roll, (0, 2))
    until(roll, late.done)
    assert roll.problem == f"rank 1 ({HERE}) was started in a world of 1, but the plan says 3", "what was found first"
    assert [str(each.exception()) for each in (early, late)] == [roll.problem, roll.problem]


def test_who_does_not_come_is_named(call: Callable[[int], RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "MISSING_SECONDS", 0.3)
    roll = call(4)
    found = meet(roll, (0, 4), (2, 4))
    until(roll, lambda: roll.problem)
    assert roll.problem == f"ranks 1, 3 of 4 did not report to {HERE} within 0 s; the others are on {HERE}"
    until(roll, lambda: all(each.done() for each in found))
    assert [str(each.exception()) for each in found] == [roll.problem, roll.problem]


def test_the_first_answer_may_take_longer(call: Callable[[int], RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "MISSING_SECONDS", 0.0)
    roll = call(2)
    for _ in range(3):
        roll.look()
        time.sleep(0.01)
    assert roll.problem is None
    monkeypatch.setattr(rollcall, "FIRST_ANSWER_SECONDS", 0.0)
    roll.look()
    assert roll.problem == f"ranks 0, 1 of 2 did not report to {HERE} within 0 s"


OF_ANOTHER_RUN = b'{"token": "another", "rank": 1, "world_size": 2, "host": "n9", "cpus": 1}\n'


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\n", b"[]\n", OF_ANOTHER_RUN, b"{}\n"])
def test_strangers_are_not_counted(line: bytes, call: Callable[[int], RollCall]) -> None:
    roll = call(2)
    address, port = roll.announcement.partition("@")[2].split(":")
    with socket.create_connection((address, int(port))) as stranger:
        stranger.sendall(line)
        stranger.settimeout(5)
        hung_up = threading.Event()
        threading.Thread(target=lambda: stranger.recv(1) == b"" and hung_up.set()).start()
        until(roll, hung_up.is_set)
    found = meet(roll, (0, 2), (1, 2))
    until(roll, lambda: all(each.done() for each in found))
    assert roll.problem is None


def test_a_launcher_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "REACH_SECONDS", 0.2)
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        place = f"{LOOPBACK}:{free.getsockname()[1]}"
        with pytest.raises(TopologyError) as caught:
            answer(f"token@no-such-host.invalid:1,{place}", 1, 2, 2)
    message = str(caught.value)
    assert message.startswith(f"rank 1 ({HERE}): cannot reach the launcher: no-such-host.invalid:1: ")
    assert f"; {place}: Connection refused; " in message
    assert message.endswith("set cluster.network_interface where only one of their networks does")


@pytest.mark.parametrize("reset", [False, True])
def test_a_launcher_that_leaves_before_all_have_come(reset: bool) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener, ThreadPoolExecutor(1) as pool:
        found = pool.submit(answer, f"token@{LOOPBACK}:{listener.getsockname()[1]}", 1, 2, 2)
        connection, _ = listener.accept()
        connection.recv(1)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.recv(4096)
        connection.close()
        with pytest.raises(TopologyError) as caught:
            found.result(10)
    assert str(caught.value) == f"rank 1 ({HERE}): the launcher on {LOOPBACK} has hung up"


def test_a_place_that_answers_is_taken_where_the_first_does_not(call: Callable[[int], RollCall]) -> None:
    roll = call(1)
    token, _, place = roll.announcement.partition("@")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(answer, f"{token}@no-such-host.invalid:1,{place}", 0, 1, 2)
        until(roll, found.done)
    assert found.result().host == LOOPBACK


def test_each_side_learns_that_the_other_has_ended(call: Callable[[int], RollCall]) -> None:
    roll = call(2)
    found = meet(roll, (0, 2), (1, 2))
    until(roll, lambda: all(each.done() for each in found))
    ended, silent = threading.Event(), threading.Event()
    found[0].result().watch(ended.set, silent.set)
    found[1].result().launcher.close()
    until(roll, lambda: roll.gone)
    (gone,) = roll.gone
    assert (gone.rank, gone.host, gone.silent) == (1, HERE, False)
    assert not ended.is_set()
    for caller in list(roll._callers.values()):
        caller.connection.close()
    assert ended.wait(5) and not silent.is_set()


def test_a_launcher_that_stands_still_is_sent_no_more_than_it_can_receive(call: Callable[[int], RollCall]) -> None:
    """Nor is a beat lost that it was sent; once it goes on, so do the beats."""
    roll = call(1)
    (found,) = meet(roll, (0, 1))
    until(roll, found.done)
    rank = found.result()
    rank.watch(lambda: None, lambda: None)
    for update in range(100):
        rank.tell(Beat(update, "in the training step", "recipe.py:1 in f", False, False, 0.0))
    assert rank.told == UNANSWERED_BEATS
    until(roll, lambda: rank.answered == UNANSWERED_BEATS)
    assert roll.heard[0].beat.update == UNANSWERED_BEATS - 1
    rank.tell(Beat(100, "in the training step", "recipe.py:1 in f", False, False, 0.0))
    until(roll, lambda: roll.heard[0].beat.update == 100)


def test_a_rank_that_goes_before_they_meet_may_come_again(call: Callable[[int], RollCall]) -> None:
    roll = call(2)
    token, _, place = roll.announcement.partition("@")
    address, port = place.split(":")
    with socket.create_connection((address, int(port))) as first:
        first.sendall(
            json.dumps({"token": token, "rank": 1, "world_size": 2, "host": HERE, "cpus": 2}).encode() + b"\n"
        )
        until(roll, lambda: roll._callers)
    until(roll, lambda: not roll._callers)
    found = meet(roll, (0, 2), (1, 2))
    until(roll, lambda: all(each.done() for each in found))


def test_the_addresses_of_an_interface() -> None:
    assert hosts_of_this_machine("lo") == [LOOPBACK]
    assert hosts_of_this_machine()[0] == HERE
    assert LOOPBACK not in hosts_of_this_machine()
    with pytest.raises(TopologyError, match=f"{HERE} has no network interface ib7 with an IPv4 address; it has .*lo"):
        hosts_of_this_machine("ib7")


def test_ranks_with_fewer_cpus_than_planned_are_told(
    call: Callable[[int], RollCall], capsys: pytest.CaptureFixture[str]
) -> None:
    roll = call(2)
    found = meet(roll, (0, 2), (1, 2))
    until(roll, lambda: all(each.done() for each in found))
    _compare_cpus(roll, 2)
    assert capsys.readouterr().err == ""
    _compare_cpus(roll, 3)
    assert capsys.readouterr().err == (
        "shoal: fewer CPUs than the 3 threads that were planned for each rank: "
        f"rank 0 ({HERE}) 2, rank 1 ({HERE}) 2; this will be slow\n"
    )
