"""Batch scripts and srun commands, letter by letter."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from launch.cluster import asked_for
from launch.config import load
from launch.errors import ConfigError
from launch.plan import Plan, make_plan
from launch.recipe import Preview
from launch.sbatch import Submission, script, step_command, step_environment

PYTHON = {"PYTHONPATH": "/opt/shoal"}


def planned(*overrides: str, folder: str = "/runs/one") -> Plan:
    loaded = load(
        None, ["recipe=causal_lm", "train.global_batch_size=64", "cluster.python=/venv/bin/python", *overrides]
    )
    machine, world = asked_for(loaded)
    return make_plan(loaded, machine, world, Preview(), Path(folder))


def text(plan: Plan, submission: Submission | None = None, started_in: str = "/home/me") -> str:
    return script(plan, Path(plan.run_folder), Path(started_in), submission or Submission(), PYTHON)


TWO_NODES = ("parallel.device=cpu", "parallel.devices=2", "parallel.nodes=2")
GPUS = ("parallel.device=cuda", "parallel.devices=4", "parallel.nodes=2", "cluster.cpus_per_process=8")


def test_the_script_of_two_nodes() -> None:
    assert text(planned(*TWO_NODES)) == (
        """\
#!/bin/bash
#SBATCH --job-name=shoal-causal_lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --output=/runs/one/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue

cd /home/me
export PYTHONPATH=/opt/shoal

# SLURM's signals reach this process itself: no shell stands between.
exec /venv/bin/python -m launch.job /runs/one
"""
    )


EVERYTHING = (
    *("cluster.partition=gpu", "cluster.account=lab-7", "cluster.qos=long", "cluster.time='2-12:00:00'"),
    *('cluster.memory="64G"', "cluster.gpu_type=a100", "cluster.notice_seconds=300", "cluster.requeue=false"),
    *("cluster.sbatch=[--exclude=n13, '--comment=two words']", "cluster.modules=[cuda/12.4, python]"),
    *("cluster.environment={HF_HOME: '/data/it''s here'}", "cluster.scratch=$SCRATCH/shoal"),
    'cluster.setup="ulimit -n 65536\\n. ~/venv/bin/activate"',
)


def test_the_script_with_everything_stated() -> None:
    submission = Submission(after=("12", "13"), array="0-5%2")
    assert text(planned(*GPUS, *EVERYTHING), submission) == (
        """\
#!/bin/bash
#SBATCH --job-name=shoal-causal_lm
#SBATCH --partition=gpu
#SBATCH --account=lab-7
#SBATCH --qos=long
#SBATCH --time=2-12:00:00
#SBATCH --mem=64G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=a100:4
#SBATCH --output=/runs/one/slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --no-requeue
#SBATCH --dependency=afterok:12:13
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --array=0-5%2
#SBATCH --exclude=n13
#SBATCH --comment="two words"

cd /home/me
module load cuda/12.4 python
export SHOAL_CACHE="$SCRATCH/shoal"
export PYTHONPATH=/opt/shoal
export HF_HOME='/data/it'"'"'s here'
ulimit -n 65536
. ~/venv/bin/activate

# SLURM's signals reach this process itself: no shell stands between.
exec /venv/bin/python -m launch.job /runs/one
"""
    )


HOSTILE = '/runs/100% sure; rm -rf $HOME `id` "it\'s" \\ ü #1'


def test_names_that_a_shell_would_take_for_something_else(tmp_path: Path) -> None:
    started_in = tmp_path / "a $HOME b"
    started_in.mkdir()
    written = text(planned(*TWO_NODES, folder=HOSTILE), started_in=str(started_in))
    (output,) = (line for line in written.splitlines() if "--output" in line)
    quoted = HOSTILE.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    assert output == f'#SBATCH --output="{quoted}/slurm-%j.log"'
    # What a real bash makes of it: the last argument is the folder, and nothing else was run.
    shown = subprocess.run(
        ["bash", "-c", written.replace("exec /venv/bin/python", "printf '%s\\n'")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == ["-m", "launch.job", HOSTILE] and not shown.stderr


@pytest.mark.parametrize("folder", ["/runs/a\nb", "/runs/a\rb"])
def test_a_line_break_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="a path with a line break cannot stand in a batch script"):
        text(planned(*TWO_NODES, folder=folder))


MEETING = ("n1", 23456)


def test_each_process_is_a_task_by_default() -> None:
    assert shlex.join(step_command(planned(*TWO_NODES), MEETING)) == (
        "srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=1 --distribution=block --kill-on-bad-exit=1 "
        "--input=none /venv/bin/python -m launch.train /runs/one"
    )


def test_on_gpus_each_task_sees_all_of_its_node() -> None:
    plan = planned(*GPUS, "cluster.container=[apptainer, exec, --nv, my image.sif]", "cluster.srun=[--mpi=none]")
    assert shlex.join(step_command(plan, MEETING)) == (
        "srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=8 --distribution=block --kill-on-bad-exit=1 "
        "--input=none --gpus-per-node=4 --gpu-bind=none --mpi=none apptainer exec --nv 'my image.sif' "
        "/venv/bin/python -m launch.train /runs/one"
    )


@pytest.mark.parametrize(
    ("launcher", "inner"),
    [
        (
            "torchrun",
            "exec /venv/bin/python -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --master-addr=n1 "
            "--master-port=23456 --node-rank=$SLURM_NODEID -m launch.train /runs/one",
        ),
        (
            "accelerate",
            "exec /venv/bin/python -m accelerate.commands.launch --config_file=/runs/one/accelerate.yaml "
            "--main_process_ip=n1 --main_process_port=23456 --machine_rank=$SLURM_NODEID -m launch.train /runs/one",
        ),
    ],
)
def test_other_launchers_are_a_task_on_each_node(launcher: str, inner: str) -> None:
    plan = planned(*TWO_NODES, f"cluster.launcher={launcher}")
    *command, last = step_command(plan, MEETING)
    assert shlex.join(command) == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=2 --distribution=block --kill-on-bad-exit=1 "
        "--input=none bash -c"
    )
    assert last == inner
    assert step_environment(plan)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "3600"


def test_one_process_needs_no_other_launcher() -> None:
    plan = planned("parallel.device=cpu", "parallel.devices=1", "cluster.launcher=torchrun")
    assert step_command(plan, MEETING)[-3:] == ["-m", "launch.train", "/runs/one"]
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in step_environment(plan)


def test_the_environment_of_the_processes() -> None:
    plan = planned(*GPUS, "cluster.network_interface=ib0")
    environment = step_environment(plan)
    assert environment["OMP_NUM_THREADS"] == "8" and environment["SHOAL_SUPERVISED"] == "1"
    assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} & {*step_environment(planned(*GPUS))}
