"""Which packages compute a run, for its records."""

from __future__ import annotations

from importlib import metadata

RECORDED_PACKAGES = (
    *("shoal", "torch", "accelerate", "transformers", "datasets", "tokenizers", "safetensors", "numpy"),
    *("deepspeed", "peft", "wandb"),
)


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
