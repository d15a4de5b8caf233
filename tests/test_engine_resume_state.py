"""What else a run must remember over a stop: patience, broken-off evaluations, streams, good checkpoints, scales."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.checkpoints import (
    MANIFEST,
    MARK,
    checkpoint_folder,
    damage,
    listed,
    newest_complete,
    read_manifest,
    read_state,
    shard_name,
    update_of,
    write_file,
)
from launch.dotted import put
from launch.errors import LaunchError
from launch.recipe import Prepared
from launch.resume import changes
from tests import tiny
from tests.gloo import run_ranks
from tests.test_engine_resume import SAMPLES, UPDATES, assert_same, attempt, in_attempts, records

NO_EXPORT = "save.export=false"
AS_THEY_COME = "train.group_by_length=off"
"""Where numbers that dropout has a part in must take a certain course."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny.gpt2().save_pretrained(folder)
    return folder


def updates_saved(folder: Path) -> list[int]:
    """Of the checkpoints that are there, in their order."""
    return sorted(map(update_of, listed(folder)))


# --- early stopping --------------------------------------------------------------------------------------

IMPATIENT = ("train.early_stopping_patience=2", "train.early_stopping_min_delta=9")


@pytest.mark.dist
@pytest.mark.slow
def test_patience_is_remembered(source: Path, tmp_path: Path) -> None:
    """Evaluations after updates 0, 3 and 6: the first has nothing to beat, the others are not better by 9."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (expected,) = in_attempts(source, whole, [("single", 1, None)], *IMPATIENT, NO_EXPORT)
    results = in_attempts(source, parts, [("single", 1, stop) for stop in (2, 5, None)], *IMPATIENT, NO_EXPORT)
    assert expected["updates"] == 6 < UPDATES
    assert [result["updates"] for result in results] == [2, 5, 6]
    assert any("stopped early at update 6" in line for line in results[-1]["said"])
    assert records(parts) == records(whole)
    assert_same(results[-1], expected)


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_that_was_stopped_early_only_exports_when_it_was_killed_before(source: Path, tmp_path: Path) -> None:
    (expected,) = in_attempts(source, tmp_path, [("ddp", 2, None)], *IMPATIENT, "save.every_steps=3")
    before = records(tmp_path)
    weights = (tmp_path / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "export")
    (tmp_path / "probe.safetensors").unlink()
    (result,) = in_attempts(source, tmp_path, [("ddp", 2, None)], *IMPATIENT, "save.every_steps=3")
    assert updates_saved(tmp_path) == [3, 6]
    assert result["updates"] == 6
    assert records(tmp_path) == before, "neither an update nor an evaluation was made again"
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "probe.safetensors").is_file()
    assert_same(result, expected)


# --- a signal while the run is evaluated -----------------------------------------------------------------


def ask_after_each_batch() -> None:
    from launch.engine import scoring

    scoring.ASK_EVERY = 1


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "stop", "every"),
    [
        pytest.param("ddp", 6, 3, id="by rank 1"),
        pytest.param("single", UPDATES, 5, id="the evaluation of the last update"),
        pytest.param("single", UPDATES, 3, id="the one that follows on the last update"),
    ],
)
def test_an_evaluation_that_was_broken_off_is_made_first(
    strategy: str, stop: int, every: int, source: Path, tmp_path: Path
) -> None:
    world_size = 1 if strategy == "single" else 2
    overrides = (f"eval.every_steps={every}", "eval.batch_size=1", NO_EXPORT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (expected,) = in_attempts(source, whole, [(strategy, world_size, None)], *overrides)
    going = functools.partial(in_attempts, source, parts)
    (broken_off,) = going([(strategy, world_size, stop)], *overrides, evaluating=True, before=ask_after_each_batch)
    assert (broken_off["stopped"], broken_off["updates"]) == (15, stop)
    assert records(parts)[-1] == next(one for one in records(whole, "train") if one["update"] == stop)
    newest = newest_complete(parts)
    assert newest == checkpoint_folder(parts, stop)
    state = read_state(newest)
    in_training = stop % every == 0
    assert state["evaluated"] is not in_training
    assert state["trained"] is (stop == UPDATES)
    (again,) = going([(strategy, world_size, stop)], *overrides, evaluating=True, before=ask_after_each_batch)
    assert (again["stopped"], again["updates"]) == (15, stop), "and may be broken off once more"
    (result,) = going([(strategy, world_size, None)], *overrides)
    assert result["stopped"] is None
    assert records(parts) == records(whole)
    assert_same(result, expected)


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_in_the_first_evaluation_leaves_nothing_to_go_on_from(source: Path, tmp_path: Path) -> None:
    """Nothing has been learned yet; the run begins anew and writes its records once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = ("eval.batch_size=1", "train.max_steps=2", NO_EXPORT)
    (expected,) = in_attempts(source, whole, [("single", 1, None)], *overrides)
    going = functools.partial(in_attempts, source, parts)
    (broken_off,) = going([("single", 1, 0)], *overrides, evaluating=True, before=ask_after_each_batch)
    assert (broken_off["stopped"], broken_off["updates"]) == (15, 0)
    assert updates_saved(parts) == []
    (result,) = going([("single", 1, None)], *overrides)
    assert records(parts) == records(whole)
    assert_same(result, expected)


