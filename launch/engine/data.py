"""The data of a run as its ranks take it. Made before the process group, because data workers are forked from it."""

from __future__ import annotations

from dataclasses import dataclass

from launch.engine.batching import Loader
from launch.engine.streams import Reader, is_stream
from launch.plan import Plan
from launch.recipe import Prepared, Samples, Stream


@dataclass(frozen=True)
class Data:
    """What one rank reads."""

    train: Loader | Reader
    validation: Loader | Reader

    def close(self) -> None:
        """End the data workers."""
        self.train.feed.close()
        self.validation.feed.close()


def open_data(plan: Plan, prepared: Prepared, rank: int) -> Data:
    """Start the planned data workers. To be called before `make_accelerator`."""
    processes, batch, config = plan.processes, plan.batch, plan.config

    def opened(name: str, data: Samples | Stream, window: int, micro: int) -> Loader | Reader:
        workers, pin_memory = config.parallel.data_workers, processes.device == "cuda"
        seed = config.train.seed + 1 + rank  # what a recipe draws while collating differs between ranks, as dropout
        if is_stream(data):
            world_size, collate = processes.world_size, prepared.collate
            return Reader(name, data, window, micro, rank, world_size, collate, workers, pin_memory, seed)
        return Loader(data, prepared.collate, workers, pin_memory, seed)

    eval_window = batch.eval_batch_size * processes.world_size
    return Data(
        opened("training", prepared.train, batch.global_batch_size, batch.micro_batch_size),
        opened("validation", prepared.validation, eval_window, batch.eval_batch_size),
    )
