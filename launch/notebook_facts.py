"""Where the kernel of a notebook is, and what it has: Colab or Kaggle, TPU, GPU or CPU, and which versions.

Read from variables, files and package records alone: nothing is imported, and no device is started, for a TPU serves
one process at a time, and that is to be the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

from launch.disk import size_in_words
from launch.report.markup import text
from launch.topology import Machine, notebook_variables, read_machine
from launch.versions import versions


@dataclass(frozen=True)
class Facts:
    """What a kernel has; `print` it, or let it be the last expression of a cell."""

    service: str
    """Colab or Kaggle; plain elsewhere."""
    accelerator: str
    """TPU, GPU or CPU."""
    device: str
    """Make and number of the accelerators, or the number of cores."""
    cores: int
    memory_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of Python, and of the packages that compute a run, as they are installed."""

    @property
    def where(self) -> str:
        """Both in words: `Colab TPU`, `Kaggle GPU`, `plain CPU`."""
        return f"{self.service} {self.accelerator}"

    def _rows(self) -> list[tuple[str, str]]:
        memory = size_in_words(self.memory_bytes) if self.memory_bytes else "not known"
        shown = [("where", self.where), ("device", self.device), ("cores", str(self.cores)), ("memory", memory)]
        return shown + list(self.versions.items())

    def __str__(self) -> str:
        return "\n".join(f"{name:<14} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in self._rows())
        return f"<table>{rows}</table>"


def where() -> str:
    """The service and the accelerator of this kernel: `Colab TPU`, `Kaggle GPU`, `plain CPU`, and so on."""
    return facts().where


def facts() -> Facts:
    """What this kernel has; takes milliseconds and starts no device."""
    installed = {"Python": platform.python_version(), **versions()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        installed["libtpu"] = metadata.version("libtpu")
    return facts_of(notebook_variables(), read_machine(), installed, _colab_is_there())


def _colab_is_there() -> bool:
    """Whether google.colab can be imported; its kernels have it in hand already."""
    if "google.colab" in sys.modules:
        return True
    try:
        return importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):  # there is no `google`, or one that is no package
        return False


def facts_of(
    variables: Mapping[str, str],
    machine: Machine,
    installed: Mapping[str, str],
    colab: bool,
) -> Facts:
    """What a kernel with these variables and versions has, on this `machine`.

    `colab` says whether google.colab is there.
    """
    kaggle, of_colab = (any(name.startswith(prefix) for name in variables) for prefix in ("KAGGLE_", "COLAB_"))
    service = "Kaggle" if kaggle else "Colab" if colab or of_colab else "plain"
    if machine.tpus:
        accelerator, device = "TPU", f"{machine.tpus} × {machine.tpu_name}"
    elif machine.gpus:
        memory = f" with {size_in_words(machine.gpu_memory_bytes)}" if machine.gpu_memory_bytes else ""
        accelerator, device = "GPU", f"{machine.gpus} × {machine.gpu_name or 'of unknown make'}{memory}"
    else:
        accelerator, device = "CPU", f"{machine.cores} cores"
    return Facts(service, accelerator, device, machine.cores, machine.memory_bytes, installed)
