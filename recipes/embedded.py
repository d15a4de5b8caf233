"""Real English text, a tokenizer and a tiny model that need no download.

The text is Python's own language reference, which every CPython carries (`pydoc_data.topics`; its wording
differs a little between Python versions). Tokenizer and model are made from it once and kept in the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import DataError
from recipes.models import Embedded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
_MODEL = {"n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 4}
_KEY = {"python": list(sys.version_info[:2]), "vocabulary": VOCABULARY, "model": _MODEL, "version": 1}


def paragraphs() -> list[str]:
    """The paragraphs of the language reference, each once, in the order they stand there.

    Raises:
        DataError: this Python was packaged without its documentation topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            f"{sys.executable}: has no pydoc_data.topics, the text of the embedded default (a minimal Python); "
            "install the full standard library, or set recipe_args.train_files"
        ) from None
    found = (part.strip() for name in sorted(topics) for part in topics[name].split("\n\n"))
    return [part + "\n" for part in dict.fromkeys(found) if len(part) > 1]


def _make(folder: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _train_tokenizer(paragraphs())
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_MODEL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


LANGUAGE_MODEL = Embedded("embedded", _KEY, _make, {"model_type": "gpt2", "vocab_size": VOCABULARY, **_MODEL})
"""Byte-level BPE tokenizer and an untrained GPT-2 of about 700,000 parameters."""
