"""Causal language modelling: continue a text, one token after the other; running text, or conversations.

Of text (`format: text`), documents are tokenised, ended with the end-of-text token, laid end to end over the whole
split, and cut into blocks of `block_size` tokens. Nothing is thrown away: the last block of a split may be shorter.
With `packing: isolated` documents that share a block do not see each other.

Of conversations (`format: chat`) and instructions with their answers (`format: instruction`) only what the assistant
says is a target. Each is a sample, or with `packing: isolated` as many as fit share a block.

The metric is perplexity, the exponential of the mean loss over all targets of the validation split; the first token of
each block or document is context only.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from launch.errors import ConfigError, DataError
from launch.recipe import Batch, Prepared, Preview, RecipeContext, Samples, Stream
from recipes.batches import IGNORED, lengths_of
from recipes.chat import (
    ChatArgs,
    Conversations,
    ConversationStream,
    chat_columns,
    check_answers,
    conversations,
    encoder,
    facts_of,
    prompt_of,
    set_template,
    stated_template,
)
from recipes.embedded import LANGUAGE_MODEL
from recipes.embedded_chats import EMBEDDED_CHATS
from recipes.head_loss import LossArgs, summed_loss, with_head_loss
from recipes.models import ModelArgs, Source, check_model
from recipes.packing import Blocks, Packed, Packing, Plan, check_isolation, collate, without_targets
from recipes.rows import (
    RowStream,
    check_rows,
    encode_rows,
    encoded_key,
    encoded_samples,
    load_rows,
    rows_identity,
)
from recipes.tokens import (
    SPLITS,
    TextArgs,
    Texts,
    check_sizes,
    check_text,
    text_key,
    text_sizes,
    tokens_folder,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

METRICS = ("perplexity",)
"""What an evaluation gives beside the loss."""

ENCODED = "conversations"
"""Name of the cache of encoded conversations."""


class Args(ChatArgs, TextArgs, ModelArgs, LossArgs):
    """What a run file may set under `recipe_args`."""

    format: Literal["text", "chat", "instruction"] = "text"
    """What data holds: running text, conversations (messages_column), or prompts with completions."""
    block_size: int = Field(128, ge=2)
    """Tokens in one training sample; longer documents are cut into several, longer conversations at their end."""
    packing: Packing | None = None
    """Blocks of text end to end (continuous), of documents unseen by each other (isolated), of one each (off)."""

    @property
    def chosen_packing(self) -> Packing:
        """How blocks are made: where nothing is stated, continuous for text and off for conversations."""
        return self.packing or ("continuous" if self.format == "text" else "off")


def preview(args: Args, context: RecipeContext) -> Preview:
    """Check all that can be checked without torch, and find the number of samples if they are prepared already."""
    _check(args)
    if args.format == "text":
        check_text(args)
    else:
        check_rows(args, chat_columns(args, args.format))
        stated_template(args)
    check_model(args)
    samples = (_text_samples if args.format == "text" else _chat_samples)(args, context)
    padded = args.chosen_packing != "continuous"
    use = _source(args, context).use("next_token", args.block_size, padded=padded, fused_loss=args.fuses(context))
    return Preview(samples, args.block_size, METRICS, use, args.streaming)


def _check(args: Args) -> None:
    packing = args.chosen_packing
    if args.stride is not None and args.stride > args.block_size:
        raise ConfigError(
            f"recipe_args.stride = {args.stride}: windows of recipe_args.block_size = {args.block_size} tokens would "
            "leave tokens out; use block_size or less"
        )
    if args.format == "text":
        if args.chat_template is not None:
            raise ConfigError("recipe_args.chat_template is for recipe_args.format=chat or instruction; leave it out")
        return
    if args.stride is not None:
        raise ConfigError(f"recipe_args.stride is for text, and recipe_args.format = {args.format}; leave it out")
    if packing == "continuous":
        raise ConfigError(
            f"recipe_args.packing = continuous: would let conversations see each other; for recipe_args.format = "
            f"{args.format} use isolated or off"
        )
    if packing == "isolated" and args.streaming:
        raise ConfigError(
            "recipe_args.packing = isolated: needs to know the length of all conversations before; "
            "leave out recipe_args.streaming, or use recipe_args.packing=off"
        )


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Tokenise (once, then from the cache) and describe the model."""
    _check(args)
    source = _source(args, context)
    tokenizer = _load_tokenizer(source)
    config = source.config(tokenizer)
    source.check_length(config, "block_size", args.block_size)
    make = _text_data if args.format == "text" else _chat_data
    train, validation, facts, sample_prompt = make(args, source, tokenizer, context)

    def build_model() -> Any:
        model = source.build("AutoModelForCausalLM", config, tokenizer)
        if args.chosen_packing == "isolated":
            check_isolation(model, args.model)
        return with_head_loss(model, loss) if args.fuses(context) else model

    padded, width = args.chosen_packing != "continuous", context.width(args.pad_to_multiple_of, args.block_size)
    return Prepared(
        build_model=build_model,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        collate=functools.partial(collate, width=width) if padded else collate,
        loss=loss,
        count=count,
        lengths=lengths_of if padded else None,
        without_targets=without_targets,
        loss_metrics=lambda mean_loss: {"perplexity": math.exp(mean_loss) if mean_loss < 700 else math.inf},
        facts=facts,
        sample_prompt=sample_prompt,
    )


