"""What holds the memory of a rank when it runs out: tensors, of which kind each is, and its name.

Tensors are found through the model, the optimizer, the batches in the frames of the error, Python's garbage collector
and autograd's graph. What only compiled code holds is not seen (gradients on their way, workspaces of libraries), and
what a line had in hand without a name is gone when its error arrives; so the sums stand beside what the process has.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from launch.engine.sharding import innermost, unwrapped
from launch.errors import with_causes


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

    Each with the operation, in autograd's words. Nothing is unpacked: hooks such as those of activation checkpointing
    would compute it.
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
    """Tensors of what a node of the graph has saved, one or several; before torch 2.7 or so they are not to be had."""
    for each in saved if isinstance(saved, (list, tuple)) else [saved]:
        tensor = getattr(each, "data", None)
        if isinstance(tensor, torch.Tensor):
            yield tensor


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


def _frames(error: BaseException) -> Iterator[FrameType]:
    for each in with_causes(error):
        yield from (frame for frame, _ in traceback.walk_tb(each.__traceback__))
