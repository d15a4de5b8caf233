from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from launch.cache import Cache
from launch.engine.batching import Loader
from launch.engine.inference import Inference
from launch.engine.precision import Autocast
from launch.engine.scoring import Evaluation
from launch.errors import LaunchError
from launch.recipe import Prepared, RecipeContext, Width
from recipes.answers import Answer, Answers, best_thresholds, join
from recipes.metrics.squad import score
from recipes.question_answering import Args, best_spans, collate, count, loss, metric_names, prepare, preview
from recipes.question_windows import IGNORED, Windows, answers_of, place_of, read_squad
from tests.gloo import run_ranks
from tests.test_engine_sharding import plan_for

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
WORDS = [*(f"w{number}" for number in range(40)), "where", "who"]


@pytest.fixture
def context(tmp_path: Path) -> RecipeContext:
    return RecipeContext(Cache(tmp_path / "cache"), seed=0)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word, as BERT has it: `<s> question </s> context </s>` and token types."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **SPECIAL)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, as RoBERTa has it: `<s> question </s> </s> context </s>`, no token types."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids"], **SPECIAL)


def columns(text: str, answer: str | None, start: int | None = None, question: str = "who") -> dict[str, list[Any]]:
    found = [] if answer is None else [answer]
    starts = [] if answer is None else [text.index(answer) if start is None else start]
    answers = {"text": found, "answer_start": starts}
    return {"id": ["q"], "question": [question], "context": [text], "answers": [answers]}


def spans(made: dict[str, list[Any]]) -> list[tuple[int, int]]:
    return list(zip(made["start_positions"], made["end_positions"], strict=True))


def marked(made: dict[str, list[Any]], text: str) -> list[str]:
    """What the positions of each window mark in the text, by the offsets."""
    return [
        text[offsets[2 * start] : offsets[2 * end + 1]] if offsets[2 * start] >= 0 else "-"
        for (start, end), offsets in zip(spans(made), made["offsets"], strict=True)
    ]


# --- windows and where the answer is -------------------------------------------------------------------------


TEN = "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9"
# Windows of 8 tokens hold `<s> who </s>`, four words of the context and `</s>`, two of them from the window before:
# w0-w3, w2-w5, w4-w7, w6-w9. The context begins at token 3.


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("w0", [(3, 3), (0, 0), (0, 0), (0, 0)]),  # at the very start
        ("w9", [(0, 0), (0, 0), (0, 0), (6, 6)]),  # at the very end
        ("w2 w3", [(5, 6), (3, 4), (0, 0), (0, 0)]),  # in two windows
        ("w3 w4", [(0, 0), (4, 5), (0, 0), (0, 0)]),  # cut by the edges of two others
        ("w4 w5 w6 w7", [(0, 0), (0, 0), (3, 6), (0, 0)]),  # a window full
        ("w1 w2 w3 w4", [(IGNORED, IGNORED)] * 4),  # whole in no window
        ("2 w3", [(5, 6), (3, 4), (0, 0), (0, 0)]),  # begins amid a token
        (None, [(0, 0)] * 4),  # there is no answer
    ],
)
def test_where_the_answer_is_in_each_window(answer: str | None, expected: list[tuple[int, int]]) -> None:
    made = Windows(word_tokenizer(), 8, 2, 3)(columns(TEN, answer), with_offsets=True)
    assert spans(made) == expected
    assert made["number"] == [0, 1, 2, 3]
    texts = [" ".join(WORDS[number - len(SPECIAL)] for number in ids[3:-1]) for ids in made["input_ids"]]
    assert texts == ["w0 w1 w2 w3", "w2 w3 w4 w5", "w4 w5 w6 w7", "w6 w7 w8 w9"]
    assert made["token_type_ids"] == [[0, 0, 0, 1, 1, 1, 1, 1]] * 4
    assert all(ids[:3] == [2, len(SPECIAL) + WORDS.index("who"), 3] and ids[-1] == 3 for ids in made["input_ids"])


