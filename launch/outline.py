"""Which weights a model has and what its forward pass keeps, from its config.json alone. Pure.

One function for each architecture of transformers 5, in the order of its forward pass, on a `Tape`. They are compared
with the real models, weight by weight and byte by byte, by tests/test_outline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.recipe import Head, ModelUse
from launch.tape import Fused, Numbers, Tape, Unit, Value, Weight

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Outline:
    """A model as a plan sees it."""

    units: tuple[Unit, ...]
    targets: int
    """Rows of logits of a sample."""
    classes: int
    """Numbers in a row of logits."""
    product: int
    """Bytes of a number in them."""
    embeddings_alone: bool
    """Whether the embeddings are sharded by themselves, and not with what is whole all the time."""
    fused: Fused | None = None
    """Where the loss is found with never all logits at once: its head."""

    @property
    def weights(self) -> list[Weight]:
        """All, each tied one once."""
        return [weight for unit in self.units for weight in unit.weights]

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def trained(self) -> int:
        """Numbers in weights that are trained."""
        return sum(weight.numel for weight in self.weights if weight.trained)


def outline(use: ModelUse, numbers: Numbers) -> Outline | None:
    """The outline of a model, of one sample of the longest there are; None where the architecture is not known here."""
    kind = use.config.get("model_type")
    draw = _ARCHITECTURES.get(str(kind))
    if draw is None or (use.head in _TEXT_TO_TEXT) != (draw in (_t5, _bart)):
        return None
    adapters = use.adapters
    targets = (adapters.targets or _PEFT_TARGETS.get(str(kind), ())) if adapters else ()
    tape = Tape(numbers, adapters=(name.rpartition(".")[2] for name in targets), rank=adapters.rank if adapters else 0)
    hidden = draw(use, tape)
    # As `engine.sharding` and Accelerate 1.15 (`fsdp2_prepare_model`) make their units.
    alone = not any(unit.tied for unit in tape.units) and use.head not in ("text_to_text", "masked_token")
    return Outline(tuple(tape.units), hidden.rows, hidden.width, tape.product, alone, tape.fused)


def _mask(use: ModelUse) -> int | None:
    """One table for all heads where samples are padded."""
    return 1 if use.padded else None


_TEXT_TO_TEXT: tuple[Head, ...] = ("text_to_text",)

_PEFT_TARGETS = {
    "gpt2": ("c_attn",),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "bart", "marian", "mbart"), ("q_proj", "v_proj")),
}
"""What PEFT 0.19 gives adapters where nothing is said (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)."""


# --- decoders --------------------------------------------------------------------------------------------


def _gpt2(use: ModelUse, tape: Tape) -> Value:
    config = use.config
    width, heads = config.get("n_embd", 768), config.get("n_head", 12)
    inner = config.get("n_inner") or 4 * width
    vocabulary = config.get("vocab_size", 50257)
    tape.unit("embeddings")
    x = tape.embedding("wte", vocabulary, width, use.tokens)
    tape.embedding("wpe", config.get("n_positions", 1024), width, use.tokens)
    for layer in range(config.get("n_layer", 12)):
        tape.unit(f"block {layer}", block=True, entry=x)
        y = tape.layer_norm("ln_1", x)
        joint = tape.linear("c_attn", y, 3 * width, transposed=True)
        tape.keep(joint)  # queries, keys and values are views of it
        q, k, v = (Value(joint.rows, width, joint.size, kept=True) for _ in range(3))
        y = tape.attention(q, k, v, heads, mask=_mask(use))
        y = tape.linear("c_proj", y, width, transposed=True)
        x = tape.add(x, y)
        y = tape.layer_norm("ln_2", x)
        y = tape.linear("c_fc", y, inner, transposed=True)
        y = tape.activation(config.get("activation_function", "gelu_new"), y)
        y = tape.linear("c_proj", y, width, transposed=True)
        x = tape.add(x, y)
    tape.unit("head")
    x = tape.layer_norm("ln_f", x)
    return _decoder_head(use, tape, x, vocabulary, tied=config.get("tie_word_embeddings", True))


def _llama(use: ModelUse, tape: Tape) -> Value:
    config, kind = use.config, use.config["model_type"]
    width, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or (128 if kind == "qwen3" else width // heads)
    inner, vocabulary = config.get("intermediate_size", 11008), config.get("vocab_size", 32000)
    bias = kind == "qwen2" or config.get("attention_bias", False)
    bias_out = config.get("attention_bias", False) if kind != "qwen2" else False
    mlp_bias = config.get("mlp_bias", False)
    tape.unit("embeddings")
    x = tape.embedding("embed_tokens", vocabulary, width, use.tokens)
    for layer in range(config.get("num_hidden_layers", 32)):
        tape.unit(f"block {layer}", block=True, entry=x)
        y = tape.rms_norm("input_layernorm", x)
        q = tape.linear("q_proj", y, heads * head, bias=bias)
        k = tape.linear("k_proj", y, kv_heads * head, bias=bias)
        v = tape.linear("v_proj", y, kv_heads * head, bias=bias)
        if kind == "qwen3":
            q, k = tape.rms_norm("q_norm", q, heads), tape.rms_norm("k_norm", k, kv_heads)
        q, k = (Value(each.rows, each.width, each.size) for each in (q, k))  # turned by their positions
        y = tape.attention(q, k, v, heads, mask=_mask(use))
        y = tape.linear("o_proj", y, width, bias=bias_out)
        x = tape.add(x, y)
        y = tape.rms_norm("post_attention_layernorm", x)
        gate = tape.activation(config.get("hidden_act", "silu"), tape.linear("gate_proj", y, inner, bias=mlp_bias))
        y = tape.product_of(gate, tape.linear("up_proj", y, inner, bias=mlp_bias))
        y = tape.linear("down_proj", y, width, bias=mlp_bias)
        x = tape.add(x, y)
    tape.unit("head")
    x = tape.rms_norm("norm", x)
    return _decoder_head(use, tape, x, vocabulary, tied=config.get("tie_word_embeddings", False))


def _lm_head(use: ModelUse, tape: Tape, x: Value, vocabulary: int, *, tied: bool) -> Value:
    return tape.scores("lm_head", x, vocabulary, bias=False, tied=tied, fused=use.fused_loss)


def _decoder_head(use: ModelUse, tape: Tape, x: Value, vocabulary: int, *, tied: bool) -> Value:
    if use.head == "next_token":
        return _lm_head(use, tape, x, vocabulary, tied=tied)
    if use.head == "sequence":
        scores = tape.linear("score", x, use.outputs, bias=False)
        return Value(1, use.outputs, scores.size)
    name = "qa_outputs" if use.head == "span" else "score"
    return tape.linear(name, x, use.outputs)


# --- encoders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoder:
    """What encoders of BERT's kind differ in."""

    width: int
    heads: int
    inner: int
    layers: int
    act: str
    types: int
    """Kinds of tokens that have an embedding, besides words and positions."""
    names: tuple[str, str, str, str]
    """Of the layers of attention, for adapters: queries, keys, values, output."""
    pooling: tuple[str, str]
    """What the head of a sequence makes of the first token: name of the layer, activation."""