# --- streams ---------------------------------------------------------------------------------------------


class Plain:
    """Samples that can only be read in order, and always in the same one."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


class Shuffled(Plain):
    """Another order in each epoch, as those of `datasets` that were shuffled."""

    _epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = np.random.RandomState([7, self._epoch]).permutation(len(self._rows))
        return (self._rows[index] for index in order)


def streamed(kind: type[Plain], prepared: Prepared) -> Prepared:
    return dataclasses.replace(prepared, train=kind(prepared.train), validation=kind(prepared.validation))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy", "workers"),
    [(Plain, "single", 0), (Shuffled, "single", 2), (Shuffled, "ddp", 0)],
)
def test_a_stream_goes_on_where_it_was(
    kind: type[Plain], strategy: str, workers: int, source: Path, tmp_path: Path
) -> None:
    """A stop in the middle of an epoch, and one at its very end: an epoch has three updates."""
    world_size = 1 if strategy == "single" else 2
    overrides = (f"parallel.data_workers={workers}", NO_EXPORT)
    change = functools.partial(streamed, kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (expected,) = in_attempts(source, whole, [(strategy, world_size, None)], *overrides, change=change)
    stops = [(strategy, world_size, stop) for stop in (5, 6, None)]
    results = in_attempts(source, parts, stops, *overrides, change=change)
    assert [result["updates"] for result in results] == [5, 6, UPDATES]
    assert records(parts) == records(whole)
    assert [one["consumed"] for one in records(parts, "train")][3:6] == [8, 16, SAMPLES]
    assert_same(results[-1], expected)


# --- the best checkpoints --------------------------------------------------------------------------------

BEST = (
    "save.keep_best=2",
    "save.keep_last=1",
    "eval.every_steps=1",
    "train.learning_rate=1e-2",
    NO_EXPORT,
    AS_THEY_COME,
)


@pytest.mark.dist
@pytest.mark.slow
def test_the_best_are_saved_and_kept_besides_the_last(source: Path, tmp_path: Path) -> None:
    """Also those of attempts before, whose scores are in the checkpoints after them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (expected,) = in_attempts(source, whole, [("single", 1, None)], *BEST)
    better = [one["update"] for one in records(whole, "eval") if one["best"] and one["update"]]
    assert better == [1, 2, 4], "then it gets worse"
    assert [one["update"] for one in records(whole, "save")] == better
    assert updates_saved(whole) == [2, 4]
    results = in_attempts(source, parts, [("single", 1, stop) for stop in (9, 10)], *BEST)
    assert [result["updates"] for result in results] == [8, 9]
    assert updates_saved(parts) == [2, 4, 9]
    shutil.rmtree(checkpoint_folder(parts, 9))
    (result,) = in_attempts(source, parts, [("single", 1, None)], *BEST)
    assert any("resumed from step-000004" in line for line in result["said"])
    assert records(parts) == records(whole)
    assert_same(result, expected)


# --- by the clock ----------------------------------------------------------------------------------------


