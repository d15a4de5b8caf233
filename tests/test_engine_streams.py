"""Samples that can only be read in order: the windows of samples by index, for any ranks, workers and sizes."""

from __future__ import annotations

import functools
import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from launch.config import load as load_config
from launch.engine.batching import Loader, Order, Work, epoch_order
from launch.engine.loop import Step, StepResult, fit
from launch.engine.scoring import Evaluation
from launch.engine.streams import Reader, is_stream
from launch.engine.trials import LOOKED_AT, longest_samples
from launch.engine.updating import updates
from launch.errors import ConfigError, DataError, LaunchError
from launch.plan import decide
from launch.prepare import check_data
from launch.recipe import Prepared
from launch.topology import World, read_world
from recipes.causal_lm import collate, count, loss
from tests import tiny
from tests.commands import shoal
from tests.gloo import run_ranks

OWN = Path(__file__).with_name("own_recipe.py")


class Rows:
    """A stream over rows in memory, which begins with another one in each epoch if wanted."""

    def __init__(self, rows: Any, turning: bool = False) -> None:
        self.rows, self.turning = rows, turning
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        first = self.epochs[-1] if self.turning else 0
        return iter([*self.rows[first:], *self.rows[:first]])


class Once:
    """A stream that has nothing left when it is read again."""

    def __init__(self, rows: Any) -> None:
        self._left = iter(rows)

    def __iter__(self) -> Iterator[Any]:
        return self._left


def numbers(samples: list[Any]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(samples)}


def read(stream: Any, updates: int, workers: int = 0, global_batch_size: int = 4) -> list[list[int]]:
    """The samples of each micro-batch of two, on one rank."""
    work = Reader("training", stream, global_batch_size, 2, 0, 1, numbers, workers).windows(updates)
    return [batch["x"].tolist() for _, batches in work for batch in batches]


# --- the same windows ------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    window=st.integers(1, 20),
    micro=st.integers(1, 3),
    world_size=st.integers(1, 4),
    updates=st.integers(1, 12),
)
def test_a_stream_has_the_windows_of_samples_by_index(
    rows: int, window: int, micro: int, world_size: int, updates: int
) -> None:
    sizes = window, micro
    for rank in range(world_size):
        order = Order(rows, *sizes, None, rank, world_size)
        expected = list(Loader(range(rows), list).load(lambda order=order: order.windows(1, updates)))  # type: ignore[misc, arg-type]
        reader: Any = Reader("training", Rows(range(rows)), *sizes, rank, world_size, list)  # type: ignore[arg-type]
        assert list(reader.windows(updates)) == expected


@given(rows=st.integers(1, 40), most=st.integers(1, 50), batch_size=st.integers(1, 5))
def test_the_first_samples_of_a_stream(rows: int, most: int, batch_size: int) -> None:
    shares: Any = [Reader("x", Rows(range(rows)), batch_size * 3, batch_size, rank, 3, list) for rank in range(3)]  # type: ignore[arg-type]
    seen = [
        index
        for reader in shares
        for window, batches in reader.epoch(most=most)
        for cell, batch in zip(window.micro_batches, batches, strict=True)
        if not cell.filler
        for index in batch
    ]
    assert sorted(seen) == list(range(min(rows, most)))


GLOBAL_BATCH = 12
MICRO_BATCH = 2
EVAL_BATCH = 16
CASES = {19: 4, 5: 2, 1001: 3}
"""Rows, and how many updates to train; two epochs but where there are very many rows."""
KINDS = ("index", "stream")


def rate(update: int) -> float:
    return 0.1 * update


def data_of(kind: str, samples: list[Any], workers: int, world: World) -> tuple[Loader | Reader, Loader | Reader]:
    """Samples to train on and to evaluate on."""
    if kind == "index":
        return Loader(samples, collate, workers), Loader(samples, collate, workers)
    ranks = world.rank, world.size, collate, workers
    return (
        Reader("training", Rows(samples), GLOBAL_BATCH, MICRO_BATCH, *ranks),
        Reader("validation", Rows(samples), EVAL_BATCH * world.size, EVAL_BATCH, *ranks),
    )


