"""Runs as jobs of a real SLURM cluster: numbers, interruptions, faults. Two nodes, two processes on each."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import newest_complete
from launch.job import STARTS, failures
from tests.cluster import Cluster
from tests.commands import ROOT, shoal

pytestmark = [pytest.mark.slurm, pytest.mark.dist, pytest.mark.slow]

RECIPE = Path(__file__).with_name("own_recipe.py")
TWO_BY_TWO = ("parallel.device=cpu", "parallel.devices=2", "parallel.nodes=2")


class Site:
    """A user on the login node, in a folder that all nodes see."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "run.yaml").write_text(
            f"recipe: {RECIPE}\ntrain: {{max_steps: 12, global_batch_size: 8, learning_rate: 0.01}}\n"
        )

    def shoal(self, *arguments: str) -> str:
        """What a command prints; it must end well."""
        done = shoal(self.folder, *arguments, OMP_NUM_THREADS="1", **self.cluster.environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """Submit the run of this folder, unless another is named; the number of the job."""
        first = () if arguments and not arguments[0].startswith("-") and "=" not in arguments[0] else ("run.yaml",)
        told: str = json.loads(self.shoal("submit", *first, *arguments, "--json"))["job"]
        return told

    def log(self, run: str = "run") -> str:
        """What the jobs of a run have said."""
        return "".join(path.read_text() for path in sorted((self.folder / run).glob("slurm-*.log")))

    def until(self, what: Callable[[], object], seconds: float = 90) -> None:
        """Wait for something that a job brings about."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.log()}\n{self.cluster.logs()}"
            time.sleep(0.1)

    def updates(self, run: str = "run") -> list[dict[str, Any]]:
        """What was recorded of each update."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]

    def has_done(self, number: int, run: str = "run") -> Callable[[], bool]:
        return lambda: len(self.updates(run)) >= number

    def states(self, run: str = "run") -> list[dict[str, Any]]:
        """What `shoal status` says."""
        found: list[dict[str, Any]] = json.loads(self.shoal("status", run, "--json"))
        return found


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Site:
    return Site(cluster, tmp_path)


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    """Each update once, with the same samples, rate and loss."""
    for name in ("update", "consumed", "learning_rate", "targets"):
        assert [record[name] for record in one] == [record[name] for record in other], name
    for name in ("loss", "gradient_norm"):
        assert [record[name] for record in one] == pytest.approx([record[name] for record in other], rel=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The updates of the same run by one process on this machine."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "run.yaml").write_text(
        f"recipe: {RECIPE}\ntrain: {{max_steps: 12, global_batch_size: 8, learning_rate: 0.01}}\n"
    )
    done = shoal(folder, "run", "run.yaml", "parallel.device=cpu", "save.export=false", "--out", "run")
    assert done.returncode == 0, done.stderr
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


# --- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "strategy"), [("auto", "zero2"), ("torchrun", "ddp"), ("accelerate", "fsdp2")])
def test_two_nodes_give_the_numbers_of_one_process(
    launcher: str, strategy: str, site: Site, alone: list[dict[str, Any]]
) -> None:
    job = site.submit(*TWO_BY_TWO, f"parallel.strategy={strategy}", f"cluster.launcher={launcher}", "--out", "run")
    fields = site.cluster.wait_for(job, ("COMPLETED", "FAILED"), 120)
    assert fields["JobState"] == "COMPLETED", site.log()
    assert_same(site.updates(), alone, 1e-5)
    (told,) = site.states()
    assert (told["state"], told["job"], told["nodes"], told["update"]) == ("finished", job, "n[1-2]", 12)
    assert "(reloaded and checked)" in site.log()
    assert site.shoal("logs", "run") == site.log()
    assert '<span class="state state-finished">' in (site.folder / "run/report.html").read_text(encoding="utf-8")


def test_a_template_works_by_hand(site: Site, alone: list[dict[str, Any]]) -> None:
    """Plain sbatch, and the processes of one node."""
    path = f"{Path(sys.executable).parent}:{site.cluster.environment()['PATH']}"
    cache = str(site.folder / "cache")
    done = site.cluster.run(
        *("sbatch", "--parsable", "--ntasks-per-node=2", f"{ROOT}/slurm/train.sbatch"),
        *("run.yaml", "parallel.device=cpu", "save.export=false"),
        cwd=site.folder,
        environment={"PATH": path, "PYTHONPATH": str(ROOT), "SHOAL_CACHE": cache},
    )
    job = done.stdout.strip()
    fields = site.cluster.wait_for(job, ("COMPLETED", "FAILED"), 90)
    log = (site.folder / f"slurm-{job}.log").read_text()
    assert fields["JobState"] == "COMPLETED", log
    assert_same(site.updates(f"runs/run-{job}"), alone, 1e-5)


def test_srun_alone_starts_ranks_that_find_each_other(site: Site, alone: list[dict[str, Any]]) -> None:
    script = site.folder / "plain.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --cpus-per-task=1\n"
        f"cd {site.folder}\nexport PYTHONPATH={ROOT} SHOAL_CACHE={site.folder}/cache\n"
        f"srun --cpus-per-task=1 {sys.executable} -m launch.train run.yaml parallel.device=cpu --out run\n"
    )
    job = site.cluster.run("sbatch", "--parsable", f"--output={site.folder}/plain.log", str(script)).stdout.strip()
    fields = site.cluster.wait_for(job, ("COMPLETED", "FAILED"), 120)
    assert fields["JobState"] == "COMPLETED", (site.folder / "plain.log").read_text()
    assert_same(site.updates(), alone, 1e-5)
    plan = json.loads((site.folder / "run/plan.json").read_text())["plan"]
    assert (plan["processes"]["nodes"], plan["processes"]["per_node"], plan["processes"]["threads"]) == (2, 2, 1)


