from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from launch.cache import Cache
from launch.engine.preflight import look
from launch.errors import ConfigError, DataError
from launch.recipe import Prepared, RecipeContext
from recipes.causal_lm import Args, preview, tokenizer
from recipes.causal_lm import prepare as prepare_recipe
from recipes.chat import DEFAULT_TEMPLATE, GENERATION
from tests.test_causal_lm import ids, make_model_folder

CHATML = (
    "{% for message in messages %}<s> {{ message.role }} {{ message.content }} </s> w0\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
"""Every message between <s> and </s>, with something behind it; says nothing of what is generated."""

MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<s> {% generation %}{{ message.content }} </s>"
    "{% endgeneration %} w0 {% else %}{{ message.content }} {% endif %}{% endfor %}"
)

TALK = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4"},
    {"role": "tool", "content": "w5"},
    {"role": "assistant", "content": "w6"},
]
UNKNOWN = 2
"""Roles are no words that the tokenizer knows."""


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def arguments(tmp_path: Path, rows: list[dict[str, Any]], **values: Any) -> Args:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model_folder(tmp_path / "model", begins=False)
    files = {"train_files": (str(path),), "validation_files": (str(path),)}
    stated = {"model": str(model), "from_scratch": True, "format": "chat", "block_size": 32, **files, **values}
    return Args(**stated)


def prepare(args: Args, context: RecipeContext) -> Prepared:
    preview(args, context)
    return prepare_recipe(args, context)


def samples_of(prepared: Prepared) -> list[tuple[list[int], list[int]]]:
    """Ids and, where they are targets, again."""
    samples: Any = prepared.train
    return [tuple(samples[index].tolist()[:2]) for index in range(len(samples))]


def targets(marks: str, tokens: list[int]) -> list[int]:
    return [token if mark == "x" else -100 for mark, token in zip(marks, tokens, strict=True)]


# --- what is a target ------------------------------------------------------------------------------------


def test_what_the_assistant_says_is_the_target_with_its_end(tmp_path: Path, context: RecipeContext) -> None:
    """Found by growing prefixes, as the template does not mark it."""
    template = CHATML.replace(" w0\n", "\n")
    prepared = prepare(arguments(tmp_path, [{"messages": TALK}], chat_template=template), context)
    found = ids("w9 w1 w2 w3 w4 w5 w6")
    u, (w9, w1, w2, w3, w4, w5, w6) = UNKNOWN, found
    tokens = [0, u, w9, 1, 0, u, w1, w2, 1, 0, u, w3, w4, 1, 0, u, w5, 1, 0, u, w6, 1]
    assert samples_of(prepared) == [(tokens, targets("...........xxx......xx", tokens))]
    assert prepared.count(prepared.collate([prepared.train[0]])) == 5  # type: ignore[index]
    assert prepared.sample_prompt == "<s> system w9 </s>\n<s> user w1 w2 </s>\n<s> assistant "
    assert prepared.facts["chat_template"] == "recipe_args.chat_template"


def test_a_template_that_marks_answers_is_believed(tmp_path: Path, context: RecipeContext) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(MARKED)
    prepared = prepare(arguments(tmp_path, [{"messages": TALK}], chat_template=str(file)), context)
    tokens = [*ids("w9 w1 w2"), 0, *ids("w3 w4"), 1, *ids("w0 w5"), 0, *ids("w6"), 1, *ids("w0")]
    assert samples_of(prepared) == [(tokens, targets("....xxx...xx.", tokens))]
    assert prepared.tokenizer.chat_template == MARKED, "it is exported"


def test_the_simple_template_for_tokenizers_without_one(tmp_path: Path, context: RecipeContext) -> None:
    """The embedded tokenizer spells everything; what it makes of a conversation reads back."""
    args = arguments(tmp_path, [{"messages": TALK}], block_size=64)
    args = args.model_copy(update={"model": "embedded", "from_scratch": False})
    prepared = prepare(args, context)
    (tokens, labels), end = samples_of(prepared)[0], prepared.tokenizer.eos_token
    assert GENERATION.search(DEFAULT_TEMPLATE)
    assert prepared.tokenizer.decode(tokens) == (
        f"system: w9\nuser: w1 w2\nassistant: w3 w4{end}tool: w5\nassistant: w6{end}"
    )
    said = prepared.tokenizer.decode([label for label in labels if label != -100])
    assert said == f" w3 w4{end} w6{end}"
    assert prepared.facts["chat_template"].startswith("the tokenizer has none; ")
    assert tokenizer(args, context).chat_template == prepared.tokenizer.chat_template


