"""`shoal explain`: each key with its value, its place, its meaning, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.assets import recipes_folder
from launch.config import load
from launch.explain import explain
from launch.keys import all_keys
from launch.plan import make_plan
from launch.recipe import Preview
from launch.registry import shipped_recipes
from launch.topology import Machine, World
from tests.commands import shoal


def explained(folder: Path, *arguments: str) -> dict[str, Any]:
    done = shoal(folder, "explain", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return {fact["key"]: fact for fact in json.loads(done.stdout)}


def test_every_key_of_every_shipped_run_file_is_told_once_with_its_place(tmp_path: Path) -> None:
    names = shipped_recipes()
    assert len(names) >= 7
    for name in names:
        facts = explained(tmp_path, name)
        assert {*all_keys()} - {"recipe_args"} <= {*facts}
        run_file = recipes_folder() / f"{name}.yaml"
        stated = load(run_file, []).layer.places
        for key, place in stated.items():
            if key in facts:
                assert facts[key]["from"] == place
        assert all(fact["from"] == "default" for key, fact in facts.items() if key not in stated)
        assert all(fact["meaning"] for fact in facts.values())


def test_what_follows_from_a_key_is_what_the_plan_says(tmp_path: Path) -> None:
    facts = explained(tmp_path, "causal_lm", "train.micro_batch_size", "save", "parallel.devices=2", "save.keep_last=5")
    assert [*facts] == ["train.micro_batch_size", *(key for key in all_keys() if key.startswith("save."))]
    size = facts["train.micro_batch_size"]
    assert size["value"] == 8 and size["from"] == f"{recipes_folder() / 'causal_lm.yaml'}:14"
    assert size["follows"][0] == "global batch: 16 samples (micro-batch 8 × accumulation 1 × 2 processes)"
    assert size["follows"][1].startswith("memory of a process: ")
    kept = facts["save.keep_last"]
    assert (kept["value"], kept["from"], kept["default"]) == (5, "command line", "2")
    assert "the newest 5 are kept" in kept["follows"][0]
    assert facts["save.export"]["follows"] == []


def test_facts_name_keys_that_there_are() -> None:
    loaded = load(None, ["recipe=causal_lm", "train.max_steps=9", "parallel.device=cpu"])
    preview = Preview(samples=100, tokens_per_sample=8)
    lines = explain(make_plan(loaded, Machine("here", 2, 0), World(), preview, Path("/runs/one")))
    named = {key for line in lines for key in line.keys}
    assert named <= {*all_keys()}
    assert {"train.learning_rate", "train.global_batch_size", "parallel.strategy", "save.keep_best"} <= named
    assert [line.name for line in lines if not line.keys] == ["training samples", "run folder"]


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [("train.lerning_rate", "; did you mean train.learning_rate?"), ("nothing", "")],
)
def test_a_key_that_is_not_there(wanted: str, hint: str, tmp_path: Path) -> None:
    done = shoal(tmp_path, "explain", "causal_lm", wanted)
    assert (done.returncode, done.stderr) == (2, f"shoal: command line: {wanted}: no such key{hint}\n")


def test_for_people(tmp_path: Path) -> None:
    done = shoal(tmp_path, "explain", "causal_lm", "train.seed", "train.seed=7")
    assert done.stdout == (
        "train.seed = 7\n    from     command line\n    kind     whole number; default 0\n"
        "    meaning  Seed of the order of samples, of weights built from scratch and of dropout.\n"
    )
