"""A rank's side of the roll call (`launch.rollcall`): it answers, meets the others, and keeps its line open."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import psutil

from launch.errors import TopologyError
from launch.pulse import Beat
from launch.rollcall import LOOPBACK, Answer
from launch.silence import is_silence, notice_silence

REACH_SECONDS = 30.0
"""How long a rank tries to reach the launcher."""

UNANSWERED_BEATS = 16
"""How many beats may be on their way. A launcher that was stopped by Ctrl-Z answers none, and must not be sent so much
that it cannot be received: for the kernel that would be silence."""


@dataclass
class Meeting:
    """Where the ranks meet, and the line to the launcher."""

    address: str
    port: int
    listener: socket.socket | None
    """On rank 0: what holds the port."""
    launcher: socket.socket
    host: str
    """The launcher's, as it was reached."""
    interface: str | None
    """The network interface by which ranks on other hosts are reached; None where all are on this one."""
    told: int = 0
    """Beats that were sent; counted by the thread that sends them alone."""
    answered: int = 0
    """How many of them the launcher has answered; counted by the thread of `watch` alone."""

    def tell(self, beat: Beat) -> None:
        """Send the launcher a beat, unless it has many to hear yet."""
        if self.told - self.answered < UNANSWERED_BEATS:
            with contextlib.suppress(OSError):  # that it has gone is noticed by `watch`
                self.launcher.sendall(json.dumps({"beat": asdict(beat)}).encode() + b"\n")
                self.told += 1

    def watch(self, ended: Callable[[], None], silent: Callable[[], None]) -> None:
        """Have a thread call `ended` when the launcher has ended, and `silent` when its host answers no more."""

        def wait() -> None:
            try:
                while answers := self.launcher.recv(4096):
                    self.answered += len(answers)
            except OSError as error:
                if is_silence(error):
                    silent()
                    return
            ended()

        threading.Thread(target=wait, name="roll call", daemon=True).start()


def answer(announcement: str, rank: int, world_size: int, cpus: int) -> Meeting:
    """Report to the launcher and wait until all ranks have.

    Raises:
        TopologyError: the launcher cannot be reached or has gone, or not all ranks have come.
    """
    token, _, places = announcement.partition("@")
    listener = None
    if rank == 0:
        listener = socket.socket()
        listener.bind(("", 0))
    launcher, host = _reach(rank, places.split(","))
    port = listener.getsockname()[1] if listener else None
    said = asdict(Answer(rank, world_size, socket.gethostname(), cpus, port))
    line = b""
    try:
        launcher.sendall(json.dumps({"token": token, **said}).encode() + b"\n")
        while not line.endswith(b"\n"):
            more = launcher.recv(4096)
            if not more:
                raise TopologyError(f"{_name(rank)}: the launcher on {host} has hung up")
            line += more
    except OSError as error:
        how = "answers no more" if is_silence(error) else "has hung up"
        raise TopologyError(f"{_name(rank)}: the launcher on {host} {how}") from None
    reply = json.loads(line)
    if problem := reply.get("problem"):
        raise TopologyError(problem)
    address = reply["address"]
    interface = None if address == LOOPBACK else _interface(address, launcher.getsockname()[0])
    return Meeting(address, reply["port"], listener, launcher, host, interface)


def _name(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()})"


def _reach(rank: int, places: list[str]) -> tuple[socket.socket, str]:
    """A connection to the first place that can be reached."""
    until = time.monotonic() + REACH_SECONDS
    patience = max(1.0, REACH_SECONDS / len(places) / 3)
    while True:
        problems = []
        for place in places:
            host, _, port = place.rpartition(":")
            try:
                connection = socket.create_connection((host, int(port)), timeout=patience)
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
                continue
            connection.settimeout(None)
            notice_silence(connection)
            return connection, host
        if time.monotonic() > until:
            raise TopologyError(
                f"{_name(rank)}: cannot reach the launcher: {'; '.join(problems)}; see whether hosts may connect to "
                "each other on any port, and set cluster.network_interface where only one of their networks does"
            )
        time.sleep(0.5)


def _interface(meeting: str, mine: str) -> str | None:
    """The interface of this host that leads to the others.

    It is the one by which the launcher was reached; on the launcher's own host that by which others have reached it.
    """
    addresses = {each.address: name for name, found in psutil.net_if_addrs().items() for each in found}
    return addresses.get(meeting) or addresses.get(mine)
