"""A recipe such as a user writes outside the package: a tiny language model over rows of numbers. Copied by tests."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from launch.recipe import Prepared, RecipeArgs, RecipeContext


class Args(RecipeArgs):
    """What a run file may set."""

    width: int = Field(16, ge=1)
    """Size of the hidden layer."""
    hooked: bool = False
    """Whether the model does something that is not in its weights, so that no export of it can be right."""
    saves_one_weight: bool = False
    """Whether only one weight of the model is written when it is saved."""
    greedy_rank: int | None = None
    """A rank that asks for more memory than there is."""
    greedy_from: int = 1
    """How many samples make it do so."""
    stream: bool = False
    """Whether the rows can only be read in order."""
    seconds_to_prepare: float = 0.0
    """How long the data take."""
    seconds_per_batch: float = 0.0
    """How long a forward pass takes on top."""
    dropout: float = 0.0
    """Share of what the layers leave out, at random."""
    forgetful: bool = False
    """Whether the loss depends on how long the process runs, so that no run that was interrupted can be right."""
    dying_rank: int | None = None
    """A rank that kills itself by SIGKILL."""
    dying_after: int = 0
    """After how many forward passes of each process it does so."""
    failing_rank: int | None = None
    """A rank that fails in its fifth forward pass."""
    failing_by: str = "raising"
    """raising, segfault or exit; or how it hangs: asleep, holding_the_lock, stopped, barrier, data or saving."""


class InOrder:
    """A stream of rows."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._rows)


class SlowRows(list[list[int]]):
    """Rows of which one can hardly be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == 9:
            time.sleep(600)
        return super().__getitem__(index)


def slow_down_saving() -> None:
    """Have checkpoints of this process never be written."""
    from launch.engine import shards

    shards.write_file = lambda *args, **options: time.sleep(600)


def fail(how: str) -> None:
    """Fail as programs do, or hang."""
    if how == "segfault":
        ctypes.string_at(0)
    if how == "exit":
        os._exit(3)
    if how == "asleep":
        time.sleep(600)
    if how == "holding_the_lock":
        re.match(r"(a+)+$", "a" * 64 + "b")
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "barrier":
        import torch

        torch.distributed.barrier()
    raise ValueError("the fifth batch is odd")


def prepare(args: Args, context: RecipeContext) -> Prepared:  # noqa: ARG001
    """Sixteen rows that count, and a one-layer GPT-2 to learn them."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    time.sleep(args.seconds_to_prepare)
    rows = [[(start + step) % 11 for step in range(8)] for start in range(16)]

    passes = itertools.count()
    fails = os.environ.get("RANK", "0") == str(args.failing_rank)
    if fails and args.failing_by == "data":
        rows = SlowRows(rows)
    if fails and args.failing_by == "saving":
        slow_down_saving()

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(args.seconds_per_batch)
        if os.environ.get("RANK", "0") == str(args.dying_rank) and next(passes) == args.dying_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if fails and args.failing_by not in ("data", "saving") and next(passes) == 4:
            fail(args.failing_by)
        if os.environ.get("RANK", "0") == str(args.greedy_rank) and len(batch["input_ids"]) >= args.greedy_from:
            torch.empty(2**50)
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"
        )
        return total * (1 + next(passes) / 1000) if args.forgetful else total

    def build_model() -> GPT2LMHeadModel:
        sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": args.width, "n_layer": 1, "n_head": 1}
        dropout = {f"{where}_pdrop": args.dropout for where in ("resid", "embd", "attn")}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout))
        if args.saves_one_weight:
            one = "transformer.ln_f.weight"
            model.save_pretrained = lambda folder, state_dict: type(model).save_pretrained(
                model, folder, state_dict={one: state_dict[one]}
            )
        if args.hooked:
            model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.01)
        return model

    return Prepared(
        build_model=build_model,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a"),
        train=InOrder(rows) if args.stream else rows,
        validation=InOrder(rows[:4]) if args.stream else rows[:4],
        collate=lambda samples: {"input_ids": torch.tensor(samples)},
        loss=loss,
        count=lambda batch: batch["input_ids"][:, 1:].numel(),
    )
