"""The file of one rank: pieces of tensors in safetensors format; and reading any range back from all such files.

A file holds 1-dimensional tensors. Its metadata say, for each, at which element of the whole tensor it starts and
what shape that has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from launch.checkpoints import DamagedError, FileRecord, write_file
from launch.engine.pieces import Piece

# The names of safetensors for what models, optimizers and generators are made of.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Part = tuple[Piece, torch.Tensor]
"""A piece, and the flat values of it that a file gets."""


def parts(held: Iterable[Piece], rank: int, world_size: int) -> Iterator[Part]:
    """What `rank` writes: its pieces; of those that all ranks share, an equal part each."""
    for piece in held:
        flat = piece.values.detach().reshape(-1)
        if not piece.shared:
            yield piece, flat
            continue
        count = flat.numel()
        begin, end = count * rank // world_size, count * (rank + 1) // world_size
        if begin < end:
            yield Piece(piece.name, piece.values, begin, piece.shape, shared=False), flat[begin:end]


def write_shard(path: Path, written: Sequence[Part]) -> FileRecord:
    """Write a file; tensors on a device are brought over one at a time.

    Not by the library's `save_file`: it would hold Python's lock while it writes, its errors do not say that the disk
    is full, and the file would have to be read again to be hashed.

    Raises:
        OSError: the disk is full, gone or broken.
    """
    header: dict[str, Any] = {}
    fragments: dict[str, list[Any]] = {}
    position = 0
    for piece, flat in written:
        assert piece.name not in header, f"{piece.name}: one range a rank"
        size = flat.numel() * flat.element_size()
        header[piece.name] = {
            "dtype": _DTYPES[flat.dtype],
            "shape": [flat.numel()],
            "data_offsets": [position, position + size],
        }
        fragments[piece.name] = [piece.start, list(piece.shape)]
        position += size
    header["__metadata__"] = {"format": "pt", "fragments": json.dumps(fragments)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8

    def content() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, flat in written:
            if flat.numel():
                yield flat.cpu().contiguous().view(torch.uint8).numpy().data

    return write_file(path, content())


class Stored:
    """The tensors of a checkpoint, whoever has written which part of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fragments: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole tensors, by name."""
        for path in sorted(folder.glob("state-*.safetensors")):
            file: Any = safe_open(path, "pt")
            for name, (start, shape) in json.loads(file.metadata()["fragments"]).items():
                self.shapes[name] = tuple(shape)
                self._fragments.setdefault(name, []).append((start, math.prod(file.get_slice(name).get_shape()), file))

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements `start..start+count` of a tensor in row-major order, shape `(count,)`.

        Raises:
            DamagedError: not all of them are there.
        """
        found: list[tuple[int, torch.Tensor]] = []
        for begin, size, file in self._fragments.get(name, []):
            first, last = max(start, begin), min(start + count, begin + size)
            if first < last:
                found.append((first, file.get_slice(name)[first - begin : last - begin]))
        found.sort(key=lambda entry: entry[0])
        position = start
        values = []
        for first, tensor in found:
            if first > position:
                break
            values.append(tensor[position - first :])
            position = max(position, first + tensor.numel())
        if position < start + count:
            raise DamagedError(f"{name} lacks elements from {position} on")
        return torch.cat(values) if len(values) > 1 else values[0] if values else torch.empty(0)

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in its own shape."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def load(self, piece: Piece) -> None:
        """Put what is stored into the live values.

        Raises:
            DamagedError: there is no such tensor, or it has another shape.
        """
        shape = self.shapes.get(piece.name)
        if shape != piece.shape:
            raise DamagedError(f"{piece.name} has shape {shape} instead of {piece.shape}")
        with torch.no_grad():
            values = self.read(piece.name, piece.start, piece.values.numel())
            piece.values.copy_(values.reshape(piece.values.shape))
