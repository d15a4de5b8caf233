"""Where the ranks of a run report to the launcher: who is there, where they meet, and that they are there still.

The launcher calls the roll (`RollCall`); each rank answers it (`launch.meeting`) before it touches data or devices.
Ranks then meet at an address by which other hosts have reached the launcher's, whatever the names of hosts resolve to,
and at a port that rank 0 already holds. The connections stay open: the kernel tells each side that the other
has gone, also where a cable was cut.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

import psutil

from launch.errors import TopologyError
from launch.hangs import Heard
from launch.pulse import Beat
from launch.silence import is_silence, notice_silence

MISSING_SECONDS = 40.0
"""How long after the last answer the ranks that have not answered count as missing."""

FIRST_ANSWER_SECONDS = 600.0
"""How long the first answer may take: a cold file system may take minutes to start Python."""

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Answer:
    """What a rank says of itself."""

    rank: int
    world_size: int
    host: str
    cpus: int
    """How many CPUs it may use."""
    port: int | None = None
    """On rank 0: where the ranks can meet, a port that it holds."""


@dataclass(frozen=True)
class Gone:
    """A rank whose connection has ended."""

    rank: int
    host: str
    silent: bool
    """Whether it just answers no more, as when its host or the network is down; False: its process has ended."""


@dataclass
class _Caller:
    """A connection, and what has come of its first line."""

    connection: socket.socket
    text: bytes = b""
    answer: Answer | None = None
    told: bool = False
    """Whether it has been told how the roll call ended."""


class RollCall:
    """Calls the roll of `world_size` ranks; `look` does what is to do and never waits.

    Every rank that answers is told how it ended, also one that comes after the others were told why they cannot meet.

    `hosts` are the names and addresses to announce; the loopback alone where all ranks are on this host. `nodes` are
    the names of those on which the ranks are expected, the same number on each.
    """

    def __init__(self, world_size: int, hosts: list[str], nodes: list[str] | None = None) -> None:
        self.problem: str | None = None
        """Why the ranks cannot meet; what was found first."""
        self.gone: list[Gone] = []
        """Ranks that have gone after they had met, in order."""
        self.heard: dict[int, Heard] = {}
        """The last beat of each rank that is there."""
        self.last: dict[int, Heard] = {}
        """The last beat of each rank, also of those that have gone."""
        self.met: list[Answer] = []
        """All ranks, once they have met."""
        self._world_size, self._nodes = world_size, nodes
        self._token = secrets.token_hex(8)
        bound = LOOPBACK if hosts == [LOOPBACK] else ""
        self._listener = socket.create_server((bound, 0), backlog=1024)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._callers: dict[int, _Caller] = {}
        self._last_answer: float | None = None
        self._begun = time.monotonic()
        port = self._listener.getsockname()[1]
        self.announcement = f"{self._token}@" + ",".join(f"{host}:{port}" for host in hosts)
        """What ranks must be told: `token@host:port,host:port …`, to be tried in this order."""

    @property
    def there(self) -> int:
        """How many of those that have met are there still."""
        return len(self.met) - len(self.gone)

    def close(self) -> None:
        """Forget all ranks."""
        for key in [*self._selector.get_map().values()]:
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def look(self) -> None:
        """Hear who has something to say; tell ranks where they meet once all have answered, or why they cannot."""
        for key, _ in self._selector.select(timeout=0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._hear(key.data)
        if not self.met and self.problem is None:
            self._conclude()
        if self.problem is not None:
            self._tell({"problem": self.problem})

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                notice_silence(connection)
                self._selector.register(connection, selectors.EVENT_READ, _Caller(connection))

    def _hear(self, caller: _Caller) -> None:
        try:
            text = caller.connection.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(caller, silent=is_silence(error))
        else:
            caller.text += text
            if not text:
                self._lose(caller, silent=False)
            elif caller.text.endswith(b"\n"):
                self._register(caller) if caller.answer is None else self._note(caller, caller.answer)

    def _register(self, caller: _Caller) -> None:
        try:
            content = json.loads(caller.text)
            if content.pop("token") != self._token:
                raise ValueError
            answer = Answer(**content)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._drop(caller)  # nobody of ours
            return
        caller.answer, self._last_answer = answer, time.monotonic()
        caller.text = b""
        self.problem = self.problem or self._misfit(answer)
        self._callers.setdefault(answer.rank, caller)

    def _misfit(self, answer: Answer) -> str | None:
        """What is wrong with a rank that has just answered."""
        if answer.rank in self._callers:
            return f"both {self._answer_of(answer.rank).host} and {answer.host} say that they are rank {answer.rank}"
        if answer.world_size != self._world_size:
            return (
                f"rank {answer.rank} ({answer.host}) was started in a world of {answer.world_size}, but the plan says "
                f"{self._world_size}"
            )
        return None

    def _note(self, caller: _Caller, answer: Answer) -> None:
        """Keep the last beat of a rank, and answer each."""
        *_, line = lines = caller.text.splitlines()
        caller.text = b""
        with contextlib.suppress(OSError):  # that it has gone is noticed when it is heard
            caller.connection.send(b"\n" * len(lines))
        with contextlib.suppress(ValueError, KeyError, TypeError):
            beat = Beat(**json.loads(line)["beat"])
            self.heard[answer.rank] = self.last[answer.rank] = Heard(answer.host, beat, time.monotonic())

    def _drop(self, caller: _Caller) -> None:
        self._selector.unregister(caller.connection)
        caller.connection.close()

    def _lose(self, caller: _Caller, *, silent: bool) -> None:
        self._drop(caller)
        if caller.answer is None:
            return
        if self.met:
            self.heard.pop(caller.answer.rank, None)
            self.gone.append(Gone(caller.answer.rank, caller.answer.host, silent))
        elif self._callers.get(caller.answer.rank) is caller:
            del self._callers[caller.answer.rank]

    def _conclude(self) -> None:
        if len(self._callers) == self._world_size:
            self.met = [self._answer_of(rank) for rank in range(self._world_size)]
            self._tell({"address": self._meeting_address(), "port": self._answer_of(0).port})
            return
        patience = MISSING_SECONDS if self._last_answer else FIRST_ANSWER_SECONDS
        if time.monotonic() - (self._last_answer or self._begun) > patience:
            self.problem = self._missing(patience)

    def _answer_of(self, rank: int) -> Answer:
        answer = self._callers[rank].answer
        assert answer is not None, "whoever is called has answered"
        return answer

    def _meeting_address(self) -> str:
        """An address by which other hosts reach that of rank 0."""
        host = self._answer_of(0).host
        elsewhere = [caller for rank, caller in self._callers.items() if self._answer_of(rank).host != host]
        if not elsewhere:
            return LOOPBACK
        own, peer = (str(name[0]) for name in _ends(self._callers[0].connection))
        if peer not in (own, LOOPBACK):  # it is on another host than the launcher
            return peer
        # It is on this one, as those see it who have come from outside.
        return str(_ends(elsewhere[0].connection)[0][0])

    def _missing(self, patience: float) -> str:
        missing = [self._expected(rank) for rank in range(self._world_size) if rank not in self._callers]
        there = sorted({self._answer_of(rank).host for rank in self._callers})
        said = f"; the others are on {', '.join(there)}" if there else ""
        plural = "s" if len(missing) > 1 else ""
        return (
            f"rank{plural} {', '.join(missing)} of {self._world_size} did not report to {socket.gethostname()} within "
            f"{patience:.0f} s{said}"
        )

    def _expected(self, rank: int) -> str:
        if not self._nodes:
            return str(rank)
        return f"{rank} ({self._nodes[rank * len(self._nodes) // self._world_size]})"

    def _tell(self, content: dict[str, Any]) -> None:
        """Tell the ranks that wait."""
        line = json.dumps(content).encode() + b"\n"
        for key in self._selector.get_map().values():
            caller: _Caller | None = key.data  # the listener has none
            if caller and caller.answer and not caller.told:
                caller.told = True
                with contextlib.suppress(OSError):  # one that has just gone is noticed when it is heard
                    caller.connection.send(line)


def _ends(connection: socket.socket) -> tuple[Any, Any]:
    return connection.getsockname(), connection.getpeername()


def hosts_of_this_machine(interface: str | None = None) -> list[str]:
    """Names and addresses by which other hosts may reach this one, or only the addresses of one network interface.

    Raises:
        TopologyError: it has no such interface.
    """
    addresses = {
        name: [each.address for each in found if each.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if not addresses.get(interface):
            names = ", ".join(sorted(name for name, found in addresses.items() if found))
            raise TopologyError(
                f"{socket.gethostname()} has no network interface {interface} with an IPv4 address; it has {names}"
            )
        return addresses[interface]
    outside = [address for found in addresses.values() for address in found if not address.startswith("127.")]
    return [socket.gethostname(), *outside]
