"""What holds the memory of a rank when it runs out: tensors by kind, and the largest by name, in `profile/`.

Tensors are found through the model, the optimizer, the batches in the frames of the error, Python's garbage collector
and autograd's graph. What only compiled code holds is not seen (gradients on their way, workspaces of libraries), and
what a line had in hand without a name is gone when its error arrives; so the sums stand beside what the process has.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import resource
import socket
import traceback
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from launch.disk import size_in_words
from launch.engine.memory import PeakMemory
from launch.engine.sharding import innermost, unwrapped
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


@dataclass
class Held:
    """Memory that one tensor holds, or several that share it."""

    kind: str
    tensor: torch.Tensor
    """The largest of them."""
    bytes: int
    """Of all the storage, which is held as a whole."""
    names: list[str] = field(default_factory=list)
    """Of the parameters that it is, or belongs to; of an activation, of the operations that made it or need it."""

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        name = self.names[0] if self.names else None
        return {
            "bytes": self.bytes,
            "kind": self.kind,
            "name": f"{name} and {len(self.names) - 1} more" if len(self.names) > 1 else name,
            "shape": list(self.tensor.shape),
            "dtype": str(self.tensor.dtype).removeprefix("torch."),
            "device": str(self.tensor.device),
        }


class Holders:
    """All the memory that was found to be held by tensors; each belongs to the kind it is first added as."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Held] = {}
        self.unread = 0
        """How many tensors did not tell what they hold, as those of a library may."""

    def add(self, kind: str, tensor: torch.Tensor, name: str = "") -> None:
        """Count its storage, unless it has been; of a sharded tensor what is here."""
        try:
            found = [(part, *_storage(part)) for part in _parts(tensor)]
        except Exception:
            self.unread += 1
            return
        for part, key, size in found:
            if not size:
                continue
            held = self._found.setdefault(key, Held(kind, part, size))
            if held.kind == kind and name and name not in held.names:
                held.names.append(name)
            if part.numel() > held.tensor.numel():
                held.tensor = part

    def all(self) -> list[Held]:
        """All of it."""
        return list(self._found.values())


def find_holders(model: torch.nn.Module | None, optimizer: Any, error: BaseException) -> Holders:
    """Who holds memory; without a model and its optimizer, as while they are made, nothing has a name."""
    holders = Holders()
    if model is not None:
        _add_named(holders, unwrapped(model), innermost(optimizer))
    for frame in _frames(error):
        for name in ("batch", "batches"):  # what `Prepared.loss` is called with, and the loop's own words
            for tensor in _tensors_in(frame.f_locals.get(name)):
                holders.add("batch", tensor)
    # Not isinstance: that asks objects which only stand for others, and may raise.
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    for tensor in tensors:
        if isinstance(tensor, torch.nn.Parameter):
            holders.add("parameters", tensor)
    for tensor, operation in _in_graph(tensors):
        holders.add("activations", tensor, operation)
    for tensor in tensors:
        holders.add("other", tensor)
    return holders


def _add_named(holders: Holders, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        holders.add("parameters", parameter, name)
        if hasattr(parameter, "ds_tensor"):  # the part of it that ZeRO-3 keeps here
            holders.add("parameters", parameter.ds_tensor, name)
    # Of FSDP2 and ZeRO the optimizer has parameters of its own: shards of those that are whole now, or fp32 copies.
    updated = [each for group in optimizer.param_groups for each in group["params"]]
    for each in updated:
        holders.add("parameters", each)
    for each in (*model.parameters(), *updated):
        if each.grad is not None:
            holders.add("gradients", each.grad, names.get(id(each), ""))
    for of, state in optimizer.state.items():
        for what, value in state.items():
            for tensor in _tensors_in(value):
                holders.add("optimizer state", tensor, f"{what} of {names.get(id(of), 'a part')}")
    for name, buffer in model.named_buffers():
        holders.add("buffers", buffer, name)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(each)


def _in_graph(tensors: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, str]]:
    """Tensors that were computed with a graph, and what that keeps for the backward pass, out of Python's sight.

    Each with the operation, in autograd's words. What is kept through hooks is left alone: those of activation
    checkpointing would compute it.
    """
    pending: list[Any] = []
    seen = set()
    for tensor in tensors:
        with contextlib.suppress(RuntimeError):  # asked of some views, which were changed in place
            if tensor.grad_fn is not None:
                pending.append(tensor.grad_fn)
                yield tensor, tensor.grad_fn.name()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [before for before, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                with contextlib.suppress(RuntimeError):  # a backward pass has let go of it
                    for tensor in _kept(getattr(node, name)):
                        yield tensor, node.name()


def _kept(saved: Any) -> Iterator[torch.Tensor]:
    """Tensors of what a node of the graph has saved, one or several.

    Both attributes came after torch 2.6, where nothing is found.
    """
    for each in saved if isinstance(saved, (list, tuple)) else [saved]:
        if getattr(each, "unpack_hook", True) is None and isinstance(each.data, torch.Tensor):
            yield each.data


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that it is made of: a shard of a DTensor, what a sparse one lists."""
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in inner:
            if isinstance(part, torch.Tensor):  # a DTensor names its mesh too
                yield from _parts(part)
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    else:
        yield tensor


def _storage(tensor: torch.Tensor) -> tuple[Hashable, int]:
    """What is the same of tensors that share memory, and the bytes of it."""
    if tensor.device.type == "xla":  # where a tensor has no address
        return id(tensor), tensor.numel() * tensor.element_size()
    try:
        storage = tensor.untyped_storage()
        on_device = storage.device.type != "meta"  # as of those that torch.compile only traces
        return (tensor.device, storage.data_ptr()), storage.nbytes() if on_device else 0
    except RuntimeError:  # of layouts that have none
        return id(tensor), 0


# --- what is told of it ----------------------------------------------------------------------------------


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
    elif device == "xla":
        found[device] = {"peak": PeakMemory(torch.device("xla")).read()}
    return found


def _whole(ran_out: str, memory: dict[str, dict[str, int | None]]) -> str:
    """What the sums are part of."""
    held = memory["process"]["resident"] if ran_out == "cpu" else memory.get(ran_out, {}).get("allocated")
    whose = "the process holds" if ran_out == "cpu" else "torch has handed out"
    return f"{whose} {size_in_words(held)}" if held else "how much is held is not known"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those it was raised from."""
    following: BaseException | None = error
    while following:
        yield following
        following = following.__cause__ or following.__context__


def _frames(error: BaseException) -> Iterator[FrameType]:
    for each in _chain(error):
        yield from (frame for frame, _ in traceback.walk_tb(each.__traceback__))


def _lines(error: BaseException) -> list[traceback.FrameSummary]:
    """The last lines of the program before the error, without their text."""
    walked = traceback.walk_tb(error.__traceback__)
    return list(traceback.StackSummary.extract(walked, lookup_lines=False))[-MOST_FRAMES:]


def _readable(content: Mapping[str, Any]) -> str:
    """JSON with a line for each fact, and for each entry of a list."""

    def shown(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {shown(value)}" for name, value in content.items()) + "\n}\n"
