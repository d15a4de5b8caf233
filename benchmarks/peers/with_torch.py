"""Contender: PyTorch alone, the least that trains: no meters, no records, no checks. The blocks are read, not made.

The loss is computed as shoal does it, shifting labels and not logits, so that loops are compared.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload


def main(workload: Workload, out: Path) -> None:
    ranks, rank, ticks = workload.ranks, int(os.environ.get("RANK", "0")), Ticks()
    ids = np.fromfile(workload.folder / "train.bin", np.int32)
    blocks = torch.from_numpy(ids[: len(ids) // workload.length * workload.length].astype(np.int64))
    blocks = blocks.view(-1, workload.length)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workload.model))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    model.train()
    decays = [value for value in model.parameters() if value.dim() >= 2]
    others = [value for value in model.parameters() if value.dim() < 2]
    groups = [
        {"params": decays, "weight_decay": workload.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=workload.learning_rate)
    order = torch.randperm(len(blocks)).repeat(-(-workload.updates * workload.batch // len(blocks)))
    for rows in order.split(workload.batch)[: workload.updates]:
        batch = blocks[rows[rank::ranks]]
        logits = model(input_ids=batch, use_cache=False).logits
        targets = functional.pad(batch[:, 1:], (0, 1), value=-100)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), workload.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ticks.update(batch.numel())
    ticks.loss = float(loss.detach())
    ticks.write(out)
    if ranks > 1:
        torch.distributed.barrier()  # as in with_accelerate
        torch.distributed.destroy_process_group()
        time.sleep(0.1)


if __name__ == "__main__":
    main(Workload.read(sys.argv[1]), Path(sys.argv[2]))
