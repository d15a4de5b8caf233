"""Questions on short made-up lives, and a tiny untrained encoder: what extractive question answering needs of a sample.

A context tells some facts of one person; a question asks for one of them, or for one that is not told. Places and days
come in two kinds each, so that to look for any place or day is not enough.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.files import Row
from recipes.models import Embedded
from recipes.rows import EmbeddedRows

NAMES = (
    *("Ada", "Bela", "Carl", "Dora", "Emil", "Fred", "Greta", "Hugo", "Ida", "Jonas", "Karin", "Leon", "Maria"),
    *("Nora", "Oskar", "Paula", "Quentin", "Rosa", "Simon", "Tilda", "Ulla", "Vera", "Walter", "Zoe"),
)
PLACES = (
    *("Athens", "Basel", "Cairo", "Dublin", "Essen", "Florence", "Geneva", "Hamburg", "Istanbul", "Jena", "Kyoto"),
    *("Lisbon", "Madrid", "New York", "Oslo", "Prague", "Rome", "San Marino", "Turin", "Vienna", "Warsaw", "Zagreb"),
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    *("November", "December"),
)
TRADES = (
    *("a baker", "a court painter", "a doctor", "a farmer", "a glass blower", "a judge", "a lawyer", "a miller"),
    *("a painter", "a poet", "a sailor", "a ship builder", "a singer", "a tailor", "a teacher", "a watch maker"),
)
DISHES = (
    *("apple pie", "bean soup", "bread", "cheese", "dumplings", "fried fish", "goulash", "noodles", "onion soup"),
    *("pancakes", "pears", "plum cake", "porridge", "rice pudding", "sausages", "stew"),
)
INSTRUMENTS = (
    *("the bass drum", "the bassoon", "the cello", "the flute", "the French horn", "the harp", "the lute"),
    *("the organ", "the trumpet", "the viola", "the violin", "the zither"),
)
FACTS = {
    "birthplace": ("{} was born in {}.", "Where was {} born?"),
    "home": ("{} moved to {}.", "Where did {} move to?"),
    "birthday": ("{} was born on {}.", "When was {} born?"),
    "wedding": ("{} married on {}.", "When did {} marry?"),
    "trade": ("{} worked as {}.", "What was the trade of {}?"),
    "dish": ("{} liked to eat {}.", "What did {} like to eat?"),
    "instrument": ("{} played {}.", "Which instrument did {} play?"),
}
"""What may be told of a person, and how it is asked for."""

TOLD = 5
"""Facts in a context."""

UNANSWERABLE = 0.2
"""Share of questions about what the context does not tell."""

TRAINING, VALIDATION = 12000, 500
_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 384,
}
_KEY: dict[str, Any] = {"version": 1, "rows": [TRAINING, VALIDATION], "model": _MODEL}


def _rows(count: int, seed: int) -> Iterator[Row]:
    """Rows with `id`, `question`, `context` and `answers`, as the columns of SQuAD are."""
    chance = random.Random(seed)
    for number in range(count):
        name = chance.choice(NAMES)
        kinds = chance.sample(list(FACTS), len(FACTS))
        told, untold = kinds[:TOLD], kinds[TOLD:]
        context, starts = "", {}
        for kind in told:
            text = _made_up(chance, kind)
            sentence = FACTS[kind][0].format(name, text)
            starts[kind] = (text, len(context) + len(sentence) - len(text) - 1)
            context += sentence + " "
        kind = chance.choice(untold if chance.random() < UNANSWERABLE else told)
        answers = [starts[kind]] if kind in starts else []
        yield {
            "id": f"{seed}-{number}",
            "question": FACTS[kind][1].format(name),
            "context": context.strip(),
            "answers": {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]},
        }


def _made_up(chance: random.Random, kind: str) -> str:
    if kind in ("birthday", "wedding"):
        return f"{chance.randint(1, 28)} {chance.choice(MONTHS)} {chance.randint(1800, 1899)}"
    words = {"birthplace": PLACES, "home": PLACES, "trade": TRADES, "dish": DISHES, "instrument": INSTRUMENTS}
    return chance.choice(words[kind])


def _make(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordLevel(unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = (f"{row['question']} {row['context']}" for row in _rows(TRAINING, 0))
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=[*special.values()], show_progress=False)
    )
    numbers = [(token, tokenizer.token_to_id(token)) for token in (special["cls_token"], special["sep_token"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=numbers
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)
    fast.save_pretrained(folder)
    config = BertConfig(vocab_size=len(fast), pad_token_id=fast.pad_token_id, **_MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForQuestionAnswering(config).save_pretrained(folder)


QUESTION_ENCODER = Embedded("embedded-questions", _KEY, _make, {"model_type": "bert", **_MODEL})
"""A tokenizer of whole words and an untrained BERT."""

QUESTIONS = EmbeddedRows("the embedded questions", _KEY, lambda: _rows(TRAINING, 0), lambda: _rows(VALIDATION, 1))
