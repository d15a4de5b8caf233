"""What a model's forward pass makes and keeps for the backward pass, written down without computing it. Pure.

A `Tape` has one method for each operation that models are made of. Called in the order of a forward pass, it notes the
weights, in units that are spread and checkpointed together, and the bytes that autograd keeps of one sample. What each
operation keeps is what torch 2.13 was seen to keep of the modules of transformers 5; tests/test_outline.py looks again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Literal

Numbers = Literal["fp32", "autocast", "low"]
"""All in 4 bytes; products in 2 bytes, with weights and sums in 4; or all, weights too, in 2."""

FULL, LOW = 4, 2
"""Bytes of a number."""

ALL_LINEAR = "all-linear"
"""What PEFT calls the linear layers of all blocks."""

INDEX = 8
"""Bytes of a token id."""


@dataclass(frozen=True)
class Weight:
    """A parameter."""

    name: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


@dataclass
class Unit:
    """Weights that belong together, such as those of a block, and what their part of the forward pass keeps."""

    name: str
    block: bool
    """Whether it is one of the repeated blocks: these are checkpointed, and sharded one by one."""
    weights: list[Weight] = field(default_factory=list)
    kept: int = 0
    """Bytes of a sample that the backward pass needs."""
    entry: int = 0
    """Bytes of a sample that it is given: all that is kept where it is computed a second time."""
    casts: int = 0
    """Bytes of weights in the number format of products, kept beside those in fp32; not of a sample."""
    tied: int = 0
    """Numbers in the weight of another unit that is used here too."""
    widest: int = 0
    """Bytes of the largest tensor of a sample in it."""
    flops: int = 0
    """Operations of a sample in its forward pass: two for each multiplication with a weight, or between tokens."""


@dataclass(frozen=True)
class Fused:
    """A head that finds the loss some tokens at a time, with its gradients."""

    width: int
    """Numbers that it is given of a token."""
    trained: bool


@dataclass(eq=False)
class Value:
    """A tensor of one sample: `rows` tokens of `width` numbers."""

    rows: int
    width: int
    size: int
    """Bytes of a number."""
    kept: bool = False

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return self.rows * self.width * self.size


class Tape:
    """Notes weights and kept tensors of a forward pass, in units."""

    def __init__(self, numbers: Numbers, *, adapters: Iterable[str] = (), rank: int = 0) -> None:
        """With a `rank`, linear layers that `adapters` names have two more weights each, and only they are trained."""
        self.numbers = numbers
        self.units: list[Unit] = []
        self.fused: Fused | None = None
        self._adapters, self._rank = tuple(adapters), rank
        self._trained = not rank

    @property
    def size(self) -> int:
        """Bytes of a number in what flows from block to block."""
        return LOW if self.numbers == "low" else FULL

    @property
    def product(self) -> int:
        """Bytes of a number that a product gives."""
        return FULL if self.numbers == "fp32" else LOW

    def unit(self, name: str, *, block: bool = False, entry: Value | None = None) -> None:
        """What follows belongs to a new unit, which is given `entry`."""
        self.units.append(Unit(name, block, entry=entry.bytes if entry else 0))

    # --- operations --------------------------------------------------------------------------------------

    def embedding(self, name: str, entries: int, width: int, rows: int) -> Value:
        """Looks `rows` token ids up."""
        self.weight(name, (entries, width))
        self._note(rows * INDEX)
        return Value(rows, width, self.size)

    def linear(
        self, name: str, x: Value, width: int, *, bias: bool = True, tied: bool = False, transposed: bool = False
    ) -> Value:
        """A product with a weight, `(width, x.width)`, or `transposed`; `tied`, where another unit holds it already."""
        unit = self.units[-1]
        unit.flops += 2 * x.rows * x.width * width
        adapted = bool(self._rank) and (name in self._adapters or (unit.block and ALL_LINEAR in self._adapters))
        if tied:
            unit.tied = width * x.width if self._trained else 0
        else:
            self.weight(f"{name}.weight", (x.width, width) if transposed else (width, x.width))
            if bias:
                self.weight(f"{name}.bias", (width,))
        if self.numbers == "autocast":
            unit.casts += LOW * width * x.width
        if self._trained:
            self._keep_for_product(x)
        if adapted:
            self._adapter(name, x, width)
        out = Value(x.rows, width, self.product)
        self._seen(out)
        return out

    def scores(self, name: str, x: Value, classes: int, *, bias: bool, tied: bool, fused: bool) -> Value:
        """Of a language model's head: a product, of which nothing is kept where the loss is `fused`."""
        unit = self.units[-1]
        before = unit.kept, unit.casts, x.kept
        out = self.linear(name, x, classes, bias=bias, tied=tied)
        if fused and not (self._rank and name in self._adapters):
            unit.kept, unit.casts, x.kept = before
            self.fused = Fused(x.width, self._trained)
        return out

    def _keep_for_product(self, x: Value) -> None:
        if x.size == self.product:
            self.keep(x)
        else:  # autocast makes one more each time
            self._note(x.rows * x.width * LOW)

    def _adapter(self, name: str, x: Value, width: int) -> None:
        """Low-rank adapters: down to `rank`, and up again."""
        self.units[-1].weights += [
            Weight(f"{name}.lora_A", (self._rank, x.width), trained=True),
            Weight(f"{name}.lora_B", (width, self._rank), trained=True),
        ]
        self.units[-1].flops += 2 * x.rows * self._rank * (x.width + width)
        self._keep_for_product(x)
        self._note(x.rows * self._rank * self.product)
        if self.numbers == "autocast":
            self.units[-1].casts += LOW * self._rank * (x.width + width)

    def layer_norm(self, name: str, x: Value) -> Value:
        """Torch's own: keeps what it is given, with mean and deviation of each token."""
        self.weight(f"{name}.weight", (x.width,))
        self.weight(f"{name}.bias", (x.width,))
        self.keep(x)
        self._note(2 * FULL * x.rows)
        return Value(x.rows, x.width, x.size)

    def rms_norm(self, name: str, x: Value, groups: int = 1) -> Value:
        """As models write it themselves, in fp32: keeps what it is given and what it makes of it.

        Of `groups`, heads, each is normed by itself, with one weight for all.
        """
        self.weight(f"{name}.weight", (x.width // groups,))
        if x.size == FULL:
            self.keep(x)
        else:
            self._note(x.rows * x.width * FULL)
        self._note(groups * FULL * x.rows)
        if self._trained:  # for the gradient of its weight
            self._note(x.bytes)
        return Value(x.rows, x.width, x.size)

    def activation(self, kind: str, x: Value) -> Value:
        """An activation function, by its name in transformers."""
        out = Value(x.rows, x.width, x.size)
        if kind in ("relu", "tanh"):
            self.keep(out)
        elif kind in ("gelu_new", "gelu_fast"):  # written out in Python: x, 0.5 x, tanh, and 1 + tanh
            self.keep(x)
            self._note(3 * x.bytes)
        else:
            self.keep(x)
        return out

    def product_of(self, a: Value, b: Value) -> Value:
        """Element by element."""
        self.keep(a)
        self.keep(b)
        return Value(a.rows, a.width, max(a.size, b.size))

    def first_of(self, x: Value) -> Value:
        """What there is of the first token; to keep it for a product is to keep all of them."""
        if x.size == self.product:
            self.keep(x)
        return Value(1, x.width, x.size, kept=x.kept)

    def add(self, a: Value, b: Value) -> Value:
        """A sum keeps nothing."""
        return Value(a.rows, a.width, max(a.size, b.size))

    def attention(
        self, queries: Value, keys: Value, values: Value, heads: int, *, mask: int | None, biased: bool = False
    ) -> Value:
        """Scaled dot products without a table of scores (`sdpa`); with it, in fp32, where scores have a trained bias.

        `mask` says how many tables of the size of one head's scores tell which tokens a sample's tokens see, made for
        each layer; None: no such table is needed. Fewer heads of keys and values than of queries are then repeated.
        """
        size, table = queries.size, queries.rows * keys.rows
        self.units[-1].flops += 4 * table * queries.width
        out = Value(queries.rows, queries.width, size)
        if biased:
            self._note(heads * table * FULL)
            for value in (queries, keys, values):
                self._note(value.rows * value.width * FULL)
            self._seen(Value(queries.rows, heads * keys.rows, FULL))
            return out
        for value in (queries, keys, values):
            if mask and value.width < queries.width:
                self._note(value.rows * queries.width * size)
            else:
                self.keep(value)
        self.keep(out)
        self._note(FULL * heads * queries.rows + (mask or 0) * table * size)
        return out

    def indices(self, number: int) -> None:
        """Keeps so many whole numbers."""
        self._note(INDEX * number)

    # --- notes -------------------------------------------------------------------------------------------

    def keep(self, x: Value) -> None:
        """Autograd keeps a tensor, once."""
        if not x.kept:
            x.kept = True
            self._note(x.bytes)

    def _note(self, size: int) -> None:
        self.units[-1].kept += size

    def _seen(self, x: Value) -> None:
        self.units[-1].widest = max(self.units[-1].widest, x.bytes)

    def weight(self, name: str, shape: tuple[int, ...], *, trained: bool = True) -> None:
        """One more weight."""
        self.units[-1].weights.append(Weight(name, shape, self._trained and trained))
