from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from launch.cache import Cache
from launch.errors import ConfigError, DataError, LaunchError
from launch.recipe import Prepared, RecipeContext
from recipes import text, tokens
from recipes.causal_lm import Args, collate, count, loss, prepare, preview
from recipes.packing import Blocks
from tests import tiny

WORDS = [f"w{index}" for index in range(50)]


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A GPT-2 folder whose tokenizer has a token per word: token ids of a text are its word numbers + 3."""
    return make_model_folder(tmp_path / "model", begins=False)


def make_model_folder(folder: Path, *, begins: bool) -> Path:
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    GPT2Config(vocab_size=len(vocabulary), n_positions=64, n_embd=16, n_layer=1, n_head=2).save_pretrained(folder)
    return folder


def ids(text: str) -> list[int]:
    return [WORDS.index(word) + 3 for word in text.split()]


def documents(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 40))) for _ in range(count)]


def all_ids(blocks: Any) -> list[int]:
    return [int(token) for index in range(len(blocks)) for token in blocks[index]]


def arguments(model_folder: Path, **values: Any) -> Args:
    return Args(model=str(model_folder), from_scratch=True, block_size=8, **values)


# --- grouping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_of_texts", [1, 3, 1000])
def test_documents_are_laid_end_to_end_and_cut_without_loss(
    tmp_path: Path, context: RecipeContext, model_folder: Path, monkeypatch: pytest.MonkeyPatch, batch_of_texts: int
) -> None:
    """Against the definition: one list of ids over the whole split, nothing dropped at any batch of rows."""
    monkeypatch.setattr(tokens, "BATCH_OF_TEXTS", batch_of_texts)
    train, validation = documents(30), documents(7, seed=1)
    files = {}
    for name, texts in (("train", train), ("validation", validation)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    args = arguments(model_folder, train_files=(str(files["train"]),), validation_files=(str(files["validation"]),))
    prepared = prepare(args, context)
    for blocks, texts in ((prepared.train, train), (prepared.validation, validation)):
        expected = [token for text in texts for token in [*ids(text), 1]]
        assert all_ids(blocks) == expected
        assert [len(blocks[index]) for index in range(len(blocks) - 1)] == [8] * (len(blocks) - 1)
        assert len(blocks) == -(-len(expected) // 8)
    assert len(prepared.train) == preview(args, context).samples  # the plan knows it from now on
    assert preview(args, context).tokens_per_sample == 8


def write_text(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts) + "\n")


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([["number", "text"], *([str(number), text] for number, text in enumerate(texts))])


def write_json(path: Path, texts: list[str]) -> None:
    rows = [{"text": text} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def write_parquet(path: Path, texts: list[str]) -> None:
    parquet.write_table(pa.table({"text": texts}), path)


WRITERS = {
    ".txt": write_text,
    ".csv": write_csv,
    ".tsv": write_csv,
    ".json": write_json,
    ".jsonl": write_json,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_tokens(
    tmp_path: Path, context: RecipeContext, model_folder: Path, suffix: str
) -> None:
    texts = documents(12)
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, texts)
    args = arguments(model_folder, train_files=(str(path),), validation_files=(str(path),), documents="row")
    assert all_ids(prepare(args, context).train) == [token for text in texts for token in [*ids(text), 1]]


def test_a_glob_and_a_compressed_file_give_the_same_tokens(
    tmp_path: Path, context: RecipeContext, model_folder: Path
) -> None:
    first, second = documents(5), documents(5, seed=1)
    write_text(tmp_path / "a.txt", first)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(("\n".join(second) + "\n").encode()))
    paths = (str(tmp_path / "*.txt*"),)
    args = arguments(model_folder, train_files=paths, validation_files=paths)
    expected = [token for texts in (first, second) for token in [*ids(" ".join(texts)), 1]]
    assert all_ids(prepare(args, context).train) == expected
    assert preview(args, context).samples == -(-len(expected) // 8)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("auto", "w1 w2 w3 w4 w5 / w6 w7 /"),
        ("file", "w1 w2 w3 w4 w5 / w6 w7 /"),
        ("row", "w1 w2 / w3 / w4 / w5 / w6 / w7 /"),
        ("paragraph", "w1 w2 w3 / w4 w5 / w6 / w7 /"),
    ],
)
def test_where_documents_end(
    tmp_path: Path, context: RecipeContext, model_folder: Path, unit: str, expected: str
) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("w1 w2\nw3\n\n \nw4\nw5\n\n")
    second.write_text("w6\n\nw7")
    paths = (str(first), str(second))
    args = arguments(model_folder, train_files=paths, validation_files=paths, documents=unit)
    expected_ids = [1 if word == "/" else ids(word)[0] for word in expected.split()]
    assert all_ids(prepare(args, context).train) == expected_ids


def messy_text(chance: random.Random) -> str:
    """Lines as programs and tables have them: indented, blank, with spaces before their ends, some very long."""
    lines = []
    for _ in range(400):
        words = " ".join(chance.choices(WORDS, k=chance.choice([0, 1, 3, 9, 40])))
        lines.append(chance.choice(["", "", "", "    ", "\t"]) + words + chance.choice(["", "", "", " ", "  \t"]))
    return "\n".join(lines)


def make_byte_level_folder(folder: Path, written: str) -> Path:
    """With tokens that reach over the ends of lines, such as two of them, or one and what the next line is indented."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator([written], trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    GPT2Config(
        vocab_size=400, bos_token_id=0, eos_token_id=0, n_positions=64, n_embd=16, n_layer=1, n_head=2
    ).save_pretrained(folder)
    return folder