@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer])
@pytest.mark.parametrize(
    ("text", "answer", "start"),
    [
        ("  w1 w2  w1 w3", "w1", 9),  # the second of two places, after leading spaces
        ("w1 😀 w2 𝕬 w3", "w2", 5),  # behind characters beyond the BMP
        ("w1 😀 w2 𝕬 w3", "𝕬", 8),
        ("w1 é w2", "é w2", 3),
        ("w1 w2 ", " w2 ", 2),  # white space around it
    ],
)
def test_the_characters_of_an_answer_are_found_again(make: Any, text: str, answer: str, start: int) -> None:
    windows = Windows(make(), 64, 8, 16)
    made = windows(columns(text, answer, start, question="who w1"), with_offsets=True)
    assert marked(made, text) == [answer.strip()]
    [(first, _)] = spans(made)
    assert made["offsets"][0][2 * first] == start + len(answer) - len(answer.lstrip())
    assert ("token_type_ids" in made) == (make is word_tokenizer)


def test_byte_tokens_and_several_rows_in_windows() -> None:
    """Windows of any size mark the answer or their first token; those that hold it whole mark exactly it."""
    text = "Łódź — the town of Łukasz 😀 and of Zoë"
    for size in range(20, 40, 3):
        for answer in ("Zoë", "uka"):
            made = Windows(byte_tokenizer(), size, 5, 8)(columns(text, answer), with_offsets=True)
            assert len(made["number"]) > 1
            assert set(marked(made, text)) - {"-"} == {answer}
    rows = [columns("w1 w2 w3", "w3"), columns("", None), columns(TEN, "w9")]
    merged = {name: [row[name][0] for row in rows] for name in rows[0]}
    windows = Windows(word_tokenizer(), 8, 2, 3)
    apart = [windows(row) for row in rows]
    assert windows(merged) == {name: [one for made in apart for one in made[name]] for name in apart[0]}
    assert windows(merged)["number"] == [0, 0, 0, 1, 2, 3]  # an empty context has a window too


def test_a_question_too_long_is_cut() -> None:
    windows = Windows(word_tokenizer(), 9, 2, 3)
    made = windows(columns(TEN, "w0", question="  who w1 w2 w3 w4 "))
    assert made["input_ids"][0][:5] == [2, *(WORDS.index(word) + len(SPECIAL) for word in ("who", "w1", "w2")), 3]
    assert set(made["question_cut"]) == {True}
    assert set(windows(columns(TEN, "w0", question="who w1 w2"))["question_cut"]) == {False}


def test_place_of_an_answer_that_is_elsewhere_than_stated() -> None:
    assert place_of("ab ab ab", "ab", 3) == (3, 5)
    assert place_of("ab ab ab", "ab", 5) == (6, 8)
    assert place_of("ab ab ab", " ab ", 2) == (3, 5)
    assert place_of("ab", "ab", -4) == (0, 2)
    assert place_of("ab    ab", "    ab", 2) == (6, 8)
    assert place_of("ab", "c", 0) is None


# --- files and rows ------------------------------------------------------------------------------------------


def squad(path: Path, paragraphs: int = 6) -> Path:
    """A SQuAD 2.0 file with two questions on each paragraph, the second without answer."""
    made = []
    for number in range(paragraphs):
        words = " ".join(f"w{(number + step) % 40}" for step in range(12))
        answer = {"text": f"w{number + 3}", "answer_start": words.index(f"w{number + 3}")}
        first = {"id": f"a{number}", "question": "who w1", "answers": [answer], "is_impossible": False}
        second = {"id": f"b{number}", "question": "where", "answers": [], "is_impossible": True}
        made.append({"context": words, "qas": [first, {**second, "plausible_answers": [answer]}]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": made}]}))
    return path


def test_squad_files_give_rows_and_rows_give_the_same_in_any_form(tmp_path: Path) -> None:
    rows = list(read_squad(squad(tmp_path / "a.json")))
    assert [row["id"] for row in rows[:3]] == ["a0", "b0", "a1"]
    assert [answers_of(row) for row in rows[:2]] == [[("w3", rows[0]["context"].index("w3"))], []]
    (tmp_path / "flat.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_squad(tmp_path / "flat.json")) == rows
    assert list(read_squad(tmp_path / "lines.json")) == rows
    given = {"text": ["w3"], "answer_start": [4]}
    for form in (given, [{"text": "w3", "answer_start": 4}], json.dumps(given), repr(given)):
        assert answers_of({"id": "q", "answers": form}) == [("w3", 4)]
    for form in ([], "", None, {"text": [], "answer_start": []}):
        assert answers_of({"id": "q", "answers": form}) == []


def arguments(folder: Path, **values: Any) -> Args:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes).save_pretrained(folder / "model")
    lengths = {"max_length": 12, "stride": 3, "max_question_length": 3} | values
    return Args(model=str(folder / "model"), from_scratch=True, **lengths)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"answers_column": "answer"},
            "has no column 'answer'; it has id, question, context, answers; set recipe_args",
        ),
        ({"max_length": 9}, "recipe_args.max_length = 9: has no room for a context"),
        ({"unanswerable": False}, "recipe_args.unanswerable = false: 6 of 12 validation questions have no answer"),
        ({"max_length": 33}, "recipe_args.max_length = 33:"),
        ({"answers_column": "question"}, "question a0: answers: got 'who w1'; must be"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, context: RecipeContext, values: dict[str, Any], says: str) -> None:
    path = str(squad(tmp_path / "a.json"))
    args = arguments(tmp_path, train_files=(path,), validation_files=(path,), **values)
    with pytest.raises(LaunchError) as caught:
        check_and_prepare(args, context)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def check_and_prepare(args: Args, context: RecipeContext) -> None:
    preview(args, context)
    prepare(args, context)


