"""Makes a plain Hugging Face folder of a checkpoint, and sees that what loads from it is what is stored.

python -m launch.engine.from_checkpoint CHECKPOINT FOLDER

Prints one JSON object: `problem`, or how much was written and compared.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from launch.engine.sharding import tied_names
from launch.engine.shards import Stored
from launch.errors import ExportError

SHARD_SIZE = "5GB"
"""Largest file of weights: what most hosts and file systems take without a word."""

STATE_FILES = ("state.json", "state-*.safetensors", "manifest.json", "COMPLETE", "config.json")
"""Of a checkpoint, what is not copied; `config.json` is written anew."""


def export(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write the model of a checkpoint to `folder`, whole or not at all; what was compared.

    Raises:
        ExportError: it cannot be made, or does not load as what is stored.
    """
    stored = Stored(checkpoint)
    model_class, config = _model_class(checkpoint)
    with torch.device("meta"):  # names, shapes and ties alone
        bare = model_class(config)
    weights = {name: _in_fp32(stored.whole(key)) for key, name in _stored_names(stored)}
    tied = tied_names(bare)
    _refuse_others(checkpoint, bare, weights)
    aside = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        # Tied names share one tensor, so that it is saved once.
        shared = {name: weights[group[0]] for group in _stored_first(tied, weights) for name in group}
        bare.save_pretrained(aside, state_dict={**weights, **shared}, max_shard_size=SHARD_SIZE)
        _copy_others(checkpoint, aside)
        _compare(aside, model_class, weights, tied)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    parameters = sum(value.numel() for value in weights.values())
    return {"tensors": len(weights), "parameters": parameters, "tied": tied}


def _model_class(checkpoint: Path) -> tuple[Any, Any]:
    """The class that the configuration names, and the configuration."""
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
    except (ValueError, KeyError, OSError) as error:
        kind = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise ExportError(_foreign(checkpoint, f"model_type {kind!r}")) from error
    name = (config.architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ExportError(_foreign(checkpoint, f"architecture {name!r}"))
    return found, config


def _foreign(checkpoint: Path, what: str) -> str:
    return (
        f"{checkpoint}: transformers {transformers.__version__} has no {what}, so no plain Hugging Face folder can be "
        "made; finish the run with save.export=true, where the recipe's own class writes it"
    )


def _stored_names(stored: Stored) -> list[tuple[str, str]]:
    """Keys of weights and buffers in the checkpoint, and their names in the model."""
    return [(key, key.partition("/")[2]) for key in stored.shapes if key.startswith(("model/", "buffer/"))]


def _in_fp32(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def _refuse_others(checkpoint: Path, bare: Any, weights: dict[str, torch.Tensor]) -> None:
    """See that the class has the tensors that are stored, in their shapes; of tied ones the first."""
    parameters = dict(bare.named_parameters())
    every = {name for name, _ in bare.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in bare.state_dict().items() if name not in every}
    wanted = {name: tuple(value.shape) for name, value in {**parameters, **buffers}.items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        raise ExportError(
            f"{checkpoint}: holds another model than the {type(bare).__name__} of its config.json "
            f"({_told(wanted, found)}); finish the run with save.export=true, where the recipe's own class writes it"
        )


def _told(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """How two sets of named shapes differ."""
    if missing := sorted(wanted.keys() - found.keys()):
        return f"without {', '.join(missing[:3])}"
    if more := sorted(found.keys() - wanted.keys()):
        return f"with {', '.join(more[:3])} besides"
    name = next(name for name in sorted(wanted) if wanted[name] != found[name])
    return f"{name} has shape {found[name]} instead of {wanted[name]}"


def _stored_first(groups: list[list[str]], weights: dict[str, torch.Tensor]) -> list[list[str]]:
    return [sorted(group, key=lambda name: name not in weights) for group in groups]


def _copy_others(checkpoint: Path, folder: Path) -> None:
    """Tokenizer and generation settings, as the run had them."""
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in STATE_FILES):
            shutil.copy2(path, folder / path.name)


def _compare(folder: Path, model_class: Any, weights: dict[str, torch.Tensor], tied: list[list[str]]) -> None:
    """Load the folder as any user would, and compare every tensor with the stored one, bit for bit."""
    try:
        model = model_class.from_pretrained(folder, dtype=torch.float32)
        transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ExportError(f"{folder}: does not load again: {type(error).__name__}: {error}") from error
    names = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    found = {name: value for name, value in state.items() if name in names or name not in every}
    shapes, expected = ({name: tuple(value.shape) for name, value in each.items()} for each in (found, weights))
    if shapes != expected:
        raise ExportError(f"{folder}: what loads is another model ({_told(expected, shapes)})")
    for name, value in weights.items():
        if not torch.equal(_bits(found[name]), _bits(value)):
            raise ExportError(f"{folder}: {name} loads with other values than those that are stored")
    if tied_names(model) != tied:
        raise ExportError(f"{folder}: weights that were one are not any more: {tied} became {tied_names(model)}")


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def main(arguments: list[str]) -> None:
    """Answer one call from the command line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint, folder = map(Path, arguments)
    try:
        answer: dict[str, Any] = {"problem": None, **export(checkpoint, folder)}
    except ExportError as error:
        answer = {"problem": str(error)}
    except OSError as error:
        answer = {"problem": f"{folder}: cannot be written: {error.strerror or error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