def _bert(use: ModelUse, tape: Tape) -> Value:
    config = use.config
    shape = _Encoder(
        width=config.get("hidden_size", 768),
        heads=config.get("num_attention_heads", 12),
        inner=config.get("intermediate_size", 3072),
        layers=config.get("num_hidden_layers", 12),
        act=config.get("hidden_act", "gelu"),
        types=config.get("type_vocab_size", 2),
        names=("query", "key", "value", "dense"),
        pooling=("pooler" if config["model_type"] == "bert" else "dense", "tanh"),
    )
    return _encoder(use, tape, shape)


def _distilbert(use: ModelUse, tape: Tape) -> Value:
    config = use.config
    shape = _Encoder(
        width=config.get("dim", 768),
        heads=config.get("n_heads", 12),
        inner=config.get("hidden_dim", 3072),
        layers=config.get("n_layers", 6),
        act=config.get("activation", "gelu"),
        types=0,
        names=("q_lin", "k_lin", "v_lin", "out_lin"),
        pooling=("pre_classifier", "relu"),
    )
    return _encoder(use, tape, shape)


def _encoder(use: ModelUse, tape: Tape, shape: _Encoder) -> Value:
    config, width, vocabulary = use.config, shape.width, use.config.get("vocab_size", 30522)
    tape.unit("embeddings")
    x = tape.embedding("word_embeddings", vocabulary, width, use.tokens)
    if shape.types:
        tape.embedding("token_type_embeddings", shape.types, width, use.tokens)
    tape.embedding("position_embeddings", config.get("max_position_embeddings", 512), width, use.tokens)
    x = tape.layer_norm("LayerNorm", x)
    for layer in range(shape.layers):
        tape.unit(f"block {layer}", block=True, entry=x)
        q, k, v = (tape.linear(name, x, width) for name in shape.names[:3])
        y = tape.attention(q, k, v, shape.heads, mask=_mask(use))
        y = tape.linear(shape.names[3], y, width)
        x = tape.layer_norm("attention_norm", tape.add(x, y))
        y = tape.activation(shape.act, tape.linear("up", x, shape.inner))
        x = tape.layer_norm("output_norm", tape.add(x, tape.linear("down", y, width)))
    tape.unit("head")
    if use.head == "masked_token":
        x = tape.activation(shape.act, tape.linear("transform", x, width))
        x = tape.layer_norm("transform_norm", x)
        tied = config.get("tie_word_embeddings", True)
        logits = tape.scores("decoder", x, vocabulary, bias=True, tied=tied, fused=use.fused_loss)
        tape.weight("decoder.bias", (vocabulary,))
        return logits
    if use.head == "sequence":
        name, act = shape.pooling
        x = tape.activation(act, tape.linear(name, tape.first_of(x), width))
    return tape.linear("qa_outputs" if use.head == "span" else "classifier", x, use.outputs)


