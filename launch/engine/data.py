"""The data of a run as its ranks take it. Made before the process group, because data workers are forked from it."""

from __future__ import annotations

from dataclasses import dataclass

from launch.engine.batching import Loader, Order, Position, Work
from launch.engine.contract import checked_lengths
from launch.engine.devices import collate_of
from launch.engine.streams import Reader, is_stream
from launch.plan import Plan
from launch.recipe import Prepared, Samples, Stream


@dataclass(frozen=True)
class Data:
    """What one rank reads."""

    train: Loader | Reader
    validation: Loader | Reader

    def work(self, plan: Plan, updates: int, done: Position, rank: int, world_size: int, *, laid: bool = False) -> Work:
        """The windows that are left of so many updates, with this rank's batches.

        They are cut as planned, unless no padding is to be saved: where rows are `laid` end to end.
        """
        if isinstance(self.train, Reader):
            return self.train.windows(updates, done.update, done.epoch, done.consumed)
        samples, seed = len(self.train.samples), plan.config.train.seed
        sizes = plan.batch.global_batch_size, plan.rows
        cut = plan.by_length == "cut" and not laid
        order = Order(samples, *sizes, seed, rank, world_size, self.train.lengths, cut)
        return self.train.load(lambda: order.windows(done.update + 1, updates))

    def close(self) -> None:
        """End the data workers."""
        self.train.feed.close()
        self.validation.feed.close()


def open_data(plan: Plan, prepared: Prepared, rank: int) -> Data:
    """Start the planned data workers. To be called before `make_accelerator`.

    Raises:
        ConfigError: the recipe's lengths are none.
    """
    processes, batch, config = plan.processes, plan.batch, plan.config

    def opened(name: str, data: Samples | Stream, window: int, micro: int) -> Loader | Reader:
        workers, pin_memory = config.parallel.data_workers, processes.device == "cuda"
        collate = collate_of(plan, prepared, micro)
        seed = config.train.seed + 1 + rank  # what a recipe draws while collating differs between ranks, as dropout
        if is_stream(data):
            world_size = processes.world_size
            return Reader(name, data, window, micro, rank, world_size, collate, workers, pin_memory, seed)
        lengths = None if plan.by_length == "off" else checked_lengths(prepared, name, data)
        return Loader(data, collate, workers, pin_memory, seed, lengths)

    eval_window = plan.eval_rows * processes.world_size
    return Data(
        opened("training", prepared.train, batch.global_batch_size, plan.rows),
        opened("validation", prepared.validation, eval_window, plan.eval_rows),
    )
