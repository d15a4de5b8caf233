"""A recipe for tests of XLA: a tiny GPT-2, whose head shares its weight, over rows of different length."""

from __future__ import annotations

import random
from typing import Any

from launch.recipe import Prepared, RecipeArgs, RecipeContext
from recipes.batches import marks, padded, summed_cross_entropy, without_labels

TOKENS, MOST = 32, 24


class Args(RecipeArgs):
    """What a run file may set."""

    few: bool = True
    """Whether batches have few shapes, as the engine asks."""
    looks: bool = False
    """Whether the loss looks at a value of its own, and goes on as that is."""
    rows: int = 46
    """To train on."""
    dropout: float = 0.0
    """Share of what the layers leave out, at random."""


def rows(number: int, seed: int) -> list[dict[str, list[int]]]:
    """Samples of 3 to 24 tokens."""
    drawn = random.Random(seed)
    texts = [[drawn.randrange(4, TOKENS) for _ in range(drawn.randint(3, MOST))] for _ in range(number)]
    return [{"input_ids": text, "labels": text} for text in texts]


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """The rows and the model."""
    from tokenizers import Tokenizer, models
    from torch.nn import functional
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(TOKENS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), unk_token="t0", pad_token="t1"
    )
    width = context.width(4, MOST) if args.few else int

    def collate(samples: list[Any]) -> dict[str, Any]:
        ids, labels = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
        mask = marks(ids, width)
        return {"input_ids": padded(ids, 1, width), "attention_mask": mask, "labels": padded(labels, -100, width)}

    def loss(model: Any, batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        summed = summed_cross_entropy(logits, functional.pad(batch["labels"][:, 1:], (0, 1), value=-100))
        if args.looks:
            for _ in range(int(batch["input_ids"].sum()) % 7):
                summed = summed + 0.0 * logits.sum()
        return summed

    def build_model() -> Any:
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), args.dropout)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=TOKENS,
                n_positions=MOST,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=1,
                **dropout,
            )
        )

    return Prepared(
        build_model=build_model,
        tokenizer=tokenizer,
        train=rows(args.rows, 1),
        validation=rows(11, 2),
        collate=collate,
        loss=loss,
        count=lambda batch: int((batch["labels"][:, 1:] != -100).sum()),
        without_targets=without_labels if args.few else None,
    )