# --- encoder-decoders ------------------------------------------------------------------------------------


def _t5(use: ModelUse, tape: Tape) -> Value:
    config = use.config
    width, heads, head = config.get("d_model", 512), config.get("num_heads", 8), config.get("d_kv", 64)
    inner, vocabulary = config.get("d_ff", 2048), config.get("vocab_size", 32128)
    kind = config.get("feed_forward_proj", "gated-gelu" if config["model_type"] == "mt5" else "relu")
    gated, act = kind.startswith("gated-"), kind.removeprefix("gated-")
    act = "gelu_new" if kind == "gated-gelu" else act
    buckets = config.get("relative_attention_num_buckets", 32)

    def attend(x: Value, memory: Value | None = None, *, first: bool = False) -> Value:
        y = tape.rms_norm("layer_norm", x)
        source = memory or y
        q = tape.linear("q", y, heads * head, bias=False)
        k, v = (tape.linear(name, source, heads * head, bias=False) for name in ("k", "v"))
        if first:  # the scores of all layers have the bias of the first
            tape.weight("relative_attention_bias", (buckets, heads))
            tape.indices(x.rows * x.rows)
        z = tape.attention(q, k, v, heads, mask=heads, biased=memory is None)
        return tape.add(x, tape.linear("o", z, width, bias=False))

    def feed(x: Value) -> Value:
        y = tape.rms_norm("layer_norm", x)
        if gated:
            gate = tape.activation(act, tape.linear("wi_0", y, inner, bias=False))
            y = tape.product_of(gate, tape.linear("wi_1", y, inner, bias=False))
        else:
            y = tape.activation(act, tape.linear("wi", y, inner, bias=False))
        return tape.add(x, tape.linear("wo", y, width, bias=False))

    layers = config.get("num_layers", 6)
    tape.unit("embeddings")
    x = tape.embedding("shared", vocabulary, width, use.tokens)
    for layer in range(layers):
        tape.unit(f"encoder block {layer}", block=True, entry=x)
        x = feed(attend(x, first=layer == 0))
    tape.unit("encoder norm")
    memory = tape.rms_norm("final_layer_norm", x)
    tape.unit("decoder embeddings")
    x = Value(use.target_tokens, width, tape.size)
    for layer in range(config.get("num_decoder_layers") or layers):
        tape.unit(f"decoder block {layer}", block=True, entry=x)
        x = feed(attend(attend(x, first=layer == 0), memory))
    tape.unit("head")
    x = tape.rms_norm("final_layer_norm", x)
    return _lm_head(use, tape, x, vocabulary, tied=config.get("tie_word_embeddings", True))


