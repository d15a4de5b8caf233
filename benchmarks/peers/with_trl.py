"""Contender: SFTTrainer of TRL, which tokenises, masks the prompts, and packs rows if it is told to.

Its own defaults compute in bfloat16 and compute activations twice; here it does neither, as the other contenders.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.hugging_face import PROMPT, Counted, rows_of
from benchmarks.peers.ticks import Ticks
from benchmarks.peers.with_trainer import Notes, settings
from benchmarks.peers.workload import Workload


def laid_out(row: dict[str, str]) -> dict[str, str]:
    """As the others have it; TRL itself puts the end of the text there."""
    return {"prompt": PROMPT.format(row["prompt"]), "completion": f" {row['completion']}"}


def main(workload: Workload, out: Path, packed: bool) -> None:
    ticks = Ticks()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workload.model))
    counted = Counted(model, ticks)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **settings(workload, out),
            max_length=workload.length,
            packing=packed,
            completion_only_loss=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=rows_of(workload, "train").map(laid_out),
        processing_class=AutoTokenizer.from_pretrained(workload.model),
        callbacks=[Notes(counted)],
    )
    ticks.loss = trainer.train().training_loss
    ticks.write(out)


if __name__ == "__main__":
    main(Workload.read(sys.argv[1]), Path(sys.argv[2]), "packed" in sys.argv[3:])