def test_the_end_of_a_line_behind_an_answer_is_not_said(tmp_path: Path, context: RecipeContext) -> None:
    template = "{% for message in messages %}{{ message.role }} {{ message.content }}{{ eos_token }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant {% endif %}"
    args = arguments(tmp_path, [{"messages": TALK}], block_size=64, chat_template=template)
    prepared = prepare(args.model_copy(update={"model": "embedded", "from_scratch": False}), context)
    ((_, labels),), end = samples_of(prepared), prepared.tokenizer.eos_token
    said = prepared.tokenizer.decode([label for label in labels if label != -100])
    assert said.replace(" ", "") == f"w3w4{end}w6{end}"


def test_the_first_token_is_context_only(tmp_path: Path, context: RecipeContext) -> None:
    template = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    (sample,) = samples_of(prepare(arguments(tmp_path, [{"messages": TALK}], chat_template=template), context))
    assert sample == (ids("w1 w2"), [-100, *ids("w2")])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_a_tool_call_has_the_arguments_that_it_was_given(tmp_path: Path, context: RecipeContext, kind: str) -> None:
    """Not those of the other calls of the column as nulls, as Arrow has them."""
    calls = [{"name": "look", "arguments": {"w1": "w2"}}, {"name": "write", "arguments": {"w3": "w4", "w5": "w6"}}]
    rows = [
        {"messages": [TALK[1], {"role": "assistant", "content": "w3", "tool_calls": [call]}, TALK[3], TALK[4]]}
        for call in calls
    ]
    template = (
        "{% for message in messages %}{% generation %}{% if message.tool_calls is defined %}"
        "{{ message.tool_calls | tojson }}{% else %}{{ message.content }}{% endif %}{% endgeneration %}{% endfor %}"
    )
    args = arguments(tmp_path, rows, block_size=128, chat_template=template)
    if kind == "parquet":
        files = (str(tmp_path / "rows.parquet"),)
        parquet.write_table(pa.Table.from_pylist(rows), files[0])
        args = args.model_copy(update={"train_files": files, "validation_files": files})
    elif kind == "dataset":
        (tmp_path / "rows").mkdir()
        shutil.move(tmp_path / "rows.jsonl", tmp_path / "rows" / "train.jsonl")
        update = {"train_files": (), "validation_files": (), "dataset": str(tmp_path / "rows")}
        args = args.model_copy(update={**update, "validation_fraction": 0.01})
    args = args.model_copy(update={"model": "embedded", "from_scratch": False})
    prepared = prepare(args, context)
    told = [prepared.tokenizer.decode(tokens) for tokens, _ in samples_of(prepared)]
    assert told
    for text in told:
        assert "null" not in text
        assert any(json.dumps(call["arguments"]) in text for call in calls)


@pytest.mark.parametrize("form", ["chat", "instruction"])
def test_the_embedded_rows_are_all_answered_and_never_on_both_sides(context: RecipeContext, form: str) -> None:
    prepared = prepare(Args(format=form), context)  # type: ignore[arg-type]
    found = prepared.facts["train_conversations"]
    assert found["rows"] > 2000
    assert found["without_answer"] == found["cut_short"] == 0
    assert look(prepared).overlap == 0
    assert str(prepared.sample_prompt).endswith("assistant:")


def test_prompts_and_completions_are_a_conversation(tmp_path: Path, context: RecipeContext) -> None:
    rows = [
        {"ask": "w1", "more": "w2", "say": "w3 w4"},
        {"ask": "w1", "more": None, "say": "w3 w4"},
        {"ask": "w1", "more": "", "say": ""},
    ]
    columns = {"prompt_column": "ask", "input_column": "more", "completion_column": "say"}
    args = arguments(tmp_path, rows, format="instruction", chat_template=MARKED, **columns)
    prepared = prepare(args, context)
    (with_input, _), (without, labels) = samples_of(prepared)
    assert with_input == [*ids("w1 w2"), 0, *ids("w3 w4"), 1, *ids("w0")]
    assert without == [*ids("w1"), 0, *ids("w3 w4"), 1, *ids("w0")]
    assert labels == targets("..xxx.", without)
    assert prepared.facts["train_conversations"] == {"rows": 3, "without_answer": 1, "cut_short": 0}


def test_long_conversations_are_cut_and_counted(tmp_path: Path, context: RecipeContext) -> None:
    late = [{"role": "user", "content": "w1 " * 30}, {"role": "assistant", "content": "w2"}]
    rows = [{"messages": TALK}, {"messages": late}, {"messages": TALK[:2]}, {"messages": []}]
    prepared = prepare(arguments(tmp_path, rows, chat_template=MARKED, block_size=12), context)
    ((tokens, labels),) = samples_of(prepared)
    assert len(tokens) == 12
    assert labels == targets("....xxx...xx", tokens)
    assert prepared.facts["train_conversations"] == {"rows": 4, "without_answer": 3, "cut_short": 1}


