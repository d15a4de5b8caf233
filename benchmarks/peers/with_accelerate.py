"""Contender: a loop of one's own around Accelerate, as the examples without Trainer have it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_scheduler

from benchmarks.peers.hugging_face import Counted, Task, written
from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload


def groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and normalisation weights do not decay."""
    named = list(model.named_parameters())
    plain = {name for name, _ in named if name.endswith("bias") or "norm" in name.lower()}
    return [
        {"params": [value for name, value in named if name not in plain], "weight_decay": weight_decay},
        {"params": [value for name, value in named if name in plain], "weight_decay": 0.0},
    ]


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, batches: Any, task: Task) -> int:
    """The mean loss, of equal weight for all batches, and texts; the number of tokens that were written."""
    model.eval()
    losses, tokens = [], 0
    for batch in batches:
        losses.append(accelerator.gather_for_metrics(model(**batch).loss.repeat(task.workload.batch_of_a_rank)))
        if task.workload.task == "translation":
            ids = accelerator.unwrap_model(model).generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=task.workload.new_tokens,
                num_beams=1,
            )
            ids = accelerator.pad_across_processes(ids, dim=1, pad_index=task.tokenizer.pad_token_id)
            ids = accelerator.gather_for_metrics(ids)
            texts = task.tokenizer.batch_decode(ids, skip_special_tokens=True)
            assert len(texts) == len(ids)
            tokens += written(ids.tolist(), task.tokenizer.eos_token_id, task.workload.new_tokens)
    torch.cat(losses).mean().item()
    model.train()
    return tokens


def main(workload: Workload, out: Path) -> None:
    accelerator, ticks = Accelerator(), Ticks()
    with accelerator.main_process_first():
        task = Task(workload)
    model: Any = task.model()
    counted = Counted(model, ticks)
    collator, size = task.collator(model), workload.batch_of_a_rank
    train = DataLoader(task.features["train"], batch_size=size, shuffle=True, collate_fn=collator)
    validation = DataLoader(task.features["validation"], batch_size=size, collate_fn=collator)
    optimizer = torch.optim.AdamW(groups(model, workload.weight_decay), lr=workload.learning_rate)
    scheduler = get_scheduler("constant", optimizer, num_training_steps=workload.updates * workload.ranks)
    model, optimizer, train, validation, scheduler = accelerator.prepare(model, optimizer, train, validation, scheduler)
    for _ in range(workload.evaluations):
        began = time.perf_counter()
        tokens = evaluate(accelerator, model, validation, task)
        ticks.evaluations.append((time.perf_counter() - began, len(task.features["validation"]), tokens))
    counted.restart()
    model.train()
    while len(ticks.times) < workload.updates:
        for batch in train:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), workload.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            counted.update()
            if len(ticks.times) == workload.save_after:
                accelerator.save_state(str(out.with_suffix(".state")))
            if len(ticks.times) == workload.updates:
                break
    ticks.loss = float(loss.detach())
    ticks.write(out)
    # A thread of gloo frees the last gradients' exchange, for which it needs Python's lock. If the model is freed just
    # then, it holds that lock and waits for the thread, for ever: shoal itself leaves like this too.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    time.sleep(0.1)


if __name__ == "__main__":
    main(Workload.read(sys.argv[1]), Path(sys.argv[2]))
