"""What recipes of encoder-decoder models share: samples, batches, loss, texts and what is measured of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from launch.cache import Cache
from launch.errors import ConfigError, DataError
from launch.recipe import Prepared, RecipeContext, Width
from recipes import translation
from recipes.text_pairs import Collate
from tests.gloo import run_ranks

WORDS = [f"w{number}" for number in range(40)]
PAD, END, UNKNOWN = 0, 1, 2


def ids(text: str) -> list[int]:
    """Token ids of a text as the tokenizer of `model_folder` has them, without the end."""
    return [int(word[1:]) + 3 for word in text.split()]


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A T5 with a token per word, which does not end texts by itself; its weights are large, so that texts differ."""
    folder = tmp_path / "t5"
    vocabulary = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN, **{word: 3 + n for n, word in enumerate(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(5)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        vocab_size=len(vocabulary), decoder_start_token_id=PAD, initializer_factor=5.0, dropout_rate=0.0, **sizes
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


ROWS = [
    {"source": f"w{n} " * (1 + n % 7) + "w39", "target": f"w{(3 * n) % 40} w{n}" + " w5" * (n % 4)} for n in range(11)
]


def rows_file(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / f"rows-{len(list(tmp_path.glob('rows-*')))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared_of(
    context: RecipeContext, folder: Path, rows: list[dict[str, Any]], recipe: Any = translation, **settings: Any
) -> Prepared:
    file = rows_file(context.cache.root.parent, rows)
    args = recipe.Args(model=str(folder), train_files=(file,), validation_files=(file,), **settings)
    recipe.preview(args, context)
    prepared: Prepared = recipe.prepare(args, context)
    return prepared


# --- samples -----------------------------------------------------------------------------------------------


def test_samples_are_the_tokens_of_both_texts_ended_and_cut(context: RecipeContext, model_folder: Path) -> None:
    rows = [
        {"source": "w1 w2", "target": "w3"},
        {"source": " ", "target": "w1"},
        {"source": "w1", "target": None},
        {"source": "w1 w2 w3 w4 w5", "target": "w1 w2 w3 w4 w5 w6"},
    ]
    limits = {"max_source_length": 5, "max_target_length": 4}
    prepared = prepared_of(context, model_folder, rows, source_prefix="w0 ", **limits)
    assert prepared.train[:]["input_ids"] == [[*ids("w0 w1 w2"), END], [*ids("w0 w1 w2 w3"), END]]
    assert prepared.train[:]["labels"] == [[*ids("w3"), END], [*ids("w1 w2 w3"), END]]
    assert prepared.validation[:]["source"] == ["w1 w2", "w1 w2 w3 w4 w5"]
    assert prepared.validation[:]["references"] == [["w3"], ["w1 w2 w3 w4 w5 w6"]]
    cut = {"share_of_source_cut": 1 / 2, "share_of_target_cut": 1 / 2}
    assert prepared.facts["train"] == {"rows": 4, "samples": 2, "left_out": 2, **cut}
    assert prepared.tokenizer.decode(prepared.train[0]["labels"], skip_special_tokens=True) == "w3"


@pytest.mark.parametrize(("lists", "references"), [("references", ["w7 w8", "w9"]), ("join", ["w7 w8 w9"])])
def test_lists_are_sentences_of_a_source_and_right_answers_of_a_target(
    context: RecipeContext, model_folder: Path, lists: str, references: list[str]
) -> None:
    rows = [{"source": ["w4 ", "w5 w6"], "target": ["w7 w8", "w9"]}]
    prepared = prepared_of(context, model_folder, rows, target_lists=lists)
    assert prepared.train[0]["input_ids"] == [*ids("w4 w5 w6"), END]
    assert prepared.train[0]["labels"] == [*ids(references[0]), END]
    assert prepared.validation[0]["references"] == references


def test_a_batch_is_padded_on_the_right_and_the_decoder_is_one_token_behind(
    context: RecipeContext, model_folder: Path
) -> None:
    prepared = prepared_of(context, model_folder, ROWS, pad_to_multiple_of=4)
    samples = [{"input_ids": [5, 6, 7, 8, 1], "labels": [9, 1]}, {"input_ids": [5, 1], "labels": [7, 8, 1]}]
    assert {name: tensor.tolist() for name, tensor in prepared.collate(samples).items()} == {
        "input_ids": [[5, 6, 7, 8, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]],
        "decoder_input_ids": [[0, 9, 0, 0], [0, 7, 8, 0]],
        "labels": [[9, 1, -100, -100], [7, 8, 1, -100]],
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_one_sample_at_a_time(context: RecipeContext, model_folder: Path, smoothing: float) -> None:
    prepared = prepared_of(context, model_folder, ROWS, label_smoothing=smoothing)
    model = prepared.build_model().eval().requires_grad_(False)
    expected, targets = 0.0, 0
    for sample in prepared.train:
        log = (
            model(
                input_ids=torch.tensor([sample["input_ids"]]),
                decoder_input_ids=torch.tensor([[PAD, *sample["labels"][:-1]]]),
            )
            .logits[0]
            .log_softmax(-1)
        )
        of_target = log.gather(1, torch.tensor(sample["labels"])[:, None]).sum()
        expected -= float((1 - smoothing) * of_target + smoothing * log.mean(-1).sum())
        targets += len(sample["labels"])
    for multiple, size in ((1, 3), (8, len(ROWS))):
        collate = type(prepared.collate)(PAD, PAD, Width(multiple), Width(multiple))
        batches = [collate(list(prepared.train)[first : first + size]) for first in range(0, len(ROWS), size)]
        assert sum(map(prepared.count, batches)) == targets
        with torch.no_grad():
            assert sum(float(prepared.loss(model, batch)) for batch in batches) == pytest.approx(expected, rel=1e-5)


def test_source_and_target_share_the_number_of_their_width() -> None:
    """Else there would be as many shapes as pairs of widths."""
    collate = Collate(PAD, PAD, Width(8, 64, 3), Width(8, 32, 3))
    sizes = [(source, target) for source in (4, 20, 60) for target in (3, 12, 30)]
    batches = [collate([{"input_ids": [5] * source, "labels": [6] * target}]) for source, target in sizes]
    shapes = {tuple(batch[name].shape[1] for name in ("input_ids", "labels")) for batch in batches}
    assert shapes == {(16, 8), (32, 16), (64, 32)}
    for batch, (source, target) in zip(batches, sizes, strict=True):
        assert batch["attention_mask"].sum() == source and (batch["labels"] == 6).sum() == target


# --- generated texts ---------------------------------------------------------------------------------------


def evaluated(name: str, settings: dict[str, Any], strategy: str, world_size: int, size: int, folder: str) -> Any:
    """Metrics and details of an evaluation by all ranks."""
    from launch.engine.batching import Loader
    from launch.engine.inference import Inference
    from launch.engine.optim import make_optimizer
    from launch.engine.precision import Autocast
    from launch.engine.scoring import Evaluation
    from launch.engine.sharding import make_accelerator, spread
    from tests.test_engine_sharding import plan_for

    recipe = importlib.import_module(f"recipes.{name}")
    prepared = recipe.prepare(recipe.Args(**settings), RecipeContext(Cache(Path(folder) / "cache"), 0))
    plan = plan_for(strategy, world_size, Path(folder), "train.global_batch_size=12")
    accelerator = make_accelerator(plan)
    model = prepared.build_model()
    model, _ = spread(accelerator, model, make_optimizer(model, plan.config.train, fused=False))
    autocast = Autocast("cpu", torch.float32)
    evaluation = Evaluation(
        *(accelerator, Loader(prepared.validation, prepared.collate), prepared.loss, prepared.count, size),
        scoring=prepared.scoring,
        inference=lambda model: Inference(accelerator, model, autocast),
    )
    score = evaluation(model)
    assert score is not None
    return {"loss": score.loss, **score.metrics}, score.details


def test_texts_are_those_of_one_sample_at_a_time_and_metrics_those_of_the_libraries(
    context: RecipeContext, model_folder: Path, tmp_path: Path
) -> None:
    references = [[row["target"], "w5 " + row["target"]][: 1 + n % 2] for n, row in enumerate(ROWS)]
    rows = [{**row, "target": targets} for row, targets in zip(ROWS, references, strict=True)]
    file = rows_file(tmp_path, rows)
    settings = {"model": str(model_folder), "train_files": [file], "validation_files": [file], "num_beams": 2}
    settings |= {"max_new_tokens": 9, "metrics": ("bleu", "chrf", "rouge"), "no_repeat_ngram_size": 3}
    prepared = translation.prepare(translation.Args(**settings), context)
    model = prepared.build_model().eval()
    texts = []
    for sample in prepared.validation:
        told = {"num_beams": 2, "do_sample": False, "max_new_tokens": 9, "no_repeat_ngram_size": 3}
        written = model.generate(input_ids=torch.tensor([sample["input_ids"]]), **told)
        texts.append(prepared.tokenizer.decode(written[0], skip_special_tokens=True))
    assert len(set(map(len, texts))) > 1
    streams = [[row[n] if n < len(row) else None for row in references] for n in range(2)]
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score_multi(row, text)["rougeL"].fmeasure for row, text in zip(references, texts, strict=True)]
    [(numbers, details)] = run_ranks(1, evaluated, "translation", settings, "single", 1, 4, str(tmp_path))
    assert [example["prediction"] for example in details["examples"]] == texts
    assert [example["references"] for example in details["examples"]] == references
    assert numbers["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score)
    assert numbers["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score)
    assert numbers["rougeL"] == pytest.approx(sum(rouge) / len(rouge))
    assert numbers["generated_length"] == sum(len(text.split()) for text in texts) / len(texts)
    assert details["bleu_signature"].startswith("nrefs:")


@pytest.mark.dist
@pytest.mark.slow
def test_an_evaluation_is_the_same_however_many_ranks_and_whatever_shards_the_weights(
    model_folder: Path, tmp_path: Path
) -> None:
    file = rows_file(tmp_path, ROWS)
    settings = {"model": str(model_folder), "train_files": [file], "validation_files": [file], "max_new_tokens": 9}
    [(expected, details)] = run_ranks(1, evaluated, "summarization", settings, "single", 1, 4, str(tmp_path))
    for strategy, world_size in (("ddp", 3), ("fsdp2", 2), ("zero3", 2)):
        by_rank = run_ranks(world_size, evaluated, "summarization", settings, strategy, world_size, 2, str(tmp_path))
        assert by_rank[0][1] == details, strategy
        for numbers, _ in by_rank:
            assert numbers == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-5)}


# --- languages and exported models -------------------------------------------------------------------------

PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((each, -3.0) for each in "abcde")]
SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SMALL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


def multilingual(kind: str, folder: Path) -> tuple[str, str]:
    """Writes a tiny model and returns the codes of two of its languages."""
    tokenizer: Any
    if kind == "nllb":
        tokenizer = NllbTokenizer(vocab={piece: number for number, (piece, _) in enumerate(PIECES)}, merges=[])
    else:
        tokenizer = (MBartTokenizer if kind == "mbart" else MBart50Tokenizer)(vocab=PIECES)
    tokenizer.save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told = {name: value for name, value in told.items() if name not in ("src_lang", "tgt_lang")}  # as of many models
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    model_class, config_class = (
        (M2M100ForConditionalGeneration, M2M100Config)
        if kind == "nllb"
        else (MBartForConditionalGeneration, MBartConfig)
    )
    torch.manual_seed(1)
    model_class(config_class(vocab_size=len(tokenizer), decoder_start_token_id=2, **SMALL)).save_pretrained(folder)
    return ("fra_Latn", "deu_Latn") if kind == "nllb" else ("fr_XX", "de_DE")


@pytest.mark.parametrize("kind", ["mbart", "mbart50", "nllb"])
def test_multilingual_models_are_told_their_languages(context: RecipeContext, tmp_path: Path, kind: str) -> None:
    codes = multilingual(kind, tmp_path / "model")
    named = {"source_language_code": codes[0], "target_language_code": codes[1]}
    prepared = prepared_of(context, tmp_path / "model", [{"source": "a b", "target": "c"}] * 2, **named)
    tokens = prepared.tokenizer.convert_ids_to_tokens
    source, target = tokens(prepared.train[0]["input_ids"]), tokens(prepared.train[0]["labels"])
    languages = (source[-1], target[-1]) if kind == "mbart" else (source[0], target[0])
    assert languages == codes
    model: Any = prepared.build_model().eval()
    batch = prepared.collate([prepared.train[0]])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = model(**given, decoder_input_ids=batch["decoder_input_ids"]).logits
    theirs = model(**given, labels=batch["labels"]).logits  # it shifts them itself
    real = batch["labels"] != -100
    assert torch.equal(ours[real], theirs[real])
    written = tokens(model.generate(**given, max_new_tokens=3)[0])
    assert written[0 if kind == "mbart" else 1] == codes[1]
    model.save_pretrained(tmp_path / "export")
    prepared.tokenizer.save_pretrained(tmp_path / "export")
    reloaded, again = (each.from_pretrained(tmp_path / "export") for each in (AutoModelForSeq2SeqLM, AutoTokenizer))
    assert again("a b")["input_ids"] == prepared.train[0]["input_ids"]
    assert again(text_target="c")["input_ids"] == prepared.train[0]["labels"]
    settings = ("decoder_start_token_id", "forced_bos_token_id", "max_new_tokens")
    of_both = [[getattr(each.generation_config, name) for name in settings] for each in (reloaded, model)]
    assert of_both[0] == of_both[1]


def test_an_exported_model_reads_the_prompt_as_it_was_trained_to(context: RecipeContext, model_folder: Path) -> None:
    from launch.engine.exported import continue_text, load_exported

    prepared = prepared_of(context, model_folder, ROWS, source_prefix="w7 w8 ")
    model, export = prepared.build_model().eval(), context.cache.root.parent / "export"
    model.save_pretrained(export)
    prepared.tokenizer.save_pretrained(export)
    read = torch.tensor([[*ids("w7 w8 w1 w2"), END]])
    expected = prepared.tokenizer.decode(model.generate(read, max_new_tokens=6)[0], skip_special_tokens=True)
    assert expected != prepared.tokenizer.decode(model.generate(read[:, 2:], max_new_tokens=6)[0], True)
    assert continue_text(*load_exported(export), "w1 w2", 6, 0.0, 0) == expected


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": 2.0}, "recipe_args.length_penalty = 2: chooses between beams"),
        ({"forced_bos_token": "w99"}, "recipe_args.forced_bos_token = w99: the tokenizer"),
        ({"source_language_code": "en"}, "is not multilingual; leave them out"),
        ({"metrics": ("blue",)}, "did you mean bleu"),
        ({"source_column": "sourse"}, "has no column 'sourse'"),
    ],
)
def test_wrong_arguments_get_one_clear_line(
    context: RecipeContext, model_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        prepared_of(context, model_folder, ROWS, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_many_languages_wants_to_know_which(context: RecipeContext, tmp_path: Path) -> None:
    multilingual("mbart50", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"target_language_code = de: .* one of ar_AR.*did you mean de_DE\?"):
        prepared_of(context, tmp_path / "model", ROWS, source_language_code="en_XX", target_language_code="de")


def test_other_models_and_values_that_are_no_text_are_refused(
    context: RecipeContext, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"recipe_args\.target_column: holds 5, which is no text"):
        prepared_of(context, model_folder, [{"source": "w1", "target": 5}])
    from tests.tiny import gpt2

    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "gpt2")
    gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="a gpt2 model has no encoder and decoder"):
        prepared_of(context, tmp_path / "gpt2", ROWS)
