"""A tiny encoder that needs no download: BERT's architecture, with a tokenizer trained on the texts of the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from recipes.models import Embedded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
TEXTS = 20_000
"""The tokenizer is trained on the first so many texts."""

_SPECIAL = {
    name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
}
_MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,  # at BERT's 0.02, meant for wider layers, so small a model learns only half as fast
}


def small_encoder(texts: Callable[[], Iterable[str]], identity: JsonValue) -> Embedded:
    """A WordPiece tokenizer trained on texts, and an untrained BERT of about a million parameters without a head.

    `texts` are to be of the training part alone; `identity` is all that they are made from.
    """
    key = {"texts": identity, "most": TEXTS, "vocabulary": VOCABULARY, "model": _MODEL, "version": 2}
    config = {"model_type": "bert", "vocab_size": VOCABULARY, **_MODEL}
    return Embedded("encoder", key, lambda folder: _make(folder, itertools.islice(texts(), TEXTS)), config)


def _make(folder: Path, texts: Iterable[str]) -> None:
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = _train_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **_MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


def _train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts, special = list(texts), list(_SPECIAL.values())
    # The trainer numbers what words go on with as it comes upon it, in another order each time, and prefers among
    # equally frequent pairs those of lower numbers (tokenizers 0.23, models/bpe/trainer.rs, `tokenize_words`). So these
    # have their numbers beforehand. They are special to the trainer alone.
    words = (tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)) for text in texts)
    known = [*special, *sorted({f"##{letter}" for of_text in words for word, _ in of_text for letter in word[1:]})]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=known, show_progress=False)
    trained = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.train_from_iterator(texts, trainer)
    tokenizer.model = models.WordPiece(trained.get_vocab(), unk_token=_SPECIAL["unk_token"])
    begin, end = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, special.index(token)) for token in (begin, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_MODEL["max_position_embeddings"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **_SPECIAL,
    )
