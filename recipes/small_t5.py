"""A tiny T5 from scratch with a byte-level tokenizer, for recipes whose model reads one text and writes another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipes.models import Embedded

PADDING = "<pad>"
END_OF_TEXT = "</s>"
BYTES = 256
_MODEL = {"d_model": 96, "d_kv": 24, "num_heads": 4, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2}


def small_t5(
    kind: str, texts: Callable[[], Iterable[str]] = lambda: (), merges: int = 0, key: dict[str, Any] | None = None
) -> Embedded:
    """A T5 whose tokens are bytes, and up to so many frequent sequences of them in `texts`, which `key` identifies."""

    def make(folder: Path) -> None:
        _make(folder, texts(), merges)

    config = {"model_type": "t5", "vocab_size": 2 + BYTES + merges, **_MODEL}
    return Embedded(f"t5-{kind}", {"merges": merges, "texts": key, "model": _MODEL, "version": 1}, make, config)


def _make(folder: Path, texts: Iterable[str], merges: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    backend = Tokenizer(models.BPE())
    # Every digit is a token of its own, for numbers are to be copied and taken apart.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2 + BYTES + merges,
        special_tokens=[PADDING, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", pair=f"$A {END_OF_TEXT} $B {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PADDING, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0, **_MODEL
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