def test_a_broken_squad_file_names_the_question(tmp_path: Path, context: RecipeContext) -> None:
    content = squad(tmp_path / "a.json").read_text().replace('"answers": [{', '"answer": [{', 1)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(LaunchError, match=r"a\.json: question a0: is not as in SQuAD files: KeyError\('answers'\)"):
        preview(arguments(tmp_path, train_files=(str(tmp_path / "a.json"),)), context)


def test_the_plan_knows_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from launch.cache import Cache\n"
        "from launch.recipe import RecipeContext\n"
        "from recipes.question_answering import Args, preview\n"
        "print(preview(Args(), RecipeContext(Cache(Path('none')), 0)).metrics)\n"
        "assert not {'torch', 'transformers', 'datasets', 'evaluate', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == repr(metric_names(unanswerable=True)), done.stderr


# --- loss ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path, context: RecipeContext) -> Prepared:
    path = str(squad(tmp_path / "a.json"))
    return prepare(arguments(tmp_path, train_files=(path,), validation_files=(path,)), context)


def test_loss_is_that_of_windows_one_by_one_whatever_they_are_padded_with(prepared: Prepared) -> None:
    torch.manual_seed(0)
    model = prepared.build_model().eval()
    samples = [*prepared.train]
    lost = {**samples[0], "start_positions": IGNORED, "end_positions": IGNORED}
    batch = prepared.collate([*samples[:5], lost])
    assert batch["input_ids"].shape[1] > min(len(sample["input_ids"]) for sample in samples[:5])
    expected = torch.zeros(())
    for sample in samples[:5]:
        ids, types = (torch.tensor(sample[name])[None] for name in ("input_ids", "token_type_ids"))
        given = model(input_ids=ids, token_type_ids=types)
        start, end = (logits.log_softmax(-1)[0] for logits in (given.start_logits, given.end_logits))
        expected = expected - (start[sample["start_positions"]] + end[sample["end_positions"]]) / 2
    assert loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert count(batch) == 5
    assert prepared.facts["train"]["windows"] == len(samples)
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items() if value.dim() == 2}
    assert loss(model, {**batch, **padded}).item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_goes_to_a_multiple_but_not_over_the_model() -> None:
    samples = [{"input_ids": [2] * size, "start_positions": 0, "end_positions": 0} for size in (3, 9)]
    width = Width(8, 12)
    assert collate(samples[:1], word_tokenizer(), width)["input_ids"].shape == (1, 8)
    assert collate(samples, word_tokenizer(), width)["input_ids"].shape == (2, 12)


# --- answers -------------------------------------------------------------------------------------------------


