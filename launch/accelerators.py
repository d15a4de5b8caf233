"""The GPUs and TPUs of this host, from the files of their drivers: no device is touched, and nothing imported. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def gpu_name(root: Path = Path("/")) -> str:
    """Make of the first GPU; empty where the driver's files are not mounted into this container."""
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return ""


def count_gpus(environ: Mapping[str, str], root: Path = Path("/")) -> int:
    """NVIDIA GPUs visible to a process started now, from the driver's own files."""
    present = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    if not present:
        present = sum(1 for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    count = 0
    for name in (part.strip() for part in visible.split(",")):
        known = int(name) < present if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not known:  # CUDA ignores everything from the first invalid name on
            break
        count += 1
    return count


GOOGLE = "0x1ae0"

_TPUS = {
    "0x0027": ("TPU v2 or v3", 2),
    "0x005e": ("TPU v4", 1),
    "0x0062": ("TPU v5p", 1),
    "0x0063": ("TPU v5e", 1),
    "0x006f": ("TPU v6e", 1),
    "0x0076": ("TPU 7x", 1),
}
"""By the number of a chip on the PCI bus its make, and how many devices it is.

Sources: JAX, jax/_src/hardware_utils.py; torch_xla 2.9, _internal/tpu.py.
"""

_STATED = {"v2": "TPU v2", "v3": "TPU v3", "v4": "TPU v4", "v5litepod": "TPU v5e", "v5e": "TPU v5e", "v5p": "TPU v5p"}
"""Makes, by what TPU_ACCELERATOR_TYPE calls them; those that are not here are called so."""


def find_tpus(variables: Mapping[str, str], root: Path = Path("/")) -> tuple[int, str]:
    """TPU devices, and their make.

    PCI devices tell, which is where libtpu looks too; where a container hides the bus, device files do, or what the
    service says of its accelerator: then one is assumed, and the run will say how many it finds.
    """
    if variables.get("PJRT_DEVICE", "TPU").upper() != "TPU":
        return 0, ""
    chips = []
    for vendor in sorted((root / "sys/bus/pci/devices").glob("*/vendor")):
        if _line(vendor) == GOOGLE and (chip := _TPUS.get(_line(vendor.with_name("device")))):
            chips.append(chip)
    if chips:
        return sum(devices for _, devices in chips), chips[0][0]
    kind = variables.get("TPU_ACCELERATOR_TYPE", "").rpartition("-")[0]
    stated = _STATED.get(kind, f"TPU {kind}".strip())
    if files := [*(root / "dev").glob("accel[0-9]*")]:
        return len(files), stated
    if kind or variables.get("TPU_NAME") or "PJRT_DEVICE" in variables:
        return len([*(root / "dev/vfio").glob("[0-9]*")]) or 1, stated
    return 0, ""


def xla_on_cpu(variables: Mapping[str, str]) -> int:
    """XLA devices that PJRT_DEVICE=CPU makes of the CPU; 0 where it is not set so."""
    if variables.get("PJRT_DEVICE", "").upper() != "CPU":
        return 0
    stated = variables.get("CPU_NUM_DEVICES", "1")
    return int(stated) if stated.isdecimal() else 1


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip().lower()
    except OSError:
        return ""
