"""The contract between recipes and the engine.

A recipe is a module with a class `Args(RecipeArgs)` and a function `prepare(args, context) -> Prepared`; it may
have `preview(args, context) -> Preview`. Recipes hand over values and functions; they know nothing of ranks,
devices, trackers or the run folder. A recipe's module is imported by the control plane too, so it must not
import torch, transformers or datasets at its top, only inside its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import AfterValidator, BeforeValidator

from launch.cache import Cache
from launch.config import Section

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RecipeArgs(Section):
    """Base of a recipe's `Args`: frozen, strict, closed to unknown keys, documented field by field."""


def _absolute(text: str) -> str:
    return str(Path(text).expanduser().absolute())


def _absolute_if_folder(text: str) -> str:
    folder = Path(text).expanduser()
    return str(folder.absolute()) if folder.is_dir() or text.startswith((".", "/", "~")) else text


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


LocalPath = Annotated[str, AfterValidator(_absolute)]
"""A local file; made absolute, so that the recorded run can be repeated from any folder."""

LocalPaths = Annotated[tuple[LocalPath, ...], BeforeValidator(_as_tuple)]
"""One local file or a list of them."""

HubNameOrFolder = Annotated[str, AfterValidator(_absolute_if_folder)]
"""A name on the Hugging Face Hub, or a local folder (made absolute)."""


class Samples(Protocol):
    """Samples by index, as torch's map-style datasets are."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """One sample, as `collate` takes it."""


class Stream(Protocol):
    """Samples that can only be read from the first on, such as a `datasets.IterableDataset`.

    Every rank and every data worker reads the whole stream and keeps its own share. So it must be the same wherever
    and whenever it is read: no order drawn from a random state that the process has anyway, no sharding by rank.
    Where it has a method `set_epoch(epoch)`, that is called before each epoch, counted from 0, and with 0 before each
    evaluation; the order may depend on it. A run over a stream states `train.max_steps`.
    """

    def __iter__(self) -> Iterator[Any]:
        """The samples, as `collate` takes them, from the first on each time it is called."""


Batch = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Progress:
    """Reports how far a long preparation has come; the default says nothing."""

    start: Callable[[str, int | None], None] = lambda description, total: None
    advance: Callable[[int], None] = lambda amount: None
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class RecipeContext:
    """What a recipe may use of its surroundings."""

    cache: Cache
    seed: int
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Preview:
    """What can be known of the data without preparing it; None where it cannot."""

    samples: int | None = None
    tokens_per_sample: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything the engine needs of a recipe. All functions are called on every rank."""

    build_model: Callable[[], PreTrainedModel]
    """The model on CPU in fp32; called after the seed is set, so weights from scratch are the same on all ranks."""
    tokenizer: PreTrainedTokenizerBase
    train: Samples | Stream
    """Samples by index are shuffled by the engine, in each epoch anew; a stream is read in its own order."""
    validation: Samples | Stream
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    """Samples to a batch of CPU tensors, first dimension = samples."""
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    """Loss **summed** over all targets of the batch, a scalar."""
    count: Callable[[Batch], int]
    """Number of targets in a batch (CPU tensors); the engine divides by its sum over all ranks."""
    loss_metrics: Callable[[float], dict[str, float]] = lambda mean_loss: {}
    """Metrics that follow from the mean loss alone, such as perplexity; the first one is the headline."""
    sample_prompt: str | None = None
    """Continued by the exported model at the end; None: no sample."""