def test_best_spans_are_those_of_trying_all() -> None:
    torch.manual_seed(1)
    inside = [(3, 9), (4, 7), (5, 5)]  # tokens of the context, in each window
    size = 10
    offsets = torch.full((3, size, 2), -1)
    for window, (first, behind) in enumerate(inside):
        for token in range(first, behind):
            offsets[window, token] = torch.tensor([token * 10, token * 10 + 8])
    outputs = SimpleNamespace(start_logits=torch.randn(3, size), end_logits=torch.randn(3, size))
    ids = torch.tensor([[2, *[5] * (size - 1)], [2, *[5] * (size - 1)], [*[5] * (size - 1), 2]])  # CLS at the end too
    batch = {"input_ids": ids, "offsets": offsets, "question": torch.tensor([4, 4, 7])}
    for most, longest in ((20, 3), (4, 30), (100, 1)):
        args = Args(n_best=most, max_answer_length=longest)
        for window, (question, null, found) in enumerate(best_spans(outputs, batch, 2, args)):
            start, end = outputs.start_logits[window], outputs.end_logits[window]
            first, behind = inside[window]
            tried = [
                [left * 10, right * 10 + 8, (start[left] + end[right]).item()]
                for left in range(first, behind)
                for right in range(left, min(behind, left + longest))
            ]
            assert found == sorted(tried, key=lambda span: -span[2])[:most]
            assert question == batch["question"][window]
            place = [0, 0, size - 1][window]
            assert null == (start[place] + end[place]).item()


PREDICTIONS: list[list[Any]] = [
    [0, 2.0, [[0, 2, 1.0], [3, 5, 0.5]]],  # the answer w0 in a window where no answer looks better
    [0, 0.5, [[3, 5, 0.9], [6, 8, 0.2]]],  # and one where it does not
    [1, 3.0, [[0, 2, 2.5]]],
    [2, 1.0, []],  # a context of nothing
]


