"""Tries micro-batch sizes on the real model, smallest first, and measures what each needs. Every rank takes part."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from launch.engine.agree import gathered
from launch.engine.batching import MicroBatch, Window
from launch.engine.loop import Step, set_learning_rate
from launch.engine.loss import count_tokens
from launch.engine.streams import first_samples, is_stream
from launch.errors import DataError
from launch.recipe import Prepared, Samples, Stream

LOOKED_AT = 512
"""Samples among which the longest are found; the same for any number of samples."""

MARGIN = 0.92
"""Share of a device's memory that trials may fill: samples yet longer, and fragments, take the rest."""


def longest_samples(prepared: Prepared, wanted: int) -> list[tuple[int, Any]]:
    """The samples with the most tokens among those looked at, each with its index; repeated where there are few.

    Raises:
        DataError: there is none.
    """
    looked_at = _looked_at(prepared.train)
    if not looked_at:
        raise DataError("the training stream gives no sample; it must hold at least one")
    by_length = sorted(looked_at, key=lambda indexed: -count_tokens(prepared.collate([indexed[1]])))
    return [by_length[position % len(by_length)] for position in range(wanted)]


def _looked_at(data: Samples | Stream) -> list[tuple[int, Any]]:
    """Some samples spread over the data, or the first ones of a stream."""
    if is_stream(data):
        return list(enumerate(first_samples(data, LOOKED_AT)))
    indices = sorted({position * len(data) // LOOKED_AT for position in range(LOOKED_AT)})
    return [(index, data[index]) for index in indices]


def try_sizes(
    step: Step,
    prepared: Prepared,
    sizes: Sequence[int],
    limit: int,
    managed: Callable[[dict[int, int]], None],
) -> dict[int, int]:
    """Make an update with each of `sizes`, ascending, until the next would need more than `limit` bytes.

    Returns the bytes at the peak of each size, over all ranks; `managed` hears them after each size. Every rank must
    call this; the weights are not of use afterwards.
    """
    peaks: dict[int, int] = {}
    longest = longest_samples(prepared, max(sizes))
    set_learning_rate(step.updates.optimizer, 0.0)
    step.model.train()
    for size in sizes:
        if _expected(peaks, size) > limit:
            break
        # Two micro-batches, where there is room for two: gradients then lie beside the activations of the second.
        indices, samples = zip(*longest[:size], strict=True)
        cells = (MicroBatch(indices),) * min(2, sizes[-1] // size)
        batch = prepared.collate(list(samples))
        for update in (1, 2) if not peaks else (1,):  # the first update ever makes the optimizer's state
            step(Window(update, 0, size, cells), [batch] * len(cells))
        peak = max(gathered([_peak(step.accelerator)]))
        if peak > limit:
            break
        peaks[size] = peak
        managed(peaks)
    return peaks


def _expected(peaks: dict[int, int], size: int) -> float:
    """What a size will need, if memory goes on growing as it did last: so that running out is the exception."""
    if len(peaks) < 2:
        return 0.0
    (smaller, low), (larger, high) = list(peaks.items())[-2:]
    return high + (high - low) / (larger - smaller) * (size - larger)


def memory_limit(accelerator: Accelerator, memory_bytes: int) -> int:
    """Bytes that this rank may fill: a share of its device, or of its part of the main memory (`memory_bytes`)."""
    if accelerator.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int((free + torch.cuda.memory_reserved()) * MARGIN)
    return int(memory_bytes * MARGIN)


def _peak(accelerator: Accelerator) -> int:
    """Bytes held at the highest point so far: sizes ascend, so it is the one of the last."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # KiB on Linux
