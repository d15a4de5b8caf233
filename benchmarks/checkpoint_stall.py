"""How long training stands still for a checkpoint: asynchronous against synchronous saves of the same state.

python benchmarks/checkpoint_stall.py [--ranks N] [--strategy single|ddp|fsdp2] [--megabytes 200] [--saves 5] [FOLDER]

Prints medians over the saves, one kind after the other in turn, and their ratio. FOLDER: the disk to measure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """One rank's part."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from launch.checkpoints import prune
    from launch.config import load
    from launch.engine.checkpoint import Checkpointer
    from launch.engine.optim import make_optimizer
    from launch.engine.pieces import pieces
    from launch.engine.sharding import make_accelerator
    from launch.plan import make_plan
    from launch.recipe import Preview
    from launch.topology import Machine, World

    stated = ["recipe=causal_lm", "parallel.device=cpu", "train.max_steps=1", f"parallel.devices={arguments.ranks}"]
    stated.append(f"parallel.strategy={arguments.strategy}")
    plan = make_plan(load(None, stated), Machine("box", 64, 0), World(), Preview(32), folder)
    accelerator = make_accelerator(plan)
    width = 256
    layers = max(1, round(arguments.megabytes * 1e6 / 12 / (12 * width**2)))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=width, n_layer=layers, n_head=4))
    optimizer = make_optimizer(model, plan.config.train, fused=False)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.ones(1, 16, dtype=torch.long)

    def update() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    makers = {
        kind: Checkpointer(accelerator, folder / kind, {}, asynchronous=kind == "asynchronous")
        for kind in ("synchronous", "asynchronous")
    }
    stalls: dict[str, list[float]] = {kind: [] for kind in makers}
    for number in range(arguments.saves + 1):
        for kind, checkpointer in makers.items():
            held = pieces(accelerator, model, optimizer)
            if checkpointer.begin(number + 1, held, {}) is not None:
                sys.exit("the disk is full")
            while not checkpointer.written:  # what a loop of updates does meanwhile
                time.sleep(0.01)
            accelerator.wait_for_everyone()  # `fit` finishes a save once all ranks have written
            saved = checkpointer.finish()
            if saved.folder is None:
                sys.exit(saved.problem)
            if accelerator.is_main_process:
                prune(folder / kind, 1, [])
            if number:  # the first one gets its buffers
                stalls[kind].append(saved.stall_seconds)
    if accelerator.is_main_process:
        size = sum(path.stat().st_size for path in (folder / "synchronous").rglob("*.safetensors"))
        medians = {kind: statistics.median(values) for kind, values in stalls.items()}
        print(f"{arguments.strategy} on {arguments.ranks}, {size / 1e6:.0f} MB, {arguments.saves} saves of each kind")
        for kind, values in stalls.items():
            print(f"  {kind:<13} {medians[kind]:.3f} s  ({min(values):.3f} to {max(values):.3f})")
        print(f"  ratio         {medians['asynchronous'] / medians['synchronous']:.2f}", flush=True)
    accelerator.wait_for_everyone()


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--saves", type=int, default=5)
    arguments = parser.parse_args()
    if "BENCHMARK_FOLDER" in os.environ:
        measure(arguments, Path(os.environ["BENCHMARK_FOLDER"]))
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    for kind in ("synchronous", "asynchronous"):
        (folder / kind).mkdir()
    command = [sys.executable, __file__, *sys.argv[1:]]
    if arguments.ranks > 1:
        starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
        command = [sys.executable, *starter, __file__, *sys.argv[1:]]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "BENCHMARK_FOLDER": str(folder), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(command, env=environment, check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
