"""What SLURM says by environment variables."""

from __future__ import annotations

import pytest

from launch.errors import TopologyError
from launch.slurm_names import Job, Step, node_names, port_of, read_job, read_step, tasks_per_node
from launch.topology import World, enter_step, read_world
from tests.cluster import Cluster

JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n1",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
STEP = {
    **JOB,
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_the_job() -> None:
    assert read_job({}) is None
    assert read_job(JOB) == Job(
        id="77",
        restarts=2,
        nodes=2,
        tasks_per_node=2,
        cpus_per_task=3,
        gpus=4,
        node="n1",
        names=("n1", "n2"),
        index=None,
    )
    element = read_job({**JOB, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"})
    assert element is not None and element.index == 7
    assert read_job({"SLURM_JOB_ID": "1"}) == Job(
        id="1", restarts=0, nodes=1, tasks_per_node=None, cpus_per_task=1, gpus=0, node="", names=(), index=None
    )


def test_a_task_of_srun_knows_its_place() -> None:
    assert read_step(STEP) == Step(
        rank=3, size=4, local_rank=1, local_size=2, address="n1", port=20000 + 77 * 37 + 1, cpus=3
    )
    uneven = read_step({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_PROCID": "3"})
    assert uneven is not None and uneven.local_size == 1
    world = read_world(STEP)
    assert (world.rank, world.size, world.local_rank, world.local_size, world.launched) == (3, 4, 1, 2, True)


def test_outside_of_slurm_there_is_no_step() -> None:
    assert read_step({}) is None
    assert read_world({}) == World()
    one = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
    assert read_world(one) == World()


def test_a_world_of_one_is_never_silent() -> None:
    """The batch script itself has SLURM_PROCID too, and is no task."""
    with pytest.raises(TopologyError) as caught:
        read_world(JOB)
    assert str(caught.value) == (
        "this process was started within SLURM job 77, which has 4 tasks, but not by srun: it would be a world of its "
        "own; put `srun` in front of its command"
    )
    assert read_world({**JOB, "SLURM_NTASKS": "1"}) == World()
    assert read_world({**JOB, "SHOAL_SUPERVISED": "1"}) == World(), "`shoal run` has started one process"


def test_torchrun_within_a_step_has_the_last_word() -> None:
    named = {**STEP, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    world = read_world(named)
    assert (world.rank, world.size, world.step) == (1, 2, None)


def test_where_tasks_meet_unless_the_user_has_said_so() -> None:
    environ = dict(STEP)
    enter_step(read_world(environ), environ)
    assert {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    named = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    assert [environ[name] for name in named] == ["n1", "22850", "3"]
    own = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "5000", "OMP_NUM_THREADS": "1"}
    environ = {**STEP, **own}
    enter_step(read_world(environ), environ)
    assert {name: environ[name] for name in named} == own
    environ = {}
    enter_step(read_world(environ), environ)
    assert environ == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,2,3", [1, 2, 3])],
)
def test_tasks_on_each_node(text: str, expected: list[int]) -> None:
    assert tasks_per_node(text) == expected


def test_what_slurm_does_not_write_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"SLURM_STEP_TASKS_PER_NODE = 2x3: is not what SLURM writes"):
        tasks_per_node("2x3")


NODES = [
    ("n1", ["n1"]),
    ("n[1-3]", ["n1", "n2", "n3"]),
    ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
    ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ("a,b-1,c[7]", ["a", "b-1", "c7"]),
]


@pytest.mark.parametrize(("text", "expected"), NODES)
def test_names_of_nodes(text: str, expected: list[str]) -> None:
    assert node_names(text) == expected


@pytest.mark.slurm
def test_names_of_nodes_are_those_that_slurm_makes_of_them(cluster: Cluster) -> None:
    for text, expected in NODES:
        assert cluster.run("scontrol", "show", "hostnames", text).stdout.split() == expected


def test_jobs_at_once_meet_at_different_ports() -> None:
    ports = {port_of(str(job), str(step)) for job in range(1000, 1200) for step in range(3)}
    assert len(ports) == 600
    assert all(20000 <= port < 30000 for port in ports)
    assert port_of("12_3", "0") >= 20000