def work_of(data: Loader | Reader, rows: int, world: World) -> Work:
    two_epochs = 2 * -(-rows // GLOBAL_BATCH)
    if isinstance(data, Reader):
        return data.windows(two_epochs)
    order = Order(rows, GLOBAL_BATCH, MICRO_BATCH, 0, world.rank, world.size)
    return data.load(lambda: order.windows(1, two_epochs))


def whole(batch: Any) -> list[tuple[int, ...]]:
    """The rows of a batch without their padding."""
    ids = batch["input_ids"]
    masks = batch.get("attention_mask", torch.ones_like(ids))
    return [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids, masks, strict=True)]


def cases() -> dict[tuple[int, str, int], dict[str, Any]]:
    """What this rank sees of each case: its samples of all windows, the first updates, and an evaluation."""
    world, found = read_world(), {}
    opened = {
        (rows, kind, workers): data_of(kind, tiny.sequences(rows), workers, world)
        for rows, kind, workers in itertools.product(CASES, KINDS, (0, 2))
    }
    accelerator = Accelerator(cpu=True)
    for case, (data, validation) in opened.items():
        rows, trained = case[0], CASES[case[0]]
        samples = tiny.sequences(rows)
        own: list[Any] = []

        def watched(work: Work, samples: Any = samples, own: Any = own) -> Work:
            for window, batches in work:
                cells = window.micro_batches
                right = all(
                    whole(batch) == [tuple(samples[index].tolist()) for index in cell.samples]
                    for cell, batch in zip(cells, batches, strict=True)
                )
                ids = [index for cell in cells if not cell.filler for index in cell.samples]
                own.append((window.update, window.epoch, window.consumed, len(cells), right, ids))
                yield window, batches

        bare = tiny.gpt2()
        model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.0))
        step = Step(accelerator, model, updates(accelerator, model, optimizer, None), loss, count)
        made: list[StepResult] = []

        def after_update(window: Any, result: StepResult, made: Any = made) -> bool:  # noqa: ARG001
            made.append(result)
            return False

        work = watched(work_of(data, rows, world))
        fit(step, itertools.islice(work, trained), rate, after_update)
        assert list(work) or rows < 1000, "there is more than was trained on"
        evaluated: list[Any] = []

        def counted(batch: Any, evaluated: Any = evaluated) -> int:
            evaluated += whole(batch)
            return count(batch)

        score = Evaluation(accelerator, validation, loss, counted, EVAL_BATCH)(tiny.gpt2())
        found[case] = {"own": own, "made": made, "evaluated": evaluated, "score": score}
    return found


