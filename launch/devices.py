"""What is known of devices by their names: memory and arithmetic, for plans and estimates. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launch.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Kind:
    """A make of GPU or TPU, or a CPU."""

    name: str
    memory_bytes: int
    """As vendors state it, in 10⁹ bytes."""
    low: float = 0.0
    """Operations per second in bf16 (fp16 where there is no bf16), dense, in 10¹²; 0: not known."""
    full: float = 0.0
    """The same in fp32, without TF32."""

    @property
    def low_format(self) -> str:
        """What `low` is of, as `train.precision` names it; empty where it is not known."""
        if not self.low:
            return ""
        return "fp16" if self.name.startswith(("T4-", "V100-")) else "bf16"


_KINDS = (
    Kind("A100-40GB", 40 * GB, 312, 19.5),
    Kind("A100-80GB", 80 * GB, 312, 19.5),
    Kind("A10-24GB", 24 * GB, 125, 31.2),
    Kind("A10G-24GB", 24 * GB, 70, 31.5),
    Kind("B200-180GB", 180 * GB, 2250, 75),
    Kind("H100-80GB", 80 * GB, 989, 67),
    Kind("H200-141GB", 141 * GB, 989, 67),
    Kind("L4-24GB", 24 * GB, 121, 30.3),
    Kind("L40S-48GB", 48 * GB, 362, 91.6),
    Kind("RTX3090-24GB", 24 * GB, 71, 35.6),
    Kind("RTX4090-24GB", 24 * GB, 165, 82.6),
    Kind("TPUV4-32GB", 32 * GB, 275),
    Kind("TPUV5E-16GB", 16 * GB, 197),
    Kind("TPUV5P-95GB", 95 * GB, 459),
    Kind("TPUV6E-32GB", 32 * GB, 918),
    Kind("T4-16GB", 16 * GB, 65, 8.1),
    Kind("V100-16GB", 16 * GB, 125, 15.7),
    Kind("V100-32GB", 32 * GB, 125, 15.7),
)
"""Vendors' data sheets, of the variants with the faster links; dense figures, not those with sparsity."""

CPU_CORE = 0.04
"""10¹² operations per second that a core is taken to do in training; cores with AVX-512 were seen to do twice that."""

UTILISATION = 0.4
"""Share of a GPU's arithmetic that training is taken to reach."""


def kind_of(gpu_name: str) -> Kind | None:
    """The kind that a driver's name stands for, such as NVIDIA H100 80GB HBM3; None where it is not known."""
    words = re.sub(r"[^A-Z0-9]+", " ", gpu_name.upper()).replace("RTX ", "RTX").replace("TPU ", "TPU").split()
    found = [kind for kind in _KINDS if kind.name.split("-")[0] in words]
    if len(found) > 1:
        found = [kind for kind in found if any(word in words for word in (kind.name.split("-")[1],))]
    return found[0] if len(found) == 1 else None


def peak_of(gpu_name: str, precision: str) -> float | None:
    """Dense operations per second of a GPU in products of numbers of a precision; None where it is not known."""
    kind = kind_of(gpu_name)
    stated = 0.0 if kind is None else kind.full if precision == "fp32" else kind.low
    return stated * 1e12 or None


@dataclass(frozen=True)
class Devices:
    """Devices of a node that is not this one, as `--on` names them."""

    number: int
    kind: Kind

    @property
    def on_xla(self) -> bool:
        """Whether they are TPUs."""
        return self.kind.name.startswith("TPU")

    @property
    def on_cpu(self) -> bool:
        """Whether they are processes on a CPU, each with that much memory."""
        return self.kind.name.startswith(CPU)


CPU = "cpu"


def read_devices(text: str) -> Devices:
    """`8xH100-80GB`; a kind that is not known needs its memory, as in `4xMI210-64GB`; `2xcpu-16GB` are processes.

    Raises:
        ConfigError: it cannot be understood.
    """
    match = re.fullmatch(r"(\d+) *[xX×] *([A-Za-z0-9 ]+?)(?:-(\d+) *GB)?", text.strip())
    if not match or not int(match[1]):
        raise ConfigError(
            f"command line: --on = {text}: is to be a number of devices and their kind, such as 8xH100-80GB or "
            "2xcpu-16GB"
        )
    number, family = int(match[1]), match[2].replace(" ", "")
    alike = [kind for kind in _KINDS if kind.name.split("-")[0] == family.upper()]
    if match[3]:
        memory = int(match[3]) * GB
        same = next((kind for kind in alike if kind.memory_bytes == memory), None)
        return Devices(number, same or Kind(f"{family}-{match[3]}GB", memory))
    if len(alike) == 1:
        return Devices(number, alike[0])
    if alike:
        hint = f"there are {' and '.join(f'{number}x{kind.name}' for kind in alike)}"
    else:
        families = ", ".join(dict.fromkeys(kind.name.split("-")[0] for kind in _KINDS))
        hint = f"say how much memory each has, as in {number}x{family}-48GB; known without that are {families}"
    raise ConfigError(f"command line: --on = {text}: {hint}")
