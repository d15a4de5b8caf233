"""What models answered in their newest evaluations: samples, scores by label, confusion matrices."""

from __future__ import annotations

import json
from typing import Any

from launch.report.markup import folded, listing, section, table
from launch.report.parts import MOST_ROWS, Story
from launch.words import NOTHING, figure

MOST_EXAMPLES = 20


def samples(story: Story) -> str:
    """What the models answered in their newest evaluations, and tables of labels."""
    parts = []
    for name, facts in story.named:
        found = facts.samples or {}
        where = f"update {found.get('update')}" if story.alone else f"{name}, update {found.get('update')}"
        examples = [each for each in found.get("examples") or () if isinstance(each, dict)][:MOST_EXAMPLES]
        if examples:
            keys = list(dict.fromkeys(key for each in examples for key in each))
            rows = [
                [str(number), *(_brief(each.get(key, "")) for key in keys)] for number, each in enumerate(examples, 1)
            ]
            parts.append(table(f"Predictions at {where}", ["sample", *keys], rows))
        parts += [*_by_label(found, where), *_confusion(found, where)]
        if sample := (facts.result or {}).get("sample"):
            parts.append(folded(f"A text of {name}", listing(str(sample), "Sample")))
    return section("samples", "Predictions", *parts)


def _brief(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = " | ".join(value)
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 600 else f"{shown[:600]} …"


def _by_label(found: dict[str, Any], where: str) -> list[str]:
    labels = found.get("by_label")
    if not isinstance(labels, dict) or not all(isinstance(each, dict) for each in labels.values()) or not labels:
        return []
    keys = list(dict.fromkeys(key for each in labels.values() for key in each))
    rows = [
        [label, *(figure(value) if isinstance(value := each.get(key), (int, float)) else NOTHING for key in keys)]
        for label, each in list(labels.items())[:MOST_ROWS]
    ]
    return [table(f"By label at {where}", ["label", *keys], rows)]


def _confusion(found: dict[str, Any], where: str) -> list[str]:
    matrix, labels = found.get("confusion_matrix"), found.get("labels")
    if not isinstance(matrix, list) or not isinstance(labels, list) or not 0 < len(matrix) == len(labels) <= 40:
        return []
    if not all(isinstance(row, list) and len(row) == len(labels) for row in matrix):
        return []
    rows = [[str(label), *map(str, row)] for label, row in zip(labels, matrix, strict=True)]
    whole = table(f"Confusion matrix at {where}: rows are true, columns predicted", ["true", *map(str, labels)], rows)
    return [folded("Confusion matrix", whole)]