def test_a_running_text_has_the_tokens_of_all_of_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it was parted, and though it is read line by line."""
    written = messy_text(random.Random(0))
    folder = make_byte_level_folder(tmp_path / "model", written)
    path = tmp_path / "a.txt"
    path.write_text(written)
    args = arguments(folder, train_files=(str(path),), validation_files=(str(path),))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    by_line = [token for line in written.splitlines(True) for token in tokenizer(line)["input_ids"]]
    whole = tokenizer(written)["input_ids"]
    assert len(by_line) > len(whole)
    for characters, pieces in ((1_000, 10), (10_000, 1)):
        monkeypatch.setattr(text, "CHARACTERS", characters)
        assert len(list(text.read_files((path,), "text", "file"))) > pieces
        cache = Cache(tmp_path / str(characters))
        assert all_ids(prepare(args, RecipeContext(cache, seed=0)).train) == [*whole, tokenizer.eos_token_id]


def test_a_text_without_a_good_place_is_parted_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("    indented line\n" * 50)
    monkeypatch.setattr(text, "CHARACTERS", 100)
    pieces = list(text.read_files((path,), "text", "file"))
    assert "".join(piece.text for piece in pieces) == path.read_text()
    assert max(len(piece.text) for piece in pieces) < 250
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_rows_of_a_table_are_never_put_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_json(path, ["ab", "cd", "", "ef"])
    assert [piece.text for piece in text.read_files((path,), "text", "file")] == ["ab", "cd", "", "ef"]
    assert [piece.text for piece in text.read_files((path,), "text", "paragraph")] == ["ab", "cd", "ef"]


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer that does something of its own with a text before its fast part sees it."""

    def __call__(self, texts: Any, *args: Any, **options: Any) -> Any:
        written = texts.upper() if isinstance(texts, str) else [each.upper() for each in texts]
        return super().__call__(written, *args, **options)


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, Shouting])
def test_texts_have_the_ids_that_the_tokenizer_gives_them(tmp_path: Path, kind: Any) -> None:
    """Also where its folder asks for cut and padded texts, which running text must not be."""
    folder = make_byte_level_folder(tmp_path, "abc ABC def DEF </s> " * 9)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=30)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = kind.from_pretrained(folder)
    texts = ["abc def", "ABC DEF abc def </s> abc def abc", ""]
    expected = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts]
    assert max(map(len, expected)) > 4
    assert tokens._ids_of(kind.from_pretrained(folder))(texts) == expected


