"""Runs on XLA devices, with the numbers of the same runs on the CPU: one device, and two that share each batch."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import damage, listed
from tests.commands import ROOT, python

pytestmark = pytest.mark.xla

RECIPE = str(Path(__file__).with_name("tiny_recipe.py"))

XLA = ("parallel.strategy=xla", "parallel.device=xla")
CPU = ("parallel.strategy=single", "parallel.device=cpu")

# 46 rows: the last micro-batch of each epoch has 2; 11 to evaluate on: the last batch has 3.
TRAIN = ("train.global_batch_size=8", "train.micro_batch_size=4", "train.max_steps=14", "train.learning_rate=3e-3")
RUN = (*TRAIN, "train.warmup_ratio=0.2", "save.every_steps=7", "eval.every_steps=7")

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""XLA optimises for a minute else, and no number of ours depends on it."""


def shoal(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "launch", *arguments, XLA_FLAGS=QUICK, PJRT_DEVICE="CPU", OMP_NUM_THREADS="1", **environment)


def trained(folder: Path, *arguments: str) -> Path:
    """The folder of a run of the tiny recipe."""
    (folder / "run.yaml").write_text(f"recipe: {RECIPE}\n")
    done = shoal(folder, "run", "run.yaml", "--out", "run", *RUN, *arguments)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder / "run"


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run: Path) -> dict[tuple[str, int], float]:
    return {(kind, each["update"]): each["loss"] for kind in ("train", "eval") for each in records(run, kind)}


def result(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("cpu"), *CPU)


@pytest.fixture(scope="module")
def on_xla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("xla"), *XLA)


def test_numbers_are_those_of_the_cpu(on_cpu: Path, on_xla: Path) -> None:
    expected = losses(on_cpu)
    assert [*losses(on_xla)] == [*expected] and len(expected) == 14 + 3
    assert losses(on_xla) == pytest.approx(expected, abs=1e-5)
    for name in ("gradient_norm", "learning_rate", "samples", "targets", "tokens"):
        assert [each[name] for each in records(on_xla, "train")] == pytest.approx(
            [each[name] for each in records(on_cpu, "train")], rel=1e-4
        ), name
    assert [each["samples"] for each in records(on_xla, "eval")] == [11] * 3, "each once"
    assert result(on_xla)["dtypes"] == result(on_cpu)["dtypes"]


def test_no_program_is_compiled_after_the_first_updates(on_xla: Path) -> None:
    rows = [(each["update"], each["shapes"], each["compiles"]) for each in records(on_xla, "train")]
    assert 1 <= rows[-1][1] <= 4, "the short batch at the end of an epoch included"
    flat = {compiles for update, _, compiles in rows if update > 8}
    assert len(flat) == 1 and flat != {0}, rows
    assert news(on_xla.parent / "said") == [], "nothing is odd about it"


