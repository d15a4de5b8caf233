"""`shoal chaos` by its real command: what it kills, that it finds a run that goes on wrongly, that nothing is left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from safetensors.numpy import save_file

from launch.chaos import Interruption, Kind, Strike, draw, settings
from launch.chaos_report import rows, verdict
from launch.processes import alive, kill
from launch.sameness import Compared, compare
from tests.commands import shoal
from tests.processes import launched

OWN = Path(__file__).with_name("own_recipe.py")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"recipe: {OWN}\n"
        "recipe_args: {seconds_per_batch: 0.05, dropout: 0.1}\n"
        "train: {global_batch_size: 8, max_steps: 100}\n"
        "eval: {every_steps: 4}\n"
        "save: {every_steps: 3}\n"
        "parallel: {device: cpu}\n"
    )
    return path


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_that_are_killed_end_with_the_numbers_of_two_that_were_not(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    stated = ["train.max_steps=12", "parallel.devices=2"]
    done = shoal(tmp_path, "chaos", str(run_file), *stated, "--kills", "2", "--seed", "16", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "chaos.json").read_text())
    rank, tree = report["interruptions"]
    assert (rank["what"], rank["exit_code"], rank["planned_update"]) == (str(Kind.RANK), 1, 5)
    assert (tree["what"], tree["exit_code"], tree["planned_update"]) == (str(Kind.TREE), -signal.SIGKILL, 7)
    for each in (rank, tree):
        resumed = each["resumed_from"] or 0
        assert resumed % 3 == 0 and 0 <= each["update"] - resumed <= 5, each
        assert each["updates_done_again"] == each["reached"] - resumed
    assert (report["same"], report["differences"]) == (True, [])
    assert report["compared"] == {"updates": 12, "evaluations": 4, "weight_tensors": 16}
    assert "The same numbers, bit for bit, after 2 interruptions: 12 updates, 4 evaluations" in done.stdout
    assert re.findall(r"^\d/2  SIGKILL of .* at update \d+$", done.stderr, re.MULTILINE)
    # What was done again is what the interrupted run itself has put aside.
    interrupted = out / "interrupted"
    discarded = [json.loads(line) for line in (interrupted / "metrics-discarded.jsonl").read_text().splitlines()]
    again = Counter(record["update"] for record in discarded if record["kind"] == "train")
    assert again.total() == rank["updates_done_again"] + tree["updates_done_again"] > 0
    assert not (out / "undisturbed/attempts").exists() and len(list((interrupted / "attempts").iterdir())) == 2
    assert compare(out / "undisturbed", interrupted).same


@pytest.mark.slow
def test_a_run_that_goes_on_wrongly_is_found_and_the_first_difference_is_named(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    stated = ["train.max_steps=8", "recipe_args.forgetful=true", "recipe_args.dropout=0", "save.export=false"]
    done = shoal(tmp_path, "chaos", str(run_file), *stated, "--kills", "1", "--seed", "2", "--json", "--out", str(out))
    assert done.returncode == 8, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "chaos.json").read_text())
    (stop,) = report["interruptions"]
    assert (stop["what"], stop["exit_code"], stop["clean"]) == (str(Kind.STOP), 75, True)
    assert (stop["resumed_from"], stop["updates_done_again"]) == (stop["reached"], 0)
    assert report["compared"]["weight_tensors"] is None
    first = report["differences"][0]
    assert first.startswith(f"train {stop['reached'] + 1}: loss ")
    assert done.stderr.splitlines()[-1] == f"shoal: not the same numbers: {first}; runs: {out}"


@pytest.mark.slow
def test_ctrl_c_ends_everything_at_once(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    with launched(tmp_path, "launch", "chaos", str(run_file), "--out", str(out)) as chaos:
        chaos.until(lambda: (out / "undisturbed/metrics.jsonl").is_file())
        started = chaos.below()
        assert len(started) >= 2
        pressed = time.monotonic()
        chaos.signal(signal.SIGINT)
        assert chaos.end() == 130
        assert time.monotonic() - pressed < 10
        assert alive(started) == []
        assert chaos.said().splitlines()[-1] == f"shoal: stopped by Ctrl-C; runs: {out}"
    report = json.loads((out / "chaos.json").read_text())
    assert (report["complete"], report["same"], report["interruptions"]) == (False, None, [])


def test_a_tree_is_killed_with_the_children_that_have_lost_their_parents(tmp_path: Path) -> None:
    """Also what ignores SIGTERM, and a child of a session of its own."""
    (tmp_path / "tree.py").write_text(
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "orphan = 'import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True)'\n"
        "subprocess.run([sys.executable, '-c', orphan, *sleep])\n"
        "print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen([sys.executable, tmp_path / "tree.py"], stdout=output, start_new_session=True)
    until = time.monotonic() + 30
    while len(said.read_text().split()) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    tree = psutil.Process(process.pid)
    orphan, child = [psutil.Process(int(number)) for number in said.read_text().split()]
    assert alive([tree, orphan, child]) == [tree, orphan, child] and orphan not in tree.children(recursive=True)
    kill(tree)
    assert alive([tree, orphan, child]) == []
    assert process.wait() == -signal.SIGKILL


# --- planning --------------------------------------------------------------------------------------------


def test_the_interruptions_are_of_all_kinds_at_different_updates_and_the_same_for_the_same_seed() -> None:
    for seed in range(200):
        strikes = draw(6, 40, seed)
        assert strikes == draw(6, 40, seed)
        assert Counter(strike.kind for strike in strikes[:3]) == Counter(Kind)
        assert Counter(strike.kind for strike in strikes) == Counter([*Kind, *Kind])
        updates = [strike.update for strike in strikes]
        assert sorted(set(updates)) == updates and updates[0] >= 1 and updates[-1] < 40
        assert all(0 <= strike.delay <= 2 and 0 <= strike.choice < 1 for strike in strikes)
    moments = {strike.update for seed in range(200) for strike in draw(6, 40, seed)}
    assert moments == set(range(1, 40)), "anywhere"
    assert [strike.update for strike in draw(3, 2, 0)] == [1, 1, 1]
    assert len({tuple(draw(3, 40, seed)) for seed in range(50)}) == 50


def test_both_runs_are_saved_often_enough_and_unseen_by_others(run_file: Path, tmp_path: Path) -> None:
    overrides, config, told = settings(str(run_file), [], tmp_path)
    assert overrides == ["train.max_steps=40", "track.every_steps=1", "track.wandb=off", "track.also=[]"]
    assert (config.train.max_steps, config.save.every_steps, told) == (40, 3, [])
    assert settings(str(run_file), ["train.max_steps=12"], tmp_path)[1].save.every_steps == 3
    overrides, config, told = settings(str(run_file), ["train.max_steps=11"], tmp_path)
    assert (overrides[-1], config.save.every_steps) == ("save.every_steps=1", 1)
    assert told == ["save.every_steps = 1 for both runs, since 3 saves too rarely to go on from"]
    stated = ["save.every_steps=null", "train.epochs=3", "track.every_steps=2"]
    overrides, config, told = settings(str(run_file), stated, tmp_path)
    assert overrides == [*stated, "track.wandb=off", "track.also=[]"] and config.save.every_steps is None and not told
    assert list(tmp_path.iterdir()) == [run_file], "nothing was started"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train.max_step=1"], 2, "command line: train.max_step = 1: unknown key; did you mean train.max_steps?"),
        (["--out", "."], 5, "is not empty, and a run is never overwritten; choose another --out"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    arguments: list[str], code: int, message: str, run_file: Path, tmp_path: Path
) -> None:
    done = shoal(tmp_path, "chaos", str(run_file), *arguments)
    assert done.returncode == code and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "chaos.json").exists() and not (tmp_path / "runs").exists()


# --- comparing -------------------------------------------------------------------------------------------

RECORDS: list[dict[str, Any]] = [
    {"kind": "eval", "update": 0, "loss": 3.5, "best": True, "time": 1.0},
    {"kind": "train", "update": 1, "loss": 3.0, "gradient_norm": 1.0, "learning_rate": 0.1, "epoch": 1, "consumed": 8},
    {"kind": "train", "update": 2, "loss": 2.5, "gradient_norm": 1.5, "learning_rate": 0.2, "epoch": 2, "consumed": 8},
]


def left(folder: Path, records: list[dict[str, Any]] = RECORDS, best: float = 3.5, **weights: Any) -> Path:
    """What is compared of a run folder."""
    (folder / "export").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "result.json").write_text(json.dumps({"updates": 2, "best": {"loss": best}, "run_folder": str(folder)}))
    values = {"a": numpy.ones((2, 2), "float32"), "b": numpy.zeros(3, "float32"), **weights}
    save_file({name: value for name, value in values.items() if value is not None}, folder / "export/model.safetensors")
    return folder


def changed(position: int, **values: Any) -> list[dict[str, Any]]:
    return [{**record, **values} if number == position else record for number, record in enumerate(RECORDS)]


@pytest.mark.parametrize(
    ("what", "first"),
    [
        ({"records": changed(2, loss=2.5000000000000004)}, "train 2: loss 2.5 → 2.5000000000000004"),
        ({"records": changed(1, gradient_norm=1.1)}, "train 1: gradient_norm 1.0 → 1.1"),
        ({"records": changed(1, learning_rate=0.2)}, "train 1: learning_rate 0.1 → 0.2"),
        ({"records": changed(2, epoch=1)}, "train 2: epoch 2 → 1"),
        ({"records": changed(1, consumed=16)}, "train 1: consumed 8 → 16"),
        ({"records": changed(0, best=False)}, "eval 0: best True → False"),
        ({"records": changed(1, overflows=1)}, "train 1: overflows None → 1"),
        ({"records": RECORDS[:2]}, "records: train 2 → nothing"),
        ({"records": [*RECORDS, RECORDS[2]]}, "records: nothing → train 2"),
        ({"records": [RECORDS[0], RECORDS[0], *RECORDS[1:]]}, "records: train 1 → eval 0"),
        ({"best": 3.0}, "result: best {'loss': 3.5} → {'loss': 3.0}"),
        ({"b": numpy.array([0, 1e-9, 0], "float32")}, "export: b differs by up to 1.0e-09"),
        ({"b": numpy.array([0, -0.0, 0], "float32")}, "export: b differs by up to 0.0e+00"),
        ({"b": numpy.zeros(4, "float32")}, "export: b float32(3,) → float32(4,)"),
        ({"b": None}, "export: names of model.safetensors differ: b"),
    ],
)
def test_each_difference_is_found_down_to_the_last_bit(what: dict[str, Any], first: str, tmp_path: Path) -> None:
    found = compare(left(tmp_path / "one"), left(tmp_path / "other", **what))
    assert found.differences == (first,) and not found.same


def test_time_and_place_are_no_differences(tmp_path: Path) -> None:
    found = compare(left(tmp_path / "one"), left(tmp_path / "other", changed(0, time=2.0, tokens_per_second=1.0)))
    assert found == Compared(2, 1, 2, ())
    assert found.words == "2 updates, 1 evaluations, the scores, 2 weight tensors"
    for run in ("one", "other"):
        (tmp_path / run / "export/model.safetensors").unlink()
    assert "no weights, because save.export = false" in compare(tmp_path / "one", tmp_path / "other").words
    left(tmp_path / "third")
    assert compare(tmp_path / "one", tmp_path / "third").differences == ("export: files [] → ['model.safetensors']",)


# --- telling ---------------------------------------------------------------------------------------------


def test_the_table_and_the_verdict() -> None:
    strike = Strike(Kind.TREE, 5, 0.0, 0.0)
    happened = [
        Interruption(strike, update=5, reached=6, exit_code=-9, resumed=3),
        Interruption(Strike(Kind.RANK, 8, 0.0, 0.0), update=8, reached=8),
    ]
    assert rows(happened) == [
        ["1", "SIGKILL of all processes", "5", "-9", "step-000003", "3"],
        ["2", "SIGKILL of one rank", "8", "restarted itself", "the beginning", "8"],
    ]
    same = Compared(8, 2, 4, ())
    assert verdict(same, 1, 1) == [
        "The same numbers, bit for bit, after 1 interruption: 8 updates, 2 evaluations, the scores, 4 weight tensors."
    ]
    assert verdict(same, 3, 2)[-1].startswith("The run was over before 1 of 3 interruptions; for more of them make it ")
    lines = verdict(Compared(8, 2, 4, tuple(f"train {update}: …" for update in range(12))), 2, 2)
    assert lines[0] == "DIFFERENT numbers after 2 interruptions, undisturbed → interrupted:"
    assert lines[1:3] == ["train 0: …", "train 1: …"] and lines[-1] == "and 2 more differences, see chaos.json"
