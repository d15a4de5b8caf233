"""Carries a plan out on several machines that nobody else brings together: a launcher on each, which meet somewhere.

The launcher on the machine with that address leads: it makes the run folder, waits for the others, calls the roll and
says how the run ends. The others start their ranks when it says so, and report what becomes of them. All need the same
run folder, on a file system that they share.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.errors import PREEMPTED, ConfigError, RunFolderError, TopologyError
from launch.local import LocalRanks
from launch.plan import Plan
from launch.record import is_run_folder, read_plan
from launch.resume import changes
from launch.rollcall import RollCall, hosts_of_this_machine
from launch.root_cause import End
from launch.sections import RunConfig
from launch.silence import is_silence, notice_silence
from launch.supervise import ALONE_SECONDS, POLL_SECONDS, Ending, Place, Signals, say, supervise, way_on
from launch.topology import Machine, World, world_to_be

REACH_SECONDS = 600.0
"""How long the others try to reach the leader, which a person may start last."""

LEAVE_SECONDS = 15.0
"""How long the others may take to end their ranks and say so."""


@dataclass(frozen=True)
class Address:
    """Where the launchers meet."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def read_address(text: str) -> Address:
    """`host:port`.

    Raises:
        ConfigError: it is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"command line: --rdzv {text}: write host:port, for example --rdzv node1:29400")
    return Address(host, int(port))


def world_of(config: RunConfig, machine: Machine) -> World:
    """The world that the machines will make, if all are as this one."""
    devices = config.parallel.devices
    if devices == "auto":
        devices = machine.gpus if machine.gpus and config.parallel.device != "cpu" else 1
    return world_to_be(config.parallel.nodes, devices)


def is_here(address: Address) -> bool:
    """Whether an address is this machine's, so that its launcher leads.

    Raises:
        TopologyError: the name does not resolve.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(address.host, None, socket.AF_INET)}
    except OSError as error:
        raise TopologyError(
            f"{socket.gethostname()}: --rdzv {address}: {address.host}: {error.strerror or error}; give a name or an "
            "IPv4 address that all machines know"
        ) from None
    own = {each.address for addresses in psutil.net_if_addrs().values() for each in addresses}
    return bool(found & own) or any(each.startswith("127.") for each in found)


def _place(hosts: list[str], address: Address) -> Place:
    """Where ranks are that report to one of these hosts, and whose launchers meet at an address."""
    return Place(hosts, command=f"shoal resume {{run}} --rdzv {address} (on each machine)")


# --- lines between launchers -----------------------------------------------------------------------------


