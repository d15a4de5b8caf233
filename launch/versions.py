"""Which packages compute a run, for its records."""

from __future__ import annotations

from importlib import metadata

RECORDED_PACKAGES = (
    *("shoal", "torch", "accelerate", "transformers", "datasets", "tokenizers", "safetensors", "numpy"),
    *("deepspeed", "peft", "torch_xla", "wandb"),
)


TORCH_XLA = "pip install 'torch_xla[tpu]==2.9.0' 'torch==2.9.0', which fit each other"
"""What to do where torch_xla is missing."""


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
