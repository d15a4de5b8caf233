"""What it costs a run that its ranks are watched: the same run, with ranks that tell what they do 100 times as often.

python benchmarks/hang_watch.py [--ranks 2] [--updates 300] [--pairs 3]

A rank tells its launcher every two seconds. What that costs is too little to be seen; what it costs 100 times as often
can be, beside the same run as it is, one after the other in turn, and is divided by 100. All is in it: the stack that
is looked at, Python's lock, the line to the launcher, and what the launcher does with it on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OFTEN = 100
RECIPE = """
import launch.pulse
from launch.recipe import Prepared, RecipeContext
from recipes import causal_lm

class Args(causal_lm.Args):
    beats_as_often: int = 1

def prepare(args: Args, context: RecipeContext) -> Prepared:
    launch.pulse.BEAT_SECONDS /= args.beats_as_often
    return causal_lm.prepare(args, context)
"""
FIRST = 20
"""Updates at the beginning that are left out."""


def seconds_per_update(folder: Path, name: str, often: int, ranks: int, updates: int) -> float:
    """Of a run, the median of its updates but the first ones."""
    stated = (
        *(f"recipe_args.beats_as_often={often}", f"parallel.devices={ranks}", f"train.max_steps={updates}"),
        *("parallel.device=cpu", "eval.at_start=false", "eval.max_samples=1", "save.export=false"),
        *("train.global_batch_size=16", "train.micro_batch_size=1"),
    )
    command = [sys.executable, "-m", "launch", "run", "run.yaml", *stated, "--out", name]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    found = [sum(record["seconds"].values()) for record in records if record["kind"] == "train"]
    return statistics.median(found[FIRST:])


def main() -> None:
    """Print a line for each pair, and what follows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "beating.py").write_text(RECIPE)
        (folder / "run.yaml").write_text("recipe: beating.py\n")
        for pair in range(arguments.pairs):
            once, often = (
                seconds_per_update(folder, f"{pair}-{times}", times, arguments.ranks, arguments.updates)
                for times in ((1, OFTEN) if pair % 2 == 0 else (OFTEN, 1))
            )
            if pair % 2:
                once, often = often, once
            ratios.append(often / once)
            print(f"an update: {1e3 * once:.2f} ms as it is, {1e3 * often:.2f} ms with {OFTEN} times the beats")
    cost = (statistics.median(ratios) - 1) / OFTEN
    print(f"median ratio {statistics.median(ratios):.4f}: the watch costs {100 * cost:.4f} % of a run's time")


if __name__ == "__main__":
    main()