def test_the_exported_head_is_the_embedding_still(on_xla: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(on_xla / "export")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert result(on_xla)["parameters"]["all"] == sum(weight.numel() for weight in model.parameters())


def test_two_devices_share_each_batch_started_by_accelerate(on_cpu: Path, tmp_path: Path) -> None:
    """With the configuration that is shipped: one process, whatever number of devices."""
    (tmp_path / "run.yaml").write_text(f"recipe: {RECIPE}\n")
    done = python(
        tmp_path,
        "accelerate.commands.launch",
        *("--config_file", str(ROOT / "accelerate_configs/tpu.yaml"), "-m", "launch.train", "run.yaml"),
        *(*RUN, *XLA, "train.micro_batch_size=2", "--out", "run"),
        XLA_FLAGS=QUICK,
        PJRT_DEVICE="CPU",
        CPU_NUM_DEVICES="2",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run/plan.json").read_text())["plan"]
    assert (plan["processes"]["world_size"], plan["processes"]["devices"]) == (1, 2)
    assert losses(tmp_path / "run") == pytest.approx(losses(on_cpu), abs=1e-5)


def cut_off(run: Path, folder: Path) -> Path:
    """The run as it was after update 7."""
    left = shutil.copytree(run, folder / "run")
    shutil.rmtree(left / "checkpoints/step-000014")
    shutil.rmtree(left / "export")
    (left / "result.json").unlink()
    assert [damage(each) for each in listed(left)] == [None]
    return left


@pytest.mark.parametrize("way", ["xla to cpu", "cpu to xla"])
def test_a_checkpoint_goes_on_elsewhere(way: str, on_cpu: Path, on_xla: Path, tmp_path: Path) -> None:
    first, then = (on_xla, CPU) if way == "xla to cpu" else (on_cpu, XLA)
    left = cut_off(first, tmp_path)
    done = shoal(tmp_path, "resume", "run", *then)
    assert done.returncode == 0, done.stderr
    assert "resumed from step-000007: 7 updates are left" in done.stderr + done.stdout
    assert losses(left) == pytest.approx(losses(on_cpu), abs=1e-5)


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    """The random numbers of the device are in the checkpoint."""
    whole = trained(tmp_path, *XLA, "recipe_args.dropout=0.2", "eval.every_steps=null")
    (tmp_path / "again").mkdir()
    left = cut_off(whole, tmp_path / "again")
    done = shoal(tmp_path / "again", "resume", "run")
    assert done.returncode == 0, done.stderr
    assert losses(left) == losses(whole), "bit for bit"


def test_bf16_is_what_products_are_computed_in(tmp_path: Path) -> None:
    run = trained(tmp_path, *XLA, "train.precision=bf16", "train.max_steps=3", "save.every_steps=null")
    assert result(run)["dtypes"]["forward"] == "bfloat16"
    assert result(run)["validation"]["after"]["loss"] < result(run)["validation"]["before"]["loss"]


# --- what is told ----------------------------------------------------------------------------------------


def news(said: Path) -> list[str]:
    return [line for line in said.read_text().splitlines() if ": XLA " in line]


def said(folder: Path, *arguments: str) -> list[str]:
    stated = ("eval.at_start=false", "save.export=false", "save.every_steps=null", "eval.every_steps=null")
    trained(folder, *XLA, *stated, *arguments)
    return news(folder / "said")


def test_an_update_of_one_micro_batch_where_others_have_two_is_no_news(tmp_path: Path) -> None:
    assert said(tmp_path, "recipe_args.rows=44") == []


def test_more_shapes_than_there_should_be_are_told_with_the_shape(tmp_path: Path) -> None:
    lines = said(tmp_path, "recipe_args.few=false")
    assert len(lines) >= 3
    assert "XLA compiles for one more shape: attention_mask 4 × " in lines[0]
    assert "RecipeContext.width and Prepared.without_targets" in lines[0]


def test_a_loss_that_looks_at_values_is_told(tmp_path: Path) -> None:
    lines = said(tmp_path, "recipe_args.looks=true")
    assert any("anew though no shape is new" in line for line in lines), lines


def test_the_launcher_of_accelerate_that_starts_threads_is_refused(tmp_path: Path) -> None:
    """No signal would reach them; run as Accelerate does it, which on a CPU has one thread."""
    (tmp_path / "run.yaml").write_text(f"recipe: {RECIPE}\n")
    (tmp_path / "xla.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: XLA\nnum_processes: 1\n")
    done = python(
        tmp_path,
        "accelerate.commands.launch",
        *("--config_file", "xla.yaml", "-m", "launch.train", "run.yaml", "--out", "run"),
        XLA_FLAGS=QUICK,
        PJRT_DEVICE="CPU",
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("shoal: ")]
    assert told == [
        "shoal: `accelerate launch` was configured for distributed_type: XLA, which starts a thread for each device; "
        "use accelerate_configs/tpu.yaml, or `shoal run`: one process has all devices of a host"
    ]
    assert not (tmp_path / "run").exists()