def tokenizer(args: Args, context: RecipeContext) -> PreTrainedTokenizerBase:
    """The tokenizer alone."""
    found = _load_tokenizer(_source(args, context))
    if args.format != "text":
        set_template(found, stated_template(args))
    return found


def _source(args: Args, context: RecipeContext) -> Source:
    return Source(args, LANGUAGE_MODEL, context.cache)


def _load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer, with an end-of-text and a padding token.

    Raises:
        DataError: it cannot be loaded, or has no end-of-text token.
    """
    tokenizer = source.tokenizer()
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"recipe_args.model = {source.args.model}: its tokenizer has no end-of-text token (eos_token), which ends "
            "documents here"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never a target, so it may share a token
    tokenizer.model_max_length = max(tokenizer.model_max_length, 2**30)  # texts are cut into blocks by us
    return tokenizer


# --- running text ----------------------------------------------------------------------------------------

Data = tuple[Samples | Stream, Samples | Stream, dict[str, Any], str | None]
"""Training and validation samples, facts, and the prompt of a sample."""


def _text_data(args: Args, source: Source, tokenizer: PreTrainedTokenizerBase, context: RecipeContext) -> Data:
    key = text_key(args, source.tokenizer_identity())
    folder = tokens_folder(args, key, tokenizer, context)
    sizes = text_sizes(folder)
    check_sizes(sizes, args.block_size)
    plan = _plan(args)
    continuous = plan.packing == "continuous"
    samples: dict[str, Samples] = {split: Blocks(folder / f"{split}.bin", args.block_size) for split in SPLITS}
    # Of continuous text only the validation part may have other blocks than those one after the other.
    texts = {
        split: Texts(folder, split, whole=continuous)
        for split in SPLITS
        if not continuous or (split == "validation" and plan.stride)
    }
    if texts:
        blocks = plan.folder(context, key, {split: text.lengths for split, text in texts.items()})
        isolated = plan.packing == "isolated"
        samples |= {split: Packed(blocks, split, text.read, isolated=isolated) for split, text in texts.items()}
    facts: dict[str, Any] = {f"{split}_text": {**sizes[split]} for split in SPLITS}
    if not continuous:
        for split, text in texts.items():
            facts[f"{split}_text"]["longer_than_a_block"] = int((text.lengths > args.block_size).sum())
    return samples["train"], samples["validation"], facts, "The"


def _text_samples(args: Args, context: RecipeContext) -> int | None:
    key = text_key(args, _source(args, context).tokenizer_identity())
    if args.chosen_packing != "continuous":
        return _plan(args).known_blocks(context, key)
    folder = context.cache.path("tokens", key)
    if not (folder / "sizes.json").is_file():
        return None
    return math.ceil(text_sizes(folder)["train"]["tokens"] / args.block_size)


def _plan(args: Args) -> Plan:
    return Plan(args.chosen_packing, args.block_size, args.stride)


# --- conversations ---------------------------------------------------------------------------------------


def _chat_data(args: Args, source: Source, tokenizer: PreTrainedTokenizerBase, context: RecipeContext) -> Data:
    template = set_template(tokenizer, stated_template(args))
    rows = load_rows(args, context, chat_columns(args, args.format), EMBEDDED_CHATS[args.format])
    encode = encoder(tokenizer, args.block_size)
    encoded = encode_rows(rows, context, ENCODED, encode, _chat_key(args, source), args.preparation_processes)
    facts = facts_of(rows, encoded, args.block_size, template)
    validation = Conversations(encoded.validation)
    first = conversations({name: [value] for name, value in rows.validation[0].items()})[0]
    sample_prompt = prompt_of(tokenizer, first)
    if isinstance(encoded.train, RowStream):
        check_answers(validation, facts)
        return ConversationStream(encoded.train), validation, facts, sample_prompt
    train = Conversations(encoded.train)
    check_answers(train, facts)
    check_answers(validation, facts)
    if args.chosen_packing == "off":
        return train, validation, facts, sample_prompt
    splits = {"train": train, "validation": validation}
    blocks = _plan(args).folder(context, encoded.identity, {split: each.lengths for split, each in splits.items()})
    packed = {split: Packed(blocks, split, each.read, isolated=True) for split, each in splits.items()}
    return packed["train"], packed["validation"], facts, sample_prompt


def _chat_key(args: Args, source: Source) -> list[Any]:
    return [1, source.tokenizer_identity(), stated_template(args), args.block_size]


def _chat_samples(args: Args, context: RecipeContext) -> int | None:
    rows = rows_identity(args, chat_columns(args, args.format), EMBEDDED_CHATS[args.format])
    key = _chat_key(args, _source(args, context))
    if args.chosen_packing == "off":
        return encoded_samples(context, ENCODED, rows, key)
    return _plan(args).known_blocks(context, encoded_key(rows, key))


# --- loss ------------------------------------------------------------------------------------------------


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each token given those before it, summed; a scalar in fp32."""
    from torch.nn import functional

    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in batch:
        # transformers keeps documents apart by their positions, but only where it is given no mask of padding.
        inputs["position_ids"] = batch["position_ids"]
    else:
        inputs["attention_mask"] = batch.get("attention_mask")
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return summed_loss(model, inputs, targets)


def count(batch: Batch) -> int:
    """Predicted tokens of a batch."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
