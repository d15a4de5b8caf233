"""The loss of a head, some tokens at a time: the same numbers as with all logits at once, and not their memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from launch.cache import Cache
from launch.recipe import RecipeContext
from recipes import causal_lm, head_loss, masked_lm
from recipes.batches import IGNORED, summed_cross_entropy
from recipes.head_loss import Head, linear_cross_entropy, summed_loss, summed_loss_and_best, with_head_loss
from tests import tiny
from tests.test_outline import CONFIGS

CLASSES, WIDTH = 101, 24


@pytest.fixture(autouse=True)
def pieces_of_seven_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than in any batch here, and they do not divide its tokens."""
    monkeypatch.setattr(head_loss, "LOSS_BYTES_CPU", 7 * 4 * CLASSES)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm().clamp(min=1e-6)).detach())


# --- the operation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [False, True], ids=["targets", "everywhere"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_loss_and_gradients_are_the_ordinary_ones(
    dtype: torch.dtype,
    within: float,
    ignored: float,
    smoothing: float,
    bias: bool,
    everywhere: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On GPUs tokens without a target are computed as well, which is tried on the CPU."""
    if everywhere:
        monkeypatch.setattr(head_loss, "COUNTS_TARGETS", ())
    torch.manual_seed(0)
    shapes = [(3, 17, WIDTH), (CLASSES, WIDTH), *([(CLASSES,)] if bias else [])]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    hidden, weight, added = (*leaves, None)[:3]
    targets = torch.randint(0, CLASSES, (3, 17))
    targets[torch.rand(3, 17) < ignored] = IGNORED
    assert (targets != IGNORED).sum() % 7 or ignored == 1.0

    def found(loss: torch.Tensor) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss * 0.37, leaves)]

    low = dtype != torch.float32
    with torch.autocast("cpu", dtype) if low else contextlib.nullcontext():
        expected = summed_cross_entropy(functional.linear(hidden, weight, added), targets, smoothing)
        got = linear_cross_entropy(hidden, weight, added, targets, smoothing, dtype)
    assert got.dtype == torch.float32
    for ours, theirs in zip(found(got), found(expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert off(ours, theirs) <= within


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_of_what_is_frozen_no_gradient_is_found(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(9, WIDTH), torch.randn(CLASSES, WIDTH)
    targets = torch.randint(0, CLASSES, (9,))
    trained = {"weight": [hidden], "hidden": [weight], "both": []}[frozen]
    found: list[list[bool]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        loss, gradients = walk(*arguments, **options)
        found.append([gradient is not None for gradient in gradients])
        return loss, gradients

    walk = head_loss._walk
    monkeypatch.setattr(head_loss, "_walk", watched)
    for tensor in trained:
        tensor.requires_grad_()
    expected = summed_cross_entropy(hidden @ weight.t(), targets)
    got = linear_cross_entropy(hidden, weight, None, targets, 0.0, torch.float32)
    assert off(got, expected) < 1e-6
    assert got.requires_grad == bool(trained)
    assert found == [[frozen == "weight", frozen == "hidden", False]]
    for tensor in trained:
        assert off(*(torch.autograd.grad(loss, tensor)[0] for loss in (got, expected))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_retained_graph_can_be_gone_through_again(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(9, WIDTH, requires_grad=True), torch.randn(CLASSES, WIDTH, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, None, torch.arange(9), 0.1, dtype)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(loss * 2, [hidden, weight]), first, strict=True):
        assert off(ours, 2 * theirs) < 1e-3
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_small_gradients_of_fp16_do_not_vanish_before_their_scale() -> None:
    """Probabilities of 3e-9 are 0 in fp16; times a loss scale of 65,536 they are not."""
    hidden = torch.ones(4, 8, requires_grad=True)
    weight = torch.zeros(50, 8)
    weight[0] = 2.5
    weight[1:] = 0.04
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, None, torch.zeros(4, dtype=torch.int64), 0.0, torch.float16)
    (found,) = torch.autograd.grad(loss * 65536.0, weight)
    probability = torch.softmax((hidden.double() @ weight.double().t()), -1)[0, 1]
    assert float(probability) < 6e-8 / 2, "less than the least number of fp16"
    assert found[1:].div(65536.0).allclose((4 * probability).float(), rtol=0.02)


def test_all_logits_are_never_there() -> None:
    """Highest resident memory of a process, in bytes; of 4,096 tokens and 32,000 classes logits are 524 MB."""
    program = """
import resource, torch
from recipes import head_loss
head_loss.LOSS_BYTES_CPU = 16 * 2**20
def loss(tokens):
    hidden, weight = torch.randn(tokens, 32, requires_grad=True), torch.randn(32000, 32, requires_grad=True)
    head_loss.linear_cross_entropy(hidden, weight, None, torch.arange(tokens), 0.0, torch.float32).backward()
