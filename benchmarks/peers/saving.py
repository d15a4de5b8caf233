"""How long a save keeps training waiting, side by side: one save of all that it takes to go on, amid timed updates.

python -m benchmarks.peers.saving [--ranks 1] [--rounds 3] [--only shoal,Trainer] [--disk FOLDER]

Before it, once: python -m benchmarks.peers.install transformers. The update after which is saved ends before the save,
the next one after it. shoal takes part as it is by default and with `save.asynchronous`, whose copy is written while
updates go on: what those lose by it is in the second column. shoal alone sees to it that a save is on the disk.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

from benchmarks.peers.contenders import CONTENDERS, Contender
from benchmarks.peers.rounds import Column, in_turn, machine, table
from benchmarks.peers.training import BATCHES, LENGTHS, add_data, names_of, threads_of
from benchmarks.peers.workload import Workload, make

ASYNCHRONOUS = "shoal, asynchronous"
TAKING_PART = {
    "shoal": CONTENDERS["shoal"],
    ASYNCHRONOUS: Contender(ASYNCHRONOUS, "transformers", settings={"save": {"asynchronous": True}}),
    "Accelerate loop": CONTENDERS["Accelerate loop"],
    "Trainer": CONTENDERS["Trainer"],
}


def stalls(times: list[float], save_after: int, skip: int) -> dict[str, float]:
    """Of the ends of updates: the median between them before the save, and how much more it was then and from then on.

    The first `skip` updates are left out.
    """
    between = [after - before for before, after in itertools.pairwise(times)]
    usual = statistics.median(between[skip - 1 : save_after - 1])
    rest = between[save_after - 1 :]
    return {"stall_seconds": rest[0] - usual, "lost_seconds": sum(rest) - usual * len(rest), "update_seconds": usual}


COLUMNS = (
    Column("save stalls, s", "stall_seconds", ".2f", against=True),
    Column("lost from the save to the end, s", "lost_seconds", ".2f"),
    Column("ms an update before", "update_seconds", ",.1f", unit=0.001),
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="names of contenders, between commas; a comma of a name is a +")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--save-after", type=int, default=9, help="of them")
    parser.add_argument("--skip", type=int, default=2, help="updates at the beginning that are not timed")
    parser.add_argument("--disk", type=Path, help="folder to save in; else where temporary files are")
    add_data(parser)
    parser.set_defaults(size="medium", vocabulary=32000, batch=BATCHES["blocks"] // 4)
    given = parser.parse_args()
    if not 1 <= given.skip < given.save_after - 1 or not given.save_after < given.updates < 2 * given.save_after:
        parser.error("updates are timed before the save and after it, and there is one save: skip, save-after, updates")
    tempfile.tempdir = given.disk and str(given.disk)
    length = given.length or LENGTHS["blocks"]
    with tempfile.TemporaryDirectory() as folder:
        make("blocks", Path(folder), given.size, given.vocabulary, given.tokenizer, given.rows, length)
        sizes = (length, given.batch, given.updates, given.ranks, threads_of(given))
        workload = Workload("blocks", Path(folder), *sizes, save_after=given.save_after)

        def measure(name: str) -> dict[str, float]:
            _, ticks = TAKING_PART[name].measure(workload)
            return stalls(ticks[0].times, given.save_after, given.skip)

        part = names_of(given.only, workload, TAKING_PART)
        title = f"saving {given.size} on {given.ranks}"
        found = in_turn(part, given.rounds, measure, title)
    print(f"{title}: batch {given.batch}, {given.rounds} rounds; {machine()}\n")
    print(table(found, COLUMNS))


if __name__ == "__main__":
    main()
