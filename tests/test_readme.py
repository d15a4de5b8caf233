"""The README, line by line: its commands run, its tables are those of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config import load
from launch.errors import EXIT_CODES
from launch.registry import find_run_file, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line.removeprefix("$ ") for block in blocks(text, "console") for line in block.splitlines()]


@pytest.mark.dist
@pytest.mark.slow
def test_the_commands_do_what_is_said(tmp_path: Path) -> None:
    """All of them, in the order they stand there, in one folder that holds what a checkout holds."""
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SHOAL_CACHE": str(tmp_path / "cache"),
    }
    said = {}
    for command in commands(section("Use")):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said[command] = done.stdout
    by_verb = {" ".join(command.split()[:2]): output for command, output in said.items()}
    assert len(said) == 19 and set(by_verb) == {
        *("shoal plan", "shoal prepare", "shoal run", "shoal parity", "shoal generate", "shoal recipes"),
        *("shoal checkpoints", "shoal export", "shoal tokenize", "shoal eval", "accelerate launch"),
        *("shoal runs", "shoal report", "shoal push"),
    }
    assert len(re.findall(" same$", by_verb["shoal parity"], re.MULTILINE)) == 2
    assert "training samples: " in by_verb["shoal prepare"]
    assert "micro-batch 8 × accumulation 1 × 2 processes" in by_verb["shoal plan"]
    assert "training labels: " in said["shoal plan recipes/text_classification.yaml --data"]
    assert re.search(r"^perplexity: [\d,.]+$", by_verb["shoal eval"], re.MULTILINE)
    assert by_verb["shoal generate"].startswith("The value of")
    assert re.search(r"runs/second +finished +20 of 20 +loss +\d", said["shoal runs"])
    assert re.search(r"parallel\.devices +auto +2", by_verb["shoal runs"]), "the settings in which two runs differ"
    assert by_verb["shoal report"] == "runs/report.html\n" and (tmp_path / "runs/report.html").is_file()
    assert re.findall(r"step-0000[12]0 .* good", by_verb["shoal checkpoints"])
    assert "tensors load as stored" in by_verb["shoal export"] and (tmp_path / "runs/model/config.json").is_file()
    assert by_verb["shoal push"].splitlines()[-1].startswith("would go to your-name/your-model: ")
    assert "recipe_args.block_size" in said["shoal recipes show causal_lm"]
    assert (tmp_path / "my_recipe.yaml").is_file() and "run it: shoal run my_recipe.yaml" in by_verb["shoal recipes"]
    assert "decoded: 'The value of'" in by_verb["shoal tokenize"]
    assert "run folder: " in by_verb["accelerate launch"]
    first, second = (
        [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    )
    losses = [[record["loss"] for record in run if record["kind"] == "train"] for run in (first, second)]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5), "two processes give the same losses as one"

    told = re.findall(r"^\| (.+?) \|", section("The run folder"), re.MULTILINE)[2:]
    told_names = {re.sub(r"step-\d+", "step-*", name) for cell in told for name in re.findall(r"`([^`]+)`", cell)}
    there = {path.relative_to(tmp_path / "runs/first").as_posix() for path in (tmp_path / "runs/first").rglob("*")}
    patterns = {"rank-N.log": "rank-0.log", "/": ""}
    only_sometimes = {
        *("checkpoints/step-*/", "stopped.json", "failure.json", "failure-N.json", "attempts/N/", "deepspeed.json"),
        *("metrics-discarded.jsonl", "adapter/", "profile/memory-rank-N.json"),
        *("job.sbatch", "slurm-N.log", "submitted.json", "slurm.json", "profile/rank-N.json.gz", "profile/rank-N.txt"),
        *("wandb.json", "wandb/", "tensorboard/", "mlflow.json", "trackio.json"),
    }
    for name in told_names - only_sometimes:
        for placeholder, real in patterns.items():
            name = name.removesuffix("/") if placeholder == "/" else name.replace(placeholder, real)
        assert name in there, f"{name} is told of, but the run folder holds {sorted(there)}"
    assert {name.partition("/")[0] for name in there} <= {name.partition("/")[0] for name in told_names}


def test_the_two_commands_of_a_new_user_are_targets_of_the_makefile_and_ci_runs_the_tests() -> None:
    beginning = commands(README.partition("\n## ")[0])
    assert [command.split()[:2] for command in beginning] == [["make", "demo"], ["make", "test"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in ("demo", "test", "check"))
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.findall(r"^make \w+$", script, re.MULTILINE) == ["make check", "make test"]


def test_commands_that_need_the_hub_or_a_users_file_are_valid_but_for_those() -> None:
    passages = section("Use"), section("Your data")
    found = [line for each in passages for block in blocks(each, "text") for line in block.splitlines() if line]
    assert len(found) >= 8
    for line in found:
        program, verb, file, *overrides = shlex.split(line)
        assert (program, verb) == ("shoal", "run")
        load_recipe(load(find_run_file(file), overrides))


def test_the_exit_codes_are_those_of_the_code() -> None:
    told = {int(code): meaning.strip() for code, meaning in re.findall(r"(\d+) ([^·]+)", section("Exit codes"))}
    assert set(told) == set(EXIT_CODES)
    assert (told[0], told[130]) == ("done", "Ctrl-C")


def test_the_tree_names_what_is_there() -> None:
    (tree,) = blocks(section("What is where"), "text")
    named = {name for line in tree.splitlines() for name in re.findall(r"[\w./]+/(?=\s|$)", line)}
    assert {"launch/", "launch/engine/", "recipes/", "accelerate_configs/", "tests/"} <= named
    assert all((ROOT / name).is_dir() for name in named), named