# --- interruptions ---------------------------------------------------------------------------------------


SLOW = ("recipe_args.seconds_per_batch=0.1", "train.max_steps=60", "eval.at_start=false")
NOT_TO_THE_END = (*SLOW, "train.max_steps=600")


def test_a_run_that_is_interrupted_four_times_ends_with_the_same_weights(site: Site) -> None:
    """Its time limit, an administrator's requeue, a preemption, and the loss of a node."""
    cluster = site.cluster
    job = site.submit(*TWO_BY_TWO, *SLOW, "save.every_steps=2", "--out", "run")
    site.until(site.has_done(3))
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    site.until(lambda: f"job {job} is queued again" in site.log(), 30)
    saved = newest_complete(site.folder / "run")
    assert saved is not None
    site.until(lambda: site.states()[0]["state"] == "queued", 30)  # its batch script has a moment to go
    assert site.states()[0]["because"].startswith("start 2, ")
    cluster.speed_up_requeue(job)

    before = len(site.updates())
    site.until(site.has_done(before + 3))
    (told,) = site.states()
    assert told["state"] == "running" and told["update"] >= before and told["updates"] == 60
    cluster.run("scontrol", "requeue", job)
    cluster.speed_up_requeue(job)

    before = len(site.updates())
    site.until(site.has_done(before + 3))
    higher = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    cluster.wait_for(higher.stdout.strip(), "COMPLETED", 60)
    cluster.speed_up_requeue(job)

    before = len(site.updates())
    site.until(site.has_done(before + 3))
    cluster.crash("n2")
    site.until(lambda: cluster.job(job)["Restarts"] == "4", 60)
    cluster.boot("n2")
    cluster.wait_for_nodes("idle", 60)
    cluster.speed_up_requeue(job)
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), 150)["JobState"] == "COMPLETED", site.log()

    starts = json.loads((site.folder / "run" / STARTS).read_text())
    assert [start["restarts"] for start in starts] == [0, 1, 2, 3, 4]
    assert all(later["saved"] > earlier["saved"] for earlier, later in itertools.pairwise(starts))
    undisturbed = ("parallel.device=cpu", "parallel.devices=4", "train.max_steps=60", "eval.at_start=false")
    site.shoal("run", "run.yaml", *undisturbed, "--out", "other")
    assert_same(site.updates(), site.updates("other"), 0)
    one, other = (site.folder / run / "export/model.safetensors" for run in ("run", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_a_preempted_job_that_has_time_saves_and_is_queued_again(slurm: None, tmp_path: Path) -> None:  # noqa: ARG001
    """SLURM tells its tasks alone then, not the batch script, and lets the job end before it would queue it again."""
    with Cluster(grace=120) as cluster:
        site = Site(cluster, tmp_path)
        job = site.submit(*TWO_BY_TWO, *NOT_TO_THE_END, "--out", "run")
        site.until(site.has_done(3))
        cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        site.until(lambda: f"job {job} is queued again" in site.log(), 60)
        stopped = json.loads((tmp_path / "run/stopped.json").read_text())
        assert stopped["signal"] == "SIGTERM" and stopped["checkpoint"] == f"checkpoints/step-{stopped['update']:06d}"
        assert len(site.updates()) == stopped["update"], "nothing is lost"
        assert cluster.wait_for(job, "PENDING")["Restarts"] == "1"


def test_a_job_that_is_cancelled_is_not_queued_again_and_goes_on_when_it_is_submitted(site: Site) -> None:
    job = site.submit(*TWO_BY_TWO, *NOT_TO_THE_END, "--out", "run")
    site.until(site.has_done(3))
    refused = shoal(site.folder, "submit", "run", **site.cluster.environment())
    assert refused.returncode == 5
    assert refused.stderr.startswith(f"shoal: {site.folder}/run: job {job} is RUNNING already; `shoal status ")
    assert site.shoal("cancel", "run") == f"job {job} is cancelled\n"
    site.cluster.wait_for(job, "CANCELLED")
    assert f"; go on with: shoal submit {site.folder}/run\n" in site.log()
    time.sleep(3)  # what would queue it again would have by now
    assert site.cluster.job(job)["JobState"] == "CANCELLED" and site.cluster.job(job)["Restarts"] == "0"
    (told,) = site.states()
    assert told["state"] == "cancelled"
    assert newest_complete(site.folder / "run") is not None, "the ranks were told and have saved"
    again = site.submit("run", "train.schedule=linear")
    assert again != job
    site.until(lambda: "resumed from step-" in site.log(), 60)
    site.shoal("cancel", "run")


def test_what_has_failed_is_told_and_not_queued_again(site: Site) -> None:
    job = site.submit(*TWO_BY_TWO, "recipe_args.dying_rank=3", "recipe_args.dying_after=1", "--out", "run")
    fields = site.cluster.wait_for(job, ("FAILED", "COMPLETED", "PENDING"), 90)
    if fields["JobState"] == "PENDING":  # it was not there yet
        fields = site.cluster.wait_for(job, ("FAILED", "COMPLETED"), 90)
    assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "1:0"
    assert "shoal: rank 3 (n2) was killed by SIGKILL" in site.log()
    (told,) = site.states()
    assert told["state"] == "failed"
    report = (site.folder / "run/report.html").read_text(encoding="utf-8")
    assert (
        "rank 3 (n2) was killed by SIGKILL" in report.partition('<section id="failure"')[2].partition("</section>")[0]
    )


def test_a_job_that_gets_nowhere_is_not_started_for_ever(site: Site) -> None:
    """Preparing takes longer than the job may: it is told before each time."""
    job = site.submit(
        *TWO_BY_TWO, "recipe_args.seconds_to_prepare=600", "cluster.max_fruitless_starts=2", "--out", "run"
    )
    for start in (1, 2):
        site.until(lambda start=start: site.log().count("preparing ") == start)  # type: ignore[misc]
        site.cluster.run("scancel", "--batch", "--signal=USR1", job)
        site.until(lambda start=start: site.log().count("is queued again") == start, 30)  # type: ignore[misc]
        site.cluster.speed_up_requeue(job)
    assert site.cluster.wait_for(job, ("FAILED", "COMPLETED"), 30)["JobState"] == "FAILED"
    assert (
        f"shoal: job {job} has been started 2 times in a row without a checkpoint newer than update 0: it is not "
        "started again; give it more cluster.time, or save more often"
    ) in site.log()


# --- faults ----------------------------------------------------------------------------------------------


def fails(site: Site, *overrides: str, seconds: float = 60) -> str:
    """Submit a job that cannot work: what it says, which must be soon."""
    job = site.submit(*TWO_BY_TWO, "save.export=false", *overrides, "--out", "run")
    site.cluster.wait_for(job, ("RUNNING", "FAILED"), 30)
    assert site.cluster.wait_for(job, ("FAILED", "COMPLETED"), seconds)["JobState"] == "FAILED"
    return site.log()


def test_an_address_that_others_cannot_reach(site: Site) -> None:
    log = fails(site, "cluster.network_interface=lo")
    assert re.search(
        r"shoal: rank [23] \(n2\): cannot reach the launcher: 127\.0\.0\.1:\d+: Connection refused; see whether", log
    )
    assert "set cluster.network_interface where only one of their networks does" in log


def test_a_task_that_does_not_come(site: Site) -> None:
    lazy = json.dumps(["bash", "-c", '[ "$SLURM_PROCID" = 3 ] && exec sleep 600; exec "$@"', "lazy"])
    log = fails(site, f"cluster.container={lazy}")
    assert "shoal: rank 3 (n2) of 4 did not report to n1 within 40 s; the others are on n1, n2" in log


def test_a_job_of_another_size_than_the_plan(site: Site) -> None:
    site.shoal("submit", "run.yaml", *TWO_BY_TWO, "--out", "run")
    site.shoal("cancel", "run")
    job = site.cluster.run("sbatch", "--parsable", "--nodes=1", "run/job.sbatch", cwd=site.folder).stdout.strip()
    assert site.cluster.wait_for(job, ("FAILED", "COMPLETED"), 30)["JobState"] == "FAILED"
    log = (site.folder / f"run/slurm-{job}.log").read_text()
    assert re.match(rf"shoal: n[12]: job {job} has 1 nodes with 2 tasks each, but ", log)
    assert f"{site.folder}/run/plan.json was made for 2 nodes with 2; submit it with `shoal submit`" in log


def test_a_process_that_srun_has_not_started_is_no_world_of_its_own(site: Site) -> None:
    script = site.folder / "wrong.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2\ncd {site.folder}\n"
        f"PYTHONPATH={ROOT} {sys.executable} -m launch.train run.yaml --out run\n"
    )
    done = site.cluster.run("sbatch", "--parsable", f"--output={site.folder}/wrong.log", str(script))
    job = done.stdout.strip()
    assert site.cluster.wait_for(job, ("FAILED", "COMPLETED"), 30)["ExitCode"] == "4:0"
    assert f"within SLURM job {job}, which has 4 tasks, but not by srun" in (site.folder / "wrong.log").read_text()


def test_names_that_resolve_wrongly_and_commands_that_lack_do_not_stop_a_run(site: Site) -> None:
    """n1 takes itself for 127.0.1.1, as Debian has it, n2 does not know n1, and there is no scontrol."""
    hosts = {"n1": "127.0.0.1 localhost\n127.0.1.1 n1\n10.77.0.12 n2\n", "n2": "127.0.0.1 localhost\n10.77.0.12 n2\n"}
    found = site.cluster.run("cat", "/etc/hosts", node="n1").stdout
    (control,) = [line for line in found.splitlines() if line.endswith(" ctl")]
    only_srun = site.folder / "bin"
    only_srun.mkdir()
    for command in ("srun", "scancel", "squeue"):
        (only_srun / command).symlink_to(f"/usr/bin/{command}")
    try:
        for node, text in hosts.items():
            file = site.folder / f"hosts-{node}"
            file.write_text(f"{text}{control}\n")
            assert site.cluster.run("mount", "--bind", str(file), "/etc/hosts", node=node).returncode == 0
        job = site.submit(*TWO_BY_TWO, "save.export=false", f"cluster.setup=export PATH={only_srun}", "--out", "run")
        fields = site.cluster.wait_for(job, ("FAILED", "COMPLETED"), 90)
    finally:
        for node in hosts:
            site.cluster.run("umount", "/etc/hosts", node=node)
    assert fields["JobState"] == "COMPLETED", site.log()
    assert (
        "shoal: n1: there is no `scontrol` on the PATH of this job: it cannot be queued again by itself" in site.log()
    )
    assert len(site.updates()) == 12


# --- many ------------------------------------------------------------------------------------------------


MANY = "100% of 'many' \"ü\"; $HOME #1 %j"


def test_a_sweep_is_an_array_of_jobs_with_a_comparison(site: Site) -> None:
    site.submit("--sweep", "train.learning_rate=0.01,0.02", "parallel.device=cpu", "save.export=false", "--out", MANY)
    site.until(lambda: {each["state"] for each in site.states(MANY)} == {"finished"}, 120)
    table = site.folder / MANY / "comparison.tsv"
    site.until(lambda: table.exists() and len(table.read_text().splitlines()) == 3, 10)
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert rows[0] == ["run", "train.learning_rate", "loss"]
    assert [row[:2] for row in rows[1:]] == [["000", "0.01"], ["001", "0.02"]]
    losses = [json.loads((site.folder / MANY / run / "result.json").read_text()) for run in ("000", "001")]
    assert [row[2] for row in rows[1:]] == [f"{result['validation']['after']['loss']:.6g}" for result in losses]
    shown = site.shoal("status", "--all", ".")
    assert shown.count("finished") == 2


STAND_IN = json.dumps([sys.executable, str(Path(__file__).with_name("stand_in_rank.py"))])


def met(run: Path) -> list[dict[str, Any]]:
    """What stand-ins for ranks have written down."""
    return [json.loads(path.read_text()) for path in sorted(run.glob("met-*.json"))]


def test_ten_jobs_at_once_on_a_node_meet_apart(slurm: None, tmp_path: Path) -> None:  # noqa: ARG001
    with Cluster(nodes=1, cpus=20) as cluster:
        site = Site(cluster, tmp_path)
        two = ("parallel.device=cpu", "parallel.devices=2", f"cluster.container={STAND_IN}")
        values = ",".join(map(str, range(10)))
        site.submit("--sweep", f"train.seed={values}", *two, "cluster.environment={STAYS: '20'}", "--out", "many")
        runs = [tmp_path / f"many/{index:03d}" for index in range(10)]
        site.until(lambda: all(len(met(run)) == 2 for run in runs))
        ports = {answer["port"] for run in runs for answer in met(run)}
        running = [fields for fields in cluster.jobs() if fields["JobState"] == "RUNNING"]
        assert len(running) == 10, "all of them at once"
        assert len(ports) == 10
        heard = [{word for answer in met(run) for word in answer["heard"]} for run in runs]
        assert all(len(words) == 1 for words in heard) and len(set.union(*heard)) == 10, "each its own ranks alone"
        site.until(lambda: all((run / "result.json").exists() for run in runs))


@pytest.mark.parametrize("cpus", [1, 2])
def test_each_rank_has_the_cpus_and_threads_of_the_plan(slurm: None, cpus: int, tmp_path: Path) -> None:  # noqa: ARG001
    if cpus > len(os.sched_getaffinity(0)):
        pytest.skip(f"needs {cpus} CPUs")
    with Cluster(nodes=2, gpus=0, affinity=True) as cluster:
        site = Site(cluster, tmp_path)
        asked = ("parallel.nodes=2", "parallel.device=cpu", f"cluster.cpus_per_process={cpus}")
        job = site.submit(*asked, f"cluster.container={STAND_IN}", "cluster.environment={TORCH: '1'}", "--out", "run")
        assert cluster.wait_for(job, ("COMPLETED", "FAILED"), 60)["JobState"] == "COMPLETED", site.log()
        assert [(answer["cpus"], answer["threads"]) for answer in met(tmp_path / "run")] == [(cpus, cpus)] * 2
        assert "fewer CPUs" not in site.log()


def test_what_srun_says_of_tasks_that_have_failed() -> None:
    said = (
        "srun: error: n2: task 3: Exited with exit code 3\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=9.0\n"
        "slurmstepd-n1: error: *** STEP 9.0 ON n1 CANCELLED AT 2026-11-26T01:26:49 ***\n"
        "srun: error: n2: task 2: Exited with exit code 143\n"
        "srun: error: n1: tasks 0-1: Exited with exit code 143\n"
    )
    found = [(end.code, end.rank, end.host) for end in failures(said)]
    assert found == [(3, 3, "n2"), (143, 2, "n2"), (143, 0, "n1")]
    (dead, *_) = failures(said.replace("Exited with exit code 3\n", "Killed\n"))
    assert (dead.code, dead.rank) == (-9, 3)
    (crashed,) = failures("srun: error: n1: tasks 0-1: Segmentation fault\n")
    assert (crashed.code, crashed.rank) == (-11, 0)
    assert failures("srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\n") == []
