"""Evaluation side by side: rows a second, the loss alone or with texts written for each row.

python -m benchmarks.peers.scoring [--task translation] [--ranks 1] [--rounds 3] [--only shoal,Trainer]

Before it, once: python -m benchmarks.peers.install. The model has random weights, so that texts of `translation` go on
to their greatest length in all contenders: the column of tokens shows it for those who tell. shoal measures BLEU of
texts and the accuracy of classes besides, which the others do not. In `blocks` it has the rows' ends, a block or two.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.peers.contenders import CONTENDERS, Contender
from benchmarks.peers.rounds import Column, in_turn, machine, table
from benchmarks.peers.training import BATCHES, LENGTHS, add_data, names_of, threads_of
from benchmarks.peers.workload import Workload, make


def numbers(contender: Contender, workload: Workload) -> dict[str, float]:
    """Of one run, which makes one update besides."""
    _, ticks = contender.measure(workload)
    seconds, rows, written = ticks[0].evaluations[-1]  # in the first one, libraries are loaded
    found = {"rows_per_second": rows / seconds, "seconds": seconds, "rows": rows}
    return {**found, "written": written} if written else found


COLUMNS = (
    Column("rows/s", "rows_per_second", ",.1f", against=True),
    Column("s an evaluation", "seconds", ".2f"),
    Column("rows", "rows"),
    Column("tokens written", "written"),
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=LENGTHS, default="translation")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="shoal,Accelerate loop,Trainer", help="names of contenders, between commas")
    add_data(parser)
    given = parser.parse_args()
    task, length = given.task, given.length or LENGTHS[given.task]
    with tempfile.TemporaryDirectory() as folder:
        make(task, Path(folder), given.size or "small", given.vocabulary, given.tokenizer, given.rows, length)
        batch = given.batch or BATCHES[task]
        sizes = (length, batch, 1, given.ranks, threads_of(given))
        # shoal's second evaluation comes after an update: of a rate so small it changes nothing that is measured.
        workload = Workload(task, Path(folder), *sizes, learning_rate=1e-12, evaluations=2)
        part = names_of(given.only, workload)
        title = f"scoring {task} on {given.ranks}"
        found = in_turn(part, given.rounds, lambda each: numbers(CONTENDERS[each], workload), title)
    print(f"{title}: batch {batch}, at most {length} tokens a row, {given.rounds} rounds; {machine()}\n")
    print(table(found, COLUMNS))


if __name__ == "__main__":
    main()
