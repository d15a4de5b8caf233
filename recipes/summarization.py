"""Summarisation: a long text to a short one that says what matters, by an encoder-decoder model.

Embedded default: logs of machines, generated, to one line about the fault that is told in them, with a tiny T5.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.recipe import Prepared, Preview, RecipeContext
from recipes.files import Row
from recipes.rows import EmbeddedRows
from recipes.sequence_to_sequence import SequenceArgs, Task
from recipes.small_t5 import small_t5

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGS = 3300
SEED = 0
_KEY = {"rows": LOGS, "seed": SEED, "version": 3}
_LEARNT_FROM = 1000
"""Logs of which the tokenizer takes its words."""

MACHINES = (
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"),
    *("india", "juliett", "kilo", "lima", "mike", "november", "oscar", "papa"),
)
ORDINARY = (
    *("backup finished", "user logged in", "certificate renewed", "job started", "cache cleared"),
    *("index rebuilt", "replica in sync", "new version deployed", "health check passed", "log rotated"),
)
WARNINGS = ("high load", "slow query", "retry scheduled", "memory almost full", "clock drift")
FAULTS = ("disk full", "out of memory", "connection refused", "certificate expired", "process killed", "lost power")


class Args(SequenceArgs):
    """What a run file may set under `recipe_args`."""

    metrics: tuple[str, ...] = ("rouge",)
    """Metrics of the generated texts: shipped ones, files of your own, or of the Hub; none: nothing is generated."""


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch, and find the number of samples if they are prepared already."""
    return _task(args, context).preview()


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer as training uses it."""
    return _task(args, context).tokenizer()


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Tokenise (once, then from the cache) and describe the model."""
    return _task(args, context).prepare()


def _task(args: Args, context: RecipeContext) -> Task:
    columns = {"source_column": args.source_column, "target_column": args.target_column}
    return Task("summarization", args, context, SMALL_T5, EmbeddedRows("logs", _KEY, logs), columns)


# --- embedded default --------------------------------------------------------------------------------------


def logs(count: int = LOGS) -> Iterator[Row]:
    """Logs of a machine, three to five lines of which one is a fault, and what matters; the same ones every time."""
    source = random.Random(SEED)
    for _ in range(count):
        length, machine, fault = source.randint(3, 5), source.choice(MACHINES), source.choice(FAULTS)
        lines = [_harmless(source, machine) for _ in range(length - 1)]
        warned = any(line.startswith("warning") for line in lines)
        lines.insert(source.randrange(length), f"error: {machine} {fault}")
        yield {"source": "\n".join(lines), "target": f"{machine} failed{' after warnings' if warned else ''}: {fault}"}


def _harmless(source: random.Random, machine: str) -> str:
    level, what = ("warning", WARNINGS) if source.random() < 0.2 else ("info", ORDINARY)
    return f"{level}: {machine} {source.choice(what)}"


SMALL_T5 = small_t5("logs", lambda: ("\n".join(row.values()) for row in logs(_LEARNT_FROM)), 300, _KEY)
"""A tiny T5 whose tokens are the words of logs, and bytes for all else."""