def test_a_tokenizer_that_begins_texts_begins_documents(tmp_path: Path, context: RecipeContext) -> None:
    folder = make_model_folder(tmp_path / "begins", begins=True)
    path = tmp_path / "a.txt"
    path.write_text("w1 w2\nw3\n\nw4 w5 w6\n")
    args = arguments(folder, train_files=(str(path),), validation_files=(str(path),), documents="paragraph")
    assert all_ids(prepare(args, context).train) == [0, *ids("w1 w2 w3"), 1, 0, *ids("w4 w5 w6"), 1]


def test_documents_held_out_are_whole_and_equal_ones_stay_together(
    tmp_path: Path, context: RecipeContext, model_folder: Path
) -> None:
    texts = documents(200) + documents(200)  # each twice
    path = tmp_path / "rows.jsonl"
    write_json(path, texts)
    prepared = prepare(arguments(model_folder, train_files=(str(path),), validation_fraction=0.25), context)
    split = {name: as_documents(all_ids(getattr(prepared, name))) for name in ("train", "validation")}
    assert not set(split["train"]) & set(split["validation"])
    assert sorted(split["train"] + split["validation"]) == sorted(tuple(ids(text)) for text in texts)
    assert 0.15 < len(split["validation"]) / len(texts) < 0.35