def write_slowly() -> None:
    """So that the weights have changed by the time they are written."""
    import time

    from launch.engine import checkpoint

    exact = checkpoint.write_shard

    def write_shard(*arguments: Any) -> Any:
        time.sleep(0.05)
        return exact(*arguments)

    checkpoint.write_shard = write_shard


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "asynchronous"), [("single", False), ("ddp", True)])
def test_what_is_saved_after_each_update_is_exact(
    strategy: str, asynchronous: bool, source: Path, tmp_path: Path
) -> None:
    world_size = 1 if strategy == "single" else 2
    overrides = (
        *("save.every_minutes=1e-6", "save.keep_last=null", f"save.asynchronous={str(asynchronous).lower()}"),
        NO_EXPORT,
    )
    attempts = [(strategy, world_size, None)]
    (expected,) = in_attempts(source, tmp_path, attempts, *overrides, before=write_slowly)
    assert [one["update"] for one in records(tmp_path, "save")] == [*range(1, UPDATES + 1)]
    assert updates_saved(tmp_path) == [*range(1, UPDATES + 1)], "the last one too, that no update waits for"
    before = records(tmp_path)
    for newer in range(4, UPDATES + 1):
        shutil.rmtree(checkpoint_folder(tmp_path, newer))
    (result,) = in_attempts(source, tmp_path, attempts, *overrides)
    assert any("resumed from step-000003" in line for line in result["said"])
    assert records(tmp_path) == before
    assert_same(result, expected)


# --- the scale of fp16 losses ----------------------------------------------------------------------------


