"""The loss of a language model's head, some tokens at a time: never the scores of a whole batch over a vocabulary.

Of a batch of 8 × 512 tokens and a vocabulary of 50,257 they are 823 MB in fp32, and the ordinary way holds three such
tables. Here the head of the model gives the loss itself, and finds gradients in the same pass, while the scores of
some tokens are there. Source: Hsu et al., Liger Kernel, arXiv:2410.10989 (FusedLinearCrossEntropy).

The model is called as ever, so that all that spreads it over ranks stays around it: `summed_loss` says for what
targets, and a `Head`, which stands in for the `forward` of the model's last layer, gives a number in place of scores.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.recipe import LOSS_BYTES, LOSS_BYTES_CPU, Batch, RecipeArgs, RecipeContext
from recipes.batches import IGNORED, summed_cross_entropy

if TYPE_CHECKING:
    import torch


class LossArgs(RecipeArgs):
    """The part of a recipe's arguments that says how the loss of its head is found."""

    fused_loss: bool = True
    """Compute the loss some tokens at a time, without all logits at once: less memory and time, the same result."""

    def fuses(self, context: RecipeContext) -> bool:
        """Whether it is: not where a device is compiled for each shape of a batch; the compiler orders work itself."""
        return self.fused_loss and context.buckets is None


# --- asking and answering --------------------------------------------------------------------------------


@dataclass
class _Question:
    """What a head is asked for in place of scores; `targets` have the shape of the tokens it is given."""

    targets: torch.Tensor
    label_smoothing: float
    best: torch.Tensor | None = None
    """Where to write, for each target, the token with the highest score."""
    answered: bool = False


_ASKED: ContextVar[_Question | None] = ContextVar("asked", default=None)