def test_the_loss_does_not_depend_on_packing_or_padding(tmp_path: Path, context: RecipeContext) -> None:
    """Against one conversation at a time, without padding; an odd number of them over several blocks."""
    talks = [TALK, TALK[1:3], TALK[1:], [*TALK, *TALK[1:]], TALK[1:3]]
    args = arguments(tmp_path, [{"messages": talk} for talk in talks], chat_template=MARKED)
    plain = prepare(args, context)
    torch.manual_seed(0)
    model = plain.build_model().eval()
    summed, counted = torch.zeros(()), 0
    for tokens, labels in samples_of(plain):
        with torch.no_grad():
            scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for position, label in enumerate(labels):
            if label != -100:
                summed, counted = summed - scores[position - 1, label], counted + 1
    packed = prepare(args.model_copy(update={"packing": "isolated"}), context)
    assert len(packed.train) < len(plain.train) == 5  # type: ignore[arg-type]
    for prepared in (plain, packed):
        samples: Any = prepared.train
        batch = prepared.collate([samples[index] for index in range(len(samples))])
        assert prepared.count(batch) == counted
        with torch.no_grad():
            assert float(prepared.loss(model, batch)) == pytest.approx(float(summed), rel=1e-5)


def test_a_stream_has_the_samples_of_the_rows_in_their_order(tmp_path: Path, context: RecipeContext) -> None:
    rows = [{"messages": talk} for talk in (TALK, TALK[:2], TALK[1:3])]
    args = arguments(tmp_path, rows, chat_template=MARKED)
    streamed: Any = prepare(args.model_copy(update={"streaming": True}), context).train
    assert [tuple(sample.tolist()) for sample in streamed] == samples_of(prepare(args, context))


# --- what goes wrong -------------------------------------------------------------------------------------

TRIMMED = CHATML.replace("message.content", "(message.content if loop.last else '…')")
"""Leaves out of earlier turns what it has written when they were the last, as templates do with thoughts."""


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (TALK, TRIMMED, 'the conversation that begins {"role": "system", "content": "w9"} in another way'),
        (TALK, "{{ raise_exception('no system here') }}", '"content": "w9"}: no system here'),
        (TALK, "{% if %}", "does not take the conversation that begins"),
        ([{"role": "bot", "content": "w1"}], MARKED, "one of system, developer, user, assistant, tool; got {'role': "),
        ([{"role": "user", "content": ["w1"]}], MARKED, "the content of a message must be text; got ['w1']"),
        ([{"from": "human", "value": "w1"}], MARKED, "a message must have a role"),
        ("w1", MARKED, "a row must hold a list of messages such as"),
        (TALK[:2], MARKED, "no row has an answer within recipe_args.block_size tokens"),
    ],
)
def test_a_conversation_that_cannot_be_used(
    tmp_path: Path, context: RecipeContext, row: Any, template: str, message: str
) -> None:
    with pytest.raises(DataError) as failure:
        prepare(arguments(tmp_path, [{"messages": row}], chat_template=template), context)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_columns_and_templates_that_are_not_there(tmp_path: Path, context: RecipeContext) -> None:
    with pytest.raises(DataError, match=r"has no column 'messages'; it has message; set recipe_args\.messages_column"):
        preview(arguments(tmp_path, [{"message": TALK}]), context)
    with pytest.raises(DataError, match=r"has no column 'completion'; .*recipe_args\.completion_column"):
        preview(arguments(tmp_path, [{"prompt": "w1"}], format="instruction"), context)
    with pytest.raises(ConfigError, match=r"chat_template = .*/no\.jinja: is no template"):
        preview(arguments(tmp_path, [{"messages": TALK}], chat_template=str(tmp_path / "no.jinja")), context)


def test_a_preview_imports_nothing_heavy_and_knows_what_is_prepared(tmp_path: Path, context: RecipeContext) -> None:
    args = arguments(tmp_path, [{"messages": TALK}] * 3, chat_template=MARKED, packing="isolated")
    blocks = len(prepare(args, context).train)  # type: ignore[arg-type]
    code = (
        "import sys; from pathlib import Path; from launch.cache import Cache; from launch.recipe import RecipeContext;"
        "from recipes.causal_lm import Args, preview;"
        f"found = preview(Args.model_validate_json({args.model_dump_json()!r}, strict=False),"
        f" RecipeContext(Cache(Path({str(context.cache.root)!r})), 0));"
        "print(found.samples, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f"{blocks} []"
