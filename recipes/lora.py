"""LoRA as a switch of every recipe: low-rank adapters (PEFT) are trained beside weights that stay as they are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from launch.errors import ConfigError
from launch.recipe import RecipeArgs, Texts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


class Lora(RecipeArgs):
    """Low-rank adapters: a weight W becomes W + alpha/r · B·A, and A and B alone are trained."""

    r: int = Field(8, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(16, ge=1)
    """The adapters' product is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of what the adapters are given."""
    target_modules: Texts = ()
    """Ends of the names of the layers that get adapters; none: what PEFT takes for this architecture; `all-linear`."""
    modules_to_save: Texts = ()
    """Modules that are trained whole besides; heads of a task and what the base model lacks are so in any case."""


def check_lora(from_scratch: bool) -> None:
    """See, without torch, that adapters can be had.

    Raises:
        ConfigError: PEFT is not installed, or the base would be random.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("recipe_args.lora: needs the package peft; pip install 'shoal[lora]'")
    if from_scratch:
        raise ConfigError(
            "recipe_args.lora: adapters belong to a base that is kept, but recipe_args.from_scratch=true makes "
            "a random one; set recipe_args.from_scratch=false"
        )


_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's names of tasks; a kind of model that it has none for, such as masked language models, is fine without."""

_HEADS = ("classifier", "score", "qa_outputs")
"""What transformers calls the heads of tasks."""


def add_adapters(model: PreTrainedModel, lora: Lora, kind: str, lacking: Iterable[str]) -> PreTrainedModel:
    """The model with adapters, its other weights frozen.

    `kind` is the class of transformers it was made by; `lacking` are names of weights that the base has not, which are
    trained whole, as the head of the task is.

    Raises:
        ConfigError: no such module, or one that cannot have adapters.
    """
    from peft import LoraConfig, get_peft_model

    _check_names(model, lora)
    new = {name.rpartition(".")[0] for name in lacking} - _tied_modules(model).keys()
    heads = {name for name, _ in model.named_children() if name in _HEADS and kind in _TASKS}
    adapters = LoraConfig(
        task_type=_TASKS.get(kind),
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.target_modules == (ALL_LINEAR,) else list(lora.target_modules) or None,
        modules_to_save=sorted({*lora.modules_to_save, *heads, *new}) or None,
    )
    try:
        with warnings.catch_warnings():
            # It sees by itself which layers keep their weights transposed.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted: PreTrainedModel = get_peft_model(model, adapters)
    except ValueError as error:
        if lora.target_modules:
            raise
        raise ConfigError(
            f"recipe_args.lora.target_modules: PEFT has no default for a {model.config.model_type} model; name some of "
            f"{', '.join(_short_names(model))}, or set {ALL_LINEAR}"
        ) from error
    return adapted


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    """Modules that can have adapters."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _short_names(model: torch.nn.Module) -> list[str]:
    """Ends of the names of linear modules, short, and without the number of their layer."""
    import torch

    names = [name for name, module in _layers(model).items() if not isinstance(module, torch.nn.Embedding)]
    ends = (name.split(".")[-2:] for name in names)
    return sorted({".".join(end[1:] if end[0].isdecimal() else end) for end in ends})


def _named(names: Iterable[str], end: str) -> list[str]:
    return [name for name in names if name == end or name.endswith(f".{end}")]


def _check_names(model: torch.nn.Module, lora: Lora) -> None:
    layers = _layers(model)
    every = [name for name, _ in model.named_modules()]
    targets = () if lora.target_modules == (ALL_LINEAR,) else lora.target_modules
    chosen = []
    for key, names, there in (("target_modules", targets, layers), ("modules_to_save", lora.modules_to_save, every)):
        for name in names:
            found = _named(there, name)
            if not found:
                raise ConfigError(
                    f"recipe_args.lora.{key}: a {type(model).__name__} has no module {name!r} for that; its linear "
                    f"modules are {', '.join(_short_names(model))}"
                )
            chosen += [(key, name, each) for each in found]
    tied = _tied_modules(model)
    for key, name, module in chosen:
        if module in tied:
            raise ConfigError(
                f"recipe_args.lora.{key}: {name} is one weight with {', '.join(sorted(tied[module] - {module}))} in a "
                f"{type(model).__name__}, and would be another afterwards; leave it out"
            )


def _tied_modules(model: torch.nn.Module) -> dict[str, set[str]]:
    """Of each module that shares a weight, all that do."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return {module: group for group in owners.values() if len(group) > 1 for module in group}