loss(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 4096 * 32000 * 4 / 4


# --- in models -------------------------------------------------------------------------------------------


def sequence_to_sequence(model: Any, batch: Any) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    return summed_loss(model, {**inputs, "use_cache": False}, batch["labels"], 0.1)


MORE = {
    **{"m2m_100": CONFIGS["bart"], "gemma": {**CONFIGS["llama"], "head_dim": 16}},
    **{"gemma2": {**CONFIGS["llama"], "head_dim": 16}, "cohere": {**CONFIGS["llama"], "eos_token_id": 1}},
    **{"granite": {**CONFIGS["llama"], "logits_scaling": 2.0}},
}
KINDS = {
    "causal": (transformers.AutoModelForCausalLM, causal_lm.loss),
    "masked": (transformers.AutoModelForMaskedLM, masked_lm.loss),
    "pairs": (transformers.AutoModelForSeq2SeqLM, sequence_to_sequence),
}


def made(kind: str, task: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS, **MORE}[kind])
    model = KINDS[task][0].from_config(config).eval()
    if kind == "marian":
        model.final_logits_bias.normal_()  # as those that are published have it
    return model


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 1000, (3, 20))
    labels = torch.where(torch.rand(3, 20) < 0.4, IGNORED, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids, "labels": labels}


def passed(model: Any, loss: Any) -> tuple[float, torch.Tensor]:
    """Loss and all gradients, end to end, each tied one once."""
    model.zero_grad()
    found = loss(model, batch())
    found.backward()
    return float(found.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        *((kind, "causal") for kind in ("gpt2", "llama", "gemma")),
        *((kind, "masked") for kind in ("bert", "roberta", "distilbert")),
        *((kind, "pairs") for kind in ("t5", "bart", "marian", "m2m_100")),
    ],
)
def test_a_model_gives_the_same_loss_and_gradients_and_is_otherwise_as_before(kind: str, task: str) -> None:
    model, loss = made(kind, task), KINDS[task][1]
    plain, state = copy.deepcopy(model), torch.get_rng_state()
    assert with_head_loss(model, loss) is model
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    expected, gradients = passed(plain, loss)
    # A copy has a head of its own, also one that went through a file.
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        head = each.get_output_embeddings()
        assert isinstance(head.forward, Head) and head.forward._layer is head
        found, ours = passed(each, loss)
        assert head.forward.product_dtype == torch.float32, "the head has answered"
        assert found == pytest.approx(expected, rel=1e-6)
        assert off(ours, gradients) < 1e-6
    assert list(model.state_dict()) == list(plain.state_dict())
    own = {name: value for name, value in batch().items() if name != "labels"}
    if task != "pairs":
        del own["decoder_input_ids"]
    with torch.no_grad():
        assert torch.equal(model(**own).logits, plain(**own).logits), "who asks for scores gets them"


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_a_model_that_changes_its_scores_behind_the_head_is_left_as_it_is(kind: str) -> None:
    model, plain = made(kind, "causal"), made(kind, "causal")
    with_head_loss(model.train(), causal_lm.loss)
    assert model.training
    assert "forward" not in vars(model.get_output_embeddings())
    assert passed(model.eval(), causal_lm.loss)[0] == passed(plain, causal_lm.loss)[0]


def test_the_best_token_of_each_target_is_that_of_its_scores() -> None:
    model = with_head_loss(made("bert", "masked"), masked_lm.loss)
    given = batch()
    labels, inputs = given["labels"], {name: given[name] for name in ("input_ids", "attention_mask")}
    scores = model(**inputs).logits
    with torch.no_grad():
        summed, best = summed_loss_and_best(model, inputs, labels)
    targets = labels != IGNORED
    assert torch.equal(best[targets], scores.argmax(-1)[targets])
    assert float(summed) == pytest.approx(float(summed_cross_entropy(scores.detach(), labels)), rel=1e-6)


def test_adapters_leave_a_head_that_has_none_of_them_its_loss() -> None:
    peft = pytest.importorskip("peft")
    for target, fused in (("q_proj", True), ("lm_head", False)):
        adapted = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=[target]))  # which do nothing yet
        plain = copy.deepcopy(adapted)
        with_head_loss(adapted, causal_lm.loss)
        assert isinstance(vars(adapted.get_output_embeddings()).get("forward"), Head) == fused
        ids = torch.randint(1, tiny.VOCABULARY, (2, 12))
        (found, ours), (expected, theirs) = (_of_ids(model, ids) for model in (adapted, plain))
        assert found == pytest.approx(expected, rel=1e-6)
        assert off(ours, theirs) < 1e-6


def _of_ids(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = causal_lm.loss(model, {"input_ids": ids, "labels": ids})
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_where_each_shape_is_compiled_for_all_logits_are_computed_at_once(tmp_path: Path) -> None:
    args = causal_lm.Args()
    assert args.fuses(RecipeContext(Cache(tmp_path), 0))
    assert not args.fuses(RecipeContext(Cache(tmp_path), 0, buckets=4))
    assert not causal_lm.Args(fused_loss=False).fuses(RecipeContext(Cache(tmp_path), 0))
