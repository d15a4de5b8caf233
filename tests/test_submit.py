"""What is planned for a cluster and refused before anything is submitted; no cluster is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cluster import asked_for
from launch.config import load
from launch.errors import ConfigError, LaunchError, TopologyError
from launch.plan import Plan
from launch.sbatch import Submission
from launch.slurm import elements, parse_jobs
from launch.submit import Prepared, prepare, submit
from tests.commands import shoal

CPU = ["parallel.device=cpu", "parallel.devices=2", "train.max_steps=4", "train.micro_batch_size=null"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings of his own, in an empty folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config/shoal").mkdir(parents=True)
    return tmp_path


def prepared(*overrides: str, sweep: tuple[str, ...] = (), submission: Submission | None = None) -> Prepared:
    return prepare("causal_lm", [*CPU, *overrides], Path("run"), list(sweep), submission or Submission())


def only(prepared: Prepared) -> Plan:
    (plan,) = prepared.plans
    return plan


def test_nodes_are_planned_as_they_are_asked_for() -> None:
    plan = only(prepared("parallel.nodes=2", "cluster.cpus_per_process=3"))
    processes = plan.processes
    assert (processes.nodes, processes.per_node, processes.world_size, processes.threads) == (2, 2, 4, 3)
    assert processes.device == "cpu" and plan.batch.micro_batch_size * 4 == plan.batch.global_batch_size
    assert only(prepared("parallel.data_workers=2")).processes.threads == 3, "a CPU for each data worker too"
    gpus = only(prepared("parallel.device=cuda", "parallel.devices=8", 'cluster.memory="64G"'))
    assert (gpus.processes.device, gpus.processes.per_node, gpus.processes.memory_bytes) == ("cuda", 8, 2**33)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.device=auto"],
            "parallel.device = auto, parallel.devices = 2: the nodes of a job cannot be looked at from here; say "
            "--gpus-per-node N, or parallel.device=cpu parallel.devices=N",
        ),
        (
            ["parallel.device=cuda", "parallel.devices=auto"],
            "parallel.device = cuda, parallel.devices = auto: the nodes",
        ),
        (["parallel.device=mps"], "parallel.device = mps: no cluster node has that"),
        (["parallel.nodes=3"], "train.global_batch_size = 16: does not divide over 6 processes; use 12, 18"),
        (["train.micro_batch_size=auto"], "train.micro_batch_size = auto: no size is known yet"),
        (["cluster.time=4h"], 'cluster.time = "4h": '),
        (["cluster.time=60"], "cluster.time = 60: must be text; quote it to keep it text"),
        (["cluster.memory=lots"], 'cluster.memory = "lots": '),
        (["cluster.partion=gpu"], 'cluster.partion = "gpu": unknown key; did you mean cluster.partition?'),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        prepared(*overrides)
    assert message in str(caught.value)
    assert not Path("run").exists()


def test_what_the_user_has_stated_of_the_cluster_counts_where_the_run_does_not(home: Path) -> None:
    profile = home / "config/shoal/cluster.yaml"
    profile.write_text('partition: gpu\naccount: lab\ntime: "01:00:00"\n')
    cluster = only(prepared("cluster.account=mine")).config.cluster
    assert (cluster.partition, cluster.account, cluster.time) == ("gpu", "mine", "01:00:00")
    run_file = home / "own.yaml"
    run_file.write_text("recipe: causal_lm\ncluster: {partition: own}\n")
    cluster = only(prepare(str(run_file), CPU, Path("run"), [], Submission())).config.cluster
    assert (cluster.partition, cluster.account) == ("own", "lab")
    run_file.write_text("cluster: {partition: own}\n")
    with pytest.raises(ConfigError, match=f"^{run_file}: recipe: must be set"):
        prepare(str(run_file), CPU, Path("run"), [], Submission())
    profile.write_text("partition: gpu\nacount: lab\n")
    with pytest.raises(ConfigError) as caught:
        prepared()
    assert str(caught.value).startswith(
        f'{profile}:2: cluster.acount = "lab": unknown key; did you mean cluster.account?'
    )
    profile.write_text("partition: [gpu\n")
    with pytest.raises(ConfigError, match=f"^{profile}:"):
        prepared()


def test_a_sweep_is_all_combinations() -> None:
    found = prepared(sweep=("train.learning_rate=1e-3,2e-3", "train.seed=1,2,3"))
    assert found.is_sweep and len(found.plans) == 6
    assert found.changes[4] == ("train.learning_rate=2e-3", "train.seed=2")
    rates = [(plan.config.train.learning_rate, plan.config.train.seed) for plan in found.plans]
    assert rates == [(0.001, 1), (0.001, 2), (0.001, 3), (0.002, 1), (0.002, 2), (0.002, 3)]
    assert [Path(plan.run_folder).name for plan in found.plans] == [f"00{index}" for index in range(6)]
    assert "#SBATCH --array=0-5\n" in found.text and found.text.endswith(f"{found.folder}\n")
    some = prepared(sweep=("train.seed=1,2,3",), submission=Submission(array="0,2%1"))
    assert "#SBATCH --array=0,2%1\n" in some.text
    assert "#SBATCH --array=0-2%2\n" in prepared(sweep=("train.seed=1,2,3",), submission=Submission(array="%2")).text


@pytest.mark.parametrize(
    ("sweep", "array", "message"),
    [
        (("train.seed",), None, "--sweep train.seed: write key=value,value"),
        (("train.sed=1,2",), None, "train.sed = 1: unknown key; did you mean train.seed?"),
        (("parallel.devices=1,2",), None, "--sweep parallel.devices=2: asks SLURM for something else than the first"),
        (("train.seed=1,2",), "0-4", "--array 0-4: the sweep has runs 0 to 1"),
        (("train.seed=1,2",), "all", "--array all: write which runs, how many at once, or both"),
    ],
)
def test_a_sweep_that_cannot_be(sweep: tuple[str, ...], array: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(sweep=sweep, submission=Submission(array=array))
    assert message in str(caught.value)
    assert not Path("run").exists()


def test_without_a_scheduler_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = prepared()
    with pytest.raises(TopologyError, match="there is no `sbatch` here; SLURM's commands are on the login nodes"):
        submit(found)
    assert not Path("run").exists()


def test_a_dry_run_prints_the_script_and_does_nothing(home: Path) -> None:
    shown = shoal(home, "submit", "causal_lm", *CPU, "--nodes", "2", "--time", "30", "--out", "run", "--dry-run")
    assert shown.returncode == 0 and "#SBATCH --nodes=2\n" in shown.stdout and "#SBATCH --time=30\n" in shown.stdout
    assert shown.stdout.endswith(f" -m launch.job {home}/run\n") and not shown.stderr
    told = shoal(home, "submit", "causal_lm", *CPU, "--gpus-per-node", "4", "--out", "run", "--dry-run", "--json")
    content = json.loads(told.stdout)
    assert "#SBATCH --gpus-per-node=4\n" in content["script"]
    assert content["plans"][0]["processes"]["world_size"] == 4
    assert not (home / "run").exists()
    wrong = shoal(home, "submit", "causal_lm", *CPU, "--array", "0-1", "--dry-run")
    assert wrong.returncode == 2 and "--array 0-1: says which runs of a --sweep" in wrong.stderr


def test_what_the_scheduler_says_of_jobs() -> None:
    lines = (
        "JobId=12 JobName=a b JobState=PENDING Reason=Priority Dependency=(null) Restarts=1 StartTime=Unknown "
        "NodeList=(null) ExitCode=0:0\n"
        "JobId=14 ArrayJobId=13 ArrayTaskId=1 JobName=c JobState=RUNNING Reason=None Restarts=0 "
        "StartTime=2026-01-01T00:00:00 NodeList=n[1-2] ExitCode=0:0\n"
        "JobId=13 ArrayJobId=13 ArrayTaskId=2-5%1 JobState=PENDING Reason=JobArrayTaskLimit NodeList= ExitCode=0:0\n"
    )
    first, second, third = parse_jobs(lines)
    assert (first.id, first.state, first.reason, first.restarts, first.nodes, first.ended) == (
        *("12", "PENDING", "Priority", 1, "", False),
    )
    assert (second.id, second.state, second.reason, second.nodes) == ("13_1", "RUNNING", "", "n[1-2]")
    assert third.id == "13_2-5%1" and elements("2-5%1") == [2, 3, 4, 5]
    assert elements("[1,4-6%2]") == [1, 4, 5, 6]


def test_a_kind_of_gpu_that_is_known_by_name_gives_the_plan_its_memory() -> None:
    stated = ["recipe=causal_lm", "parallel.device=cuda", "parallel.devices=2"]
    known, other = (asked_for(load(None, [*stated, f"cluster.gpu_type={kind}"])) for kind in ("h100", "ourgpu"))
    assert (known[0].gpu_name, known[0].gpu_memory_bytes) == ("H100-80GB", 80 * 10**9)
    assert (other[0].gpu_name, other[0].gpu_memory_bytes) == ("", 0)