def summed_loss(
    model: Any, inputs: Mapping[str, Any], targets: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of what the model makes of `inputs`, summed over all targets; a scalar in fp32.

    `targets`, shape `(batch, seq)`, stand where the scores for them do; IGNORED is none.
    """
    asked = _Question(targets, label_smoothing)
    given = _ask(model, inputs, asked)
    return given if asked.answered else summed_cross_entropy(given, targets, label_smoothing)


def summed_loss_and_best(
    model: Any, inputs: Mapping[str, Any], targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and for each target the token with the highest score, shape `(batch, seq)`; undefined for IGNORED."""
    import torch

    asked = _Question(targets, 0.0, best=torch.full_like(targets, IGNORED))
    given = _ask(model, inputs, asked)
    if asked.answered:
        assert asked.best is not None
        return given, asked.best
    return summed_cross_entropy(given, targets), given.argmax(-1)


def _ask(model: Any, inputs: Mapping[str, Any], asked: _Question) -> torch.Tensor:
    """The loss, if the head has answered; else scores, shape `(batch, seq, vocabulary)`."""
    token = _ASKED.set(asked)
    try:
        given: torch.Tensor = model(**inputs).logits
    finally:
        _ASKED.reset(token)
    return given.flatten()[0] if asked.answered else given


class Head:
    """Stands in for `forward` of a linear layer: gives scores, or to who asks for it the summed loss.

    An object and not a function, so that a model with it can be copied and pickled.
    """

    product_dtype: torch.dtype | None = None
    """What the scores of the last call were computed in, where it gave something else; see `engine.precision`."""

    def __init__(self, layer: torch.nn.Linear, model: Any) -> None:
        self._layer, self._model = layer, model

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` has shape `(batch, seq, width)`; a loss has `(1, 1, 1)`, as the score of a token has."""
        layer, asked = self._layer, _ASKED.get()
        if asked is None or asked.targets.shape != hidden.shape[:-1]:
            self.product_dtype = None
            return type(layer).forward(layer, hidden)
        asked.answered, self.product_dtype = True, _product_dtype(layer.weight)
        bias = layer.bias
        added = getattr(self._model, "final_logits_bias", None)  # by models of BART's kind, to whatever comes from here
        if added is not None:
            bias = added[0] if bias is None else bias + added[0]
        loss = linear_cross_entropy(
            *(hidden, layer.weight, bias, asked.targets, asked.label_smoothing, self.product_dtype), best=asked.best
        )
        # Not a view: FSDP2 hooks what a forward gives, and warns of views, on which it may lose its hooks.
        return (loss if added is None else loss - added[0, 0]).view(1, 1, 1).clone()


def with_head_loss(model: Any, loss: Callable[[Any, Batch], torch.Tensor]) -> Any:
    """The model, with a `Head` where that gives the same loss as the ordinary way.

    It does not where a model changes scores behind its head (Gemma 2 caps them, Cohere scales them), and there is none
    where the head has an adapter. So it is tried, on a few tokens.
    """
    import torch

    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return model
    ids = torch.arange(1, 9)[None]
    labels = torch.where(ids == 4, IGNORED, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids, "labels": labels}
    training = model.training
    model.eval()
    same = False
    # What is done to scores may be impossible with one number; a loss that fails in any case fails in training.
    errors = contextlib.suppress(IndexError, RuntimeError, TypeError, ValueError)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), errors:
        ordinary = float(loss(model, batch))
        vars(head)["forward"] = Head(head, model)
        same = math.isclose(float(loss(model, batch)), ordinary, rel_tol=1e-4)
    if not same:
        vars(head).pop("forward", None)
    model.train(training)
    return model


# --- computing -------------------------------------------------------------------------------------------

COUNTS_TARGETS = ("cpu",)
"""Devices on which tokens that are no targets are left out; on others finding them would be a wait for the device."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
    *,
    best: torch.Tensor | None = None,
) -> torch.Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets)`, summed; a scalar in fp32.

    `hidden` has shape `(…, width)`, `weight` `(classes, width)`, `targets` and `best` that of `hidden` without the
    last dimension. Products are in `dtype`, all else, also the sum that is the gradient of the weight, in fp32.
    """
    import torch

    hidden, targets = hidden.flatten(0, -2).to(dtype), targets.flatten()
    places: Any = ...
    if hidden.device.type in COUNTS_TARGETS:
        places = (targets != IGNORED).nonzero()[:, 0]
        hidden, targets = hidden[places], targets[places]
    tensors = (hidden, weight, bias)
    wanted = tuple(torch.is_grad_enabled() and each is not None and each.requires_grad for each in tensors)
    found = None if best is None else torch.empty_like(targets)
    loss: torch.Tensor = _function().apply(*tensors, targets, label_smoothing, wanted, found)
    if best is not None and found is not None:
        best.view(-1)[places] = found
    return loss


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a linear layer with that weight would give."""
    import torch

    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@functools.cache
def _function() -> Any:
    """The operation as autograd knows it. Made when it is first needed: recipes are imported without torch."""
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        """Finds gradients with the loss, and hands them out, times the gradient of the loss, in the backward pass.

        In fp16 they are found in the backward pass, from scores computed once more: only then the loss scale is known,
        without which small gradients would vanish. So they are where a retained graph is gone through again.
        """

        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, *others: Any) -> Any:
            targets, label_smoothing, wanted, best = others
            now = wanted if hidden.dtype != torch.float16 else (False, False, False)
            loss, gradients = _walk(hidden, weight, bias, targets, label_smoothing, now, best=best)
            ctx.gradients = gradients if any(now) else None
            ctx.label_smoothing, ctx.wanted = label_smoothing, wanted
            ctx.save_for_backward(hidden, weight, bias, targets)
            return loss

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad_output: Any) -> Any:
            hidden, weight, bias, targets = ctx.saved_tensors
            gradients, ctx.gradients = ctx.gradients, None  # they are changed in place, and may become a weight's
            if gradients is None:
                told = ctx.label_smoothing, ctx.wanted
                _, gradients = _walk(hidden, weight, bias, targets, *told, scale=grad_output)
            else:
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(grad_output)
            return (*gradients, None, None, None, None)

    return LinearCrossEntropy


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    label_smoothing: float,
    wanted: tuple[bool, ...],
    *,
    scale: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The loss and, of what is `wanted` of hidden, weight and bias, the gradients times `scale`.

    `hidden` has shape `(tokens, width)`.
    """
    import torch

    dtype, full, device = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32), hidden.device
    classes, weight_shape = len(weight), weight.shape
    loss = torch.zeros((), dtype=full, device=device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    at_once = dtype == full and len(hidden) > 0  # the first product is the sum so far
    made = torch.empty if at_once else torch.zeros
    of_weight = made(weight_shape, dtype=full, device=device) if wanted[1] else None
    of_bias = torch.zeros(classes, dtype=full, device=device) if wanted[2] else None
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for rows in _pieces(len(hidden), classes, device.type):
            part, goals = hidden[rows], targets[rows]
            scores = torch.nn.functional.linear(part, weight, bias)
            if best is not None:
                best[rows] = scores.argmax(-1)
            logarithms = torch.log_softmax(scores, -1, dtype=full)
            del scores
            no_target = (goals == IGNORED)[:, None]
            goals = goals[:, None].clamp(min=0)
            losses = logarithms.gather(1, goals) * (label_smoothing - 1.0)
            if label_smoothing:
                losses -= logarithms.sum(-1, keepdim=True) * (label_smoothing / classes)
            loss += losses.masked_fill_(no_target, 0.0).sum()
            if not any(wanted):
                continue
            gradient = logarithms.exp_()
            if label_smoothing:
                gradient -= label_smoothing / classes
            gradient.scatter_add_(1, goals, torch.full_like(goals, label_smoothing - 1.0, dtype=full))
            if device.type not in COUNTS_TARGETS:
                gradient.masked_fill_(no_target, 0.0)
            if scale is not None:
                gradient *= scale
            if of_bias is not None:
                of_bias += gradient.sum(0)
            low = gradient.to(dtype)
            del logarithms, gradient
            if of_hidden is not None:
                torch.mm(low, weight, out=of_hidden[rows])
            if of_weight is not None and at_once:
                of_weight.addmm_(low.t(), part, beta=float(rows.start > 0))
            elif of_weight is not None:
                of_weight += low.t() @ part
    return loss, [of_hidden, of_weight, of_bias]


def _pieces(tokens: int, classes: int, device: str) -> list[slice]:
    """Tokens whose scores are there at once: as many as the budget has room for, and about as many in each piece."""
    budget = LOSS_BYTES_CPU if device == "cpu" else LOSS_BYTES
    number = -(-tokens // max(budget // (4 * classes), 1))
    size = -(-tokens // max(number, 1))
    return [slice(start, start + size) for start in range(0, tokens, max(size, 1))]
