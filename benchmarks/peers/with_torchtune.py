"""Contender: a loop of torchtune's pieces, as its recipe for one device has them: llama2, its chunked loss, its AdamW.

Its recipe itself starts from a checkpoint and a tokenizer of a known model only. For several CPUs it has none: its
distributed recipe is FSDP2 of NCCL's devices.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchtune import training, utils
from torchtune.data import padded_collate_sft
from torchtune.models.llama2 import llama2
from torchtune.modules.loss import CEWithChunkedOutputLoss

from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload


def main(workload: Workload, out: Path) -> None:
    assert workload.ranks == 1, "see above"
    shape, ticks, device = workload.config, Ticks(), utils.get_device("cpu")
    training.set_seed(0)
    model = llama2(
        vocab_size=shape["vocab_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_attention_heads"],
        embed_dim=shape["hidden_size"],
        intermediate_dim=shape["intermediate_size"],
        max_seq_len=workload.length,
        norm_eps=shape["rms_norm_eps"],
    )
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.learning_rate, weight_decay=workload.weight_decay)
    ids, length = np.fromfile(workload.folder / "train.bin", np.int32).tolist(), workload.length
    blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    rows = [{"tokens": block, "labels": block} for block in blocks]
    collate = partial(padded_collate_sft, padding_idx=0, ignore_idx=loss_of.ignore_index)
    batches = DataLoader(rows, batch_size=workload.batch, shuffle=True, collate_fn=collate, drop_last=True)
    ignored = torch.full((workload.batch, 1), loss_of.ignore_index)
    model.train()
    while len(ticks.times) < workload.updates:
        for batch in batches:
            utils.batch_to_device(batch, device)
            tokens = batch["tokens"].numel()
            labels = torch.hstack((batch.pop("labels")[..., 1:], ignored))
            targets = (labels != loss_of.ignore_index).sum()
            loss = loss_of(model(**batch), labels) * targets
            loss.backward()
            training.scale_grads(model, 1 / targets)
            torch.nn.utils.clip_grad_norm_(model.parameters(), workload.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ticks.loss = (loss / targets).item()
            ticks.update(tokens)
            if len(ticks.times) == workload.updates:
                break
    ticks.write(out)


if __name__ == "__main__":
    main(Workload.read(sys.argv[1]), Path(sys.argv[2]))
