"""What agreeing on stopping and saving adds to an update: the exchange of counts with the requests, and without.

python benchmarks/agreement.py [--ranks 2] [--exchanges 3000]

Prints the medians of both kinds, one after the other in turn, and the difference as a share of an update of 10 ms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

UPDATE_SECONDS = 0.010


def measure(exchanges: int) -> None:
    """One rank's part."""
    from dataclasses import astuple

    from accelerate import Accelerator

    from launch.engine.agree import Requests
    from launch.engine.loss import Counts, count_over_ranks

    accelerator = Accelerator(cpu=True)
    counts, requests = Counts(8, 1000, 1024), Requests(0, 0, 1)
    seconds: dict[str, list[float]] = {"counts alone": [], "with requests": []}
    for _ in range(exchanges):
        for kind, others in (("counts alone", ()), ("with requests", astuple(requests))):
            began = time.perf_counter()
            count_over_ranks(accelerator, counts, *others)
            seconds[kind].append(time.perf_counter() - began)
    if accelerator.is_main_process:
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        for kind, median in medians.items():
            print(f"{kind:<14} {1e6 * median:7.1f} µs")
        added = medians["with requests"] - medians["counts alone"]
        print(f"added          {1e6 * added:7.1f} µs, {100 * added / UPDATE_SECONDS:.2f} % of an update of 10 ms")
    accelerator.wait_for_everyone()


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--exchanges", type=int, default=3000)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.exchanges)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(arguments.ranks), __file__, *sys.argv[1:]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
