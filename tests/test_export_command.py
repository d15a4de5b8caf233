"""`shoal export` by its real command: a checkpoint becomes the folder that the run itself would have exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.engine import from_checkpoint
from launch.engine.exported import load_exported
from launch.engine.sharding import tied_names
from launch.engine.shards import Stored
from launch.errors import ExportError
from tests.commands import shoal

OWN = Path(__file__).with_name("own_recipe.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "run.yaml").write_text(
        f"recipe: {OWN}\n"
        "train: {global_batch_size: 8, max_steps: 6, learning_rate: 0.01}\n"
        "eval: {every_steps: 2}\n"
        "save: {every_steps: 2, keep_last: null}\n"
        "parallel: {device: cpu, devices: 2, strategy: fsdp2}\n"
    )
    done = shoal(folder, "run", "run.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Of the newest checkpoint, to be spoilt."""
    return Path(shutil.copytree(run / "checkpoints/step-000006", tmp_path / "step-000006"))


@pytest.mark.dist
@pytest.mark.slow
def test_the_newest_checkpoint_becomes_the_export_of_the_run_bit_for_bit_and_generates(run: Path) -> None:
    done = shoal(run.parent, "export", "run")
    assert done.returncode == 0, done.stderr
    folder = run / "export-step-000006"
    assert done.stdout == (
        "3,616 parameters of step-000006; 16 tensors load as stored; one weight: lm_head.weight, "
        f"transformer.wte.weight\nmodel: {folder}\n"
    )
    ours, theirs = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (folder, run / "export"))
    assert theirs.pop("README.md"), "the card of the run"
    assert ours == theirs and "tokenizer.json" in ours and len(ours) >= 4
    model, _ = load_exported(folder)
    assert tied_names(model) == [["lm_head.weight", "transformer.wte.weight"]]
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}
    said = shoal(run.parent, "generate", str(folder), "a", "--max-new-tokens", "3")
    assert said.returncode == 0, said.stderr

    again = shoal(run.parent, "export", "run")
    assert (again.returncode, again.stderr) == (
        5,
        f"shoal: {folder}: is there already; nothing is ever overwritten: choose another --out\n",
    )


@pytest.mark.dist
@pytest.mark.slow
def test_a_checkpoint_is_chosen_by_name_or_by_loss(run: Path, tmp_path: Path) -> None:
    losses = {
        record["update"]: record["loss"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "eval"
    }
    best = min(losses, key=lambda update: losses[update])
    assert best == 6, "it learns"
    for which, name in (("step-000002", "step-000002"), ("best", "step-000006")):
        out = tmp_path / which
        done = shoal(run.parent, "export", "run", "--checkpoint", which, "--out", str(out), "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["checkpoint"] == str(run / "checkpoints" / name) and report["folder"] == str(out)
        stored = Stored(run / "checkpoints" / name)
        weights = load_file(out / "model.safetensors")
        assert {f"model/{key}" for key in weights} == {key for key in stored.shapes if key.startswith("model/")}
        assert all(torch.equal(value, stored.whole(f"model/{key}")) for key, value in weights.items())


@pytest.mark.dist
@pytest.mark.slow
def test_only_a_good_checkpoint_is_exported(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    done = shoal(tmp_path, "export", "run", "--checkpoint", "step-000007")
    assert (done.returncode, done.stderr) == (
        5,
        "shoal: run: has no checkpoint step-000007; --checkpoint is one of newest, best, step-000006, step-000004, "
        "step-000002\n",
    )
    shard = next((own / "checkpoints/step-000006").glob("state-00000-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = shoal(tmp_path, "export", "run", "--checkpoint", "step-000006")
    assert done.returncode == 5 and done.stderr.startswith(
        "shoal: run/checkpoints/step-000006: is damaged: the content"
    )
    done = shoal(tmp_path, "export", "run")
    assert done.returncode == 0 and done.stdout.endswith(f"model: {own}/export-step-000004\n"), "the newest good one"


# --- what cannot be exported -----------------------------------------------------------------------------


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["OwnModel"]}, r"transformers \S+ has no architecture 'OwnModel', so no plain Hugging Face"),
        ({"model_type": "own"}, r"transformers \S+ has no model_type 'own', so no plain Hugging Face folder can be"),
        ({"n_layer": 2}, r"holds another model than the GPT2LMHeadModel .* \(without transformer.h.1.attn.c_attn.bias"),
        ({"n_layer": 0}, r"\(with transformer.h.0.attn.c_attn.bias, .* besides\)"),
        ({"n_positions": 9}, r"\(transformer.wpe.weight has shape \(8, 16\) instead of \(9, 16\)\)"),
        ({"tie_word_embeddings": False}, r"\(without lm_head.weight\)"),
    ],
)
def test_a_model_that_is_not_the_one_of_its_configuration_is_refused(
    values: dict[str, object], message: str, copy: Path, tmp_path: Path
) -> None:
    change_config(copy, **values)
    with pytest.raises(ExportError, match=message) as raised:
        from_checkpoint.export(copy, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [copy], "nothing is left"


@pytest.mark.dist
@pytest.mark.slow
def test_what_does_not_load_as_it_is_stored_is_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that were written are changed before they are loaded again."""
    copy_others = from_checkpoint._copy_others

    def spoilt(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], None]:
        from safetensors.torch import save_file

        def then(checkpoint: Path, folder: Path) -> None:
            copy_others(checkpoint, folder)
            state = load_file(folder / "model.safetensors")
            change(state)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

        return then

    def one_bit(state: dict[str, torch.Tensor]) -> None:
        state["transformer.wpe.weight"].view(torch.int32)[3, 3] ^= 1

    monkeypatch.setattr(from_checkpoint, "_copy_others", spoilt(one_bit))
    with pytest.raises(
        ExportError, match=r"transformer\.wpe\.weight loads with other values than those that are stored"
    ):
        from_checkpoint.export(copy, tmp_path / "out")

    def untie(checkpoint: Path, folder: Path) -> None:
        copy_others(checkpoint, folder)
        change_config(folder, tie_word_embeddings=False)

    monkeypatch.setattr(from_checkpoint, "_copy_others", untie)
    with pytest.raises(ExportError, match=r"what loads is another model \(with lm_head.weight besides\)"):
        from_checkpoint.export(copy, tmp_path / "out")

    def broken_tokenizer(checkpoint: Path, folder: Path) -> None:
        copy_others(checkpoint, folder)
        (folder / "tokenizer.json").write_text("{")

    monkeypatch.setattr(from_checkpoint, "_copy_others", broken_tokenizer)
    with pytest.raises(ExportError, match="does not load again"):
        from_checkpoint.export(copy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.dist
@pytest.mark.slow
def test_large_models_are_written_in_several_files(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_checkpoint.SHARD_SIZE == "5GB"
    monkeypatch.setattr(from_checkpoint, "SHARD_SIZE", "5KB")
    from_checkpoint.export(copy, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
