"""Tiny models and samples that tests train on; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def gpt2() -> Any:
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )


def llama() -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )


def sequences(count: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Token ids of very different lengths; every fifth has a single token, hence no target."""
    random = np.random.RandomState(seed)
    lengths = [1 if index % 5 == 3 else int(random.randint(2, 30)) for index in range(count)]
    return [random.randint(1, VOCABULARY, length).astype(np.int32) for length in lengths]


def lengths(samples: Any) -> np.ndarray[Any, Any]:
    """As `Prepared.lengths` tells them."""
    return np.array([len(sample) for sample in samples])


def reference_loss(model: Any, samples: list[np.ndarray[Any, Any]]) -> torch.Tensor:
    """Mean cross-entropy over all targets, one sample at a time, without padding: the definition."""
    summed, targets = torch.zeros(()), 0
    for sample in samples:
        ids = torch.from_numpy(sample.astype(np.int64))[None]
        log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        summed = summed - log_probabilities.gather(1, ids[0, 1:, None]).sum()
        targets += len(sample) - 1
    return summed / targets
