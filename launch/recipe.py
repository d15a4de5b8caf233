"""The contract between recipes and the engine.

A recipe is a module with a class `Args(RecipeArgs)` and a function `prepare(args, context) -> Prepared`; it may
have `preview(args, context) -> Preview`, and `tokenizer(args, context) -> PreTrainedTokenizerBase` for those who want
no data. Recipes hand over values and functions; they know nothing of ranks, devices, trackers or the run folder. A
recipe's module is imported by the control plane too, so it must not import torch, transformers or datasets at its top,
only inside its functions. A user's own recipe can import the files beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator

from launch.cache import Cache
from launch.sections import Section

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Lengths = np.ndarray[Any, np.dtype[np.integer[Any]]]


IGNORED = -100
"""Label of a position that is no target (torch's `cross_entropy` default)."""


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

Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One text or a list of them."""

HubNameOrFolder = Annotated[str, AfterValidator(_absolute_if_folder)]
"""A name on the Hugging Face Hub, or a local folder (made absolute)."""


class Samples(Protocol):
    """Samples by index, as torch's map-style datasets are.

    Where they have a method `set_epoch(epoch)`, that is called before samples of an epoch are read, counted from 0, and
    with 0 for evaluations; what a sample is may depend on it, such as what is hidden in it.
    """

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

Metrics = dict[str, Any]
"""Names with numbers; beside them any plain data worth keeping, such as a confusion matrix or examples."""


class Inference(Protocol):
    """The model as an evaluation uses it: the same to a recipe whatever shards it, in evaluation mode, no gradients."""

    def __call__(self, **inputs: Any) -> Any:
        """Its forward pass, which gives what the class of the model gives."""

    def generate(self, **settings: Any) -> torch.Tensor:
        """Token ids, shape `(batch, seq)`, by `GenerationMixin.generate` with these settings.

        Where ranks share the weights, all of them go on until the last has finished its own.
        """


@dataclass(frozen=True)
class Scoring:
    """How a recipe finds metrics that do not follow from the mean loss."""

    predict: Callable[[Inference, Batch], tuple[torch.Tensor, list[Any]]]
    """Of a batch the summed loss, as `Prepared.loss` gives it, and for each sample what `measure` needs of it.

    Plain data (numbers, text, lists), and little: it is kept for every sample and sent between ranks, so never logits.
    """
    measure: Callable[[list[Any]], Metrics]
    """Metrics from what was predicted of the validation samples, in their order; all, or the first so many of them.

    Called on one rank. Numbers are recorded; what else it returns is kept in the run folder, under `eval/`.
    """
    lowest_is_best: tuple[str, ...] = ()
    """Names of metrics that are better the lower they are; of any other, higher is better."""


@dataclass(frozen=True)
class Progress:
    """Reports how far a long preparation has come; the default says nothing."""

    start: Callable[[str, int | None], None] = lambda description, total: None
    advance: Callable[[int], None] = lambda amount: None
    finish: Callable[[], None] = lambda: None


_ANY_WIDTH: ContextVar[bool] = ContextVar("any_width", default=False)


@contextlib.contextmanager
def any_width() -> Iterator[None]:
    """Meanwhile batches are padded as they are where their shapes may be any: the same on every device."""
    token = _ANY_WIDTH.set(True)
    try:
        yield
    finally:
        _ANY_WIDTH.reset(token)


@dataclass(frozen=True)
class Width:
    """To how many tokens a batch is padded whose longest sample has so many."""

    multiple: int = 1
    most: int | None = None
    """Where multiples end, such as the positions of the model; a longer sample stays whole."""
    buckets: int | None = None
    """How many widths there are: the greatest, half of it, half of that …; None: any multiple."""

    def __call__(self, longest: int) -> int:
        """Tokens."""
        return self.of(self.bucket(longest)) if self.few and self.most else self._multiple(longest)

    @property
    def few(self) -> bool:
        """Whether there are only so many widths."""
        return self.buckets is not None and not _ANY_WIDTH.get()

    def bucket(self, longest: int) -> int:
        """The number of the smallest width that has room, the greatest being 0; less for one that none has room for."""
        assert self.most, "without a greatest width there is no other"
        if longest > self.most:
            return self.most - longest
        found = 0
        while found + 1 < (self.buckets or 1) and longest <= self.of(found + 1):
            found += 1
        return found

    def of(self, bucket: int) -> int:
        """The width of that number."""
        assert self.most, "without a greatest width there is no other"
        return self.most - bucket if bucket < 0 else self._multiple(-(-self.most // 2**bucket))

    def _multiple(self, longest: int) -> int:
        width = -(-longest // self.multiple) * self.multiple
        return width if self.most is None else min(width, max(self.most, longest))


MULTIPLE = 8
"""To a multiple of how many tokens batches are padded, unless told otherwise: GPUs compute in pieces of so many."""


@dataclass(frozen=True)
class RecipeContext:
    """What a recipe may use of its surroundings."""

    cache: Cache
    seed: int
    progress: Progress = field(default_factory=Progress)
    buckets: int | None = None
    """How many widths batches may have, where a device is compiled for each; None: any."""
    multiple: int = MULTIPLE
    """To a multiple of how many tokens batches are padded where nothing else is asked for."""

    def width(self, multiple: int | None, most: int | None) -> Width:
        """How batches are to be padded: to a multiple, or to one of a few widths up to `most` tokens."""
        return Width(multiple or self.multiple, most, self.buckets)


Head = Literal["next_token", "masked_token", "sequence", "token", "span", "text_to_text"]
"""What a model gives: scores of tokens, of a sequence's or a token's labels, of where an answer begins and ends."""


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters, all other weights frozen."""

    rank: int
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that have them; none: what PEFT takes for the architecture."""


@dataclass(frozen=True)
class ModelUse:
    """A model and what it is used for, as far as its need of memory follows from it."""

    config: Mapping[str, Any]
    """The content of its config.json, with what the recipe changes in it."""
    head: Head
    tokens: int
    """In the longest sample."""
    target_tokens: int = 0
    """In the longest text that is written, of a model that reads one text and writes another."""
    outputs: int = 0
    """Labels, where the head has any."""
    padded: bool = True
    """Whether samples differ in length, so that the model is given a mask."""
    adapters: Adapters | None = None
    fused_loss: bool = False
    """Whether the loss is found some tokens at a time, with its gradients, so that never all scores are there."""
    metric_libraries: bool = False
    """Whether an evaluation imports `evaluate`, and with it pandas, SciPy and what its metrics compute with."""


LOSS_BYTES_CPU, LOSS_BYTES = 128 * 2**20, 512 * 2**20
"""Scores in fp32 that such a loss has at once, on a CPU (with less it was slower) and elsewhere (not measured)."""


@dataclass(frozen=True)
class Preview:
    """What can be known of the data without preparing it; None where it cannot."""

    samples: int | None = None
    tokens_per_sample: int | None = None
    """Where all samples have as many; else of the longest."""
    metrics: tuple[str, ...] | None = None
    """Names of the numbers that an evaluation gives beside `loss`."""
    model: ModelUse | None = None
    """What the plan of memory follows from."""
    streams: bool = False
    """Whether the training data is known to be a stream."""


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
    scoring: Scoring | None = None
    """Metrics of predictions; None: the loss, and what follows from it, says all."""
    without_targets: Callable[[Any], Any] | None = None
    """Of a sample one of the same length that adds nothing to loss and count, to fill up a short batch with.

    Needed only for devices that are compiled for each shape of a batch (XLA). `count` is not asked about it, and what
    is predicted of it is dropped.
    """
    lengths: Callable[[Samples], Lengths] | None = None
    """Tokens of each of the training samples, or of the validation samples: integers of shape `(samples,)`.

    By these the samples of an update are dealt out to ranks and micro-batches, and those of an evaluation to batches,
    so that less is padded (`train.group_by_length`). Of a sample with a source and a target, both together. Asked once
    for each split, of all its samples: none is to be read for it. None: all have as many, or it is not known. A stream
    is not asked about, and is read in its own order.
    """
    targets: tuple[str, ...] = ("labels",)
    """Names in a batch that are for the loss alone: the model's forward pass is not given them."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the preparation has counted, as plain data, such as rows, empty rows and texts cut short."""
    sample_prompt: str | None = None
    """Continued by the exported model at the end; None: no sample."""
