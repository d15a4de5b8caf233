"""The run folder: complete, never overwritten, without secrets, and readable again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.assets import code_root
from launch.config import load
from launch.errors import RunFolderError
from launch.plan import Plan, make_plan
from launch.recipe import Preview
from launch.record import create_run_folder, model_folder, read_plan, summary, write_json
from launch.topology import Machine, World


def plan_for(folder: Path) -> Plan:
    loaded = load(None, ["recipe=causal_lm", "train.max_steps=3", "train.learning_rate=1.5e-3"])
    return make_plan(loaded, Machine("box", 4, 0), World(), Preview(), folder)


def test_a_folder_holds_the_run_file_and_the_plan_and_both_are_read_back(tmp_path: Path) -> None:
    plan = plan_for(tmp_path / "runs/one")
    folder = create_run_folder(plan)
    assert folder == tmp_path / "runs/one"
    assert sorted(path.name for path in folder.iterdir()) == ["accelerate.yaml", "logs", "plan.json", "run.yaml"]
    assert load(folder / "run.yaml", []).config == plan.config
    assert read_plan(folder) == plan
    recorded = json.loads((folder / "plan.json").read_text())
    assert recorded["versions"]["torch"].startswith("2.") and recorded["versions"]["accelerate"]
    assert recorded["host"] and recorded["python"] and recorded["arguments"] == sys.argv


def test_the_commit_is_recorded_where_there_is_one(tmp_path: Path) -> None:
    recorded = json.loads((create_run_folder(plan_for(tmp_path / "one")) / "plan.json").read_text())["git"]
    if not (code_root() / ".git").exists():
        assert recorded is None
        return
    head = subprocess.run(
        ["git", "-C", str(code_root()), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert recorded["commit"] == head.stdout.strip()
    assert isinstance(recorded["modified"], bool)


@pytest.mark.parametrize("inside", ["metrics.jsonl", ".hidden"])
def test_a_folder_with_something_in_it_is_never_touched(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / inside).write_text("precious")
    with pytest.raises(RunFolderError) as caught:
        create_run_folder(plan_for(folder))
    assert str(caught.value) == f"{folder}: is not empty, and a run is never overwritten; choose another --out"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {inside: "precious"}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert (create_run_folder(plan_for(tmp_path / "one")) / "plan.json").is_file()


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError) as caught:
        create_run_folder(plan_for(tmp_path / below))
    assert str(caught.value) == f"{tmp_path / below}: the run folder cannot be written: Not a directory"


def test_a_secret_reaches_neither_the_environment_nor_the_arguments_recorded(tmp_path: Path) -> None:
    """By the real command, with secrets wherever a user may have one."""
    token = "hf_" + "aB3" * 9
    secrets = {
        "HF_TOKEN": token,
        "WANDB_API_KEY": "pale-blue-dot",
        "SHOAL_PASSWORD": "pale-blue-dot",
        "NCCL_NOTE": token,
        "SLURM_JOB_COMMENT": "https://user:pale-blue-dot@host",
    }
    script = (
        "import pathlib, sys; from tests.test_record import plan_for; from launch.record import create_run_folder;"
        "create_run_folder(plan_for(pathlib.Path(sys.argv[1])))"
    )
    out = tmp_path / "one"
    given = [str(out), token, f"https://user:{token}@host", "password=pale-blue-dot"]
    subprocess.run(
        [sys.executable, "-c", script, *given],
        env={**os.environ, **secrets, "PYTHONPATH": str(code_root()), "NCCL_DEBUG": "INFO"},
        check=True,
    )
    written = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert token not in written and "pale-blue-dot" not in written
    recorded = json.loads((out / "plan.json").read_text())
    assert recorded["environment"]["NCCL_DEBUG"] == "INFO", "what changes a run is recorded"
    assert recorded["arguments"][1] == str(out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder}: is not a run folder (no plan.json in it)"),
        ("{", "{folder}/plan.json: cannot be read: "),
        ("{}", "{folder}/plan.json: cannot be read: "),
        ('{"plan": {"shoal": "0"}}', "{folder}/plan.json: cannot be read: "),
    ],
)
def test_a_folder_that_is_no_run(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(RunFolderError) as caught:
        read_plan(tmp_path)
    assert str(caught.value).startswith(message.format(folder=tmp_path))


def test_where_the_model_of_a_run_is(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(RunFolderError) as caught:
            model_folder(tmp_path)
        return str(caught.value).removeprefix(f"{tmp_path}: ")

    advice = "; give a finished run folder, as printed by `shoal run`"
    assert refusal() == f"no such run or model folder{advice}"
    (tmp_path / "plan.json").write_text("{}")
    assert refusal() == f"this run has exported no model (yet){advice}"
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(tmp_path) == tmp_path, "any Hugging Face folder will do"
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("{}")
    assert model_folder(tmp_path) == tmp_path / "export"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    class Unwritable:
        pass

    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": Unwritable()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_the_last_words_of_a_run() -> None:
    result: dict[str, Any] = {
        "validation": {
            "before": {"loss": 7.5, "perplexity": 1808.04241},
            "after": {"loss": 5.0, "perplexity": 148.413},
        },
        "run_folder": "/runs/one",
    }
    assert summary(result).splitlines() == [
        "validation loss: 7.5000 → 5.0000",
        "validation perplexity: 1,808.0424 → 148.4130",
        "run folder: /runs/one",
    ]
    del result["validation"]["before"]
    result |= {"export": "/runs/one/export", "sample": "The end"}
    result["seconds"] = {"data": 3.0, "compute": 96.6, "sync": 0.4, "save": 0.0}
    result |= {"peak_memory": [3 * 10**9, 4 * 10**9], "planned_memory": 3900 * 10**6}
    assert summary(result).splitlines() == [
        "validation loss: 5.0000",
        "validation perplexity: 148.4130",
        "sample: 'The end'",
        "model: /runs/one/export (reloaded and checked)",
        "time: compute 97 %, data 3 %",
        "memory: 4.0 GB for the fullest process at its peak; planned 3.9 GB",
        "run folder: /runs/one",
    ]
