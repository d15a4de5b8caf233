"""The model as evaluations use it: a forward pass, and text generated from it, the same whatever shards the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch.distributed.fsdp import FSDPModule

from launch.engine.devices import Devices, on_host
from launch.engine.sharding import unwrapped
from launch.errors import ConfigError


class Inference:
    """One rank's way to predict with a model that is in evaluation mode. Every rank must call what one calls."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        devices: Devices | None = None,
    ) -> None:
        self._accelerator, self._model, self._autocast = accelerator, model, autocast
        self._devices = devices or Devices()

    def __call__(self, **inputs: Any) -> Any:
        """The forward pass, in the planned number format."""
        with self._autocast():
            given = self._model(**inputs)
        self._devices.settle()  # else what is made of it one by one would compute it each time
        return given

    def generate(self, **settings: Any) -> torch.Tensor:
        """Token ids, shape `(batch, seq)`, by `GenerationMixin.generate`.

        Where ranks share the weights every forward pass is a collective: a rank whose texts have ended goes on, and
        drops what comes, until those of all ranks have (`synced_gpus`).

        Raises:
            ConfigError: the model cannot generate.
        """
        plain: Any = unwrapped(self._model)
        if not plain.can_generate():
            raise ConfigError(f"{type(plain).__name__} cannot generate text; evaluate it without generation")
        with (
            torch.no_grad(),
            self._autocast(),
            _whole_root(plain),
            on_host(self._accelerator, plain) as device,  # each length of a text is a shape
        ):
            inputs = send_to_device(settings, device)
            ids: torch.Tensor = plain.generate(**inputs, synced_gpus=self._shards)
        return ids

    @property
    def _shards(self) -> bool:
        kind = self._accelerator.distributed_type
        sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        return sharded and self._accelerator.num_processes > 1


@contextlib.contextmanager
def _whole_root(model: Any) -> Iterator[None]:
    """Keep the weights together that belong to no block, such as embeddings.

    FSDP2 gathers them when the whole model is called, but generation calls parts of it too, an encoder say.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model._get_fsdp_state()._lazy_init()  # else the first part that is called takes itself for the whole
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
