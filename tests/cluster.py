"""A real SLURM cluster of several hosts on this machine: slurmctld, a slurmd per node, and clients of a login node.

Everything but the files in one folder lives in the namespaces of `tests/hosts.py`. The nodes share the file system of
the machine and nothing else; their names resolve inside only, so that a client that was not led inside reaches nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.hosts import PATH, Host, sweep, wait

CLIENTS = ("sbatch", "srun", "salloc", "squeue", "scontrol", "scancel", "sacct", "sdiag", "sinfo")
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    **dict.fromkeys(CLIENTS, "slurm-wlm"),
    "munged": "munge",
    "ip": "iproute2",
    "mount": "mount",
    **dict.fromkeys(("unshare", "nsenter", "setpriv"), "util-linux"),
}
PREFIX = "shoal-slurm-"
_numbers = itertools.count()


def missing() -> str:
    """What this machine lacks for a cluster; empty if nothing."""
    if os.geteuid() != 0:
        return "not root"
    if lacking := {package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)}:
        return f"not installed: {', '.join(sorted(lacking))}"
    probe = ["ip", "link", "add", "type", "veth"]
    for kind, command in {"namespaces": ["true"], "network interfaces (veth)": probe}.items():
        spaces = ["unshare", "--pid", "--fork", "--mount", "--uts", "--net", "--mount-proc"]
        tried = subprocess.run([*spaces, *command], env={"PATH": PATH}, capture_output=True, text=True, check=False)
        if tried.returncode:
            return f"no {kind}: {tried.stderr.strip()}"
    return ""


class Cluster:
    """A cluster, from `with` to its end. Partitions: `debug`, whose jobs are requeued for those of `high`.

    Args:
        nodes: how many, called n1, n2 …
        cpus: of each node. More than there are can be claimed, but then no task is bound to its own.
        gpus: of each node, fake.
        kill_wait: seconds between SIGTERM and SIGKILL for a job that is cancelled.
        grace: seconds that a preempted job has before it is requeued. In them only its steps are told, by SIGTERM;
            SLURM looks every half minute whether they are over. With 0, its own default, it requeues at once.
        node_timeout: SlurmdTimeout, in seconds; a crash is found out some ten seconds later.
        affinity: claim only the CPUs that are there, and bind tasks to them.
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        cpus: int = 8,
        gpus: int = 4,
        kill_wait: int = 5,
        grace: int = 0,
        node_timeout: int = 20,
        affinity: bool = False,
    ) -> None:
        self.names = tuple(f"n{number + 1}" for number in range(nodes))
        self.cpus = len(os.sched_getaffinity(0)) if affinity else cpus
        self.gpus, self.kill_wait, self.grace, self.affinity = gpus, kill_wait, grace, affinity
        self.node_timeout = node_timeout
        # The name says whose it is, so that what a killed run has left can be told from what is in use.
        identity = f"{PREFIX}{os.getpid()}-{_started(os.getpid())}-{next(_numbers)}"
        self.folder = Path(tempfile.gettempdir(), identity)
        self._munge = f"{self.folder}/munge"
        daemons = (
            f"munged --foreground --force --key-file={self._munge}/key --socket={self._munge}/socket "
            f"--pid-file={self._munge}/pid --log-file={self._munge}/log --seed-file={self._munge}/seed & "
            f"until [ -S {self._munge}/socket ]; do sleep 0.02; done; exec slurmctld -i -D"
        )
        self._control = Host(self.folder, "ctl", "10.77.0.1", None, ("sh", "-c", daemons))
        self._nodes = {
            name: Host(self.folder, name, f"10.77.0.{11 + number}", self._control, ("slurmd", "-D", "-N", name))
            for number, name in enumerate(self.names)
        }

    def __enter__(self) -> Self:
        _clear_leftovers()
        try:
            self._write()
            self._control.start()
            self._lead_clients_inside()
            for node in self._nodes.values():
                node.start()
            self.wait_for_nodes("idle", 30)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of it, jobs and clients too, and leave nothing behind."""
        for host in (*self._nodes.values(), self._control):
            host.kill()
        _remove(self.folder)

    def environment(self) -> dict[str, str]:
        """What makes a process on this machine one on the login node: add it to the environment."""
        path = f"{self.folder}/bin:{os.environ.get('PATH', os.defpath)}"
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def run(
        self,
        *command: str,
        node: str | None = None,
        timeout: float = 60,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, or inside a node."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        host = self._nodes[node] if node else None
        return subprocess.run(
            host.enter(*command, folder=cwd) if host else [f"{self.folder}/bin/enter", *command],
            env={**inherited, **self.environment(), **(environment or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def crash(self, node: str) -> None:
        """Cut the power of a node."""
        self._nodes[node].kill()

    def boot(self, node: str) -> None:
        """Switch a node on that has crashed."""
        self._nodes[node].start()

    def link(self, node: str, up: bool) -> None:
        """Pull or plug the network cable of a node."""
        self._control.ip(f"link set v{node} {'up' if up else 'down'}")

    def port(self, node: str, open_: bool) -> None:
        """Open or close a node's port of the switch: where it is closed packets vanish, and no host is told."""
        self._control.ip(f"link set v{node} {'master eth0' if open_ else 'nomaster'}")

    def jobs(self) -> list[dict[str, str]]:
        """The fields of all jobs, also of those that have ended."""
        return [_fields(line) for line in self._said("scontrol", "show", "job", "-o").splitlines() if "JobId=" in line]

    def job(self, job: str) -> dict[str, str]:
        """The fields of one job; `job` is 12, or 12_3 for a task of an array."""
        return _fields(self._said("scontrol", "show", "job", "-o", job))

    def wait_for(self, job: str, states: str | Collection[str], timeout: float = 30) -> dict[str, str]:
        """Wait until the job is in one of the states; its fields."""
        wanted = {states} if isinstance(states, str) else {*states}
        deadline = time.monotonic() + timeout
        while (fields := self.job(job))["JobState"] not in wanted:
            if time.monotonic() > deadline:
                told = " ".join(f"{name}={value}" for name, value in fields.items())
                raise AssertionError(f"job {job} is not {wanted} after {timeout} s: {told}\n{self.logs()}")
            time.sleep(0.1)
        return fields

    def wait_for_nodes(self, state: str, timeout: float = 30, names: Collection[str] | None = None) -> None:
        """Wait until these nodes, or all, are in a state as `sinfo` calls it."""
        wanted = {f"{name} {state}" for name in names or self.names}

        def reached() -> bool:
            told = self.run("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %t", timeout=30)
            return wanted <= {*told.stdout.splitlines()}

        try:
            wait(reached, "", timeout)
        except AssertionError:
            told = self.run("sinfo", "--Node", "--long", timeout=30)
            message = f"nodes are not {state} after {timeout} s: {told.stdout}{told.stderr}\n{self.logs()}"
            raise AssertionError(message) from None

    def speed_up_requeue(self, job: str) -> None:
        """Start a requeued job now: SLURM holds it for two minutes, lest the last attempt still runs somewhere.

        Or lest a node that was off is still to be told to end the last attempt, and ends this one.
        """
        self.wait_for(job, "PENDING")
        told = r"Agent queue size:\s+0\s+Agent count:\s+0\s"
        wait(lambda: re.search(told, self._said("sdiag")), f"slurmctld still sends messages\n{self.logs()}", 40)
        self._said("scontrol", "update", f"JobId={job}", "StartTime=now")

    def settle(self) -> None:
        """End all jobs, connect and boot what is not, and wait until all nodes are idle again."""
        active = [fields["JobId"] for fields in self.jobs() if fields["JobState"] in ACTIVE]
        if active:
            self.run("scancel", "--full", "--signal=KILL", *active)
            self.run("scancel", *active)
        for name, node in self._nodes.items():
            if not node.runs:
                self.boot(name)
            self.link(name, up=True)
            self.port(name, open_=True)
        told = self._said("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %t")
        if down := [line.split()[0] for line in told.splitlines() if "*" in line or "down" in line]:
            self.run("scontrol", "update", f"NodeName={','.join(down)}", "State=RESUME")
        self.wait_for_nodes("idle")

    def completions(self) -> str:
        """The job completion file: a line for each attempt that has ended."""
        log = self.folder / "completions.log"
        return log.read_text() if log.exists() else ""

    def logs(self, lines: int = 15) -> str:
        """The last lines of slurmctld's log and of each slurmd's, or of what they said before they had one."""
        told = []
        for name in ("ctl", *self.names):
            files = [file for kind in ("log", "console") if (file := self.folder / f"{name}.{kind}").exists()]
            for file in files[:1]:
                told += [f"--- {file.name}", *file.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(told)

    def _said(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def _write(self) -> None:
        """All files of the cluster."""
        for folder in ("bin", "cgroup/freezer", "devices", "munge", "state", *(f"spool/{name}" for name in self.names)):
            (self.folder / folder).mkdir(parents=True)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        hosts = {
            "localhost": "127.0.0.1",
            **{host.name: host.address for host in (self._control, *self._nodes.values())},
        }
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        devices = [self.folder / f"devices/gpu{number}" for number in range(self.gpus)]
        for device in devices:
            device.symlink_to("/dev/null")  # any character device will do
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        (self.folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint={self.folder}/cgroup\n"
        )
        (self.folder / "slurm.conf").write_text(self._configuration())

    def _configuration(self) -> str:
        gres = f"Gres=gpu:{self.gpus} " if self.gpus else ""
        return f"""\
ClusterName=shoal
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self._munge}/socket
CredType=cred/munge
MailProg=/bin/true
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
SlurmdSpoolDir={self.folder}/spool/%n
StateSaveLocation={self.folder}/state
SlurmctldLogFile={self.folder}/ctl.log
SlurmdLogFile={self.folder}/%n.log
# Signals reach the processes of a step and no others, and nothing of a step survives it.
ProctrackType=proctrack/cgroup
TaskPlugin=task/{"affinity" if self.affinity else "none"}
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={self.folder}/completions.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# The nodes have what is written here, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait={self.kill_wait}
# Ended jobs can be asked for as long as the cluster runs.
MinJobAge=86400
InactiveLimit=0
WaitTime=0
SlurmctldTimeout=20
SlurmdTimeout={self.node_timeout}
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,bf_yield_sleep=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={",".join(self.names)} CPUs={self.cpus} RealMemory=8000 {gres}State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace}
PartitionName=high Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""

    def _lead_clients_inside(self) -> None:
        """Programs `bin/sbatch` … for the login node, and `bin/enter` for any other command there."""
        outside = Path("/proc/self/ns/net").stat().st_ino
        spaces = self._control.namespaces
        for name in ("enter", *CLIENTS):
            program = shutil.which(name, path=PATH) or ""
            file = self.folder / "bin" / name
            file.write_text(
                f"""#!/bin/sh
# Jobs find this on their PATH too, and are inside already.
export SLURM_CONF={self.folder}/slurm.conf
[ "$(stat -L -c %i /proc/self/ns/net)" = {outside} ] || exec {program} "$@"
exec nsenter --net={spaces}/net --uts={spaces}/uts \\
  unshare --mount sh -c 'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"' sh {program} "$@"
"""
            )
            file.chmod(0o755)


ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "PREEMPTED", "REQUEUED", "REQUEUE_HOLD")


def _fields(line: str) -> dict[str, str]:
    """`A=1 B=two words C=x=1` as a dictionary."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s[A-Z][\w/:]*=|\s*$)", line))


def _started(pid: int) -> int:
    """When a process was started, in ticks since the machine was; 0 if there is none."""
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if after_name[0] in "ZX" else int(after_name[19])
    return 0


def _clear_leftovers() -> None:
    """Remove what runs have left that were killed: their folder names a process that is no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*-*"):
        pid, started, _ = folder.name.removeprefix(PREFIX).split("-")
        if _started(int(pid)) != int(started):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove the cluster of a folder, whose hosts are off."""
    if not folder.exists():
        return
    own = f"SLURM_CONF={folder}/slurm.conf"
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if own in Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace").split("\0"):
                process.send_signal(signal.SIGKILL)  # a client, such as an srun that nobody waits for
    sweep(folder)
    shutil.rmtree(folder)
