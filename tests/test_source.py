"""Run files and overrides: what each scalar means, where it came from, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError
from launch.source import COMMAND_LINE, Layer, merge, read_overrides, read_run_file

SCALARS: list[tuple[str, Any]] = [
    ("1e-3", 0.001),
    ("1E3", 1000.0),
    ("1.5e-3", 0.0015),
    (".5", 0.5),
    ("2.", 2.0),
    ("-1.5", -1.5),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("20", 20),
    ("-7", -7),
    ("+7", 7),
    ("010", 10),
    ("09", 9),
    ("0o10", 8),
    ("0x10", 16),
    ("true", True),
    ("True", True),
    ("FALSE", False),
    ("null", None),
    ("~", None),
    ("NULL", None),
    ("", None),
    # Anything else is text, also what YAML 1.1 took for something.
    ("off", "off"),
    ("on", "on"),
    ("no", "no"),
    ("yes", "yes"),
    ("y", "y"),
    ("tRUE", "tRUE"),
    ("nULL", "nULL"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("-0x10", "-0x10"),
    ("1:30", "1:30"),
    ("1.2.3", "1.2.3"),
    ("1e", "1e"),
    ("inf", "inf"),
    ("nan", "nan"),
    ("2020-01-01", "2020-01-01"),
    ("wikitext-2-raw-v1", "wikitext-2-raw-v1"),
]


def same(got: Any, expected: Any) -> bool:
    return type(got) is type(expected) and got == expected


def file_with(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_run_file(path)
    return str(caught.value)


@pytest.mark.parametrize(("text", "expected"), SCALARS)
def test_a_scalar_means_the_same_in_a_file_and_in_an_override(text: str, expected: Any, tmp_path: Path) -> None:
    in_file = read_run_file(file_with(tmp_path, f"key: {text}\n")).values["key"]
    in_override = read_overrides([f"key={text}"]).values["key"]
    assert same(in_file, expected), in_file
    assert same(in_override, expected), in_override


def test_not_a_number_is_read_as_such(tmp_path: Path) -> None:
    value = read_run_file(file_with(tmp_path, "key: .nan\n")).values["key"]
    assert isinstance(value, float) and math.isnan(value)


def test_quoted_scalars_stay_text(tmp_path: Path) -> None:
    layer = read_run_file(file_with(tmp_path, "a: '20'\nb: \"true\"\nc: 'null'\n"))
    assert layer.values == {"a": "20", "b": "true", "c": "null"}


def test_values_and_the_line_of_every_key(tmp_path: Path) -> None:
    text = (
        "# header\nrecipe: x\n\ntrain:\n  max_steps: 20  # short\n  seed: 1\nrecipe_args: {a: [1, {b: 2}], c: {d: 3}}\n"
    )
    path = file_with(tmp_path, text)
    layer = read_run_file(path)
    assert layer.values == {
        "recipe": "x",
        "train": {"max_steps": 20, "seed": 1},
        "recipe_args": {"a": [1, {"b": 2}], "c": {"d": 3}},
    }
    lines = {
        "recipe": 2,
        "train": 4,
        "train.max_steps": 5,
        "train.seed": 6,
        "recipe_args": 7,
        "recipe_args.a": 7,
        "recipe_args.c": 7,
        "recipe_args.c.d": 7,
    }
    assert layer.places == {key: f"{path}:{line}" for key, line in lines.items()}


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    assert read_run_file(file_with(tmp_path, b"\xef\xbb\xbfrecipe: x\n")).values == {"recipe": "x"}


# `{path}` stands for the file.
BAD_FILES = [
    ("", "{path}: empty run file; it needs at least `recipe: <name>`"),
    ("# only a comment\n", "{path}: empty run file; it needs at least `recipe: <name>`"),
    ("null\n", "{path}:1: a run file is a mapping of `section:` entries"),
    ("- recipe\n- train\n", "{path}:1: a run file is a mapping of `section:` entries"),
    ("causal_lm\n", "{path}:1: a run file is a mapping of `section:` entries"),
    (
        "recipe: x\ntrain:\n  max_steps: 1\n  seed: 2\n  max_steps: 3\n",
        "{path}:5: train.max_steps is stated twice (first in line 3); keep one",
    ),
    ("train: {seed: 1}\nrecipe: x\ntrain: {}\n", "{path}:3: train is stated twice (first in line 1); keep one"),
    ("recipe: x\nrecipe_args: {1: 2}\n", "{path}:2: 1: a key must be text; quote it if it is meant"),
    ("recipe: x\ntrue: 2\n", "{path}:2: true: a key must be text; quote it if it is meant"),
    ("recipe: x\nrecipe_args:\n  null: 2\n", "{path}:3: null: a key must be text; quote it if it is meant"),
    ("recipe: x\nrecipe_args: {[a]: 2}\n", "{path}:2: a key must be plain text"),
    ("recipe: x\ntrain: max_steps: 3\n", "{path}:2: not valid YAML: mapping values are not allowed here"),
    (
        "recipe: x\ntrain:\n\tmax_steps: 3\n",
        "{path}:3: not valid YAML: found character '\\t' that cannot start any token",
    ),
    ("recipe: x\ntrain: [1, 2\n", "{path}:3: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ("recipe: x\n---\nrecipe: y\n", "{path}:2: not valid YAML: but found another document"),
    (
        "recipe: x\nrecipe_args:\n  a: !!python/name:os.system\n",
        "{path}:3: not valid YAML here: !!python/name:os.system is no kind of value a configuration can hold",
    ),
    (
        b"recipe: caf\xe9\n",
        "{path}: cannot be read as a run file: 'utf-8' codec can't decode byte 0xe9 in position 11: "
        "invalid continuation byte",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file_gives_one_exact_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = file_with(tmp_path, text)
    assert refusal(path) == message.format(path=path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such run file"
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read as a run file: ")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("recipe: x\ntrain: \x07\n", id="control character"),
        pytest.param("recipe: x\x00\n", id="NUL"),
        pytest.param("recipe: x\nrecipe_args: &a\n  b: *a\n", id="mapping within itself"),
        pytest.param("recipe: x\nrecipe_args:\n  b: !!int foo\n", id="tag int on text"),
        pytest.param("recipe: x\nrecipe_args:\n  b: !!float foo\n", id="tag float on text"),
        pytest.param("recipe: x\nrecipe_args:\n  b: !!bool foo\n", id="tag bool on text"),
        pytest.param("recipe: x\nrecipe_args:\n  b: !!timestamp 2020-01-01\n", id="tag timestamp"),
        pytest.param("recipe: x\nrecipe_args:\n  b: !!binary aGk=\n", id="tag binary"),
        pytest.param("recipe: x\nrecipe_args:\n  a: [{b: 1, b: 2}]\n", id="key twice within a list"),
    ],
)
def test_what_a_run_file_cannot_hold_is_refused_with_its_name(text: str, tmp_path: Path) -> None:
    path = file_with(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}:")
    assert "\n" not in message


# --- overrides -------------------------------------------------------------------------------------------

OVERRIDES: list[tuple[str, Any]] = [
    ("key=[1, two, 3.5]", [1, "two", 3.5]),
    ("key=[a,b]", ["a", "b"]),
    ("key=[]", []),
    ("key={a: 1, b: off}", {"a": 1, "b": "off"}),
    ('key="20"', "20"),
    ("key='it''s'", "it's"),
    ('key=""', ""),
    ('key="[1, 2]"', "[1, 2]"),
    ("key=a=b=c", "a=b=c"),
    ("key==", "="),
    ("key=x: y", "x: y"),
    ("key=C:/data", "C:/data"),
    ("key=https://host/data?a=1#top", "https://host/data?a=1#top"),
    ("key=a #b", "a #b"),
    ("key=# all of it", "# all of it"),
    ("key=- a", "- a"),
    ("key=*.txt", "*.txt"),
    ("key=&a", "&a"),
    ("key=!tag x", "!tag x"),
    ("key=%d", "%d"),
    ("key=@file", "@file"),
    ("key=a, b", "a, b"),
    ("key=say [this]", "say [this]"),
    ("key= 3", " 3"),
    ("key=two words", "two words"),
    ("key=Ünïcode", "Ünïcode"),
]


@pytest.mark.parametrize(("item", "expected"), OVERRIDES)
def test_the_value_of_an_override(item: str, expected: Any) -> None:
    layer = read_overrides([item])
    assert same(layer.values["key"], expected), layer.values
    assert layer.places["key"] == COMMAND_LINE


def test_overrides_nest_and_the_later_wins() -> None:
    layer = read_overrides(["train.max_steps=1", "train.seed=2", "train.max_steps=3", "recipe_args.a.b.c=x"])
    assert layer.values == {"train": {"max_steps": 3, "seed": 2}, "recipe_args": {"a": {"b": {"c": "x"}}}}
    assert read_overrides(["train=1", "train.seed=2"]).values == {"train": {"seed": 2}}
    assert read_overrides(["train.seed=2", "train=1"]).values == {"train": 1}


NOT_YAML = "command line: {item!r}: the value is not valid YAML: "
NOT_AN_OVERRIDE = "command line: {item!r} is not an override; write section.key=value, for example train.max_steps=20"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("max_steps", NOT_AN_OVERRIDE),
        ("=3", NOT_AN_OVERRIDE),
        (".train=3", NOT_AN_OVERRIDE),
        ("train.=3", NOT_AN_OVERRIDE),
        ("train..seed=3", NOT_AN_OVERRIDE),
        ("", NOT_AN_OVERRIDE),
        ("key=[1, 2", NOT_YAML + "expected ',' or ']', but got '<stream end>'"),
        ("key={a: 1", NOT_YAML + "expected ',' or '}}', but got '<stream end>'"),
        ('key="open', NOT_YAML + "found unexpected end of stream"),
        ("key='open", NOT_YAML + "found unexpected end of stream"),
        ("key=[1] 2", NOT_YAML + "expected '<document start>', but found '<scalar>'"),
    ],
)
def test_a_bad_override_gives_one_exact_line(item: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_overrides([item])
    assert str(caught.value) == message.format(item=item)


@pytest.mark.parametrize(
    "item",
    [
        pytest.param("key=[!!int foo]", id="tag int on text"),
        pytest.param("key=[&a [*a]]", id="list within itself"),
        pytest.param("key={a: 1, a: 2}", id="key twice"),
        pytest.param("key=[\x07]", id="control character"),
    ],
)
def test_what_an_override_cannot_hold_is_refused_in_one_line(item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_overrides([item])
    assert str(caught.value).startswith(f"{COMMAND_LINE}: ")
    assert "\n" not in str(caught.value)


def test_a_mapping_given_as_a_whole_gives_a_place_to_each_of_its_keys() -> None:
    layer = read_overrides(["train={max_steps: 3, seed: 1}"])
    assert layer.places == dict.fromkeys(("train", "train.max_steps", "train.seed"), COMMAND_LINE)


# --- merging ---------------------------------------------------------------------------------------------

LENGTH = (("train.max_steps", "train.epochs"),)


def merged(lower: dict[str, Any], upper: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    below = Layer({"train": lower}, {"train": "f:1", **{f"train.{key}": "f:2" for key in lower}})
    layer = merge(below, read_overrides(upper), LENGTH)
    assert below.values == {"train": lower}, "the lower layer is not touched"
    return layer.values["train"], layer.places


def test_mappings_are_merged_key_by_key_and_all_else_is_replaced() -> None:
    lower = Layer({"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}, {"a": "f:1", "a.b": "f:2", "a.c": "f:3", "d": "f:4"})
    layer = merge(lower, read_overrides(["a.c=[3]", "d=4", "g.h=5"]))
    assert layer.values == {"a": {"b": 1, "c": [3]}, "d": 4, "g": {"h": 5}}
    assert (layer.places["a.b"], layer.places["a.c"], layer.places["d"]) == ("f:2", COMMAND_LINE, COMMAND_LINE)


def test_one_of_an_exclusive_group_displaces_the_other() -> None:
    values, places = merged({"epochs": 2.0, "seed": 1}, ["train.max_steps=20"])
    assert values == {"max_steps": 20, "seed": 1}
    assert places == {"train": "f:1", "train.seed": "f:2", "train.max_steps": COMMAND_LINE}


def test_null_displaces_nothing() -> None:
    values, _ = merged({"epochs": 2.0}, ["train.max_steps=null"])
    assert values == {"epochs": 2.0, "max_steps": None}


def test_null_takes_back_what_stands_below() -> None:
    values, _ = merged({"epochs": 2.0}, ["train.epochs=null"])
    assert values == {"epochs": None}


def test_both_of_a_group_stated_above_are_both_kept() -> None:
    values, _ = merged({"epochs": 2.0}, ["train.max_steps=20", "train.epochs=3"])
    assert values == {"max_steps": 20, "epochs": 3}


def test_both_of_a_group_stated_below_are_both_kept() -> None:
    values, _ = merged({"max_steps": 20, "epochs": 2.0}, ["train.seed=3"])
    assert values == {"max_steps": 20, "epochs": 2.0, "seed": 3}


def test_a_mapping_given_as_a_whole_displaces_too() -> None:
    values, _ = merged({"epochs": 2.0}, ["train={max_steps: 20}"])
    assert values == {"max_steps": 20}
