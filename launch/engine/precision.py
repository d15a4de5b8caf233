"""In which number formats a run really computes: autocast, the scale of fp16 losses, and a look at what was used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch

from launch.errors import TopologyError
from launch.recipe import Batch
from launch.strategy import Dtypes


class Autocast:
    """Around forward passes: matrix products in `dtype`, what needs precision (norms, softmax, losses) in fp32."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def __call__(self) -> contextlib.AbstractContextManager[object]:
        """A context that may be entered once."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()  # XLA's warns of a format that it has nothing to do for
        return torch.autocast(self._device, self._dtype)


Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


def in_autocast(loss: Loss, autocast: Autocast) -> Loss:
    """The same loss, computed in that format."""

    def inside(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with autocast():
            return loss(model, batch)

    return inside


class LossScale:
    """What fp16 losses are multiplied by, so that small gradients do not vanish; gradients are divided by it.

    A power of two, so that scaling rounds nothing. Halved when a gradient overflows, doubled after `patience` updates
    without. Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; values as in `torch.amp.GradScaler`.
    """

    def __init__(self, value: float = 2.0**16, patience: int = 2000) -> None:
        self.value = value
        self._patience = patience
        self._since_overflow = 0

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"value": self.value, "since_overflow": self._since_overflow}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.value, self._since_overflow = state["value"], int(state["since_overflow"])

    def after_overflow(self) -> bool:
        """Halve; False where there is nothing left to halve."""
        if self.value <= 1.0:
            return False
        self.value /= 2.0
        self._since_overflow = 0
        return True

    def after_update(self) -> None:
        """Double after a long time without overflow."""
        self._since_overflow += 1
        if self._since_overflow == self._patience:
            self.value *= 2.0
            self._since_overflow = 0


@contextlib.contextmanager
def forward_dtypes(model: torch.nn.Module) -> Iterator[set[torch.dtype]]:
    """While active, collects what the last matrix product of the model (its head) comes out in.

    The head, because it lies outside the blocks that `train.compile` compiles: a hook inside would change them. Where
    its forward gives something else than its product, such as the loss, that says in `product_dtype` what it was in.
    """
    seen: set[torch.dtype] = set()
    products = [module for module in model.modules() if _is_product(module)]
    if not products:
        yield seen
        return

    def see(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        seen.add(getattr(module.forward, "product_dtype", None) or output.dtype)

    hook = products[-1].register_forward_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def _is_product(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.nn.Parameter) or isinstance(module, torch.nn.Embedding):
        return False
    shape = getattr(weight, "ds_shape", weight.shape)  # a weight sharded by ZeRO-3 has no shape of its own
    return len(shape) == 2


def names(dtypes: Iterable[torch.dtype]) -> str:
    """`float32`; several are joined, none is empty."""
    return "+".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def optimizer_dtypes(optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """Of the weights it changes and of what it remembers (`""` for nothing), once it has made an update."""
    masters, remembered = set(), set()
    for parameter, state in optimizer.state.items():
        masters.add(parameter.dtype)
        remembered |= {value.dtype for value in state.values() if isinstance(value, torch.Tensor) and value.dim()}
    return names(masters), names(remembered)


def check(planned: Dtypes, seen: Dtypes) -> None:
    """See that the formats are the planned ones; what could not be seen (`""`) is not judged.

    Raises:
        TopologyError: a format was replaced by another.
    """
    wrong = [
        f"{field.name} {getattr(seen, field.name)} instead of {getattr(planned, field.name)}"
        for field in fields(Dtypes)
        if getattr(seen, field.name) not in ("", getattr(planned, field.name))
    ]
    if wrong:
        raise TopologyError(
            f"the number formats are not as planned: {', '.join(wrong)}; a recipe must build its model in "
            "fp32 and leave its format alone; if this one does, use train.precision=fp32 and report the strategy"
        )