@functools.cache
def expected_updates(rows: int, kind: str) -> list[tuple[float, float, int, int]]:
    """Loss, gradient norm, samples and targets of the trained updates, by a plain loop without any of our parts."""
    samples, model, made = tiny.sequences(rows), tiny.gpt2(), []
    for update in range(1, CASES[rows] + 1):
        epoch, position = divmod(update - 1, -(-rows // GLOBAL_BATCH))
        order = epoch_order(rows, 0, epoch) if kind == "index" else np.arange(rows)
        chosen = [samples[index] for index in order[position * GLOBAL_BATCH :][:GLOBAL_BATCH]]
        model.zero_grad()
        mean = tiny.reference_loss(model, chosen)
        mean.backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        made.append((mean.item(), norm.item(), len(chosen), sum(len(sample) - 1 for sample in chosen)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate(update) * parameter.grad
    return made


@functools.cache
def expected_score(rows: int) -> float:
    with torch.no_grad():
        return float(tiny.reference_loss(tiny.gpt2(), tiny.sequences(rows)))


def check_windows(rows: int, kind: str, by_rank: list[list[Any]]) -> None:
    per_epoch = -(-rows // GLOBAL_BATCH)
    assert {len(own) for own in by_rank} == {2 * per_epoch}
    for number, windows in enumerate(zip(*by_rank, strict=True)):
        epoch, position = divmod(number, per_epoch)
        order = epoch_order(rows, 0, epoch) if kind == "index" else np.arange(rows)
        consumed = min(rows, (position + 1) * GLOBAL_BATCH)
        assert {window[:3] for window in windows} == {(number + 1, epoch, consumed)}
        assert len({window[3] for window in windows}) == 1, "ranks stay in step"
        assert all(window[4] for window in windows), "a batch holds the samples it is said to hold"
        together = sorted(index for window in windows for index in window[5])
        assert together == sorted(order[position * GLOBAL_BATCH : consumed].tolist())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_windows_losses_and_scores_do_not_depend_on_ranks_workers_and_kind_of_data(world_size: int) -> None:
    by_rank = run_ranks(world_size, cases)
    assert len(by_rank[0]) == len(CASES) * len(KINDS) * 2
    for rows, kind, workers in by_rank[0]:
        found = [cases[rows, kind, workers] for cases in by_rank]
        check_windows(rows, kind, [case["own"] for case in found])
        for case in found:
            for result, expected in zip(case["made"], expected_updates(rows, kind), strict=True):
                assert result.loss == pytest.approx(expected[0], abs=2e-6)
                assert result.gradient_norm == pytest.approx(expected[1], rel=1e-5)
                assert (result.counts.samples, result.counts.targets) == expected[2:]
            assert case["score"].loss == pytest.approx(expected_score(rows), abs=1e-6)
            assert case["score"].counts.samples == rows
        evaluated = sorted(row for case in found for row in case["evaluated"])
        assert evaluated == sorted(tuple(sample.tolist()) for sample in tiny.sequences(rows))


# --- ends ------------------------------------------------------------------------------------------------


def little() -> dict[str, Any]:
    """One row on all ranks, and streams that end too early."""
    world, one = read_world(), tiny.sequences(1)

    def opened(stream: Any, workers: int) -> tuple[Reader, Reader]:
        ranks = world.rank, world.size, collate, workers
        return Reader("training", stream, 6, 2, *ranks), Reader("validation", stream, 2 * world.size, 2, *ranks)

    streams = {"one": Rows(one), "empty": Rows([]), "once": Once(one)}
    data = {(name, workers): opened(streams[name], workers) for name in streams for workers in (0, 2)}
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny.gpt2())
    found: dict[str, Any] = {}
    for (name, workers), (training, validation) in data.items():
        try:
            work = list(training.windows(2))
        except DataError as error:
            found[f"{name}, {workers}"] = str(error)
        else:
            cells = [(window.epoch, window.consumed, cell) for window, _ in work for cell in window.micro_batches]
        if name == "once":
            continue
        try:
            score = Evaluation(accelerator, validation, loss, count, 2)(model)
        except DataError as error:
            found[f"{name} validation, {workers}"] = str(error)
        else:
            found[f"{name}, {workers}"] = cells, score
    return found


@pytest.mark.dist
def test_one_sample_is_enough_for_any_number_of_ranks_and_none_is_an_error_on_all() -> None:
    by_rank = run_ranks(3, little)
    expected = tiny.reference_loss(tiny.gpt2(), tiny.sequences(1)).item()
    for workers in (0, 2):
        for rank, found in enumerate(by_rank):
            windows, score = found[f"one, {workers}"]
            assert [(epoch, consumed) for epoch, consumed, _ in windows] == [(0, 1), (1, 1)]
            assert all((cell.samples, cell.filler) == ((0,), rank > 0) for *_, cell in windows)
            assert score.loss == pytest.approx(expected, abs=1e-6)
            assert score.counts.samples == 1
            hint = "it must hold at least one, and begin with the first each time it is read"
            assert found[f"empty, {workers}"] == f"the training stream gives no sample in epoch 1; {hint}"
            assert found[f"empty validation, {workers}"] == f"the validation stream gives no sample in epoch 1; {hint}"
            assert found[f"once, {workers}"] == f"the training stream gives no sample in epoch 2; {hint}"


def test_an_endless_stream_is_read_as_far_as_needed() -> None:
    class Endless:
        def __init__(self) -> None:
            self.taken = 0

        def __iter__(self) -> Iterator[int]:
            for number in itertools.count():
                self.taken += 1
                yield number

    stream = Endless()
    assert read(stream, 3) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert stream.taken == 12
    assert read(stream, 3, workers=2) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_an_evaluation_reads_no_more_than_it_was_asked_for() -> None:
    samples, advanced = tiny.sequences(10), []
    rows = Rows(itertools.count())
    rows.__class__ = type("Cycle", (Rows,), {"__iter__": lambda self: itertools.cycle(samples)})
    model = tiny.gpt2()
    data = Reader("validation", rows, 4, 4, 0, 1, collate)
    evaluation = Evaluation(Accelerator(cpu=True), data, loss, count, 4, max_samples=6)
    assert evaluation.size is None
    for _ in range(2):
        score = evaluation(model, advanced.append)
        with torch.no_grad():
            assert score.loss == pytest.approx(float(tiny.reference_loss(model, samples[:6])), abs=1e-6)
        assert score.counts.samples == 6
    assert advanced == [4, 2, 4, 2]
    assert rows.epochs == [0, 0], "always the same samples"


# --- epochs and workers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_told_of_each_epoch_before_it_begins(workers: int) -> None:
    stream = Rows(range(5), turning=True)
    assert read(stream, 6, workers) == [
        *([0, 1], [2, 3], [4]),
        *([1, 2], [3, 4], [0]),
        *([2, 3], [4, 0], [1]),
    ]
    assert stream.epochs == [0, 1, 2]


def shards(starts: list[int]) -> Iterator[dict[str, int]]:
    for start in starts:
        yield from ({"x": number} for number in range(start, start + 7))


def of_datasets(shuffled: bool) -> Any:
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(shards, gen_kwargs={"starts": [0, 7, 14]})
    return stream.shuffle(seed=1, buffer_size=5) if shuffled else stream


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_that_shards_itself_over_workers_is_read_whole_by_each(shuffled: bool) -> None:
    def epochs(workers: int) -> list[list[int]]:
        reader = Reader(
            "training", of_datasets(shuffled), 4, 2, 0, 1, lambda rows: numbers([row["x"] for row in rows]), workers
        )
        cells = [batch["x"].tolist() for _, batches in reader.windows(12) for batch in batches]
        return [list(itertools.chain(*cells[:11])), list(itertools.chain(*cells[11:]))]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(21))
    assert (first != list(range(21))) == shuffled
    assert (first != second) == shuffled
    for workers in (1, 2):
        assert epochs(workers) == [first, second]


class Torn:
    """A stream whose eighth sample cannot be read."""

    def __iter__(self) -> Iterator[int]:
        yield from range(7)
        raise DataError("part-3.jsonl:8: not valid JSON")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_a_stream_has_to_say_reaches_the_user_as_one_line_at_the_same_window(workers: int) -> None:
    work = Reader("training", Torn(), 2, 2, 0, 1, numbers, workers).windows(9)
    assert [next(work)[0].consumed for _ in range(3)] == [2, 4, 6]
    with pytest.raises(DataError) as caught:
        next(work)
    assert str(caught.value) == "part-3.jsonl:8: not valid JSON"


# --- around them -----------------------------------------------------------------------------------------


class OfTorch(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


def test_which_data_is_a_stream() -> None:
    from datasets import Dataset

    for stream in (Rows([1]), OfTorch(), of_datasets(True), {1, 2}):
        assert is_stream(stream)  # type: ignore[arg-type]
    for samples in ([1], range(3), np.arange(3), Dataset.from_dict({"x": [1]}), torch.arange(3)):
        assert not is_stream(samples)  # type: ignore[arg-type]
    assert read(OfTorch(), 2) == [[0, 1], [2], [0, 1], [2]]


def prepared(train: Any, validation: Any = ("a",)) -> Prepared:
    build: Any = tiny.gpt2
    return Prepared(build, None, train, validation, collate, loss, count)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        (
            ([], [1]),
            ["train.max_steps=3"],
            "recipe = mine: its training data holds no sample",
        ),
        (
            (Rows([1]), ()),
            ["train.max_steps=3"],
            "recipe = mine: its validation data holds no sample",
        ),
        (
            (Rows([1]), None),
            ["train.max_steps=3"],
            "recipe = mine: its validation data is a NoneType; it must have __len__ and __getitem__, or an __iter__ "
            "that begins with the first sample each time it is called",
        ),
        (
            (iter([1]), [1]),
            ["train.max_steps=3"],
            "recipe = mine: its training data is a list_iterator; it must have __len__ and __getitem__, or an __iter__ "
            "that begins with the first sample each time it is called",
        ),
        (
            (Rows([1]), [1]),
            ["train.epochs=1.5"],
            "train.epochs = 1.5: the training data of mine is a stream, of which only the end tells the length; state "
            "train.max_steps instead",
        ),
    ],
)
def test_data_that_cannot_be_trained_on(data: tuple[Any, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        check_data(load_config(None, ["recipe=mine", *overrides]).config, prepared(*data))
    assert str(caught.value) == message


def test_the_longest_of_the_first_samples_of_a_stream() -> None:
    rows = [*tiny.sequences(20), *(np.ones(1, np.int32) for _ in range(LOOKED_AT)), np.ones(32, np.int32)]
    longest = longest_samples(prepared(Rows(rows)), 30)
    assert [index for index, _ in longest[:3]] == sorted(range(20), key=lambda index: -len(rows[index]))[:3]
    assert all(rows[index] is sample for index, sample in longest)
    assert [index for index, _ in longest_samples(prepared(Rows(rows[:2])), 5)] in ([0, 1, 0, 1, 0], [1, 0, 1, 0, 1])
    with pytest.raises(DataError, match="the training stream gives no sample; it must hold at least one"):
        longest_samples(prepared(Rows([])), 1)


def streamed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(f"recipe: {OWN}\nrecipe_args: {{stream: true}}\ntrain: {{global_batch_size: 8}}\n")
    return shoal(folder, "run", "run.yaml", *arguments, "--out", "out")


@pytest.mark.dist
@pytest.mark.slow
def test_a_recipe_with_streams_by_the_real_command(tmp_path: Path) -> None:
    stated = ["parallel.devices=2", "parallel.data_workers=2", "train.micro_batch_size=auto", "train.max_steps=5"]
    done = streamed(tmp_path, *stated)
    assert done.returncode == 0, done.stderr
    assert "streamed training and streamed validation samples, 5 updates" in done.stderr
    assert "is the largest that fits" in done.stderr
    assert (tmp_path / "out/export/model.safetensors").is_file()


@pytest.mark.slow
def test_a_stream_cannot_be_planned_in_epochs(tmp_path: Path) -> None:
    done = streamed(tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"shoal: train.epochs = 1: the training data of {OWN} is a stream, of which only the end tells the length; "
        "state train.max_steps instead"
    )


@pytest.mark.parametrize("key", ["train.epochs", "eval.every_epochs"])
@pytest.mark.parametrize(
    "recipe",
    [
        *("causal_lm_chat", "masked_lm", "question_answering", "summarization", "translation"),
        *("text_classification", "token_classification"),
    ],
)
def test_of_the_recipes_with_rows_that_is_known_before_anything_is_prepared(recipe: str, key: str) -> None:
    stated = {"train.epochs": "null", "eval.every_epochs": "null", key: "2"}
    if key != "train.epochs":
        stated["train.max_steps"] = "4"
    options = ["recipe_args.streaming=true", *(f"{name}={value}" for name, value in stated.items())]
    if "classification" in recipe:
        options.append("recipe_args.labels=[a, b]")
    if recipe == "causal_lm_chat":
        options.append("recipe_args.packing=off")
    with pytest.raises(ConfigError, match=rf"command line: {key} = 2: the training data of \w+ is a stream, of which"):
        decide(recipe, options, None, World())
