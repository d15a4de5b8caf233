"""Text generated in evaluation: by all ranks, however the weights are sharded and wherever each text ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.engine.batching import Loader
from launch.engine.inference import Inference
from launch.engine.precision import Autocast
from launch.engine.scoring import Evaluation
from launch.recipe import Batch, Scoring
from launch.recipe import Inference as InferenceProtocol
from tests import tiny
from tests.gloo import run_ranks
from tests.test_engine_sharding import plan_for

ENDS = list(range(0, tiny.VOCABULARY, 4))
"""Tokens that end a text: so many that an untrained model meets one soon, in each text at another length."""


def translator() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(3)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    # With weights this large an untrained model does not say the same token over and over.
    settings = {"vocab_size": tiny.VOCABULARY, "initializer_factor": 5.0, "decoder_start_token_id": 0}
    config = T5Config(dropout_rate=0.0, **settings, **sizes)
    return T5ForConditionalGeneration(config)


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(map(len, samples))
    # On the left, for a decoder goes on after the last token.
    ids = torch.tensor([[*[0] * (longest - len(sample)), *map(int, sample)] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.clamp(max=5)}


def predict(kind: str, beams: int) -> Any:
    def predicted(model: InferenceProtocol, batch: Batch) -> tuple[torch.Tensor, list[Any]]:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = {"labels": batch["labels"]} if kind == "t5" else {"labels": batch["input_ids"]}
        loss = model(**given, **labels).loss * len(batch["labels"])
        ids = model.generate(
            **given, num_beams=beams, do_sample=False, max_new_tokens=9, eos_token_id=ENDS, pad_token_id=0
        )
        start = 0 if kind == "t5" else given["input_ids"].shape[1]
        return loss, [[token for token in row if token] for row in ids[:, start:].tolist()]

    return predicted


def generated(kind: str, strategy: str, world_size: int, rows: int, beams: int, folder: str) -> Any:
    from launch.engine.optim import make_optimizer
    from launch.engine.sharding import make_accelerator, spread

    plan = plan_for(strategy, world_size, Path(folder), "train.global_batch_size=12")
    accelerator = make_accelerator(plan)
    model = translator() if kind == "t5" else tiny.llama()
    model, _ = spread(accelerator, model, make_optimizer(model, plan.config.train, fused=False))

    def measure(predictions: list[Any]) -> dict[str, Any]:
        return {"tokens": sum(map(len, predictions)), "texts": predictions}

    autocast = Autocast("cpu", torch.float32)
    evaluation = Evaluation(
        accelerator,
        Loader(tiny.sequences(rows), collate),
        lambda model, batch: torch.zeros(()),
        lambda batch: len(batch["labels"]),
        2,
        scoring=Scoring(predict(kind, beams), measure),
        inference=lambda model: Inference(accelerator, model, autocast),
    )
    model.train()
    scores = [evaluation(model) for _ in range(2)]  # sharded weights must be as before afterwards
    assert scores[0].metrics == scores[1].metrics
    return scores[0].metrics, scores[0].details, model.training, scores[0].loss


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_text_is_that_of_one_process_whatever_shards_the_weights(kind: str, beams: int, tmp_path: Path) -> None:
    rows = 7
    [(metrics, details, _, loss)] = run_ranks(1, generated, kind, "single", 1, rows, beams, str(tmp_path))
    lengths = [len(text) for text in details["texts"]]
    assert len(lengths) == rows
    assert len(set(lengths)) > 1, "texts end at different lengths"
    for strategy, world_size in (("ddp", 3), ("fsdp2", 2), ("fsdp2", 3), ("zero3", 2)):
        by_rank = run_ranks(world_size, generated, kind, strategy, world_size, rows, beams, str(tmp_path))
        assert by_rank[0][1] == details, strategy
        for found, _, training, its_loss in by_rank:
            assert found == metrics
            assert its_loss == pytest.approx(loss, rel=1e-5)
            assert training