def rows_of_three() -> Dataset:
    answers = [{"text": ["w0"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    answers.append({"text": ["w7"], "answer_start": [5]})
    names = ["x", "y", "z"]
    contexts = ["w0 w1 w2", "w0 w1 w2", ""]
    return Dataset.from_dict({"id": names, "question": names, "context": contexts, "answers": answers})


def test_windows_of_a_question_are_joined_in_any_order() -> None:
    expected = Answers(rows_of_three(), True, 0.0).measure(PREDICTIONS)
    first, second, third = expected["examples"]
    assert (first["answered"], first["no_answer_is_better_by"]) == ("w0", -0.5)  # the lowest null score counts
    assert first["n_best"] == [
        {"text": text, "score": value} for text, value in (("w0", 1.0), ("w1", 0.9), ("w2", 0.2))
    ]
    assert (second["answered"], third["answered"]) == ("", "")
    numbers = [expected[name] for name in ("exact_match", "HasAns_exact", "NoAns_exact")]
    assert numbers == pytest.approx([200 / 3, 50, 100])
    for seed in range(5):
        shuffled = random.Random(seed).sample(PREDICTIONS, len(PREDICTIONS))
        assert Answers(rows_of_three(), True, 0.0).measure(shuffled) == expected
    reluctant = Answers(rows_of_three(), True, -1.0).measure(PREDICTIONS)
    assert [example["answered"] for example in reluctant["examples"]] == ["", "", ""]
    eager = Answers(rows_of_three(), True, 0.5).measure(PREDICTIONS)
    assert [example["answered"] for example in eager["examples"]] == ["w0", "w0", ""]
    of_first = Answers(rows_of_three().select([0, 2]), False, -9.0).measure(PREDICTIONS[:2])
    assert of_first["examples"][0]["answered"] == "w0"  # without questions that lack an answer no threshold counts
    assert set(of_first) - {"examples"} == set(metric_names(unanswerable=False))
    assert set(expected) - {"examples", "null_threshold_of_best"} == set(metric_names(unanswerable=True))


def test_the_best_threshold_is_that_of_trying_all() -> None:
    chance = random.Random(3)
    for _ in range(50):
        answers = []
        for _ in range(chance.randint(1, 8)):
            right = chance.choice([[], ["a b", "c"], ["b"]])
            row = {"id": "q", "answers": {"text": right, "answer_start": [0] * len(right)}}
            answers.append(Answer(row, chance.choice(["a b", "b", "c d"]), float(chance.randint(-2, 2)), []))

        def with_threshold(threshold: float, place: int, answers: list[Answer] = answers) -> float:
            texts = ["" if answer.doubt > threshold else answer.best for answer in answers]
            scores = [score(text, one.right, second=True)[place] for text, one in zip(texts, answers, strict=True)]
            return 100 * sum(scores) / len(scores)

        found = best_thresholds(answers)
        for place, name in enumerate(("exact_match", "f1")):
            best = max(with_threshold(threshold, place) for threshold in range(-4, 4))
            assert found[name].value == pytest.approx(best)
            assert with_threshold(found[name].threshold, place) == pytest.approx(best)


# --- ranks ---------------------------------------------------------------------------------------------------


def evaluated(strategy: str, world_size: int, batch_size: int, args: Args, folder: str) -> Any:
    from launch.engine.optim import make_optimizer
    from launch.engine.sharding import make_accelerator, spread

    made = prepare(args, RecipeContext(Cache(Path(folder) / "cache"), seed=0))
    plan = plan_for(strategy, world_size, Path(folder), "train.global_batch_size=12")
    accelerator = make_accelerator(plan)
    model = untrained(made)
    model, _ = spread(accelerator, model, make_optimizer(model, plan.config.train, fused=False))
    evaluation = Evaluation(
        accelerator,
        Loader(made.validation, made.collate),
        *(made.loss, made.count, batch_size, None, made.scoring),
        inference=lambda model: Inference(accelerator, model, Autocast("cpu", torch.float32)),
    )
    found = evaluation(model)
    return found.loss, found.metrics, found.details


def untrained(made: Prepared) -> BertForQuestionAnswering:
    """Weights so large that it is sure of something, and not of the same everywhere."""
    torch.manual_seed(5)
    model: Any = made.build_model()
    for parameter in model.parameters():
        parameter.data.mul_(8)
    return model  # type: ignore[no-any-return]


@pytest.mark.dist
def test_any_number_of_ranks_answers_as_one_process_would(tmp_path: Path, context: RecipeContext) -> None:
    path = str(squad(tmp_path / "a.json"))
    args = arguments(tmp_path, train_files=(path,), validation_files=(path,), max_answer_length=3, n_best=4)
    [(one_loss, one, details)] = run_ranks(1, evaluated, "single", 1, 3, args, str(tmp_path))
    assert 0 < one["f1"] < 100
    expected = plain_answers(prepare(args, context), tmp_path)
    assert [example["answered"] for example in details["examples"]] == expected
    for strategy, world_size, batch_size in (("ddp", 3, 2), ("fsdp2", 2, 1)):
        by_rank = run_ranks(world_size, evaluated, strategy, world_size, batch_size, args, str(tmp_path))
        for its_loss, found, _ in by_rank:
            assert its_loss == pytest.approx(one_loss, rel=1e-5)
            assert found == pytest.approx(one, abs=1e-4)
        assert [example["answered"] for example in by_rank[0][2]["examples"]] == expected


def plain_answers(made: Prepared, folder: Path) -> list[str]:
    """What is answered to each question: window by window, span by span."""
    model = untrained(made).eval()
    rows = list(read_squad(folder / "a.json"))
    best: list[tuple[float, str]] = [(-1e9, "")] * len(rows)
    nulls = [1e9] * len(rows)
    for sample in made.validation:
        ids, types = (torch.tensor(sample[name])[None] for name in ("input_ids", "token_type_ids"))
        with torch.no_grad():
            given = model(input_ids=ids, token_type_ids=types)
        start, end = given.start_logits[0].tolist(), given.end_logits[0].tolist()
        number, offsets = sample["question"], sample["offsets"]
        nulls[number] = min(nulls[number], start[0] + end[0])
        for left in range(len(start)):
            for right in range(left, min(left + 3, len(start))):
                if offsets[2 * left] >= 0 and offsets[2 * right] >= 0:
                    text = rows[number]["context"][offsets[2 * left] : offsets[2 * right + 1]]
                    best[number] = max(best[number], (start[left] + end[right], text))
    return ["" if null > value else text for null, (value, text) in zip(nulls, best, strict=True)]


def test_questions_are_those_of_the_rows(prepared: Prepared) -> None:
    numbers = [sample["question"] for sample in prepared.validation]
    assert numbers[0] == 0
    assert numbers[-1] == 11
    assert all(after - before in (0, 1) for before, after in pairwise(numbers))
    assert len(join([[number, 0.0, []] for number in numbers])) == 12