def as_documents(tokens: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    start = 0
    for position, token in enumerate(tokens):
        if token == 1:
            found.append(tuple(tokens[start:position]))
            start = position + 1
    return found


def test_the_end_of_a_running_text_is_held_out(tmp_path: Path, context: RecipeContext, model_folder: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(documents(40)))
    prepared = prepare(arguments(model_folder, train_files=(str(path),), validation_fraction=0.25), context)
    whole = [*ids(path.read_text()), 1]
    cut = len(whole) - int(len(whole) * 0.25)
    assert all_ids(prepared.train) == whole[:cut]
    assert all_ids(prepared.validation) == whole[cut:]


def test_tokens_are_made_again_when_a_file_changes(tmp_path: Path, context: RecipeContext, model_folder: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9")
    args = arguments(model_folder, train_files=(str(path),), validation_files=(str(path),))
    assert all_ids(prepare(args, context).train)[0] == ids("w1")[0]
    path.write_text("w9 w8 w7 w6 w5 w4 w3 w2 w1 w0")
    assert preview(args, context).samples is None
    assert all_ids(prepare(args, context).train)[0] == ids("w9")[0]


def test_a_dataset_folder_is_read_as_the_hub_would_be(
    tmp_path: Path, context: RecipeContext, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a file per split is what `load_dataset` finds in a dataset's repository."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = {"train": documents(9), "validation": documents(4, seed=2)}
    for split, rows in texts.items():
        write_parquet(folder / f"{split}.parquet", rows)
    prepared = prepare(arguments(model_folder, dataset=str(folder)), context)
    for split, rows in texts.items():
        assert all_ids(getattr(prepared, split)) == [token for text in rows for token in [*ids(text), 1]]
    with pytest.raises(DataError, match=r"has no column 'txt'; it has text; set recipe_args\.text_column"):
        prepare(arguments(model_folder, dataset=str(folder), text_column="txt"), context)


# --- batches and loss ------------------------------------------------------------------------------------


def test_collate_pads_only_where_it_must() -> None:
    full = collate([np.array([5, 6, 7], np.int32), np.array([8, 9, 10], np.int32)])
    assert set(full) == {"input_ids", "labels"}
    assert full["labels"].tolist() == [[5, 6, 7], [8, 9, 10]], "the first is a target of nothing"
    padded = collate([np.array([5, 6, 7], np.int32), np.array([8], np.int32)])
    assert padded["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert count(padded) == 2
    assert count(full) == 4


@pytest.mark.parametrize("model", [tiny.gpt2, tiny.llama])
def test_the_loss_is_the_sum_of_its_definition(model: Any) -> None:
    samples = tiny.sequences(6)
    live = model().eval()
    batch = collate(samples)
    with torch.no_grad():
        expected = float(tiny.reference_loss(live, samples)) * count(batch)
        assert float(loss(live, batch)) == pytest.approx(expected, rel=1e-6)


def test_blocks_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    assert len(Blocks(tmp_path / "x.bin", 8)) == 0


# --- tokenizer and model ---------------------------------------------------------------------------------


def test_special_tokens_are_the_tokenizers_and_dropout_is_ours(
    tmp_path: Path, context: RecipeContext, model_folder: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(documents(5)))
    prepared = prepare(arguments(model_folder, train_files=(str(path),), dropout=0.25), context)
    model = prepared.build_model()
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 1, 1)
    assert (model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) == (0.25, 0.25, 0.25)
    assert prepared.tokenizer.pad_token == "</s>"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_pretrained_weights_are_loaded_unless_from_scratch(
    tmp_path: Path, context: RecipeContext, model_folder: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(documents(5)))
    args = arguments(model_folder, train_files=(str(path),))
    torch.manual_seed(3)
    saved = prepare(args, context).build_model()
    saved.save_pretrained(model_folder)
    pretrained = prepare(args.model_copy(update={"from_scratch": False}), context).build_model()
    other = prepare(args, context).build_model()
    assert torch.equal(pretrained.lm_head.weight, saved.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, saved.lm_head.weight)


def test_a_llama_from_its_configuration_with_changes(tmp_path: Path, context: RecipeContext) -> None:
    folder = make_model_folder(tmp_path / "llama", begins=True)
    LlamaConfig(
        vocab_size=53, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(folder)
    path = tmp_path / "a.txt"
    path.write_text(" ".join(documents(5)))
    args = arguments(folder, train_files=(str(path),), config_overrides={"num_hidden_layers": 3})
    assert len(prepare(args, context).build_model().model.layers) == 3


def test_the_embedded_default_is_made_once_and_splits_paragraphs(context: RecipeContext) -> None:
    prepared = prepare(Args(), context)
    assert isinstance(prepared, Prepared)
    assert len(prepared.train) > 5 * len(prepared.validation) > 0
    made = {path: path.stat().st_mtime_ns for path in context.cache.root.rglob("*") if path.is_file()}
    again = prepare(Args(), context)
    assert all_ids(again.validation) == all_ids(prepared.validation)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    text = prepared.tokenizer.decode(all_ids(prepared.validation)[:200])
    assert "<|endoftext|>" in text
    model, twin = prepared.build_model(), again.build_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# --- bad input -------------------------------------------------------------------------------------------


def failure(context: RecipeContext, args: Args) -> LaunchError:
    with pytest.raises(LaunchError) as caught:  # noqa: PT012  (either may refuse)
        preview(args, context)
        prepare(args, context)
    return caught.value


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "is empty"),
    "rows.csv": (b"a,b\n1,2\n", "has no column 'text'; it has a, b; set recipe_args.text_column"),
    "rows.tsv": (b"a\tb\n1\t2\n", "has no column 'text'; it has a, b; set recipe_args.text_column"),
    "rows.jsonl": (b'{"a": 1}\n', "has no column 'text'; it has a; set recipe_args.text_column"),
    "list.json": (b"[1, 2]", 'cannot be read as json: rows must be objects such as {"text": "\u2026"}'),
    "cut.json": (b'[{"text": ', "cannot be read as json: "),
    "number.jsonl": (b'{"text": 3}\n', "column 'text' holds int (3), not text"),
    "open.csv": (b'text\n"un', "cannot be read as csv: "),
    "junk.parquet": (b"PAR1junk", "cannot be read as parquet: "),
    "latin.txt": (b"\xff\xfe\x00", "is not UTF-8 text: "),
    "short.txt": (b"w1 w2", "the training text has 3 tokens, less than one block of recipe_args.block_size = 8"),
    "what.doc": (b"text", "cannot tell what it holds; a name ends in .txt, "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, context: RecipeContext, model_folder: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    error = failure(context, arguments(model_folder, train_files=(str(tmp_path / name),)))
    assert isinstance(error, DataError)
    assert message in str(error)
    assert name in str(error) or name == "short.txt"
    assert "\n" not in str(error)


def test_files_and_folders_that_are_not_there(tmp_path: Path, context: RecipeContext, model_folder: Path) -> None:
    error = failure(context, arguments(model_folder, train_files=(str(tmp_path / "no.txt"),)))
    assert str(error) == f"recipe_args.train_files: {tmp_path}/no.txt: no such file"
    (tmp_path / "empty").mkdir()
    error = failure(context, arguments(model_folder, train_files=(str(tmp_path / "empty"),)))
    assert "holds no file whose name ends in .txt, " in str(error)
    error = failure(context, Args(model=str(tmp_path / "no")))
    assert str(error) == f"recipe_args.model = {tmp_path}/no: no such folder"


def test_a_tokenizer_that_encodes_to_nothing(context: RecipeContext, model_folder: Path) -> None:
    """transformers 5 makes an empty GPT-2 tokenizer, without a word, from files it does not recognise."""
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    (model_folder / "vocab.json").write_text("{}")
    (model_folder / "merges.txt").write_text("#version: 0.2\n")
    (model_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert "encodes text to nothing" in str(failure(context, Args(model=str(model_folder))))


def test_model_and_tokenizer_that_do_not_belong_together(context: RecipeContext, model_folder: Path) -> None:
    GPT2Config(vocab_size=10, n_positions=64, n_embd=16, n_layer=1, n_head=2).save_pretrained(model_folder)
    assert "embeds 10 tokens, but the tokenizer has 53" in str(failure(context, arguments(model_folder)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 65}, "recipe_args.block_size = 65: "),
        ({"config_overrides": {"n_layers": 2}}, "config_overrides.n_layers: a gpt2 model has no such setting"),
        ({"config_overrides": {"n_layer": 2}, "from_scratch": False}, "set recipe_args.from_scratch=true"),
        ({"dataset": "x/y", "train_files": ("a.txt",)}, "exclude each other"),
        ({"stride": 9}, "use block_size or less"),
        ({"streaming": True}, "recipe_args.streaming is for rows"),
        ({"chat_template": "{{ x }}"}, "recipe_args.chat_template is for recipe_args.format=chat"),
        ({"format": "chat", "stride": 4}, "recipe_args.stride is for text"),
        ({"format": "chat", "packing": "continuous"}, "for recipe_args.format = chat use isolated or off"),
        ({"format": "chat", "packing": "isolated", "streaming": True}, "leave out recipe_args.streaming"),
        ({"format": "chat", "chat_template": "/no/such"}, "is no template (it has no brace), and no file"),
        ({"tokenizer": "embedded"}, "goes with recipe_args.model=embedded only"),
    ],
)
def test_settings_that_contradict_each_other(
    context: RecipeContext, model_folder: Path, values: dict[str, Any], message: str
) -> None:
    args = arguments(model_folder).model_copy(update=values)
    error = failure(context, args)
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_remote_code_is_not_run_unless_named(tmp_path: Path, context: RecipeContext, model_folder: Path) -> None:
    ran = tmp_path / "ran"
    code = (
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import GPT2Config\n"
        "class Mine(GPT2Config):\n    model_type = 'mine'\n"
    )
    (model_folder / "configuration_mine.py").write_text(code)
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}, "vocab_size": 53}
    (model_folder / "config.json").write_text(json.dumps(config))
    error = failure(context, arguments(model_folder))
    assert f"recipe_args.trust_remote_code=[{model_folder}]" in str(error)
    assert not ran.exists()


@pytest.mark.parametrize("values", [{"model": "gpt2"}, {"dataset": "wikitext"}, {"tokenizer": "gpt2"}])
def test_a_hub_name_while_offline(
    context: RecipeContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = failure(context, Args(**values))
    key, name = next(iter(values.items()))
    assert str(error).startswith(f"recipe_args.{key} = {name}: not a local folder, not in the cache, and the Hub is")
    assert f"`hf download {name}" in str(error)


def test_a_hub_that_does_not_answer(context: RecipeContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached ([Errno 111]" in str(failure(context, Args(model="gpt2")))
