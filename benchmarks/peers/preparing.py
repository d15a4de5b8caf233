"""One preparation of a text, for benchmarks/peers/preparation.py: by shoal, or by datasets.map as the examples have it.

Both are timed once all is imported and the tokenizer is loaded, up to the first block read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def by_shoal(text: Path, model: Path, length: int) -> tuple[float, int]:
    """Seconds and blocks, of the recipe causal_lm with its cache in $SHOAL_CACHE."""
    import datasets  # noqa: F401
    import transformers.models.llama  # noqa: F401

    from launch.cache import Cache
    from launch.recipe import RecipeContext
    from recipes import causal_lm

    files = {"train_files": str(text), "validation_files": str(text.with_name("validation.txt"))}
    args = causal_lm.Args(model=str(model), from_scratch=True, block_size=length, **files)  # type: ignore[arg-type]
    context = RecipeContext(Cache(Path(os.environ["SHOAL_CACHE"])), seed=0)
    causal_lm.tokenizer(args, context)
    began = time.perf_counter()
    train: Any = causal_lm.prepare(args, context).train
    train[0]
    return time.perf_counter() - began, len(train)


def by_map(text: Path, model: Path, length: int) -> tuple[float, int]:
    """Seconds and blocks, of two calls of datasets.map over 1,000 lines, with their cache in $HF_DATASETS_CACHE."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenise(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"])

    def group(features: dict[str, list[list[int]]]) -> dict[str, Any]:
        ends = {name: [token for row in rows for token in row] for name, rows in features.items()}
        most = len(ends["input_ids"]) // length * length
        cut = {name: [row[start : start + length] for start in range(0, most, length)] for name, row in ends.items()}
        return {**cut, "labels": [list(block) for block in cut["input_ids"]]}

    tokenizer("warm")
    began = time.perf_counter()
    files = {"train": str(text), "validation": str(text.with_name("validation.txt"))}
    rows = datasets.load_dataset("text", data_files=files)
    blocks = rows.map(tokenise, batched=True, remove_columns=["text"]).map(group, batched=True)
    blocks["train"][0]
    return time.perf_counter() - began, len(blocks["train"])


def main() -> None:
    """By whom, text, model, length, where the numbers go."""
    how, text, model, length, out = sys.argv[1:]
    made = {"shoal": by_shoal, "map": by_map}[how](Path(text), Path(model), int(length))
    Path(out).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
