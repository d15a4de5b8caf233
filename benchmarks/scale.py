"""How the cost of a run grows: over real ranks (gloo) as far as this machine goes, counted for pretended ones beyond.

python benchmarks/scale.py ranks [--worlds 1 2 4 8]           what ranks do together, measured
python benchmarks/scale.py pretend [--worlds 8 64 256 1024]   weights and messages of one rank among so many, counted
python benchmarks/scale.py parts                              what one process does for so many ranks, samples, files

Each prints a table; they are kept, with what follows from them, in docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MEBI = 1024**2


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """In Markdown."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(_shown, row)) + " |")
    print()


def _shown(cell: Any) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def median_seconds(act: Callable[[], Any], repeats: int) -> float:
    """Of one call."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# --- real ranks ------------------------------------------------------------------------------------------


def of_one_rank(parameters: int) -> None:
    """One rank's part of `ranks`: rank 0 prints a line of JSON."""
    import psutil
    import torch
    from accelerate import Accelerator

    from launch.engine.agree import Requests, gathered
    from launch.engine.checkpoint import Checkpointer, find
    from launch.engine.loss import Counts, count_over_ranks
    from launch.engine.pieces import Piece
    from launch.engine.shards import Stored
    from launch.engine.stragglers import REASONS

    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    requests = [Requests().stop, Requests().save, Requests().written]
    found = {"ranks": world, "start": time.time() - float(os.environ["BEGUN"])}

    def timed(name: str, act: Callable[[], Any], repeats: int) -> None:
        accelerator.wait_for_everyone()
        found[name] = median_seconds(act, repeats)

    timed("agree", lambda: count_over_ranks(accelerator, Counts(8, 1000, 1024), *requests), 300)
    tells = [0] * (world * len(REASONS))
    timed("agree and tell", lambda: count_over_ranks(accelerator, Counts(8, 1000, 1024), *requests, *tells), 300)
    timed("gather", lambda: gathered([("rank", rank, "host")]), 50)
    # A whole state that ranks share out, as DDP's is: each writes its part of it.
    values = [torch.full((parameters // 100,), float(number)) for number in range(100)]
    held = [Piece(f"weight.{number}", each, 0, tuple(each.shape), shared=True) for number, each in enumerate(values)]
    with tempfile.TemporaryDirectory() as own:
        folder = Path(gathered([own])[0])
        saver = Checkpointer(accelerator, folder, {}, asynchronous=False)
        updates = iter(range(1, 100))

        def save() -> None:
            saver.begin(next(updates), held, {"position": {}})
            assert saver.finish().folder

        timed("save", save, 3)

        def read() -> None:
            newest = find(accelerator, folder, lambda line: None)
            assert newest
            stored = Stored(newest)
            for piece in held:
                stored.load(piece)

        timed("find and read", read, 3)
        accelerator.wait_for_everyone()
    found["MiB of a rank"] = psutil.Process().memory_info().rss / MEBI
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    accelerator.wait_for_everyone()


def ranks(worlds: Sequence[int], parameters: int) -> None:
    """Start so many real ranks at a time and show what they measured."""
    rows: list[list[Any]] = []
    names: list[str] = []
    for world in worlds:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        environment["BEGUN"] = str(time.time())
        done = subprocess.run(
            [*command, __file__, "rank", "--parameters", str(parameters)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        names = [name if "MiB" in name or name == "ranks" else f"{name} (s)" for name in found]
        rows.append([found["ranks"], *(float(value) for name, value in found.items() if name != "ranks")])
    table(names, rows)


# --- pretended ranks -------------------------------------------------------------------------------------


def of_one_among(world: int, strategy: str) -> list[Any]:
    """Bytes that rank 0 of `world` holds and sends for GPT-2 with 124 million weights, by one real update."""
    import torch
    from accelerate import Accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import GPT2Config, GPT2LMHeadModel

    from launch.engine.sharding import _ddp, _fsdp_plugin, _gloo_counts_as_a_device, spread
    from launch.strategy import Strategy

    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts what is handed to collectives."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                name = func._overloadpacket.__name__.strip("_").replace("_base", "")
                given = [each for each in _flat(args) if isinstance(each, torch.Tensor)]
                # The larger of what goes in and what comes out: the whole of what ranks have together of it.
                sent[name] += max((each.numel() * each.element_size() for each in given), default=0)
                calls[name] += 1
            return func(*args, **(kwargs or {}))

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    sharded = strategy == "fsdp2"
    os.environ |= {"ACCELERATE_USE_CPU": "false" if sharded else "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with _gloo_counts_as_a_device(sharded):
        options: dict[str, Any] = {"fsdp_plugin": _fsdp_plugin(Strategy("fsdp2"), True, torch.float32)}
        accelerator = Accelerator(**(options if sharded else {"cpu": True, "kwargs_handlers": [_ddp()]}))
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config())
    optimizer = torch.optim.AdamW(plain.parameters())
    model, optimizer = spread(accelerator, plain, optimizer)
    if not sharded:  # whose exchanges are made where no mode sees them, and the pretended group's give it nothing

        def exchange(_: None, bucket: Any) -> Any:
            sent["allreduce"] += bucket.buffer().numel() * bucket.buffer().element_size()
            calls["allreduce"] += 1
            done: Any = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        # torch looks at the annotations, which are text here.
        exchange.__annotations__ = {"bucket": torch.distributed.GradBucket}  # type: ignore[attr-defined]
        model.register_comm_hook(None, exchange)
    ids = torch.arange(16)[None]
    with Counting():  # type: ignore[no-untyped-call]
        for _ in range(2):  # the first makes the optimizer's state, and DDP its buckets
            sent.clear()
            calls.clear()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    own = [_local(each) for each in model.parameters()]
    gradients = [_local(each.grad) for each in model.parameters() if each.grad is not None]
    moments = [
        _local(value)
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    return [
        strategy,
        world,
        *(sum(each.numel() * each.element_size() for each in group) / MEBI for group in (own, gradients, moments)),
        sum(calls.values()),
        # A ring sends all but a rank's own part once for a gathering or a scattering, twice for a reduction on all.
        sum(size * (2 if name.startswith("allreduce") else 1) * (world - 1) / world for name, size in sent.items())
        / MEBI,
    ]


def _flat(values: Any) -> list[Any]:
    return [each for value in values for each in (_flat(value) if isinstance(value, (list, tuple)) else [value])]


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def pretend(worlds: Sequence[int]) -> None:
    """Count for each strategy and world in a process of its own."""
    rows = []
    for strategy in ("ddp", "fsdp2"):
        for world in worlds:
            done = subprocess.run(
                [sys.executable, __file__, "among", "--worlds", str(world), "--strategy", strategy],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    mib = ("weights (MiB)", "gradients (MiB)", "optimizer (MiB)")
    table(["strategy", "ranks", *mib, "exchanges an update", "sent an update (MiB)"], rows)


# --- one process for many --------------------------------------------------------------------------------


def roll_call(world: int) -> list[Any]:
    """Seconds until so many callers know where they meet, and of one look at so many beats."""
    import socket
    from dataclasses import asdict

    from launch.pulse import Beat
    from launch.rollcall import LOOPBACK, RollCall

    call = RollCall(world, [LOOPBACK])
    token, _, address = call.announcement.partition("@")
    port = int(address.rpartition(":")[2])
    callers: list[socket.socket] = []

    def answer() -> None:
        for rank in range(world):
            caller = socket.create_connection((LOOPBACK, port))
            said = {"token": token, "rank": rank, "world_size": world, "host": "n", "cpus": 1, "port": 1}
            caller.sendall(json.dumps(said).encode() + b"\n")
            callers.append(caller)

    began = time.perf_counter()
    thread = threading.Thread(target=answer)
    thread.start()
    while not call.met:
        call.look()
        assert call.problem is None, call.problem
    thread.join()
    met = time.perf_counter() - began
    beat = asdict(Beat(1, "compute", "loop.py:1 in fit", False, False, 1.0))
    for caller in callers:
        caller.sendall(json.dumps({"beat": beat}).encode() + b"\n")
    began = time.perf_counter()
    call.look()
    looked = time.perf_counter() - began
    for caller in callers:
        caller.close()
    call.close()
    return [world, met, looked]


def order_of(samples: int) -> list[Any]:
    """Seconds and memory of an epoch's order on each rank, and of dealing out one update of 4,096 over 1,024 ranks."""
    from launch.engine.batching import Order, epoch_order

    began = time.perf_counter()
    order = epoch_order(samples, 0, 0)
    seconds = time.perf_counter() - began
    windows = Order(samples, 4096, 4, 0, 5, 1024).windows(1, 50)
    next(windows)
    return [samples, seconds, order.nbytes / MEBI, 1e3 * median_seconds(lambda: next(windows), 40)]


def checkpoint_of(world: int, tensors: int = 450) -> list[Any]:
    """Seconds that one rank takes to open a checkpoint of so many, and to read its own part of every tensor."""
    import torch

    from launch.checkpoints import shard_name
    from launch.engine.pieces import Piece
    from launch.engine.shards import Stored, write_shard

    size = 1024
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(world):
            written = [
                (Piece(f"weight.{number}", values, rank * size, (world * size,), shared=False), values)
                for number in range(tensors)
                for values in [torch.zeros(size)]
            ]
            write_shard(folder / shard_name(rank, world), written)
        began = time.perf_counter()
        stored = Stored(folder)
        opened = time.perf_counter() - began
        began = time.perf_counter()
        for number in range(tensors):
            stored.read(f"weight.{number}", 0, size)
        return [world, opened, time.perf_counter() - began, world * tensors]


def parts() -> None:
    """Show how each grows."""
    table(["ranks", "roll call (s)", "look at a beat of each (s)"], [roll_call(each) for each in (8, 64, 256, 1024)])
    header = ["samples", "order of an epoch (s)", "held (MiB)", "dealing out an update (ms)"]
    table(header, [order_of(10**power) for power in (5, 6, 7, 8)])
    header = ["ranks", "open a checkpoint (s)", "read one's own part (s)", "ranges"]
    table(header, [checkpoint_of(each) for each in (8, 64, 256)])


def main() -> None:
    """Measure, or be a part of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("ranks", "pretend", "parts", "rank", "among"))
    parser.add_argument("--worlds", type=int, nargs="+")
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--strategy", default="ddp")
    given = parser.parse_args()
    if given.what == "rank":
        of_one_rank(given.parameters)
    elif given.what == "among":
        print(json.dumps(of_one_among(given.worlds[0], given.strategy)))
    elif given.what == "ranks":
        ranks(given.worlds or [1, 2, 4, 8], given.parameters)
    elif given.what == "pretend":
        pretend(given.worlds or [8, 64, 256, 1024])
    else:
        parts()


if __name__ == "__main__":
    main()
