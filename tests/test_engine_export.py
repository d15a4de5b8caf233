"""Model folders: whole or not there, and a reload that is really compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from launch.assets import code_root
from launch.engine.export import write_model, write_probe
from launch.engine.exported import TOLERANCE, difference, load_exported, main, unlike, untied
from launch.recipe import Prepared
from recipes.causal_lm import collate, count, loss
from tests import tiny


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{index}": index for index in range(tiny.VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), unk_token="w0")


@pytest.fixture(params=[tiny.gpt2, tiny.llama], ids=["tied", "untied"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """The live model, its folder, and the probe."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(request.param())
    samples: Any = tiny.sequences(4)
    prepared = Prepared(lambda: model, tokenizer(), samples, samples, collate, loss, count)
    sums = write_model(accelerator, model, prepared.tokenizer, tmp_path / "export")
    write_probe(accelerator, model, prepared, sums, tmp_path / "probe.safetensors")
    return model, tmp_path / "export", tmp_path / "probe.safetensors"


def test_a_written_model_comes_back_the_same(exported: tuple[Any, Path, Path]) -> None:
    live, folder, probe = exported
    assert not folder.with_name("export.writing").exists()
    loaded, loaded_tokenizer = load_exported(folder)
    assert difference(loaded, probe, "cpu") <= TOLERANCE
    assert unlike(loaded, probe) == []
    live_state, state = live.state_dict(), loaded.state_dict()
    assert set(state) == set(live_state)
    assert all(torch.equal(state[name], live_state[name]) for name in state)
    assert loaded_tokenizer.get_vocab() == tokenizer().get_vocab()


def test_the_folder_can_be_used_in_a_fresh_process(exported: tuple[Any, Path, Path]) -> None:
    _, folder, probe = exported
    check = [sys.executable, "-m", "launch.engine.exported", "check", str(folder), str(probe), "cpu", ""]
    done = subprocess.run(check, cwd=code_root(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["difference"] <= TOLERANCE


@pytest.mark.parametrize("which", ["first", "last"])
def test_one_changed_weight_is_noticed(exported: tuple[Any, Path, Path], which: str) -> None:
    _, folder, probe = exported
    path = folder / "model.safetensors"
    state = load_file(path)
    names = [name for name in sorted(state) if state[name].dim() == 2 and "wpe" not in name]
    name = names[0 if which == "first" else -1]
    state[name][1, 0] += 0.1
    save_file(state, path, metadata={"format": "pt"})
    loaded, _ = load_exported(folder)
    assert difference(loaded, probe, "cpu") > TOLERANCE
    assert unlike(loaded, probe) == [name]


def test_missing_weights_are_noticed(exported: tuple[Any, Path, Path]) -> None:
    """transformers fills what is missing with random weights and a warning."""
    _, folder, probe = exported
    path = folder / "model.safetensors"
    state = load_file(path)
    del state[max(name for name in state if "mlp" in name and name.endswith("weight"))]
    save_file(state, path, metadata={"format": "pt"})
    assert difference(load_exported(folder)[0], probe, "cpu") > TOLERANCE


def test_what_an_interrupted_writing_left_is_written_over(tmp_path: Path) -> None:
    left = tmp_path / "export.writing"
    left.mkdir()
    (left / "half.bin").write_text("half")
    write_model(Accelerator(cpu=True), tiny.gpt2(), tokenizer(), tmp_path / "export")
    assert not left.exists()
    assert not (tmp_path / "export/half.bin").exists()


def test_a_tie_that_is_lost_is_noticed_by_storage(exported: tuple[Any, Path, Path]) -> None:
    live, folder, probe = exported
    loaded, _ = load_exported(folder)
    assert untied(loaded, probe) == []
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach().clone())  # equal, but another storage
    tied = live.get_input_embeddings().weight is live.get_output_embeddings().weight
    assert untied(loaded, probe) == (["transformer.wte.weight"] if tied else [])
    assert difference(loaded, probe, "cpu") <= TOLERANCE, "its logits do not show it"


def test_a_model_that_writes_no_text_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    GPT2ForSequenceClassification(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["continue", str(tmp_path), "a", "3", "0", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"shoal: {tmp_path}: a GPT2ForSequenceClassification writes no text\n")