class Line:
    """A connection on which each line is a message."""

    def __init__(self, connection: socket.socket) -> None:
        notice_silence(connection)
        self.connection = connection
        self.host = ""
        self.lost: str | None = None
        """How it was lost: silent or ended."""
        self._text = b""

    def send(self, **content: Any) -> None:
        """Send a message; where the other side has gone that is noticed when it is read."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(content).encode() + b"\n")

    def read(self, seconds: float = 0) -> list[dict[str, Any]]:
        """The messages that have come, waiting so long for one."""
        if self.lost is None and select.select([self.connection], [], [], seconds)[0]:
            try:
                more = self.connection.recv(65536)
                self.lost = None if more else "ended"
                self._text += more
            except OSError as error:
                self.lost = "silent" if is_silence(error) else "ended"
        *lines, self._text = self._text.split(b"\n")
        messages = []
        for line in lines:
            with contextlib.suppress(ValueError):
                messages.append(json.loads(line))
        return [message for message in messages if isinstance(message, dict)]


def serve(address: Address) -> socket.socket:
    """What listens for the other machines.

    Raises:
        TopologyError: the port is taken.
    """
    try:
        return socket.create_server(("", address.port), backlog=128)
    except OSError as error:
        raise TopologyError(
            f"{socket.gethostname()}: --rdzv {address}: {error.strerror}; another run may meet there: choose another "
            "port, on all machines"
        ) from None


# --- the leader ------------------------------------------------------------------------------------------


def lead(plan: Plan, folder: Path, address: Address) -> Ending:
    """Wait for the launchers of the other machines, see the run through with them, and tell them how it ended.

    Raises:
        TopologyError: the port is taken.
    """
    interface = plan.config.cluster.network_interface
    hosts = hosts_of_this_machine(interface)
    place = _place(hosts if interface else [address.host, *hosts], address)
    team = _Team(plan, folder, address)
    try:
        with Signals() as signals:
            team.signals = signals
            ending = supervise(plan, folder, team.start, place, signals=signals)
        team.tell_all(end={"exit_code": ending.exit_code, "message": ending.message})
        return ending
    finally:
        team.close()


class _Team:
    """The launchers of the other machines."""

    def __init__(self, plan: Plan, folder: Path, address: Address) -> None:
        self._plan, self._folder, self._address = plan, folder, address
        self._listener = serve(address)
        self.lines: list[Line] = []
        self.signals = Signals()

    def start(self, plan: Plan, folder: Path, roll: RollCall | None) -> _TeamRanks:
        """Wait until all are there, then start all ranks."""
        self._gather(self.signals)
        assert roll is not None, "several nodes have several ranks"
        per_node = plan.processes.per_node
        for number, line in enumerate(self.lines, start=1):
            line.send(start={"announcement": roll.announcement, "first_rank": number * per_node})
        return _TeamRanks(LocalRanks(plan, folder, roll.announcement, 0), self.lines)

    def _gather(self, signals: Signals) -> None:
        self.lines = [line for line in self.lines if line.lost is None]
        told = -1
        while (missing := self._plan.processes.nodes - 1 - len(self.lines)) and signals.first is None:
            if missing != told:
                told = missing
                say(f"waiting for {missing} more at {self._address}: run the same command on each machine")
            if select.select([self._listener], [], [], POLL_SECONDS)[0]:
                self._welcome(Line(self._listener.accept()[0]))

    def _welcome(self, line: Line) -> None:
        for message in line.read(5.0)[:1]:
            line.host = str(message.get("host"))
            problem = self._problem(message)
            if problem:
                say(f"{line.host} is refused: {problem}")
                line.send(refused=problem)
                return
            line.send(folder=str(self._folder))
            self.lines.append(line)

    def _problem(self, message: dict[str, Any]) -> str | None:
        """Why a launcher cannot take part."""
        harmless, dangerous = changes(self._plan.config.model_dump(mode="json"), message.get("config") or {})
        if differing := [*harmless, *dangerous]:
            return f"it was started with other settings: {'; '.join(differing)}"
        return None

    def tell_all(self, **content: Any) -> None:
        """Send every launcher a message."""
        for line in self.lines:
            line.send(**content)

    def close(self) -> None:
        """Hang up."""
        for line in self.lines:
            line.connection.close()
        self._listener.close()


class _TeamRanks:
    """The ranks of all machines: those here, and what the others say of theirs."""

    def __init__(self, local: LocalRanks, lines: list[Line]) -> None:
        self._local, self._lines = local, lines
        self._working = {*lines}
        self.ends: list[End] = []
        self._noted = 0

    def look(self) -> None:
        """Notice who has gone, here and there."""
        self._local.look()
        self.ends += self._local.ends[self._noted :]
        self._noted = len(self._local.ends)
        for line in self._lines:
            for message in line.read():
                self._hear(line, message)
            if line.lost and line in self._working:
                self._working.remove(line)
                self.ends.append(End(1, None, line.host))
                if line.lost == "ended":  # its ranks are asked to stop by the kernel, and have still saved
                    say(f"the launcher on {line.host} has ended")

    def _hear(self, line: Line, message: dict[str, Any]) -> None:
        for failed in message.get("failed", []):
            self.ends.append(End(failed["code"], failed["rank"], line.host, failed["kills"]))
        if "left" in message:
            self._working.discard(line)

    @property
    def left(self) -> int:
        """How many ranks are there still, those of another machine counted as one."""
        return self._local.left + len(self._working)

    def tell(self, number: int) -> None:
        """Send a signal to every rank, once to each."""
        self._local.tell(number)
        for line in self._working:
            line.send(tell=number)

    def ask_for_stack(self, rank: int) -> None:
        """Have a rank of this machine write its stack to its log."""
        self._local.ask_for_stack(rank)

    def end(self) -> None:
        """See that nothing is left, here or there."""
        for line in self._working:
            line.send(stop=True)
        self._local.end()
        until = time.monotonic() + LEAVE_SECONDS
        while self._working and time.monotonic() < until:
            self.look()
            time.sleep(POLL_SECONDS)


# --- the others ------------------------------------------------------------------------------------------


def follow(plan: Plan, address: Address) -> Ending:
    """Join the leader at an address, start ranks when it says so, and end as it does.

    Raises:
        TopologyError: it cannot be reached, or refuses us.
        RunFolderError: its run folder is not seen here.
    """
    with Signals() as signals:
        line = reach(address, signals)
        line.send(host=socket.gethostname(), config=plan.config.model_dump(mode="json"))
        folder: Path | None = None
        while True:
            for message in line.read(POLL_SECONDS):
                if refused := message.get("refused"):
                    raise TopologyError(f"refused by {address}: {refused}")
                if "folder" in message:
                    folder = _shared(Path(message["folder"]), address)
                if end := message.get("end"):
                    return Ending(end["exit_code"], end["message"])
                if begun := message.get("start"):
                    assert folder is not None, "it was said before"
                    _work(read_plan(folder), folder, line, begun, signals)
            if line.lost == "silent":  # the run folder may be out of reach as well
                why = "that host is down, or the network between"
                return Ending(1, f"{socket.gethostname()}: no answer from {address.host}: {why}")
            if line.lost:
                then = f"\n{way_on(folder, _place([], address))}" if folder else ""
                return Ending(1, f"{socket.gethostname()}: lost the launcher on {address.host}{then}")
            if signals.first is not None and folder is None:
                return Ending(PREEMPTED, "stopped before the run began")


def reach(address: Address, signals: Signals, command: str = "shoal run") -> Line:
    """A line to the launcher at an address, which may be started later; there by the same command.

    Raises:
        TopologyError: nobody answers there in time.
    """
    until = time.monotonic() + REACH_SECONDS
    told = False
    while True:
        try:
            connection = socket.create_connection((address.host, address.port), timeout=10)
        except OSError as error:
            if time.monotonic() > until or signals.first is not None:
                raise TopologyError(
                    f"{socket.gethostname()}: cannot reach {address}: {error.strerror or error}; is `{command}` "
                    "started there, and may the port be used?"
                ) from None
            if not told:
                told = True
                say(f"waiting for the launcher at {address}")
            signals.quiet_for(1.0)
            continue
        connection.settimeout(None)
        return Line(connection)


def _shared(folder: Path, address: Address) -> Path:
    if not is_run_folder(folder):
        raise RunFolderError(
            f"{folder}: is the run folder on {address.host}, but is not seen on {socket.gethostname()}; choose an "
            "--out on a file system that all machines share"
        )
    return folder


def _work(plan: Plan, folder: Path, line: Line, begun: dict[str, Any], signals: Signals) -> None:
    """Start the ranks of this machine and see them through; what the leader must know is sent to it."""
    ranks = LocalRanks(plan, folder, begun["announcement"], begun["first_rank"])
    reported = 0
    alone_since: float | None = None
    try:
        while ranks.left:
            ranks.look()
            reported = _report(ranks, reported, line)
            messages = line.read(POLL_SECONDS)
            if any("stop" in message for message in messages):
                return
            for message in messages:
                if "tell" in message:
                    ranks.tell(message["tell"])
            if signals.first is not None:
                ranks.tell(signals.first)
            if line.lost:
                ranks.tell(signal.SIGTERM)
                alone_since = alone_since or time.monotonic()
                if line.lost == "silent" or time.monotonic() - alone_since > ALONE_SECONDS:
                    return
                time.sleep(POLL_SECONDS)
    finally:
        ranks.end()
        _report(ranks, reported, line)
        line.send(left=True)


def _report(ranks: LocalRanks, reported: int, line: Line) -> int:
    """Tell the leader of the ranks that have failed since; how many it knows of now."""
    if new := ranks.ends[reported:]:
        line.send(failed=[{"rank": end.rank, "code": end.code, "kills": end.out_of_memory_kills} for end in new])
    return len(ranks.ends)
