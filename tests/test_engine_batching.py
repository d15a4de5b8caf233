from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.engine.batching import Loader, MicroBatch, Order, deal, deal_by_length, epoch_order

sizes = st.integers(1, 60)


@given(sizes, st.integers(1, 7), st.integers(1, 5))
def test_dealing_gives_each_sample_to_one_rank(size: int, micro: int, world_size: int) -> None:
    by_rank = [deal(range(size), micro, rank, world_size) for rank in range(world_size)]
    dealt = [index for cells in by_rank for cell in cells if not cell.filler for index in cell.samples]
    assert sorted(dealt) == list(range(size))
    assert len({len(cells) for cells in by_rank}) == 1  # ranks stay in step
    assert all(1 <= len(cell.samples) <= micro for cells in by_rank for cell in cells)
    assert all(len(cell.samples) == 1 for cells in by_rank for cell in cells if cell.filler)
    assert len(by_rank[0]) == -(-size // (micro * world_size))


@given(
    samples=sizes,
    accumulation=st.integers(1, 3),
    micro=st.integers(1, 3),
    world_size=st.integers(1, 4),
    updates=st.integers(1, 30),
)
def test_windows_do_not_depend_on_the_split(
    samples: int, accumulation: int, micro: int, world_size: int, updates: int
) -> None:
    total = accumulation * micro * world_size
    alone = list(Order(samples, total, total, 3, 0, 1).windows(1, updates))
    ranks = [list(Order(samples, total, micro, 3, rank, world_size).windows(1, updates)) for rank in range(world_size)]
    for position, reference in enumerate(alone):
        together = sorted(
            index
            for windows in ranks
            for cell in windows[position].micro_batches
            if not cell.filler
            for index in cell.samples
        )
        assert together == sorted(reference.micro_batches[0].samples)
        for windows in ranks:
            window = windows[position]
            assert (window.update, window.epoch, window.consumed) == (
                reference.update,
                reference.epoch,
                reference.consumed,
            )


def skewed(samples: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Lengths of which most are short, and a few long, as those of texts are."""
    return np.random.RandomState(seed).lognormal(3.5, 0.8, samples).astype(int) + 1


@given(
    size=sizes,
    micro=st.integers(1, 20),
    world_size=st.integers(1, 5),
    cut=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    alike=st.booleans(),
)
def test_samples_dealt_by_length_are_alike_in_a_step(
    size: int, micro: int, world_size: int, cut: bool, seed: int, alike: bool
) -> None:
    lengths = np.full(size, 7) if alike else skewed(size, seed)
    indices = epoch_order(size, seed, 0)
    by_rank, again = (
        [deal_by_length(indices, lengths, micro, rank, world_size, seed, cut=cut) for rank in range(world_size)]
        for _ in range(2)
    )
    assert by_rank == again
    assert len({len(cells) for cells in by_rank}) == 1  # ranks stay in step
    rows: list[list[int]] = []
    for step in zip(*by_rank, strict=True):
        cells = [cell.samples for cell in step if not cell.filler]
        assert all(1 <= len(cell) <= micro for cell in cells)
        assert all(
            len(cell.samples) == 1 and cell.samples[0] in itertools.chain(*cells) for cell in step if cell.filler
        )
        assert {len(cell) for cell in cells} <= {len(cells[0]), len(cells[0]) + 1, len(cells[0]) - 1}
        # The n-th longest of each rank: so each has as long ones as the others.
        rows += [[cell[row] for cell in cells if row < len(cell)] for row in range(max(map(len, cells)))]
    assert sorted(itertools.chain(*rows)) == list(range(size))
    for row, following in itertools.pairwise(rows):
        assert min(lengths[row]) >= max(lengths[following])
    least = -(-size // (micro * world_size))
    assert len(by_rank[0]) == least if alike or not cut else len(by_rank[0]) >= least


def test_of_equally_long_samples_the_order_stays_and_ranks_take_turns() -> None:
    lengths = np.array([5, 9, 5, 9, 7, 5])
    by_rank = [deal_by_length(np.array([5, 4, 3, 2, 1, 0]), lengths, 2, rank, 2, 0, cut=False) for rank in (0, 1)]
    assert [[cell.samples for cell in cells] for cells in by_rank] == [[(3, 4), (0,)], [(1, 5), (2,)]]
    by_rank = [deal_by_length(range(3), lengths, 1, rank, 2, 1, cut=False) for rank in (0, 1)]
    assert by_rank == [(MicroBatch((0,)), MicroBatch((2,))), (MicroBatch((1,)), MicroBatch((2,), filler=True))]


def dealt_in(windows: Any) -> list[int]:
    """The samples of one window, of all ranks."""
    cells = [cell for window in windows for cell in window.micro_batches]
    return sorted(index for cell in cells if not cell.filler for index in cell.samples)


@given(samples=sizes, micro=st.integers(1, 3), world_size=st.integers(1, 4), seed=st.sampled_from([None, 3]))
def test_a_window_has_the_same_samples_by_length(samples: int, micro: int, world_size: int, seed: int | None) -> None:
    """But for an evaluation, whose samples are all in order, and which no update depends on."""
    sizes, lengths = (2 * micro * world_size, micro), skewed(samples)
    updates = 2 * -(-samples // sizes[0])

    def windows(*by_length: Any) -> list[Any]:
        orders = [Order(samples, *sizes, seed, rank, world_size, *by_length) for rank in range(world_size)]
        ranks = zip(*(order.windows(1, updates) for order in orders), strict=True)
        return [(each[0].update, each[0].epoch, each[0].consumed, dealt_in(each)) for each in ranks]

    plain = windows()
    for cut in (False, True):
        found = windows(lengths, cut)
        if seed is not None:
            assert found == plain
            continue
        assert [each[:3] for each in found] == [each[:3] for each in plain]
        parts = [each[3] for each in found[: updates // 2]]
        assert sorted(itertools.chain(*parts)) == list(range(samples))
        assert all(min(lengths[one]) >= max(lengths[next_one]) for one, next_one in itertools.pairwise(parts))


def computed(order: Order, lengths: np.ndarray[Any, Any], updates: int) -> tuple[int, int]:
    """Tokens with padding, and micro-batches."""
    cells = [cell for window in order.windows(1, updates) for cell in window.micro_batches]
    return sum(len(cell.samples) * int(lengths[list(cell.samples)].max()) for cell in cells), len(cells)


def test_less_is_padded_by_length() -> None:
    """Two ranks: of both together, so that no rank waits for the other."""
    lengths = skewed(1024)
    real = int(lengths.sum())

    def padding(*by_length: Any) -> tuple[float, int]:
        found = [computed(Order(1024, 64, 16, 0, rank, 2, *by_length), lengths, 16) for rank in (0, 1)]
        assert abs(found[0][0] - found[1][0]) < (0.02 if by_length else 0.2) * found[0][0]
        return sum(tokens for tokens, _ in found) / real - 1, found[0][1]

    (plain, steps), (dealt, same), (cut, more) = padding(), padding(lengths), padding(lengths, True)
    assert plain > 1.2 and dealt < 0.75 * plain and cut < 0.3 * plain
    assert steps == same < more < 5 * steps


@given(samples=sizes, total=st.integers(1, 9), first=st.integers(1, 40))
def test_starting_later_continues_the_same_windows(samples: int, total: int, first: int) -> None:
    order = Order(samples, total, total, 7, 0, 1)
    assert list(order.windows(first, first + 5)) == list(order.windows(1, first + 5))[first - 1 :]


@given(samples=sizes, total=st.integers(1, 9))
def test_an_epoch_covers_each_sample_once_and_epochs_differ(samples: int, total: int) -> None:
    order = Order(samples, total, total, 0, 0, 1)
    per_epoch = -(-samples // total)
    windows = list(order.windows(1, 2 * per_epoch))
    for epoch in (0, 1):
        seen = [i for w in windows if w.epoch == epoch for cell in w.micro_batches for i in cell.samples]
        assert sorted(seen) == list(range(samples))
    assert [window.consumed for window in windows if window.epoch == 1][-1] == samples


def test_the_order_is_frozen() -> None:
    """A resumed run must find the order it began with: these numbers may never change."""
    assert epoch_order(10, 0, 0).tolist() == [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]
    assert epoch_order(10, 3, 2).tolist() == [0, 9, 3, 8, 1, 6, 7, 5, 4, 2]
    assert epoch_order(10, 0, 1).tolist() != epoch_order(10, 0, 0).tolist()
    assert epoch_order(10, 1, 0).tolist() != epoch_order(10, 0, 0).tolist()


def test_batches_come_in_order_with_and_without_workers() -> None:
    samples = [np.array([index]) for index in range(20)]
    order = Order(20, 6, 3, None, 0, 1)  # unshuffled; the last window is short

    def collate(items: list[np.ndarray]) -> dict[str, torch.Tensor]:  # type: ignore[type-arg]
        return {"x": torch.from_numpy(np.concatenate(items))}

    for workers in (0, 2):
        got = list(Loader(samples, collate, workers).load(lambda: order.windows(1, 4)))
        assert [window for window, _ in got] == list(order.windows(1, 4))
        assert [batch["x"].tolist() for _, batches in got for batch in batches] == [
            *([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17], [18, 19])
        ]
    assert MicroBatch((0,)).filler is False
