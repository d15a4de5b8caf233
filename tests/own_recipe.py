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

ALL_RANKS = -1


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
    """How long a forward pass takes on top; the rank sleeps in its loss."""
    slow_rank: int | None = None
    """The one rank of which that is so, or `ALL_RANKS`; all judge sooner than usual who is slow."""
    seconds_first_batch: float = 0.0
    """How much longer the first forward pass that trains takes on rank 0, on rank 1 twice as much, and so on."""
    dropout: float = 0.0
    """Share of what the layers leave out, at random."""
    forgetful: bool = False
    """Whether the loss depends on how long the process runs, so that no run that was interrupted can be right."""
    dying_rank: int | None = None
    """A rank that kills itself by SIGKILL."""
    dying_after: int = 0
    """After how many forward passes of each process it does so."""
    odd_epoch: int | None = None
    """An epoch, counted from 0, in which a row is odd, and the loss of its batch so many times as high."""
    odd_factor: float = 30.0
    """How many times."""
    late_rank: int | None = None
    """A rank that takes a moment to read each row; all judge sooner than usual who is slow."""
    failing_rank: int | None = None
    """A rank that fails in its fifth forward pass, or `ALL_RANKS`."""
    failing_by: str = "raising"
    """raising, segfault, exit, killing, eating; or how it hangs: a word of `fail`, data or saving.

    skipping: it leaves out an exchange that all others make.
    """


class InOrder:
    """A stream of rows."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._rows)


class OddRows(list[list[int]]):
    """Rows of which one is odd, in one epoch."""

    epoch = 0
    odd_epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next rows are of."""
        self.epoch = epoch

    def __getitem__(self, index: Any) -> Any:
        return [3] * 8 if (index, self.epoch) == (5, self.odd_epoch) else super().__getitem__(index)


class SlowRows(list[list[int]]):
    """Rows of which one can hardly be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == 9:
            time.sleep(600)
        return super().__getitem__(index)


class LateRows(list[list[int]]):
    """Rows each of which takes a moment to read."""

    def __getitem__(self, index: Any) -> Any:
        time.sleep(0.01)
        return super().__getitem__(index)


def judge_often() -> None:
    """Have this process judge in a second who is slow, instead of half a minute."""
    from launch.engine import stragglers

    stragglers.WINDOW_SECONDS = 0.5


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
    if how == "killing":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "eating":  # up to 3 GB, where nothing ends it before
        eaten = [os.urandom(2**20) * 64 for _ in range(48)]
        raise ValueError(f"{len(eaten)} pieces of memory were to be had")
    if how == "asleep":
        time.sleep(600)
    if how == "holding_the_lock":
        re.match(r"(a+)+$", "a" * 64 + "b")
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)  # others of its threads may run on first
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
    slow = args.slow_rank in (None, ALL_RANKS) or os.environ.get("RANK", "0") == str(args.slow_rank)
    slow_start = iter([args.seconds_first_batch * (1 + int(os.environ.get("RANK", "0")))])
    fails = args.failing_rank == ALL_RANKS or os.environ.get("RANK", "0") == str(args.failing_rank)
    if args.odd_epoch is not None:
        rows = OddRows(rows)
        rows.odd_epoch = args.odd_epoch
    if args.late_rank is not None or args.slow_rank is not None:
        judge_often()
    if os.environ.get("RANK", "0") == str(args.late_rank):
        rows = LateRows(rows)
    if fails and args.failing_by == "data":
        rows = SlowRows(rows)
    if fails and args.failing_by == "saving":
        slow_down_saving()

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        trains = getattr(model, "training", False)  # an Inference says nothing of it
        time.sleep(args.seconds_per_batch * slow + (next(slow_start, 0.0) if trains else 0.0))
        if os.environ.get("RANK", "0") == str(args.dying_rank) and next(passes) == args.dying_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.failing_by == "skipping" and next(passes) == 4 and not fails:
            torch.distributed.all_reduce(torch.zeros(1))
        if fails and args.failing_by not in ("data", "saving", "skipping") and next(passes) == 4:
            fail(args.failing_by)
        if os.environ.get("RANK", "0") == str(args.greedy_rank) and len(batch["input_ids"]) >= args.greedy_from:
            torch.empty(2**50)
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"
        )
        if args.odd_epoch is not None and bool((batch["input_ids"] == 3).all(dim=1).any()):
            total = total * args.odd_factor
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
