"""The cluster of the tests is a real one, and what we rely on in SLURM is as we think."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests import hosts
from tests.cluster import Cluster
from tests.commands import ROOT

pytestmark = pytest.mark.slurm

TASK = str(Path(__file__).with_name("stand_in_task.py"))
FOUR = ("--nodes=2", "--ntasks-per-node=2")
# Starts tasks as a supervisor does: as the batch script itself, with srun as a child that it can signal.
SUPERVISOR = """\
import pathlib, signal, subprocess, sys
folder, signals = pathlib.Path(sys.argv[1]), []
signal.signal(signal.SIGUSR1, lambda *_: signals.append("SIGUSR1"))
with (folder / "stderr").open("w") as stderr:
    srun = subprocess.Popen(["srun", "--kill-on-bad-exit=1", sys.executable, *sys.argv[2:]], stderr=stderr)
while srun.poll() is None:
    try:
        srun.wait(0.1)
    except subprocess.TimeoutExpired:
        if (folder / "signal").exists():
            srun.send_signal(int((folder / "signal").read_text()))
            (folder / "signal").unlink()
(folder / "supervisor").write_text(f"{srun.returncode} {signals}")
"""


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """Hand in a batch script; the number of the job."""
    (folder / "job.sh").write_text(f"#!/bin/bash\n{textwrap.dedent(script)}")
    done = cluster.run("sbatch", "--parsable", f"--output={folder}/output", *options, str(folder / "job.sh"))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def supervised(cluster: Cluster, folder: Path, *code: str) -> str:
    (folder / "supervisor.py").write_text(SUPERVISOR)
    return submit(
        cluster,
        folder,
        f"exec {sys.executable} {folder}/supervisor.py {folder} {TASK} {folder} {' '.join(code)}",
        *FOUR,
    )


def tasks(folder: Path, attempt: int = 0) -> list[str]:
    """What each task of an attempt has noted, by its number."""
    return [file.read_text() for file in sorted(folder.glob(f"attempt-{attempt}-task-*"))]


def until_tasks_run(folder: Path, attempt: int = 0, number: int = 4) -> None:
    hosts.wait(lambda: len(tasks(folder, attempt)) == number, f"no {number} tasks in {[*folder.iterdir()]}", 30)


def errors(folder: Path) -> list[str]:
    """What srun said, without what depends on the clock; nodes report in any order."""
    lines = (folder / "stderr").read_text().splitlines()
    return sorted(line.partition(" AT ")[0] for line in lines)


def test_nodes_are_hosts_of_their_own(cluster: Cluster) -> None:
    told = cluster.run("srun", "--nodes=2", "--label", "sh", "-c", "hostname; hostname -I; ls /proc | grep -cx 1")
    assert sorted(told.stdout.split("\n")) == ["", "0: 1", "0: 10.77.0.11 ", "0: n1", "1: 1", "1: 10.77.0.12 ", "1: n2"]
    assert cluster.run("hostname").stdout == "ctl\n"
    assert cluster.run("hostname", node="n2").stdout == "n2\n"
    assert cluster.run("pgrep", "-x", "slurmctld", node="n2").returncode == 1, "it has processes of its own"
    known = subprocess.run(["getent", "hosts", "n2"], check=False, capture_output=True)
    assert known.returncode == 2, "outside nobody knows of it"


def test_code_on_the_login_node_simply_calls_the_clients(cluster: Cluster, tmp_path: Path) -> None:
    script = "sbatch --wait --parsable -N2 --output=said --wrap 'srun hostname' && squeue --noheader"
    environment = {**os.environ, **cluster.environment()}
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted((tmp_path / "said").read_text().split()) == ["n1", "n2"]
    job = done.stdout.split()[0]
    assert cluster.job(job)["WorkDir"] == str(tmp_path)
    hosts.wait(lambda: f"JobId={job} " in cluster.completions(), "no line in the completion file")


def test_gpus_are_given_out(cluster: Cluster) -> None:
    told = cluster.run("srun", "--gres=gpu:2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE")
    assert told.stdout == "0,1 2\n"
    refused = cluster.run("srun", "--gres=gpu:5", "true")
    assert refused.returncode == 1 and "Requested node configuration is not available" in refused.stderr


def test_a_job_that_is_not_in_the_state_is_shown_with_the_logs(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "exit 3")
    with pytest.raises(
        AssertionError, match=rf"job {job} is not .'COMPLETED'.*ExitCode=3:0(?s:.*)--- ctl\.log\n(?s:.*)n2"
    ):
        cluster.wait_for(job, "COMPLETED", timeout=2)


def test_a_signal_to_the_batch_script_reaches_it_only(cluster: Cluster, tmp_path: Path) -> None:
    job = supervised(cluster, tmp_path)
    until_tasks_run(tmp_path)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    time.sleep(1)
    assert tasks(tmp_path) == [""] * 4
    (tmp_path / "signal").write_text(str(int(signal.SIGUSR1)))
    assert cluster.wait_for(job, "COMPLETED")["ExitCode"] == "0:0"
    assert (tmp_path / "supervisor").read_text() == "0 ['SIGUSR1']"
    assert tasks(tmp_path) == ["SIGUSR1\n"] * 4, "srun hands it to the tasks on all nodes"
    assert errors(tmp_path) == []


def test_cancelling_terminates_the_tasks(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, f"srun {sys.executable} {TASK} {tmp_path}", *FOUR)
    until_tasks_run(tmp_path)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    hosts.wait(lambda: all("SIGTERM" in noted for noted in tasks(tmp_path)), f"{tasks(tmp_path)}")


def test_srun_that_is_terminated_kills_its_tasks_at_once(cluster: Cluster, tmp_path: Path) -> None:
    job = supervised(cluster, tmp_path)
    until_tasks_run(tmp_path)
    (tmp_path / "signal").write_text(str(int(signal.SIGTERM)))
    cluster.wait_for(job, "COMPLETED")
    assert tasks(tmp_path) == [""] * 4, "none is told by SIGTERM"
    assert (tmp_path / "supervisor").read_text() == "137 []"
    assert "srun: forcing job termination" in errors(tmp_path)


def test_a_requeued_job_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, f"srun {sys.executable} {TASK} {tmp_path}", *FOUR)
    until_tasks_run(tmp_path)
    cluster.run("scontrol", "requeue", job)
    cluster.speed_up_requeue(job)
    until_tasks_run(tmp_path, attempt=1)
    assert cluster.job(job)["Restarts"] == "1"


def preempt(cluster: Cluster, folder: Path) -> str:
    done = cluster.run("sbatch", "--parsable", "--partition=high", "-N2", "-c8", "--wrap=true", cwd=folder)
    return done.stdout.strip()


def test_a_job_of_the_high_partition_takes_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, f"srun {sys.executable} {TASK} {tmp_path}", *FOUR, "--cpus-per-task=4")
    until_tasks_run(tmp_path)
    high = preempt(cluster, tmp_path)
    cluster.wait_for(high, "COMPLETED")
    assert tasks(tmp_path) == ["SIGTERM\n"] * 4
    cluster.speed_up_requeue(job)
    until_tasks_run(tmp_path, attempt=1)


@pytest.mark.slow
def test_a_preempted_job_has_its_time_of_grace(tmp_path: Path) -> None:
    """SLURM looks every half minute whose time is over. A job that ends before is over, and not requeued."""
    with Cluster(grace=3) as own:
        job = submit(own, tmp_path, f"srun {sys.executable} {TASK} {tmp_path} stays", *FOUR, "--cpus-per-task=4")
        until_tasks_run(tmp_path)
        high = preempt(own, tmp_path)
        hosts.wait(lambda: tasks(tmp_path) == ["SIGTERM\n"] * 4, "the tasks are not told", 5)
        time.sleep(2)
        assert own.job(job)["JobState"] == "RUNNING"
        own.wait_for(high, "COMPLETED", timeout=60)
        own.speed_up_requeue(job)
        until_tasks_run(tmp_path, attempt=1)


@pytest.mark.parametrize(
    ("code", "exit_code", "said"), [("3", 3, "task 3: Exited with exit code 3"), ("-9", 137, "task 3: Killed")]
)
def test_a_task_that_fails_ends_the_others(
    cluster: Cluster, tmp_path: Path, code: str, exit_code: int, said: str
) -> None:
    job = supervised(cluster, tmp_path, code)
    cluster.wait_for(job, "COMPLETED")
    assert tasks(tmp_path) == ["SIGTERM\n"] * 3 + [""]
    assert (tmp_path / "supervisor").read_text() == f"{exit_code} []"
    assert f"srun: error: n2: {said}" in errors(tmp_path)


@pytest.mark.slow
def test_a_node_that_crashes_costs_an_attempt(tmp_path: Path) -> None:
    with Cluster(node_timeout=5) as own:
        job = supervised(own, tmp_path)
        until_tasks_run(tmp_path)
        own.crash("n2")
        assert own.wait_for(job, "PENDING", timeout=60)["Restarts"] == "1"
        hosts.wait(lambda: "srun: error: Node failure on n2" in errors(tmp_path), "srun does not tell", 5)
        own.boot("n2")
        own.wait_for_nodes("idle")
        own.speed_up_requeue(job)
        until_tasks_run(tmp_path, attempt=1)


def test_a_cable_that_is_pulled_cuts_the_node_off(cluster: Cluster) -> None:
    reach = (sys.executable, "-SE", "-c", "import socket; socket.create_connection(('n2', 6818), 1)")
    assert cluster.run(*reach).returncode == 0
    cluster.link("n2", up=False)
    assert cluster.run(*reach).returncode == 1
    assert cluster.run("hostname", node="n2").stdout == "n2\n", "it runs"
    cluster.link("n2", up=True)
    assert cluster.run(*reach).returncode == 0


def test_tasks_are_bound_to_their_cpus() -> None:
    """With the CPUs there are; the shared cluster claims more."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one CPU")
    command = (sys.executable, "-SE", "-c", "import os; print(len(os.sched_getaffinity(0)))")
    with Cluster(nodes=1, affinity=True) as own:
        assert own.run("srun", "-c1", *command).stdout == "1\n"
        assert own.run("srun", "-c2", *command).stdout == "2\n"


