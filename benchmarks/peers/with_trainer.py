"""Contender: transformers.Trainer, with the settings that an example would state."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.peers.hugging_face import Counted, Task, written
from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload


class Notes(TrainerCallback):
    """Notes when updates are over."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self._counted.update()


def settings(workload: Workload, out: Path) -> dict[str, Any]:
    """What TrainingArguments are given, of every kind."""
    return {
        "output_dir": str(out.with_suffix(".trainer")),
        "max_steps": workload.updates,
        "per_device_train_batch_size": workload.batch_of_a_rank,
        "per_device_eval_batch_size": workload.batch_of_a_rank,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": workload.weight_decay,
        "max_grad_norm": workload.max_grad_norm,
        "use_cpu": True,
        "ddp_backend": "gloo" if workload.ranks > 1 else None,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        **({"save_steps": workload.save_after} if workload.save_after else {"save_strategy": "no"}),
    }


def arguments(workload: Workload, out: Path, by_length: bool) -> TrainingArguments:
    writes = workload.task == "translation"
    kind = Seq2SeqTrainingArguments if writes else TrainingArguments
    more: dict[str, Any] = {"predict_with_generate": True} if writes else {}
    if by_length:
        known = {each.name for each in dataclasses.fields(TrainingArguments)}
        old = "group_by_length" in known
        more |= {"group_by_length": True} if old else {"train_sampling_strategy": "group_by_length"}
    return kind(**settings(workload, out), **more)


def evaluate(trainer: Trainer, task: Task, ticks: Ticks) -> None:
    """As often as asked for; what is written is counted by a look at it, outside the time."""
    workload, rows = task.workload, task.features["validation"]
    for _ in range(workload.evaluations):
        began, tokens = time.perf_counter(), 0
        if workload.task == "translation":
            how = GenerationConfig(max_new_tokens=workload.new_tokens, num_beams=1)
            found = trainer.predict(rows, generation_config=how).predictions
            seconds = time.perf_counter() - began
            tokens = written(found.tolist(), task.tokenizer.eos_token_id, workload.new_tokens)
        else:
            trainer.evaluate(rows)
            seconds = time.perf_counter() - began
        ticks.evaluations.append((seconds, len(rows), tokens))


def main(workload: Workload, out: Path, by_length: bool) -> None:
    task, ticks = Task(workload), Ticks()
    model: PreTrainedModel = task.model()
    counted = Counted(model, ticks)
    kind = Seq2SeqTrainer if workload.task == "translation" else Trainer
    trainer = kind(
        model=model,
        args=arguments(workload, out, by_length),
        train_dataset=task.features["train"],
        data_collator=task.collator(model),
        callbacks=[Notes(counted)],
    )
    evaluate(trainer, task, ticks)
    counted.restart()
    ticks.loss = trainer.train().training_loss
    ticks.write(out)


if __name__ == "__main__":
    main(Workload.read(sys.argv[1]), Path(sys.argv[2]), "by-length" in sys.argv[3:])
