"""How an encoder-decoder model writes: its tokenizer made ready, and the settings its texts are generated with."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError, DataError
from recipes.models import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from recipes.sequence_to_sequence import SequenceArgs


def ready_tokenizer(source: Source, args: SequenceArgs) -> Any:
    """The tokenizer, told its languages, with a padding token, ending every text with the end-of-text token.

    Raises:
        ConfigError: a language that it does not know, or none where it needs one.
        DataError: it has no end-of-text token.
    """
    tokenizer: Any = source.tokenizer()
    _tell_languages(tokenizer, args)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"recipe_args.model = {args.model}: its tokenizer has no end-of-text token (eos_token), with which a model "
            "says that its text is finished"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # what is padded is masked, and no target
    if tokenizer.eos_token_id not in tokenizer("a")["input_ids"]:
        _end_texts(tokenizer, args)
    return tokenizer


def _tell_languages(tokenizer: Any, args: SequenceArgs) -> None:
    codes = {"src_lang": args.source_language_code, "tgt_lang": args.target_language_code}
    if not hasattr(tokenizer, "src_lang"):
        if any(codes.values()):
            raise ConfigError(
                f"recipe_args.source_language_code and target_language_code: the tokenizer of {args.model} is not "
                "multilingual; leave them out"
            )
        return
    special = tokenizer.all_special_tokens
    known = list(getattr(tokenizer, "lang_code_to_id", None) or (each for each in special if "_" in each))
    for name, key in (("src_lang", "source_language_code"), ("tgt_lang", "target_language_code")):
        code = codes[name]
        if code not in known:
            close = difflib.get_close_matches(code or getattr(args, key[:-5], None) or "", known, n=1, cutoff=0.3)
            raise ConfigError(
                f"recipe_args.{key} = {code}: the tokenizer of {args.model} needs to know the language, one of "
                f"{', '.join(known[:8])}, … ({len(known)} in all){f'; did you mean {close[0]}?' if close else ''}"
            )
        setattr(tokenizer, name, code)
        tokenizer.init_kwargs[name] = code  # or the exported tokenizer would forget it


def _end_texts(tokenizer: Any, args: SequenceArgs) -> None:
    """Have the tokenizer itself add the end-of-text token, so that the exported one does too."""
    from tokenizers import processors

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"recipe_args.model = {args.model}: its tokenizer does not end texts with {tokenizer.eos_token}, and is "
            "none of the tokenizers library, which could be told to; save it with a tokenizer.json"
        )
    end = tokenizer.eos_token
    ending = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    before = [backend.post_processor] if backend.post_processor is not None else []
    backend.post_processor = processors.Sequence([*before, ending])


@dataclass(frozen=True)
class Writing:
    """How the model's own texts are generated, in evaluations and by the exported model."""

    start: int
    """Token id that every target is written after."""
    settings: dict[str, Any]
    """For `GenerationMixin.generate`."""
    prefix: str

    @classmethod
    def of(cls, args: SequenceArgs, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Writing:
        """As the arguments, the model's configuration and the tokenizer's languages say.

        Raises:
            ConfigError: the model does not write from a source, or there is no such token.
        """
        if not config.is_encoder_decoder:
            raise ConfigError(
                f"recipe_args.model = {args.model}: a {config.model_type} model has no encoder and decoder; name one "
                "that has, such as t5-small or facebook/bart-base"
            )
        target = tokenizer(text_target="a")["input_ids"]
        if args.from_scratch and args.tokenizer:
            config.decoder_start_token_id = tokenizer.pad_token_id  # the one configured is of another vocabulary
        elif config.model_type == "mbart":  # the last token of its targets comes round to the front
            config.decoder_start_token_id = target[-1]
        start: int | None = config.decoder_start_token_id
        if start is None:
            raise ConfigError(f"recipe_args.model = {args.model}: its config.json has no decoder_start_token_id")
        settings: dict[str, Any] = {
            "num_beams": args.num_beams,
            "do_sample": False,
            "max_new_tokens": args.max_new_tokens or args.max_target_length,
            "decoder_start_token_id": start,
        }
        if args.num_beams == 1:
            settings |= {"early_stopping": False, "length_penalty": 1.0}  # say something of beams alone
        for name in ("length_penalty", "no_repeat_ngram_size"):
            if (value := getattr(args, name)) is not None:
                settings[name] = value
        if (forced := _forced(args, tokenizer, target)) is not None:
            settings["forced_bos_token_id"] = forced
        return cls(start, settings, args.source_prefix)

    @property
    def most_tokens(self) -> int:
        """Length of the longest text, in tokens."""
        return int(self.settings["max_new_tokens"])

    def told(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, which keeps in its configurations how its texts are generated, and what to put before a source."""
        for name, value in {"max_length": None, **self.settings}.items():
            setattr(model.generation_config, name, value)
        model.config.prefix = self.prefix or None
        return model


def _forced(args: SequenceArgs, tokenizer: Any, target: list[int]) -> int | None:
    """Id of the token that texts must begin with: a stated one, or the language's where targets begin with that."""
    token = args.forced_bos_token
    if token is None:
        languages = getattr(tokenizer, "tgt_lang", None) is not None
        return target[0] if languages and target[0] in set(tokenizer.all_special_ids) else None
    if token not in tokenizer.get_vocab():
        raise ConfigError(f"recipe_args.forced_bos_token = {token}: the tokenizer of {args.model} has no such token")
    return int(tokenizer.convert_tokens_to_ids(token))
