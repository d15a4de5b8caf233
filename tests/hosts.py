"""Hosts on this machine: processes, a name, mounts and a network of their own, in namespaces that end with process 1.

`Host` is the outside. Run as a program, this file is process 1 of a host (`_boot`), or `_sweep`; so only the standard
library is imported. Nothing is made that has a name outside: no named namespace, no mount, no interface.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class Host:
    """One host. Every other is plugged into the bridge of the one whose `switch` is None.

    The thread that starts a host has to outlive it: the kernel kills the host when that thread ends, so that nothing
    is left of a test run that was killed itself.
    """

    def __init__(self, folder: Path, name: str, address: str, switch: Host | None, daemon: Sequence[str]) -> None:
        self.name, self.address = name, address
        self._folder, self._switch, self._daemon = folder, switch, daemon
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def namespaces(self) -> str:
        """The folder of its namespaces, as seen from outside."""
        assert self._process, f"{self.name} is off"
        return f"/proc/{self._process.pid}/ns"

    def start(self) -> None:
        """Boot; its daemon starts as soon as its network is there."""
        assert not self._process, f"{self.name} runs"
        with (self._folder / f"{self.name}.console").open("ab") as console:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--uts", "--net", "--mount-proc"),
                    *(sys.executable, "-SE", __file__, "boot", str(self._folder), self.name, self.address),
                    *self._daemon,
                ],
                # A job must not see the variables of whoever runs the tests, except through sbatch.
                env={"PATH": PATH, "LC_ALL": "C", "HOME": "/root", "SLURM_CONF": str(self._folder / "slurm.conf")},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        ours = Path("/proc/self/ns/net").stat().st_ino
        wait(lambda: Path(self.namespaces, "net").stat().st_ino != ours, f"{self.name} gets no network namespace")
        self._plug_in()

    def kill(self) -> None:
        """A power cut: nobody is told, no connection is closed."""
        if not self._process:
            return
        if self._switch and self._switch._process:
            self._switch.ip(f"link del v{self.name}", check=False)
        # Process 1 and not `unshare`, which then waits for it: machines whose own process 1 does not reap would keep
        # a zombie.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first() or self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=20)
        self._process = None

    @property
    def runs(self) -> bool:
        """Whether it is on."""
        return self._process is not None and self._process.poll() is None

    def enter(self, *command: str, folder: Path | None = None) -> list[str]:
        """The command that runs `command` inside, in a folder, or in the working folder of the caller."""
        here = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder or Path.cwd())]
        return ["nsenter", f"--target={self._first()}", "--pid", "--mount", "--uts", "--net", *here, *command]

    def ip(self, *commands: str, check: bool = True) -> None:
        """Run commands of `ip` in its network."""
        done = subprocess.run(
            ["nsenter", f"--net={self.namespaces}/net", "ip", "-batch", "-"],
            input="\n".join(commands),
            env={"PATH": PATH},
            text=True,
            capture_output=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{self.name}: {commands}: {done.stderr}"

    def _plug_in(self) -> None:
        """Its network interface and the cable to the switch."""
        assert self._process
        if self._switch:
            # A booted host keeps its hardware address, else the others would look for the old one for seconds.
            hardware = f"02:00:{':'.join(f'{int(part):02x}' for part in self.address.split('.'))}"
            cable = f"link add v{self.name} type veth peer name eth0 address {hardware} netns {self._process.pid}"
            self._switch.ip(cable, f"link set v{self.name} master eth0 up")
        else:
            self.ip("link add eth0 type bridge")
        self.ip("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up")

    def _first(self) -> int:
        """The process that is number 1 inside; 0 if it has none."""
        assert self._process, f"{self.name} is off"
        pid = self._process.pid
        with contextlib.suppress(FileNotFoundError):
            return int((Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or ["0"])[0])
        return 0


def wait(what: Callable[[], object], complaint: str, seconds: float = 20) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def sweep(folder: Path) -> None:
    """Remove the control groups of a cluster in `folder`, whose processes are dead."""
    subprocess.run(
        ["unshare", "--mount", sys.executable, "-SE", __file__, "sweep", str(folder)], env={"PATH": PATH}, check=True
    )


def _freezer(folder: Path) -> Path:
    """Where the processes of steps are kept together, mounted in our mount namespace only.

    The v1 freezer is what clusters of this age use. Where the kernel has none, a hierarchy without a controller does
    as well, but slurmstepd then complains about `freezer.state` in the stderr of jobs.
    """
    everything = folder / "everything"
    everything.mkdir(exist_ok=True)
    for options in ("freezer", f"none,name={folder.name}"):
        if subprocess.run(["mount", "-t", "cgroup", "-o", options, "none", everything], check=False).returncode == 0:
            break
    # A part of the tree which only our cluster uses: the names in it, slurm_n1 …, may be those of another.
    ours = everything / folder.name
    ours.mkdir(exist_ok=True)
    return ours


def _sweep(folder: Path) -> None:
    ours = _freezer(folder)
    for _ in range(200):
        for state in ours.rglob("freezer.state"):
            with contextlib.suppress(OSError):
                state.write_text("THAWED")  # a frozen process does not even die
        for group in sorted((path for path in ours.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
        with contextlib.suppress(OSError):
            ours.rmdir()
            break
        time.sleep(0.05)
    else:
        sys.exit(f"control groups are left in {folder.name}")


def _boot(folder: Path, name: str, address: str, *daemon: str) -> None:
    """Process 1 of a host: prepares it, starts the daemon, then waits for whoever ends."""
    socket.sethostname(name)
    mounted = folder / "cgroup/freezer"
    for arguments in (
        ("--bind", folder / "hosts", "/etc/hosts"),
        ("-t", "tmpfs", "none", "/dev/shm"),
        ("--bind", _freezer(folder), mounted),
    ):
        subprocess.run(["mount", *arguments], check=True)

    def has_network() -> bool:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((address, 0))
            return True
        return False

    wait(has_network, f"{name}: no network")
    subprocess.Popen(daemon)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)  # a host outlives its daemon


if __name__ == "__main__":
    if sys.argv[1] == "sweep":
        _sweep(Path(sys.argv[2]))
    else:
        _boot(Path(sys.argv[2]), *sys.argv[3:])
