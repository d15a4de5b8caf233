"""The whole path by its real commands: launcher, workers, export, generation."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from tests.commands import ROOT, python

SHORT = ["train.max_steps=6", "eval.every_steps=3"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def command(cache: Path, *arguments: str, module: str = "launch") -> subprocess.CompletedProcess[str]:
    return python(Path.cwd(), module, *arguments, cache=cache)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_same_numbers(one: Path, other: Path) -> None:
    for kind in ("train", "eval"):
        pairs = list(zip(records(one, kind), records(other, kind), strict=True))
        assert len(pairs) == {"train": 6, "eval": 3}[kind]
        for a, b in pairs:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["targets"] == b["targets"]
            if kind == "train":
                assert (a["update"], a["epoch"], a["consumed"]) == (b["update"], b["epoch"], b["consumed"])
                assert a["learning_rate"] == b["learning_rate"]
            else:
                assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-6)


@pytest.mark.dist
@pytest.mark.slow
def test_one_process_two_processes_and_accelerate_launch_agree(tmp_path: Path, cache: Path) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    run = command(cache, "run", "causal_lm", *SHORT, "save.every_steps=2", "save.keep_last=1", "--out", str(one))
    assert run.returncode == 0, run.stderr
    assert "validation perplexity: " in run.stdout
    assert sorted(path.name for path in (one / "checkpoints").iterdir()) == ["step-000006"]
    result = json.loads((one / "result.json").read_text())
    assert result["difference"] <= 1e-5
    assert ModelCard.load(one / "export/README.md").data.metrics == ["perplexity"]
    assert result["seconds"]["evaluate"] > 0, "before and after training, though not within"
    assert result["validation"]["after"]["perplexity"] < result["validation"]["before"]["perplexity"]

    traced = ("--profile", "2", "track.profile_ranks=[1]")
    run = command(cache, "run", "causal_lm", *SHORT, "parallel.devices=2", *traced, "--json", "--out", str(two))
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["updates"] == 6
    assert run.stderr == "" and "training 6/6" in (two / "logs/launcher.log").read_text(), "it is quiet"
    assert_same_numbers(one, two)
    assert sorted(path.name for path in (two / "profile").iterdir()) == ["rank-1.json.gz", "rank-1.txt"]
    trace = json.loads(gzip.decompress((two / "profile/rank-1.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}, "the fourth and fifth update"
    assert "DistributedDataParallel.forward" in (two / "profile/rank-1.txt").read_text()

    config = str(ROOT / "accelerate_configs/ddp.yaml")
    run = command(
        cache,
        *("--config_file", config, "--num_processes", "2", "-m", "launch.train", "causal_lm", *SHORT),
        *("--out", str(three)),
        module="accelerate.commands.launch",
    )
    assert run.returncode == 0, run.stderr
    assert_same_numbers(one, three)

    said = command(cache, "generate", str(one), "The value")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("The value")

    again = command(cache, "run", "causal_lm", *SHORT, "--out", str(one))
    assert (again.returncode, again.stdout) == (0, result["summary"] + "\n")
    assert again.stderr == f"shoal: {one}: this run is finished already\n"
    other = command(cache, "run", "causal_lm", *SHORT, "train.seed=1", "--out", str(one))
    assert (other.returncode, other.stdout) == (2, "")
    assert "; set them back, or begin a new run with another --out" in other.stderr
    assert "train.seed: 0 → 1" in other.stderr

    finished = command(cache, str(two), module="launch.train")
    assert (finished.returncode, finished.stderr) == (0, f"shoal: {two}: this run is finished already\n")
    # The plan of two processes, started as one: refused before any work.
    (two / "result.json").unlink()
    alone = command(cache, str(two), module="launch.train")
    assert alone.returncode == 4
    assert "rank 0 finds itself in a world of 1" in alone.stderr


@pytest.mark.slow
def test_bf16_and_early_stopping(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    stopping = ["eval.every_steps=2", "train.early_stopping_patience=2", "train.early_stopping_min_delta=100"]
    own = str(Path(__file__).with_name("own_recipe.py"))
    (tmp_path / "run.yaml").write_text(f"recipe: {own}\ntrain: {{max_steps: 40, global_batch_size: 8}}\n")
    run = command(cache, "run", str(tmp_path / "run.yaml"), "train.precision=bf16", *stopping, "--out", str(out))
    assert run.returncode == 0, run.stderr
    # Nothing is better by 100: the evaluation before training is the best one, those after 2 and 4 updates are worse.
    assert len(records(out, "train")) == 4
    assert [record["update"] for record in records(out, "eval")] == [0, 2, 4]
    assert "stopped early at update 4: 2 evaluations in a row without a better validation loss" in run.stderr
    exact = command(cache, "run", str(tmp_path / "run.yaml"), *stopping, "--out", str(tmp_path / "fp32"))
    assert exact.returncode == 0, exact.stderr
    pairs = list(zip(records(out, "train"), records(tmp_path / "fp32", "train"), strict=True))
    differences = [abs(a["loss"] - b["loss"]) for a, b in pairs]
    assert max(differences) > 1e-5, "bf16 is not fp32"
    assert max(differences) < 1e-2, "but near it"


@pytest.mark.slow
def test_on_a_cpu_nothing_is_padded_to_the_pieces_that_gpus_compute_in(tmp_path: Path, cache: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from tests.own_recipe import Args, prepare as made\n\n\n"
        "def prepare(args, context):\n"
        "    print('padded to', context.width(None, None)(9))\n"
        "    return made(args, context)\n"
    )
    (tmp_path / "run.yaml").write_text(f"recipe: {own}\ntrain: {{max_steps: 1, global_batch_size: 8}}\n")
    run = command(cache, "run", str(tmp_path / "run.yaml"), "save.export=false", "--out", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert "padded to 9\n" in run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_a_model_that_does_not_come_back_from_its_export_is_no_success(
    strategy: str, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "run"
    own = str(Path(__file__).with_name("own_recipe.py"))
    (tmp_path / "run.yaml").write_text(f"recipe: {own}\ntrain: {{max_steps: 2, global_batch_size: 8}}\n")
    run = command(
        cache, "run", str(tmp_path / "run.yaml"), "recipe_args.hooked=true", *spread(strategy), "--out", str(out)
    )
    assert run.returncode == 7, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"shoal: {out}/export: the reloaded model's logits differ from the trained model's by ")
    assert not (out / "result.json").exists()
    assert (out / "probe.safetensors").is_file()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_an_export_without_weights_is_no_success(strategy: str, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    own = str(Path(__file__).with_name("own_recipe.py"))
    (tmp_path / "run.yaml").write_text(f"recipe: {own}\ntrain: {{max_steps: 2, global_batch_size: 8}}\n")
    run = command(
        cache,
        "run",
        str(tmp_path / "run.yaml"),
        "recipe_args.saves_one_weight=true",
        *spread(strategy),
        "--out",
        str(out),
    )
    assert run.returncode == 7, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"shoal: {out}/export: weights of the trained model are missing in it, or are others: ")
    assert not (out / "result.json").exists()


def spread(strategy: str) -> list[str]:
    return [f"parallel.strategy={strategy}", f"parallel.devices={1 if strategy == 'single' else 2}"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_a_sharded_model_trains_and_is_exported_in_bf16(strategy: str, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    own = str(Path(__file__).with_name("own_recipe.py"))
    (tmp_path / "run.yaml").write_text(
        f"recipe: {own}\ntrain: {{max_steps: 3, global_batch_size: 8, precision: bf16}}\n"
    )
    run = command(cache, "run", str(tmp_path / "run.yaml"), *spread(strategy), "--out", str(out))
    assert run.returncode == 0, run.stderr
    with safe_open(out / "export/model.safetensors", "pt") as file:
        weights = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {weight.dtype for weight in weights} == {torch.float32}, "the export holds the master weights"
    beyond_bf16 = [weight for weight in weights if not torch.equal(weight.bfloat16().float(), weight)]
    assert len(beyond_bf16) > len(weights) / 2
