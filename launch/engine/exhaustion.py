"""What is told where a rank runs out of memory: who holds it, in `profile/` of the run folder and in a line."""

from __future__ import annotations

import json
import re
import resource
import socket
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from launch.disk import size_in_words
from launch.engine.holding import Held, find_holders
from launch.engine.memory import PeakMemory
from launch.out_of_memory import limit_around

MOST_SHOWN = 30
"""Tensors in the file, those that are alike together: the largest ones."""

MOST_FRAMES = 12
"""Lines of the program in the file: the last ones before the error."""

NOTE = (
    "bytes are of whole storages, each counted once; what compiled code alone holds (gradients on their way, "
    "workspaces of libraries) is not seen"
)

TOLD = ("can't allocate memory", "out of memory", "RESOURCE_EXHAUSTED", "bad_alloc")
"""What is said for lack of memory where there is no exception of its own for it: by the CPU's allocator
(c10/core/impl/alloc_cpu.cpp), CUDA's libraries and MPS, XLA, and C++.
"""

ASKED = re.compile(r"(?:allocat(?:e|ing)|reserve) ([\d.]+) ?(bytes|[KMGT]i?B?)\b", re.IGNORECASE)
"""How much was asked for, in the words of torch, numpy and XLA; all their units are powers of 1024."""


def is_exhaustion(error: BaseException) -> bool:
    """Whether memory ran out, of whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TOLD)


def asked_bytes(error: BaseException) -> int | None:
    """How many bytes were asked for in vain; None where the error does not say it."""
    found = ASKED.search(str(error))
    if not found:
        return None
    unit = found[2][0].upper()
    return int(float(found[1]) * (1024 ** " KMGT".index(unit) if unit in "KMGT" else 1))


def holders_file(folder: Path, rank: int) -> Path:
    """Where it is written in a run folder."""
    return folder / "profile" / f"memory-rank-{rank}.json"


def write_holders(
    folder: Path,
    rank: int,
    error: BaseException,
    device: str,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    update: int | None = None,
) -> str:
    """Write who holds the memory of this rank's `device` after `error`; what took most, in a line for the user.

    Never raises: the error is what the user must hear of.
    """
    try:
        ran_out = "cpu" if isinstance(error, MemoryError) or "CPUAllocator" in str(error) else device
        holders = find_holders(model, optimizer, error)
        found = holders.all()
        sums: dict[str, Counter[str]] = {}
        for held in found:
            sums.setdefault(held.tensor.device.type, Counter())[held.kind] += held.bytes
        memory, path = _memory(device), holders_file(folder, rank)
        content = {
            "rank": rank,
            "host": socket.gethostname(),
            "after_update": update,
            "error": f"{type(error).__name__}: {error}",
            "ran_out": ran_out,
            "asked_bytes": asked_bytes(error),
            "asked_in": [f"{each.filename}:{each.lineno} in {each.name}" for each in _lines(error)],
            **{f"memory_of_{of}": facts for of, facts in memory.items()},
            "seen_bytes": {where: dict(by_kind.most_common()) for where, by_kind in sums.items()},
            "unread_tensors": holders.unread,
            "note": NOTE,
            "largest": _largest(found),
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(_readable(content), encoding="utf-8")
        kinds = sums.get(ran_out, Counter()).most_common()
        seen = ", ".join(f"{kind} {size_in_words(size)}" for kind, size in kinds) or "nothing"
        return f"seen on {ran_out}: {seen}; {_whole(ran_out, memory)}; largest tensors: {path}"
    except Exception as problem:
        return f"warning: what held the memory could not be written: {type(problem).__name__}: {problem}"


def _largest(found: list[Held]) -> list[dict[str, Any]]:
    """The largest, those that are alike together: a model of many layers has many such activations."""
    alike: dict[str, list[Held]] = {}
    for held in found:
        alike.setdefault(json.dumps(held.as_json()), []).append(held)
    ranked = sorted(alike.values(), key=lambda group: -sum(held.bytes for held in group))
    return [{"count": len(group), **group[0].as_json()} for group in ranked[:MOST_SHOWN]]


def _memory(device: str) -> dict[str, dict[str, int | None]]:
    """Bytes that the process, its machine, its control group and its device have and use, as far as they are told."""
    process, machine, group = psutil.Process().memory_info(), psutil.virtual_memory(), limit_around()
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    found: dict[str, dict[str, int | None]] = {
        "process": {
            "resident": process.rss,
            "peak": PeakMemory(torch.device("cpu")).read(),
            "address_space": process.vms,
            "address_space_limit": None if limit == resource.RLIM_INFINITY else limit,
        },
        "machine": {"total": machine.total, "available": machine.available},
    }
    if group:
        found["control_group"] = {"limit": group.limit, "used": group.used}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        found[device] = {"total": total, "free": free, "allocated": allocated, "reserved": reserved}
    elif device == "mps":
        found[device] = {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
        }
    elif device == "xla":
        found[device] = {"peak": PeakMemory(torch.device("xla")).read()}
    return found


def _whole(ran_out: str, memory: dict[str, dict[str, int | None]]) -> str:
    """What the sums are part of."""
    held = memory["process"]["resident"] if ran_out == "cpu" else memory.get(ran_out, {}).get("allocated")
    whose = "the process holds" if ran_out == "cpu" else "torch has handed out"
    return f"{whose} {size_in_words(held)}" if held else "how much is held is not known"


def _lines(error: BaseException) -> list[traceback.FrameSummary]:
    """The last lines of the program before the error, without their text and those that only call a module."""
    walked = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    return [each for each in walked if each.name not in ("_call_impl", "_wrapped_call_impl")][-MOST_FRAMES:]


def _readable(content: Mapping[str, Any]) -> str:
    """JSON with a line for each fact, and for each entry of a list."""

    def shown(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {shown(value)}" for name, value in content.items()) + "\n}\n"
