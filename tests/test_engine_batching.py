from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.engine.batching import Loader, MicroBatch, Order, deal, epoch_order

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