def _bart(use: ModelUse, tape: Tape) -> Value:
    config, kind = use.config, use.config["model_type"]
    width, vocabulary = config.get("d_model", 1024), config.get("vocab_size", 50265)
    act = config.get("activation_function", "gelu")
    before = kind == "mbart"  # norms come before what they norm for, and once more at the end
    positions = config.get("max_position_embeddings", 1024) + (0 if kind == "marian" else 2)

    def attend(x: Value, memory: Value, heads: int, name: str, *, mask: int | None) -> Value:
        same = memory is x
        y = tape.layer_norm(f"{name}_norm", x) if before else x
        q = tape.linear("q_proj", y, width)
        source = y if same else memory
        k, v = (tape.linear(each, source, width) for each in ("k_proj", "v_proj"))
        z = tape.linear("out_proj", tape.attention(q, k, v, heads, mask=mask), width)
        x = tape.add(x, z)
        return x if before else tape.layer_norm(f"{name}_norm", x)

    def feed(x: Value, inner: int) -> Value:
        y = tape.layer_norm("final_layer_norm", x) if before else x
        y = tape.linear("fc2", tape.activation(act, tape.linear("fc1", y, inner)), width)
        x = tape.add(x, y)
        return x if before else tape.layer_norm("final_layer_norm", x)

    def begin(rows: int, *, shared: bool) -> Value:
        x = tape.embedding("shared", vocabulary, width, rows) if shared else Value(rows, width, tape.size)
        if kind != "marian":  # whose positions are computed
            tape.embedding("embed_positions", positions, width, rows)
        else:
            tape.weight("embed_positions", (positions, width), trained=False)
        return tape.layer_norm("layernorm_embedding", x) if kind != "marian" else x

    tape.unit("embeddings")
    x = begin(use.tokens, shared=True)
    for layer in range(config.get("encoder_layers", 12)):
        tape.unit(f"encoder block {layer}", block=True, entry=x)
        x = attend(x, x, config.get("encoder_attention_heads", 16), "self_attn", mask=_mask(use))
        x = feed(x, config.get("encoder_ffn_dim", 4096))
    if before:
        tape.unit("encoder norm")
        x = tape.layer_norm("layer_norm", x)
    memory = x
    tape.unit("decoder embeddings")
    x = begin(use.target_tokens, shared=False)
    heads = config.get("decoder_attention_heads", 16)
    for layer in range(config.get("decoder_layers", 12)):
        tape.unit(f"decoder block {layer}", block=True, entry=x)
        x = attend(x, x, heads, "self_attn", mask=None)
        x = attend(x, memory, heads, "encoder_attn", mask=_mask(use))
        x = feed(x, config.get("decoder_ffn_dim", 4096))
    tape.unit("head")
    if before:
        x = tape.layer_norm("layer_norm", x)
    return _lm_head(use, tape, x, vocabulary, tied=config.get("tie_word_embeddings", True))


_ARCHITECTURES: dict[str, Callable[[ModelUse, Tape], Value]] = {
    "gpt2": _gpt2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama),
    **dict.fromkeys(("bert", "roberta"), _bert),
    "distilbert": _distilbert,
    **dict.fromkeys(("t5", "mt5"), _t5),
    **dict.fromkeys(("bart", "marian", "mbart"), _bart),
}
