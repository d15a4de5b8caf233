"""Trials of micro-batch sizes on a model that really takes the memory: 64 MiB more for each sample."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.gloo import run_ranks

PER_SAMPLE = 64 * 2**20


def tried(room: int, greedy_rank: int) -> tuple[dict[int, int], list[int], list[int]]:
    """Peaks above the start, the sizes that were heard of, and those that updates were made with."""
    import torch
    from accelerate import Accelerator

    from launch.engine.loop import Step
    from launch.engine.trials import try_sizes
    from launch.engine.updating import updates
    from launch.recipe import Prepared
    from recipes.causal_lm import collate, count, loss

    accelerator = Accelerator(cpu=True)
    made: list[int] = []

    def greedy(model: Any, batch: Any) -> Any:
        samples = len(batch["input_ids"])
        made.append(samples)
        held = np.ones(samples * PER_SAMPLE if accelerator.process_index == greedy_rank else 1, dtype=np.uint8)
        return loss(model, batch) + 0.0 * float(held[0])

    bare = tiny.gpt2()
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters()))
    samples: Any = tiny.sequences(40)
    prepared = Prepared(lambda: bare, None, samples, samples, collate, greedy, count)  # type: ignore[arg-type]
    step = Step(accelerator, model, updates(accelerator, model, optimizer, 1.0), greedy, count)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    heard: list[int] = []
    peaks = try_sizes(step, prepared, (1, 2, 4, 8), start + room, lambda peaks: heard.append(max(peaks)))
    return {size: peak - start for size, peak in peaks.items()}, heard, made


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_sizes_are_tried_until_the_next_would_not_fit(world_size: int) -> None:
    """Four samples take 256 MiB; eight are expected to take twice that, and are not tried."""
    by_rank = run_ranks(world_size, tried, 6 * PER_SAMPLE, world_size - 1)
    for peaks, heard, made in by_rank:
        assert heard == list(peaks) == [1, 2, 4], "all ranks stop where the greediest has to"
        assert sorted(set(made)) == [1, 2, 4]
        assert made == [1, 1, 1, 1, 2, 2, 4, 4], "two micro-batches an update, and two updates with the first size"
    greediest = by_rank[-1][0]
    assert 4 * PER_SAMPLE <= greediest[4] < 6 * PER_SAMPLE
    assert by_rank[0][0].keys() == greediest.keys()


@pytest.mark.dist
def test_where_everything_fits_the_last_size_is_one_micro_batch() -> None:
    ((peaks, _, made),) = run_ranks(1, tried, 100 * PER_SAMPLE, 0)
    assert list(peaks) == [1, 2, 4, 8]
    assert made[-3:] == [4, 4, 8]


@pytest.mark.dist
def test_what_turns_out_too_large_is_no_answer() -> None:
    """Of the first two sizes nothing can be expected: they are tried, and judged by what they took."""
    ((peaks, heard, made),) = run_ranks(1, tried, PER_SAMPLE * 3 // 2, 0)
    assert heard == list(peaks) == [1]
    assert made[-1] == 2
