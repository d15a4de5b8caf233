"""What all that shoal does around an update costs: updates of shoal and of PyTorch alone, in turn, in one process.

python -m benchmarks.overhead [--rounds 3] [--only 128] [--fused]

A real `shoal run` with its default settings; `benchmarks/paired_recipe.py` makes the bare updates. The launcher, which
watches in a process of its own, is told apart: its time on a CPU as a share of one core. With `--fused` the bare
updates have the fused AdamW, as shoal's have: so what shoal gains does not hide what it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import yaml

from benchmarks.peers.install import ROOT
from benchmarks.peers.rounds import Column, in_turn, machine, run, table

SIZES = {
    "64": (1, 64, 32, 4, 600),
    "128": (2, 128, 64, 8, 300),
    "256": (4, 256, 128, 8, 60),
    "512": (6, 512, 256, 8, 14),
}
"""By the model's width: layers, width, tokens in a row, rows in an update, updates."""

SKIPPED = 0.2
"""Share of the updates, the first ones, that are not counted."""


def measure(name: str, *, fused: bool = False) -> dict[str, float]:
    """Of one run: medians, in milliseconds, and how much more shoal's updates take."""
    layers, width, length, batch, updates = SIZES[name]
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        out = folder / "times.json"
        recipe_args = {
            "layers": layers,
            "width": width,
            "length": length,
            "batch": batch,
            "rows": batch * (updates + 8),
            "updates": updates,
            "out": str(out),
            "fused": fused,
        }
        run_file = {
            "recipe": str(ROOT / "benchmarks" / "paired_recipe.py"),
            "recipe_args": recipe_args,
            "train": {"global_batch_size": batch, "max_steps": updates + 4, "learning_rate": 1e-5},
            "eval": {"at_start": False},
            "save": {"every_minutes": None, "export": False},
            "parallel": {"device": "cpu"},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(run_file))
        command = [sys.executable, "-m", "launch", "run", "run.yaml", "--out", "run"]
        run(command, folder, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))})
        found = json.loads(out.read_text())
    first = int(SKIPPED * updates)
    shoal, bare = found["shoal"][first:], found["bare"][first:]
    middle = statistics.median(bare)
    # Each update of shoal beside the bare ones before and after it: what slows the machine slows all three.
    added = [each - (before + after) / 2 for each, before, after in zip(shoal, bare, bare[1:], strict=False)]
    return {
        "bare_seconds": middle,
        "shoal_seconds": statistics.median(shoal),
        "added_seconds": statistics.median(added),
        "added_percent": 100 * statistics.median(added) / middle,
        "launcher_percent": 100 * found["launcher"],
    }


COLUMNS = (
    Column("PyTorch alone, ms an update", "bare_seconds", ",.2f", 0.001),
    Column("shoal, ms", "shoal_seconds", ",.2f", 0.001),
    Column("added, ms", "added_seconds", ",.2f", 0.001),
    Column("added, %", "added_percent", ".2f"),
    Column("launcher, % of a core", "launcher_percent", ".2f"),
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help=f"widths, between commas, of {', '.join(SIZES)}")
    parser.add_argument("--fused", action="store_true", help="the bare updates have the fused AdamW")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(SIZES)
    found = in_turn(names, given.rounds, partial(measure, fused=given.fused), "overhead")
    print(f"overhead: {given.rounds} rounds; {machine()}\n")
    print(table({f"width {name}": rounds for name, rounds in found.items()}, COLUMNS))


if __name__ == "__main__":
    main()
