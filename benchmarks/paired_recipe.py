"""A recipe for benchmarks/overhead.py: between any two updates of shoal it makes one of PyTorch alone, and times both.

Model, batch, loss and kind of optimizer are the same, and so is the process; what differs is all that shoal does
around: meters, records, checks, agreement, display. Where a batch is wanted, the bare update is made first.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil

from launch.recipe import LocalPath, Prepared, RecipeArgs, RecipeContext
from recipes.batches import IGNORED, summed_cross_entropy

VOCABULARY = 4096


class Args(RecipeArgs):
    """What the benchmark sets."""

    layers: int
    """Of the model."""
    width: int
    """Of the model."""
    length: int
    """Tokens in a row."""
    batch: int
    """Rows in an update."""
    rows: int
    """There are."""
    updates: int
    """After so many numbers are written."""
    out: LocalPath
    """Where to."""
    fused: bool = False
    """Whether the bare update has the fused AdamW too."""


class Pairs:
    """Makes batches and bare updates, and keeps the time."""

    def __init__(self, args: Args) -> None:
        self.model: Any = None
        self._args = args
        self._bare: list[float] = []
        self._shoal: list[float] = []
        self._returned = 0.0
        self._optimizer: Any = None
        self._launcher = psutil.Process(os.getppid())
        self._before: list[float] = []

    def collate(self, samples: list[int]) -> dict[str, Any]:
        """A batch; before one to train on, a bare update."""
        import torch

        def batch() -> dict[str, torch.Tensor]:
            rows = [torch.arange(self._args.length) * (abs(sample) + 1) % VOCABULARY for sample in samples]
            ids = torch.stack(rows)
            return {"input_ids": ids, "labels": ids}

        if samples[0] < 0 or len(samples) < self._args.batch:  # of validation, or looked at before training
            return batch()
        arrived = time.perf_counter()
        if self._returned:
            self._shoal.append(arrived - self._returned)
        began = time.perf_counter()
        self._update(batch())
        self._bare.append(time.perf_counter() - began)
        if len(self._shoal) == self._args.updates:
            self._write()
        elif len(self._shoal) == self._args.updates // 2:
            self._before = self._spent()
        self._returned = time.perf_counter()
        return batch()

    def _update(self, batch: dict[str, Any]) -> None:
        import torch

        if self._optimizer is None:
            parameters = list(self.model.parameters())
            groups = [
                {"params": [each for each in parameters if each.dim() >= 2], "weight_decay": 0.01},
                {"params": [each for each in parameters if each.dim() < 2], "weight_decay": 0.0},
            ]
            self._optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=self._args.fused)
        (loss(self.model, batch) / count(batch)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _spent(self) -> list[float]:
        spent = self._launcher.cpu_times()
        return [time.perf_counter(), spent.user + spent.system]

    def _write(self) -> None:
        wall, launcher = (after - before for before, after in zip(self._before, self._spent(), strict=True))
        found = {"shoal": self._shoal, "bare": self._bare[: len(self._shoal)], "launcher": launcher / wall}
        Path(self._args.out).write_text(json.dumps(found))


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """A small Llama, and rows of numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from recipes.embedded import LANGUAGE_MODEL

    pairs = Pairs(args)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        max_position_embeddings=args.length,
    )

    def build_model() -> Any:
        pairs.model = LlamaForCausalLM(config)
        return pairs.model

    return Prepared(
        build_model=build_model,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(LANGUAGE_MODEL.folder(context.cache)),
        train=range(args.rows),
        validation=range(-1, -9, -1),
        collate=pairs.collate,
        loss=loss,
        count=count,
    )


def loss(model: Any, batch: Any) -> Any:
    """As the recipe `causal_lm` has it."""
    from torch.nn import functional

    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return summed_cross_entropy(logits, functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED))


def count(batch: Any) -> int:
    """Predicted tokens."""
    return int(batch["labels"][:, 1:].numel())
