"""Training side by side: tokens a second, main memory, and how long it takes from the command to the first update.

python -m benchmarks.peers.training [--task blocks] [--ranks 1] [--rounds 3] [--only shoal,Trainer]

Before it, once: python -m benchmarks.peers.install. With `--size tiny --batch 2 --updates 2` it is about the start.
Tokens are those that are no padding, of the updates after the first few. All numbers of all rounds go to
runs/benchmarks/.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.peers.contenders import ALL, CONTENDERS, Contender
from benchmarks.peers.rounds import Column, in_turn, machine, table
from benchmarks.peers.workload import SIZES, Workload, make

LENGTHS = {"blocks": 256, "classification": 128, "translation": 64, "instruction": 128}
BATCHES = {"blocks": 8, "classification": 32, "translation": 32, "instruction": 16}


def numbers(contender: Contender, workload: Workload, skip: int) -> dict[str, float]:
    """Of one run."""
    measured, ticks = contender.measure(workload)
    times = ticks[0].times
    tokens = sum(sum(each.tokens[skip:]) for each in ticks)
    each_update = sorted(after - before for before, after in zip(times[skip - 1 :], times[skip:], strict=False))
    return {
        "tokens_per_second": tokens / (times[-1] - times[skip - 1]) if skip < len(times) else 0.0,
        "update_seconds": each_update[len(each_update) // 2] if each_update else 0.0,
        "least_update_seconds": each_update[0] if each_update else 0.0,
        "first_update_seconds": times[0] - measured.began,
        "all_bytes": measured.all_bytes,
        "process_bytes": measured.process_bytes,
        "loss": ticks[0].loss or 0.0,
    }


COLUMNS = (
    Column("tokens/s", "tokens_per_second", against=True),
    Column("ms an update", "update_seconds", ",.1f", unit=0.001),
    Column("ms, the fastest", "least_update_seconds", ",.1f", unit=0.001, against=True),
    Column("first update after, s", "first_update_seconds", ".1f", against=True),
    Column("memory of one process at most, MB", "process_bytes", unit=1e6, against=True),
    Column("of all, MB", "all_bytes", unit=1e6),
    Column("loss", "loss", ".2f"),
)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options of model and data."""
    parser.add_argument("--size", choices=SIZES, help="of the model")
    parser.add_argument("--vocabulary", type=int, help="that the model has outputs for; the tokenizer's by default")
    parser.add_argument("--batch", type=int, help="rows in an update, over all ranks")
    parser.add_argument("--threads", type=int, help="of a rank; the cores that it has by default")
    parser.add_argument("--length", type=int, help="tokens in a block or in the longest row")
    parser.add_argument("--rows", type=Path, help="a text; else a tsv file of two columns, without a header")
    parser.add_argument("--tokenizer", type=Path, help="folder of one; else one is made of the rows")


def threads_of(given: argparse.Namespace) -> int:
    """Of a rank: as many as there are cores for it. With others on the machine fewer are steadier."""
    stated: int | None = given.threads
    return stated or max(1, len(os.sched_getaffinity(0)) // given.ranks)


def names_of(only: str, workload: Workload, known: dict[str, Contender] = CONTENDERS) -> list[str]:
    """The contenders that are asked for, can do it and are installed; all without names."""
    names = [name.strip().replace("+", ",") for name in only.split(",")] if only else list(known)
    if unknown := set(names) - set(known):
        sys.exit(f"{', '.join(unknown)}: there are {'; '.join(known)}")
    part = [name for name in names if known[name].takes(workload)]
    if missing := [name for name in part if not known[name].installed()]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    return [name for name in part if name not in missing]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=ALL, default="blocks")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="names of contenders, between commas; a comma of a name is a +")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--skip", type=int, default=4, help="updates at the beginning that are not timed")
    add_data(parser)
    given = parser.parse_args()
    task, length = given.task, given.length or LENGTHS[given.task]
    size = given.size or ("medium" if task == "blocks" else "small")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(task, folder, size, given.vocabulary, given.tokenizer, given.rows, length)
        batch = given.batch or BATCHES[task]
        workload = Workload(task, folder, length, batch, given.updates, given.ranks, threads_of(given))
        part = names_of(given.only, workload)
        title = f"training {task} {size} on {given.ranks}"
        found = in_turn(part, given.rounds, lambda each: numbers(CONTENDERS[each], workload, given.skip), title)
    threads = f"{workload.threads} threads a rank"
    print(f"{title}: batch {batch}, at most {length} tokens a row, {threads}, {given.rounds} rounds; {machine()}\n")
    print(table(found, COLUMNS))


if __name__ == "__main__":
    main()
