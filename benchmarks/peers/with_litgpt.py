"""Contender: LitGPT's own pretraining (`litgpt.pretrain.main`) of its own GPT in the shape of the model.

It compiles the whole model with torch.compile; `plain` leaves that out, as the other contenders do. `litgpt pretrain`
itself spreads a model over devices with FSDP, which Lightning has for GPUs only: on CPUs its Fabric is given DDP.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from torch.utils.data import DataLoader

from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload


class Notes(Logger):
    """Told of each update by `fit`."""

    def __init__(self, ticks: Ticks, tokens: int) -> None:
        self._ticks, self._tokens = ticks, tokens

    name, version = "notes", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # noqa: ARG002
        """Note an update."""
        if "loss" in metrics:
            self._ticks.update(self._tokens)
            self._ticks.loss = float(metrics["loss"])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Leave them."""


class Blocks(DataModule):
    """Token ids in blocks; LitGPT's have one more, which is a target only."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self._workload = workload

    def connect(self, batch_size: int = 1, **_: Any) -> None:
        """Take the size of a batch."""
        self._size = batch_size

    def _loader(self, split: str) -> DataLoader[Any]:
        ids, length = np.fromfile(self._workload.folder / f"{split}.bin", np.int32), self._workload.length
        most = (len(ids) - 1) // length
        blocks = [torch.from_numpy(ids[start * length : (start + 1) * length + 1]) for start in range(most)]
        return DataLoader(blocks, batch_size=self._size, shuffle=split == "train", drop_last=True)

    def train_dataloader(self) -> DataLoader[Any]:
        """In random order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """In their own order."""
        return self._loader("validation")


def main(workload: Workload, out: Path, compiled: bool) -> None:
    if not compiled:
        torch.compile = lambda model: model
    shape, ticks = workload.config, Ticks()
    config = Config(
        name="benchmark",
        block_size=workload.length,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_attention_heads"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    ranks, size = workload.ranks, workload.batch_of_a_rank
    fabric = lightning.Fabric(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="32-true",
        loggers=[Notes(ticks, size * workload.length)],
    )
    fabric.launch()
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": workload.learning_rate, "weight_decay": workload.weight_decay},
    }
    with tempfile.TemporaryDirectory() as folder:
        pretrain.save_checkpoint = lambda *given, **named: None
        pretrain.main(
            fabric=fabric,
            devices=ranks,
            seed=0,
            initial_checkpoint_dir=None,
            resume=False,
            config=config,
            data=Blocks(workload),
            out_dir=Path(folder),
            tokenizer_dir=None,
            tokenizer=None,
            train=TrainArgs(
                save_interval=None,
                global_batch_size=workload.batch,
                micro_batch_size=size,
                max_tokens=workload.updates * workload.batch * workload.length,
                max_norm=workload.max_grad_norm,
                min_lr=workload.learning_rate,
                lr_warmup_steps=0,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
            optimizer=optimizer,
        )
    ticks.write(out)


if __name__ == "__main__":
    main(Workload.read(sys.argv[1]), Path(sys.argv[2]), "plain" not in sys.argv[3:])
