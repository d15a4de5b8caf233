"""What torch sees here; among several processes, a timed sum of so many bytes."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launch.engine.leaving import leave
from launch.engine.sharding import serve_store

ROUNDS = 5

TIMEOUT = timedelta(seconds=60)
"""How long a rank waits for the others, which have met already."""


def measure(
    size_bytes: int, rank: int, size: int, local_rank: int, local_size: int, listener: socket.socket | None
) -> dict[str, Any]:
    """Devices, versions, and the exchange; `listener`: on rank 0, what holds the port where they meet."""
    gpus = torch.cuda.device_count()
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}
    if size > 1:
        store = serve_store(listener) if listener else None
        gpu = local_rank if gpus >= local_size else None
        found |= exchange(size_bytes, rank, size, gpu)
        del store
    return found


def exchange(size_bytes: int, rank: int, size: int, gpu: int | None) -> dict[str, Any]:
    """Add up a tensor of so many bytes over all ranks, several times; whether that is right, and how fast.

    The rate is that of the algorithm, bytes over seconds: NCCL's tests call it `algbw`.
    """
    backend = "gloo" if gpu is None else "nccl"
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    dist.init_process_group(backend, timeout=TIMEOUT)
    tensor = torch.ones(size_bytes // 4, device=device)
    seconds = []
    for _ in range(ROUNDS):
        tensor.fill_(rank + 1)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if gpu is not None:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    right = bool((tensor == size * (size + 1) / 2).all())
    dist.barrier()
    leave()
    return {"backend": backend, "right": right, "gigabytes_per_second": size_bytes / min(seconds) / 1e9}
