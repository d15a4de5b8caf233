"""The model card of an export: what was trained on what, how, and how well it does, from the facts of its run."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.plan import Plan
from launch.report.settings import settings
from launch.sections import RunConfig
from launch.words import NOTHING, roughly

CARD = "README.md"
"""Its name in the exported folder, as the Hub wants it."""

TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForConditionalGeneration": ("text2text-generation", "AutoModelForSeq2SeqLM"),
}
"""By the end of an architecture's name: the Hub's name of the task, and what loads the model."""

RECIPE_TASKS = {"translation": "translation", "summarization": "summarization"}
"""Where the architecture alone does not tell."""


@dataclass(frozen=True)
class ModelFacts:
    """What a card is written from."""

    plan: Plan
    result: Mapping[str, Any]
    """As in result.json."""
    data: Mapping[str, Any] | None
    """As in data.json."""
    versions: Mapping[str, str]
    architecture: str
    """Of the exported model, as its config.json names it."""
    adapter: bool = False
    """Whether it is an adapter alone."""

    @property
    def config(self) -> RunConfig:
        """The settings of the run."""
        return self.plan.config

    @property
    def task(self) -> tuple[str | None, str]:
        """The Hub's name of the task, if it has one, and the class that loads the model."""
        found = (each for end, each in TASKS.items() if self.architecture.endswith(end))
        task, loader = next(found, (None, "AutoModel"))
        return RECIPE_TASKS.get(self.config.recipe, task), loader

    @property
    def name(self) -> str:
        """Of the run."""
        return Path(self.plan.run_folder).name

    @property
    def base(self) -> str | None:
        """The model on the Hub that the run began with; None where there is none."""
        args = self.config.recipe_args
        return None if args.get("from_scratch") else _on_hub(args.get("model"))

    @property
    def dataset(self) -> str | None:
        """The data on the Hub that it was trained on."""
        return _on_hub(self.config.recipe_args.get("dataset"))

    @property
    def metrics(self) -> dict[str, float]:
        """Of the validation data, after training."""
        found = self.result["validation"].get("after", {})
        return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def write_card(folder: Path, facts: ModelFacts) -> None:
    """Write the card into an exported folder, in the place of any that a library has put there."""
    (folder / CARD).write_text(model_card(facts), encoding="utf-8")


def facts_of(folder: Path, plan: Plan, result: Mapping[str, Any], versions: Mapping[str, str]) -> ModelFacts:
    """What the card of an exported folder is written from; an adapter has no config.json, so its model's counts."""
    run, adapter = Path(plan.run_folder), (folder / "adapter_config.json").is_file()
    config = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
    data = run / "data.json"
    return ModelFacts(
        plan,
        result,
        json.loads(data.read_text(encoding="utf-8")) if data.is_file() else None,
        versions,
        (config.get("architectures") or [""])[0],
        adapter,
    )


def model_card(facts: ModelFacts) -> str:
    """A card in Markdown whose head is metadata as the Hub reads it."""
    return f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(_sections(facts)) + "\n"


