"""A recipe such as a user writes outside the package: a linear language model over bytes. Copied by tests."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from launch.recipe import Prepared, RecipeArgs, RecipeContext


class Args(RecipeArgs):
    """What a run file may set."""

    width: int = Field(16, ge=1)
    """Size of the hidden layer."""


def prepare(args: Args, context: RecipeContext) -> Prepared:  # noqa: ARG001
    """Sixteen rows of numbers; a one-layer GPT-2 to learn them."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    rows = [[(start + step) % 11 for step in range(8)] for start in range(16)]

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"
        )

    return Prepared(
        build_model=lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_positions=8, n_embd=args.width, n_layer=1, n_head=1, resid_pdrop=0)
        ),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a"),
        train=rows,
        validation=rows[:4],
        collate=lambda samples: {"input_ids": torch.tensor(samples)},
        loss=loss,
        count=lambda batch: batch["input_ids"][:, 1:].numel(),
    )
