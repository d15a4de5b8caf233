"""Shows what the tokenizer of a run makes of texts.

python -m launch.tokenized [--batch] [--json] FILE TEXT … [key=value …]    (what `shoal tokenize` becomes)
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from launch.cache import Cache
from launch.config import load
from launch.errors import ConfigError, DataError
from launch.prepare import answer, prepare
from launch.recipe import RecipeContext
from launch.registry import find_run_file, load_recipe
from launch.sections import RunConfig
from launch.topology import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("pad", "eos", "bos", "unk", "mask", "cls", "sep")
"""What transformers calls the special tokens that have a purpose of their own."""

UNLIMITED = 2**30
"""A `model_max_length` from here on is none: transformers writes 10**30 where it knows of no limit."""


def main() -> None:
    """Tokenise the texts of the command line, and print what came out."""
    parser = argparse.ArgumentParser(prog="launch.tokenized", description="Shows what a tokenizer makes of texts.")
    parser.add_argument("file", metavar="FILE", help="a run file, or the name of a shipped one")
    parser.add_argument("texts", metavar="TEXT|key=value", nargs="+", help="texts, and overrides of the run file")
    parser.add_argument("--batch", action="store_true", help="the texts are samples of a batch, not a pair")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    def tokenized() -> str:
        overrides = [item for item in arguments.texts if _is_override(item)]
        texts = [item for item in arguments.texts if not _is_override(item)]
        if not texts or (len(texts) > 2 and not arguments.batch):
            raise ConfigError(
                f"command line: {len(texts)} texts; give one, or two that make a pair, or any number with --batch "
                '(what begins as "train.max_steps=" does is an override)'
            )
        found = show(load_tokenizer(arguments.file, overrides), texts, batch=arguments.batch)
        return json.dumps(found) if arguments.json else _in_words(found)

    answer(tokenized)


def _is_override(item: str) -> bool:
    """Whether it sets a key of a run file, and is not a text that happens to have a `=`."""
    key, equals, _ = item.partition("=")
    section, dot, _ = key.partition(".")
    return bool(equals) and section in RunConfig.model_fields and (bool(dot) or section == "recipe")


def load_tokenizer(file: str, overrides: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a run file's recipe; its data is prepared only where the recipe gives it no other way.

    Raises:
        LaunchError: the run file, the recipe or the tokenizer cannot be used.
    """
    loaded = load(find_run_file(file), overrides)
    recipe = load_recipe(loaded)
    context = RecipeContext(Cache(cache_folder()), loaded.config.train.seed)
    recipe.preview(context)  # what it finds wrong, it finds soon
    import transformers

    transformers.utils.logging.set_verbosity_error()
    tokenizer = recipe.tokenizer(context)
    if tokenizer is None:
        from launch.engine.progress import Display

        display = Display(True)
        try:
            tokenizer = prepare(recipe, loaded.config, display)[0].tokenizer
        finally:
            display.close()
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise ConfigError(
            f"recipe = {loaded.config.recipe}: its tokenizer is a {type(tokenizer).__name__}; "
            "it must be a PreTrainedTokenizerBase of transformers"
        )
    return tokenizer


def show(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, batch: bool = False) -> dict[str, Any]:
    """What the tokenizer is, and one row for each sample: a text or a pair; of a batch as many, padded to the longest.

    Raises:
        DataError: the samples cannot be padded.
    """
    padded = batch and len(texts) > 1
    if padded and tokenizer.pad_token_id is None:
        raise DataError(
            "the tokenizer has no padding token (pad_token), so texts of a batch cannot be made equally long"
        )
    inputs = tokenizer(texts, padding=padded) if batch else tokenizer(*([text] for text in texts))
    samples = [[text] for text in texts] if batch else [texts]
    limit = tokenizer.model_max_length
    return {
        "tokenizer": type(tokenizer).__name__,
        "vocabulary_size": len(tokenizer),
        "model_max_length": limit if limit < UNLIMITED else None,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "special_tokens": {kind: _special(tokenizer, kind) for kind in KINDS},
        "rows": [
            _row(tokenizer, sample, {name: values[index] for name, values in inputs.items()})
            for index, sample in enumerate(samples)
        ],
    }


def _special(tokenizer: PreTrainedTokenizerBase, kind: str) -> dict[str, Any] | None:
    token = getattr(tokenizer, f"{kind}_token")
    return None if token is None else {"token": str(token), "id": getattr(tokenizer, f"{kind}_token_id")}


def _row(tokenizer: PreTrainedTokenizerBase, texts: list[str], inputs: dict[str, list[int]]) -> dict[str, Any]:
    ids, special = inputs["input_ids"], set(tokenizer.all_special_ids)
    tokens = [
        {"id": number, "token": token, "text": tokenizer.decode([number]), "special": number in special}
        for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    ]
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return {
        "texts": texts,
        "tokens": tokens,
        "inputs": inputs,
        "decoded": tokenizer.decode(ids),
        "decoded_without_special_tokens": tokenizer.decode(ids, skip_special_tokens=True),
        "round_trips": [tokenizer.decode(part) for part in plain] == texts,
    }


def _in_words(found: dict[str, Any]) -> str:
    limit = found["model_max_length"]
    lines = [
        f"{found['tokenizer']}: {found['vocabulary_size']:,} tokens, at most "
        f"{'any number' if limit is None else f'{limit:,}'} in a text; pads on the {found['padding_side']}, "
        f"truncates on the {found['truncation_side']}"
    ]
    known = {kind: token for kind, token in found["special_tokens"].items() if token}
    lines.append(
        "special tokens: " + ", ".join(f"{kind} {each['token']!r} {each['id']}" for kind, each in known.items())
    )
    if missing := [kind for kind in KINDS if kind not in known]:
        lines.append(f"has no {', '.join(missing)}")
    for row in found["rows"]:
        lines += ["", *_row_in_words(row, limit)]
    return "\n".join(lines)


def _row_in_words(row: dict[str, Any], limit: int | None) -> list[str]:
    tokens = row["tokens"]
    width = max((len(token["token"]) for token in tokens), default=0)
    lines = [f"text: {' + '.join(map(repr, row['texts']))}", f"{len(tokens)} tokens"]
    if limit is not None and len(tokens) > limit:
        lines[-1] += f": {len(tokens) - limit} more than the model takes; a recipe has to truncate them"
    for position, token in enumerate(tokens):
        mark = "  special" if token["special"] else ""
        lines.append(f"{position:>5}  {token['id']:>7}  {token['token']:<{width}}  {token['text']!r}{mark}")
    lines += [f"{name}: {values}" for name, values in row["inputs"].items()]
    lines.append(f"decoded: {row['decoded']!r}")
    lines.append(f"decoded without special tokens: {row['decoded_without_special_tokens']!r}")
    lines.append("decodes to the same text" if row["round_trips"] else "does NOT decode to the same text")
    return lines


if __name__ == "__main__":
    main()
