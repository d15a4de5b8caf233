"""What is known of micro-batch sizes that fit: pure parts here, real trials by the real command below."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.beginning import Start
from launch.cache import Cache
from launch.config import load
from launch.errors import MemoryExhaustedError
from launch.fitting import Fits, advice, question, recall, remember, smaller
from launch.plan import Plan, make_plan
from launch.recipe import Preview
from launch.topology import Machine, World
from launch.train import _memory_may_run_out
from tests.commands import python, shoal

OWN = Path(__file__).with_name("own_recipe.py")
GPUS = Machine("box", 32, 4, gpu_name="NVIDIA H100 80GB HBM3", memory_bytes=2**40)


def planned(*overrides: str, machine: Machine = GPUS, fits: Fits | None = None) -> Plan:
    loaded = load(None, ["recipe=causal_lm", "train.global_batch_size=48", *overrides])
    return make_plan(loaded, machine, World(), Preview(), Path("/runs/one"), fits)


@pytest.mark.parametrize(
    ("fits", "sizes", "expected"),
    [
        (Fits(8, 16), [1, 2, 4, 8, 16], 8),
        (Fits(8, 16), [1, 3, 6, 12], 6),  # 12 was never tried, but may be too large
        (Fits(8, None), [1, 2, 4, 8], 8),
        (Fits(8, None), [1, 2, 4], 4),
        (Fits(8, None), [1, 2, 4, 8, 16], None),  # 16 was never tried, and might fit
        (Fits(2, 4), [3, 6], None),
    ],
)
def test_the_best_size_that_is_known_to_fit(fits: Fits, sizes: list[int], expected: int | None) -> None:
    assert fits.largest_of(sizes) == expected


def test_a_plan_takes_what_is_known_and_keeps_the_global_batch() -> None:
    unknown = planned("train.micro_batch_size=auto").batch
    assert unknown.candidates == (1, 2, 3, 4, 6, 12)
    known = planned("train.micro_batch_size=auto", fits=Fits(5, 6)).batch
    assert (known.candidates, known.micro_batch_size, known.accumulation) == ((), 4, 3)
    assert known.micro_batch_size * known.accumulation * 4 == known.global_batch_size == 48
    assert planned("train.micro_batch_size=6", fits=Fits(2, 3)).batch.micro_batch_size == 6, "a stated size is kept"


def test_the_answer_depends_on_model_length_strategy_and_device_and_on_nothing_else() -> None:
    asked = question(planned("train.micro_batch_size=auto"))
    for override in (
        *("recipe_args.block_size=256", "train.precision=bf16", "train.optimizer=sgd", "train.compile=true"),
        *("train.activation_checkpointing=true", "parallel.strategy=fsdp2", "parallel.device=cpu"),
    ):
        assert question(planned("train.micro_batch_size=auto", override)) != asked, override
    for override in ("train.learning_rate=1", "train.max_steps=7", "train.global_batch_size=96"):
        assert question(planned("train.micro_batch_size=auto", override)) == asked, override
    assert question(planned("parallel.devices=2"))["processes"] is None, "each process of DDP holds the whole model"
    sharded = [question(planned("parallel.strategy=fsdp2", f"parallel.devices={n}")) for n in (2, 4)]
    assert sharded[0] != sharded[1], "each of more processes holds less of the model"
    by_strategy = [
        question(planned(f"parallel.strategy={name}", "parallel.devices=4")) for name in ("fsdp2", "fsdp2_offload")
    ]
    assert by_strategy[0] != by_strategy[1]


def test_an_answer_is_remembered_and_a_broken_one_is_none(tmp_path: Path) -> None:
    cache, asked = Cache(tmp_path / "new"), {"a": 1}
    assert recall(cache, asked) is None
    remember(cache, asked, Fits(8, None))
    assert recall(cache, asked) == Fits(8, None)
    assert recall(cache, {"a": 2}) is None
    (written,) = (tmp_path / "new").iterdir()
    written.write_text('{"largest": 8')
    assert recall(cache, asked) is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("train.micro_batch_size=6",),
            "use train.micro_batch_size=4 (the global batch stays 48) or train.precision=bf16 or "
            "train.activation_checkpointing=true or parallel.strategy=fsdp2",
        ),
        (
            (
                *("train.micro_batch_size=1", "train.precision=bf16", "train.activation_checkpointing=true"),
                "parallel.strategy=zero3",
            ),
            "use an offloading strategy such as parallel.strategy=fsdp2_offload",
        ),
        (
            (
                *("train.micro_batch_size=1", "train.precision=bf16", "train.activation_checkpointing=true"),
                "parallel.strategy=zero3_offload",
            ),
            "use a smaller model, shorter samples or more devices",
        ),
    ],
)
def test_the_advice_names_what_is_not_done_yet(overrides: tuple[str, ...], expected: str) -> None:
    assert advice(planned(*overrides)) == expected


def test_the_next_smaller_size_keeps_the_global_batch() -> None:
    sizes = [12]
    while size := smaller(planned(f"train.micro_batch_size={sizes[-1]}")):
        sizes.append(size)
    assert sizes == [12, 6, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Bad StatusOr access: RESOURCE_EXHAUSTED: Attempting to reserve 1.17G"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (NotImplementedError("of the kind RuntimeError"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_what_is_about_memory_is_told_as_such(error: Exception, is_memory: bool) -> None:
    start: Any = Start(planned(), None, World(), None)  # type: ignore[arg-type]  # no recipe is needed
    with pytest.raises(MemoryExhaustedError if is_memory else type(error)) as caught, _memory_may_run_out(start):
        raise error
    assert ("out of memory with micro-batch 12; use train.micro_batch_size=6 (" in str(caught.value)) == is_memory


# --- by the real command ---------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"recipe: {OWN}\ntrain: {{global_batch_size: 16, max_steps: 2}}\nparallel: {{device: cpu, devices: 2}}\n"
        "eval: {batch_size: 1}\nsave: {export: false}\n"
    )
    return path


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_size_is_found_where_one_rank_runs_out_of_memory_and_remembered(
    strategy: str, run_file: Path, tmp_path: Path
) -> None:
    stated = [
        *(str(run_file), "train.micro_batch_size=auto", f"parallel.strategy={strategy}"),
        *("recipe_args.greedy_rank=1", "recipe_args.greedy_from=4"),
    ]
    done = shoal(tmp_path, "run", *stated, "--out", "one")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "shoal: trying micro-batch sizes 1, 2, 4, 8"
    assert "shoal: micro-batch 2 is the largest that fits (memory of a process at its peak: 1: " in done.stderr
    assert "micro-batch 2 × accumulation 4 × 2 processes" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "one", "run.yaml"], "nothing is left behind"

    again = shoal(tmp_path, "run", *stated, "--out", "two")
    assert again.returncode == 0, again.stderr
    assert "trying" not in again.stderr
    assert "micro-batch 2 × accumulation 4 × 2 processes" in again.stderr


@pytest.mark.dist
@pytest.mark.slow
def test_out_of_memory_on_one_rank_ends_all_of_them_and_says_what_to_do(run_file: Path, tmp_path: Path) -> None:
    greedy: Any = ["recipe_args.greedy_rank=1", "train.micro_batch_size=8"]
    done = shoal(tmp_path, "run", str(run_file), *greedy, "--out", "one")
    assert done.returncode == 9
    why, held = done.stderr.splitlines()[-2:]
    assert re.match(
        r"shoal: rank 1 \(.+\): out of memory with micro-batch 8; use train\.micro_batch_size=4 \(the global batch "
        r"stays 16\) or train\.activation_checkpointing=true or parallel\.strategy=fsdp2: .*can't allocate memory",
        why,
    ), why
    assert re.match(r"shoal: seen on cpu: .*parameters 14\.5 kB.*; largest tensors: .*/memory-rank-1\.json$", held), (
        held
    )

    nothing = shoal(
        tmp_path, "run", str(run_file), "recipe_args.greedy_rank=1", "train.micro_batch_size=auto", "--out", "two"
    )
    assert nothing.returncode == 9
    assert nothing.stderr.splitlines()[-1].startswith("shoal: not even one sample per process fits into memory; use ")


def test_a_folder_that_is_not_of_trials_is_not_removed_for_them(run_file: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "one.trials" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    done = shoal(tmp_path, "run", str(run_file), "train.micro_batch_size=auto", "--out", "one")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1] == (
        f"shoal: {theirs.parent}: is not empty, and a run is never overwritten; choose another --out"
    )
    assert theirs.read_text() == "mine"


@pytest.mark.slow
def test_a_plan_of_its_own_needs_a_known_size(run_file: Path, tmp_path: Path) -> None:
    done = python(tmp_path, "launch.train", str(run_file), "parallel.devices=1", "train.micro_batch_size=auto")
    assert done.returncode == 2
    assert done.stderr == (
        "shoal: command line: train.micro_batch_size = auto: no size is known yet for this model, length and device; "
        "`shoal run` finds it first, or state a number\n"
    )
