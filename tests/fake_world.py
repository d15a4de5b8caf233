"""What FSDP2 needs on rank 0 of worlds that nobody has, told by torch itself: no memory, no network, no other ranks.

    python -m tests.fake_world 2 64 1024

Prints a line of JSON for each size. Tensors are fake (shapes without values), and so is the process group; torch's
tracker counts what forward, backward and step of two updates would have held at the peak.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

MODEL = {
    "model_type": "llama",
    "hidden_size": 250,  # which does not divide over the worlds
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "vocab_size": 8000,
    "tie_word_embeddings": False,
    "use_cache": False,
}
SAMPLES, TOKENS = 2, 256


def track(world_size: int) -> dict[str, Any]:
    """Bytes at the peak by kind, and numbers of all weights on this rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = dict(MODEL)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        # As Accelerate makes its units of a model whose head has a weight of its own.
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.model.embed_tokens, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = torch.randint(0, config["vocab_size"], (SAMPLES, TOKENS))
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((ids,))
        with tracker:
            for update in range(2):  # the first makes the optimizer's state
                loss = _loss(model, ids)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if update == 0:
                    tracker.reset_mod_stats()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
        numbers = sum(parameter.to_local().numel() for parameter in model.parameters())
    dist.destroy_process_group()
    return {"numbers": numbers, **{str(kind).rpartition(".")[2]: size for kind, size in peak.items()}}


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits
    return functional.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="sum")


if __name__ == "__main__":
    for size in map(int, sys.argv[1:]):
        print(json.dumps({"world_size": size, **track(size)}), flush=True)
