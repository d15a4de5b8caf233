"""How long commands take that start nothing, beside other launchers' `--help`, and whether they import torch.

python benchmarks/startup.py [--repeats 5]     needs the extra `shoal[dev]`; the table is kept in docs/startup.md

In each round every command is started once, one after the other, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHOAL = (
    "--help",
    "run --help",
    "plan causal_lm",
    "explain causal_lm",
    "submit causal_lm --dry-run --gpus-per-node 2",
    "status RUNS",
    "doctor --help",
)
OTHERS = ("accelerate launch --help", "torchrun --help")
OURS = "from launch.cli import main; main()"
LOOK = "\nimport atexit, sys; atexit.register(lambda: sys.stderr.write(f'torch={\"torch\" in sys.modules}'))\n"


def commands(folder: str) -> dict[str, list[str]]:
    """By what a user types, what is started."""
    ours = {f"shoal {text}": [sys.executable, "-c", LOOK + OURS, *text.split()] for text in SHOAL}
    for words in ours.values():
        words[:] = [folder if word == "RUNS" else word for word in words]
    beside = Path(sys.executable)
    return ours | {text: [str(beside.with_name(text.split()[0])), *text.split()[1:]] for text in OTHERS}


def measure(repeats: int) -> dict[str, tuple[list[float], str]]:
    """Seconds of each command in each round, and whether it had imported torch."""
    root = str(Path(__file__).resolve().parents[1])
    environ = {**os.environ, "PYTHONPATH": root}
    found: dict[str, tuple[list[float], str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for text, command in commands(folder).items():
                start = time.perf_counter()
                done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
                seconds = time.perf_counter() - start
                if done.returncode and "status" not in text:  # of a folder without runs there is nothing to say
                    sys.exit(f"{text}: {done.stderr}")
                torch = {"True": "yes", "False": "no"}.get(done.stderr.rpartition("torch=")[2], "yes")
                found.setdefault(text, ([], torch))[0].append(seconds)
    return found


RANK = "import torch, accelerate, transformers.modeling_layers, launch.engine.run"
"""What a rank imports before it has a model."""

IMPORTS = {
    "as Python does it": RANK,
    "without collections of garbage": f"from launch.imports import importing\nwith importing():\n    {RANK}",
}


def measure_imports(repeats: int) -> dict[str, list[float]]:
    """Seconds of CPU that a rank's imports take, both ways in turn."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    found: dict[str, list[float]] = {how: [] for how in IMPORTS}
    for _ in range(repeats):
        for how, program in IMPORTS.items():
            command = [sys.executable, "-c", f"{program}\nimport time; print(time.process_time())"]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
            found[how].append(float(done.stdout.split()[-1]))
    return found


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("| a rank's imports | seconds of CPU (median) | least |\n|---|---|---|")
    for how, each in measure_imports(repeats).items():
        print(f"| {how} | {statistics.median(each):.2f} | {min(each):.2f} |")
    found = measure(repeats)
    print("| command | seconds (median) | least | torch imported |\n|---|---|---|---|")
    for text, (seconds, torch) in found.items():
        print(f"| `{text}` | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {torch} |")


if __name__ == "__main__":
    main()