def traces(folder: Path) -> list[str]:
    """What is left on this machine of a cluster in this folder."""
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if folder.name in line]
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{folder.name}")]
    processes = [
        str(process)
        for process in psutil.process_iter(["cmdline", "status"])
        if folder.name in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
    return [*mounts, *groups, *processes, *([str(folder)] if folder.exists() else [])]


def network_namespaces() -> set[int]:
    found = set()
    for process in psutil.pids():
        try:
            found.add(Path(f"/proc/{process}/ns/net").stat().st_ino)
        except OSError:
            continue
    return found


def test_nothing_is_left_of_a_cluster_with_jobs(tmp_path: Path) -> None:
    which = ("stat", "--dereference", "--format=%i", "/proc/self/ns/net")
    with Cluster(nodes=1) as own:
        submit(own, tmp_path, f"trap '' TERM; srun {sys.executable} {TASK} {tmp_path}")
        until_tasks_run(tmp_path, number=1)
        client = subprocess.Popen(["srun", "-c2", "sleep", "60"], env={**os.environ, **own.environment()})
        hosts.wait(lambda: len([job for job in own.jobs() if job["JobState"] == "RUNNING"]) == 2, "two jobs run")
        networks = {int(own.run(*which, node=node).stdout) for node in (None, "n1")}
        assert len(traces(own.folder)) >= 3 and len(networks) == 2 and networks <= network_namespaces()
    assert client.wait(timeout=20) == -signal.SIGKILL
    assert traces(own.folder) == [] and not networks & network_namespaces()


def test_nothing_is_left_of_one_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "_configuration", lambda _: "ClusterName=broken\n")
    monkeypatch.setattr(Cluster, "wait_for_nodes", lambda self, *_: pytest.fail(self.logs()))
    own = Cluster(nodes=1)
    with pytest.raises(pytest.fail.Exception, match="--- n1"), own:
        raise AssertionError("it has started")
    assert traces(own.folder) == []


def test_what_a_killed_run_has_left_is_removed_by_the_next() -> None:
    script = "import time; from tests.cluster import *; c = Cluster(nodes=1).__enter__(); print(c.folder, flush=True)"
    killed = subprocess.Popen([sys.executable, "-c", f"{script}; time.sleep(60)"], cwd=ROOT, stdout=subprocess.PIPE)
    assert killed.stdout
    folder = Path(killed.stdout.readline().decode().strip())
    assert folder.exists()
    killed.kill()
    killed.wait()
    hosts.wait(lambda: not [trace for trace in traces(folder) if "psutil" in trace], "its processes end with it")
    with Cluster(nodes=1) as own:
        assert traces(own.folder), "its own traces are seen"
        assert traces(folder) == []