def scale_that_changes() -> None:
    """In fp16; the first scales overflow, and after each four good updates it is doubled."""
    from launch import plan
    from launch.engine import precision, run
    from tests.test_engine_sharding import compute_in_fp16_on_a_cpu

    compute_in_fp16_on_a_cpu()
    run.LossScale = lambda: precision.LossScale(2.0**24, patience=4)  # type: ignore[misc,assignment]
    exact = plan.deepspeed_config

    def with_a_short_window(*arguments: Any) -> dict[str, Any]:
        config = exact(*arguments)
        config["fp16"]["loss_scale_window"] = 4
        return config

    plan.deepspeed_config = with_a_short_window


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_the_loss_scale_goes_on(strategy: str, source: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = ("train.precision=fp16", "save.every_steps=1", "save.keep_last=null", NO_EXPORT, AS_THEY_COME)
    (expected,) = in_attempts(source, whole, [(strategy, 2, None)], *overrides, before=scale_that_changes)
    attempts = [(strategy, 2, 7), (strategy, 2, None)]
    results = in_attempts(source, parts, attempts, *overrides, before=scale_that_changes)
    assert [result["updates"] for result in results] == [6, UPDATES], "a signal is heard after each save, too"
    scales, expected_scales = (
        [read_state(checkpoint_folder(folder, update))["loss_scale"] for update in range(1, UPDATES + 1)]
        for folder in (parts, whole)
    )
    values = [scale["value"] for scale in expected_scales]
    assert values[0] < 2.0**24, "it has fallen"
    assert values[-1] > values[5], "and has yet to rise when the run is stopped"
    assert scales == expected_scales
    assert records(parts) == records(whole)
    assert_same(results[-1], expected)


# --- what no run goes on from ----------------------------------------------------------------------------


def altered(prepared: Prepared) -> Prepared:
    rows = list(prepared.train)  # type: ignore[arg-type]
    rows[SAMPLES // 2] = rows[SAMPLES // 2] % (tiny.VOCABULARY - 1) + 1
    return dataclasses.replace(prepared, train=rows)


def shortened(prepared: Prepared) -> Prepared:
    return dataclasses.replace(prepared, train=list(prepared.train)[:-1])  # type: ignore[arg-type]


def as_it_is(prepared: Prepared) -> Prepared:
    return prepared


def refusals(
    strategy: str, source: str, folder: str, tried: list[tuple[tuple[str, ...], Callable[[Prepared], Prepared]]]
) -> list[str]:
    """Try to go on with these overrides and data; why that was refused, each time."""
    messages = []
    for overrides, change in tried:
        world_size = 1 if strategy == "single" else 2
        try:
            attempt(strategy, world_size, source, folder, None, (NO_EXPORT, *overrides), change=change)
        except LaunchError as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("")
    return messages


@pytest.mark.dist
@pytest.mark.slow
def test_other_data_and_settings_are_refused(source: Path, tmp_path: Path) -> None:
    in_attempts(source, tmp_path, [("single", 1, 2)], NO_EXPORT)
    other = ("train.learning_rate=1e-3", "train.seed=3", "train.micro_batch_size=1")
    tried = [((), altered), ((), shortened), (other, as_it_is), (("train.micro_batch_size=1",), as_it_is)]
    ((data, fewer, settings, harmless),) = run_ranks(1, refusals, "single", str(source), str(tmp_path), tried)
    assert data.startswith("DataError: step-000002 was made with other training data")
    assert fewer.startswith("DataError: step-000002 was made with other training data (20 samples, now 19)")
    assert settings.startswith("ConfigError: step-000002 was made with other settings")
    assert "train.learning_rate: 0.003 → 0.001; train.seed: 0 → 3; set" in settings
    assert "micro_batch_size" not in settings
    assert harmless == ""
    assert records(tmp_path, "train")[-1]["update"] == UPDATES


def without(shard: Path, name: str) -> None:
    """Take a tensor out of a checkpoint that is as it was written for all that its manifest can tell."""
    folder = shard.parent
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors, fragments = load_file(shard), json.loads(metadata["fragments"])
    del tensors[name], fragments[name]
    save_file(tensors, shard, {**metadata, "fragments": json.dumps(fragments)})
    manifest = read_manifest(folder)
    files = {**manifest.files, shard.name: write_file(shard, [shard.read_bytes()])}
    text = manifest.model_copy(update={"files": files}).model_dump_json().encode()
    record = write_file(folder / MANIFEST, [text])
    write_file(folder / MARK, [record.sha256.encode()])


@pytest.mark.dist
@pytest.mark.slow
def test_a_checkpoint_without_a_tensor_is_refused_by_all_ranks(source: Path, tmp_path: Path) -> None:
    """Rank 0 has all that it needs, and would wait for the other."""
    name = "model/transformer.wpe.weight"
    in_attempts(source, tmp_path, [("fsdp2", 2, 2)], NO_EXPORT)
    folder = checkpoint_folder(tmp_path, 2)
    without(folder / shard_name(1, 2), name)
    assert damage(folder) is None
    messages = run_ranks(2, refusals, "fsdp2", str(source), str(tmp_path), [((), as_it_is)])
    assert messages[0] == messages[1]
    ((message,), _) = messages
    assert message.startswith("RunFolderError: rank 1 (")
    assert f"{folder}: {name} lacks elements from {16 * 32} on" in message


CONFIG: dict[str, Any] = {
    "train": {
        **{"max_steps": 10, "schedule": "linear", "learning_rate": 1e-3, "compile": False},
        **{"on_spike": "rewind", "group_by_length": "auto"},
    },
    "save": {"keep_last": 2, "every_steps": 5},
    "recipe_args": {"text": "old"},
}


@pytest.mark.parametrize(
    ("key", "value", "line", "harmless"),
    [
        ("save.keep_last", 3, "save.keep_last: 2 → 3", True),
        ("train.compile", True, "train.compile: false → true", True),
        ("train.group_by_length", "off", 'train.group_by_length: "auto" → "off"', True),
        ("train.on_spike", "skip", 'train.on_spike: "rewind" → "skip"', True),
        ("save.every_steps", 9, "save.every_steps: 5 → 9", False),
        ("train.learning_rate", 0.5, "train.learning_rate: 0.001 → 0.5", False),
        ("train.max_steps", 20, "train.max_steps: 10 → 20", False),
        ("recipe_args.text", "new", 'recipe_args.text: "old" → "new"', False),
        ("recipe_args.more", 1, "recipe_args.more: null → 1", False),
    ],
)
def test_a_change_is_harmless_or_dangerous(key: str, value: Any, line: str, harmless: bool) -> None:
    now = copy.deepcopy(CONFIG)
    put(now, key, value)
    assert changes(CONFIG, now) == (([line], []) if harmless else ([], [line]))


def test_a_constant_schedule_may_go_on_for_longer() -> None:
    before = copy.deepcopy(CONFIG)
    before["train"]["schedule"] = "constant"
    now = copy.deepcopy(before)
    now["train"]["max_steps"] = None
    assert changes(before, now) == (["train.max_steps: 10 → null"], [])


def test_what_a_release_did_not_know_is_no_change() -> None:
    now = copy.deepcopy(CONFIG)
    now["train"]["novelty"] = 1
    assert changes(CONFIG, now) == ([], [])
    assert changes(now, CONFIG) == ([], [])
