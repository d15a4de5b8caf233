"""Contender: shoal, by its real command with a run file written here, read from what every run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload


def run_file(workload: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluations and saves are off while updates are timed; all else is as it is by default.

    `settings` go on top, by section, such as `{"train": {"compile": True}}`.
    """
    every = workload.evaluations > 0
    sections = {
        "train": {
            "global_batch_size": workload.batch,
            "max_steps": workload.updates,
            "learning_rate": workload.learning_rate,
            "weight_decay": workload.weight_decay,
            "max_grad_norm": workload.max_grad_norm,
            "schedule": "constant",
        },
        "eval": {
            "at_start": every,
            "batch_size": workload.batch_of_a_rank,
            # There is one at the end too, after what is timed.
            **({} if every else {"max_samples": workload.ranks}),
        },
        "save": {"every_minutes": None, "every_steps": workload.save_after, "export": False},
        "parallel": {"device": "cpu", "devices": workload.ranks},
        "recipe_args": _recipe_args(workload),
    }
    merged = {name: {**section, **settings.get(name, {})} for name, section in sections.items()}
    recipe = {"classification": "text_classification", "translation": "translation"}.get(workload.task, "causal_lm")
    return {"recipe": recipe, **merged}


def _recipe_args(workload: Workload) -> dict[str, Any]:
    kind = "txt" if workload.task == "blocks" else "jsonl"
    found: dict[str, Any] = {
        "model": str(workload.model),
        "from_scratch": True,
        "train_files": str(workload.folder / f"train.{kind}"),
        "validation_files": str(workload.folder / f"validation.{kind}"),
    }
    most = workload.length
    match workload.task:
        case "blocks":
            return {**found, "block_size": most}
        case "instruction":
            return {**found, "format": "instruction", "block_size": most}
        case "classification":
            return {**found, "max_length": most, "metrics": ["accuracy"]}
        case _:
            metrics = ["bleu"] if workload.evaluations else []
            lengths = {"max_source_length": most, "max_target_length": most, "max_new_tokens": workload.new_tokens}
            return {**found, **lengths, "metrics": metrics}


def ticks(workload: Workload, folder: Path) -> Ticks:
    """What a run has noted of itself: all tokens of all ranks."""
    found, before = Ticks(), 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            found.times.append(line["time"])
            found.tokens.append(line["tokens"] - before)
            before, found.loss = line["tokens"], line["loss"]
    result = json.loads((folder / "result.json").read_text())
    found.ranks = len(result["peak_memory"])
    if workload.evaluations:
        rows = [line["samples"] for line in lines if line["kind"] == "eval"]
        after = lines[-1]["time"] - found.times[-1]  # the only one that a line stands before
        before = result["seconds"]["evaluate"] - after
        found.evaluations = list(zip((before, after), rows, (0, 0), strict=True))
    return found