def _metadata(facts: ModelFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task, _ = facts.task
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=facts.dataset or "other",
            dataset_name=facts.dataset or _data_in_words(facts.config),
            dataset_split="validation",
            metric_type=name,
            metric_value=value,
        )
        for name, value in facts.metrics.items()
        if not math.isnan(value)  # which the Hub does not take
    ]
    data = ModelCardData(
        model_name=facts.name,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=task,
        base_model=facts.base,
        license=facts.config.save.license,
        datasets=[facts.dataset] if facts.dataset else None,
        metrics=[name for name in facts.metrics if name != "loss"] or None,
        tags=["shoal", *(["lora"] if facts.adapter else [])],
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _sections(facts: ModelFacts) -> Iterator[str]:
    yield f"# {facts.name}"
    yield _beginning(facts)
    yield "## Use\n\n" + _use(facts)
    if facts.metrics:
        yield "## Evaluation\n\n" + _evaluation(facts)
    yield "## Data\n\n" + _data(facts)
    yield "## Training\n\n" + _table(("what", "value"), _training(facts))
    yield "## Once more\n\n" + _again(facts)


def _beginning(facts: ModelFacts) -> str:
    what = "A LoRA adapter" if facts.adapter else "A model"
    model, begun = facts.config.recipe_args.get("model"), "trained from scratch"
    if facts.base:
        begun = f"fine-tuned from [{facts.base}](https://huggingface.co/{facts.base})"
    elif not facts.config.recipe_args.get("from_scratch") and model and Path(str(model)).is_absolute():
        begun = f"fine-tuned from the local model `{Path(str(model)).name}`"
    parameters = facts.result["parameters"]
    counted = f"{parameters['all']:,} parameters"
    if parameters["trainable"] != parameters["all"]:
        counted += f", {parameters['trainable']:,} of them trained"
    lacking = "" if facts.config.save.license else " Its licence has not been stated."
    return f"{what} ({facts.architecture or 'unknown architecture'}, {counted}), {begun} with shoal.{lacking}"


def _use(facts: ModelFacts) -> str:
    _, loader = facts.task
    if facts.adapter:
        lines = [
            "from peft import AutoPeftModel",
            "",
            'model = AutoPeftModel.from_pretrained("path or name of this folder")',
        ]
    else:
        lines = [
            f"from transformers import AutoTokenizer, {loader}",
            "",
            'folder = "path or name of this folder"',
            f"model = {loader}.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _evaluation(facts: ModelFacts) -> str:
    before = facts.result["validation"].get("before", {})
    rows = [(name, _number(before.get(name)), _number(value)) for name, value in facts.metrics.items()]
    samples = _samples(facts, "validation")
    on = f"On {samples:,} validation samples:" if samples else "On the validation data:"
    return f"{on}\n\n" + _table(("metric", "before training", "after"), rows)


def _data(facts: ModelFacts) -> str:
    told = _data_in_words(facts.config)
    counts = [(name, _samples(facts, name)) for name in ("training", "validation")]
    sizes = " and ".join(f"{count:,} {name} samples" for name, count in counts if count)
    return f"{told[0].upper()}{told[1:]}" + (f": {sizes}." if sizes else ".")


def _training(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    train, batch, processes = facts.config.train, facts.plan.batch, facts.plan.processes
    yield "recipe", Path(facts.config.recipe).name
    yield "updates", f"{facts.result['updates']:,}"
    parts = f"{processes.replicas} {processes.noun}"
    sizes = f"micro-batch {batch.micro_batch_size} × accumulation {batch.accumulation} × {parts}"
    yield "global batch", f"{batch.global_batch_size} samples: {sizes}"
    yield "optimizer", f"{train.optimizer}, weight decay {train.weight_decay:g}"
    yield "learning rate", f"{train.learning_rate:g}, {train.schedule} schedule"
    yield "gradient norm", f"at most {train.max_grad_norm:g}" if train.max_grad_norm else "not limited"
    yield "precision", train.precision
    yield "seed", str(train.seed)
    device = processes.device_name or processes.device.upper()
    yield "hardware", f"{processes.replicas} × {device}, strategy {processes.strategy}"
    yield "time", roughly(sum(facts.result["seconds"].values()))
    names = ("shoal", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    yield "software", ", ".join(f"{name} {facts.versions[name]}" for name in names if name in facts.versions)


def _again(facts: ModelFacts) -> str:
    """The command, with what was set otherwise than usual; without the folders of whoever ran it."""
    told = [
        f"{setting.key}={json.dumps(_without_folder(setting.values[0]), ensure_ascii=False)}"
        for setting in settings([facts.plan])
        if setting.unusual and setting.key.partition(".")[0] in ("recipe_args", "train", "eval")
    ]
    command = shlex.join(["shoal", "run", _without_folder(facts.config.recipe), *told])
    return f"With the files that it names beside it:\n\n```console\n{command}\n```"


def _without_folder(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folder(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _data_in_words(config: RunConfig) -> str:
    args = config.recipe_args
    if name := args.get("dataset"):
        return f"the dataset {_without_folder(name)}"
    if isinstance(files := args.get("train_files"), list) and files:
        return "the files " + ", ".join(Path(str(file)).name for file in files)
    return f"the embedded data of the recipe {Path(config.recipe).stem}" if "dataset" in args else "data of its own"


def _on_hub(name: Any) -> str | None:
    """A name that the Hub may have: not a folder, nor what stands for something in a recipe."""
    if not isinstance(name, str) or Path(name).is_absolute() or name in ("embedded", "minilm"):
        return None
    return name


def _samples(facts: ModelFacts, split: str) -> int | None:
    found = ((facts.data or {}).get("splits") or {}).get(split) or {}
    return found.get("samples")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else NOTHING


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
