"""The configuration: every bad input gives one exact line; every key is documented everywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from typer.testing import CliRunner

from launch.cli import app
from launch.config import dump_yaml, load
from launch.errors import ConfigError
from launch.keys import all_keys, describe
from launch.sections import RunConfig, TrainSection


def refusal(overrides: list[str], run_file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(run_file, overrides)
    return str(caught.value)


def file_with(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- messages --------------------------------------------------------------------------------------------

SECTIONS = "recipe, recipe_args, train, eval, save, track, parallel, cluster"
TRAIN_KEYS = ", ".join(key.removeprefix("train.") for key in all_keys() if key.startswith("train."))
MAPPING = "must be a mapping of `key: value` entries"

# What is given on the command line beside `recipe=x`, and what is said behind "command line: ".
REFUSED = [
    # Unknown keys.
    ("train.max_stepz=3", "train.max_stepz = 3: unknown key; did you mean train.max_steps?"),
    ("train.micro_batch=3", "train.micro_batch = 3: unknown key; did you mean train.micro_batch_size?"),
    (
        "train.every_steps=3",
        "train.every_steps = 3: unknown key; did you mean eval.every_steps, save.every_steps or track.every_steps?",
    ),
    ("eval.seed=3", "eval.seed = 3: unknown key; did you mean train.seed?"),
    ("parallel.strategi=x", 'parallel.strategi = "x": unknown key; did you mean parallel.strategy?'),
    ("save.eval=3", "save.eval = 3: unknown key; did you mean eval?"),
    ("max_steps=3", "max_steps = 3: unknown key; did you mean train.max_steps?"),
    ("trains=3", "trains = 3: unknown key; did you mean train?"),
    ("trains.seed=3", 'trains = {"seed": 3}: unknown key; did you mean train?'),
    ("zzz=3", f"zzz = 3: unknown key; a run file has {SECTIONS}"),
    ("train.lr=1", f"train.lr = 1: unknown key; train has {TRAIN_KEYS}"),
    ("cluster.partitoin=gpu", 'cluster.partitoin = "gpu": unknown key; did you mean cluster.partition?'),
    # Whole numbers.
    ("train.max_steps=twenty", 'train.max_steps = "twenty": must be a whole number, got text'),
    ('train.max_steps="20"', 'train.max_steps = "20": must be a whole number, not text; remove the quotes'),
    ("train.max_steps=2.5", "train.max_steps = 2.5: must be a whole number"),
    ("train.max_steps=2.0", "train.max_steps = 2.0: must be a whole number"),
    ("train.max_steps=true", "train.max_steps = true: must be a whole number"),
    ("train.max_steps=[1]", "train.max_steps = [1]: must be a whole number"),
    ("train.global_batch_size=null", "train.global_batch_size = null: must be a whole number"),
    ("train.seed.low=3", 'train.seed = {"low": 3}: must be a whole number'),
    # Numbers.
    ("train.learning_rate=fast", 'train.learning_rate = "fast": must be a number, got text'),
    ('train.learning_rate="1e-3"', 'train.learning_rate = "1e-3": must be a number, not text; remove the quotes'),
    ("train.learning_rate=false", "train.learning_rate = false: must be a number"),
    ("train.learning_rate=.nan", "train.learning_rate = NaN: must be a finite number"),
    ("train.learning_rate=.inf", "train.learning_rate = Infinity: must be a finite number"),
    ("train.learning_rate=-.inf", "train.learning_rate = -Infinity: must be a finite number"),
    ("train.learning_rate=1e999", "train.learning_rate = Infinity: must be a finite number"),
    ("train.epochs=.inf", "train.epochs = Infinity: must be a finite number"),
    # True or false.
    ("eval.at_start=1", "eval.at_start = 1: must be true or false"),
    ("eval.at_start=off", 'eval.at_start = "off": must be true or false, got text'),
    ('eval.at_start="true"', 'eval.at_start = "true": must be true or false, not text; remove the quotes'),
    # Text.
    ("track.project=3", "track.project = 3: must be text; quote it to keep it text: '\"3\"'"),
    ("track.project=true", "track.project = true: must be text; quote it to keep it text: '\"true\"'"),
    ("track.project=[a]", 'track.project = ["a"]: must be text'),
    ('track.project=""', 'track.project = "": string should have at least 1 character'),
    ("recipe=3", "recipe = 3: must be text; quote it to keep it text: '\"3\"'"),
    ("recipe=null", "recipe = null: must be text"),
    ('recipe=""', 'recipe = "": string should have at least 1 character'),
    # Sections.
    ("train=[1, 2]", f"train = [1, 2]: {MAPPING}"),
    ("train=3", f"train = 3: {MAPPING}"),
    ("train=null", f"train = null: {MAPPING}"),
    ("recipe_args=[1]", f"recipe_args = [1]: {MAPPING}"),
    ("recipe_args=null", f"recipe_args = null: {MAPPING}"),
    # Out of range.
    ("train.global_batch_size=0", "train.global_batch_size = 0: must be greater than or equal to 1"),
    ("train.micro_batch_size=0", 'train.micro_batch_size = 0: must be at least 1, or "auto"'),
    ("train.max_steps=-1", "train.max_steps = -1: must be greater than or equal to 1"),
    ("train.epochs=0", "train.epochs = 0: must be greater than 0"),
    ("train.learning_rate=-1e-3", "train.learning_rate = -0.001: must be greater than or equal to 0"),
    ("train.warmup_ratio=1", "train.warmup_ratio = 1: must be less than 1"),
    ("train.warmup_ratio=-0.1", "train.warmup_ratio = -0.1: must be greater than or equal to 0"),
    ("train.warmup_steps=-1", "train.warmup_steps = -1: must be greater than or equal to 0"),
    ("train.max_grad_norm=0", "train.max_grad_norm = 0: must be greater than 0"),
    ("train.adam_beta1=1", "train.adam_beta1 = 1: must be less than 1"),
    ("train.adam_epsilon=0", "train.adam_epsilon = 0: must be greater than 0"),
    ("train.seed=-1", "train.seed = -1: must be greater than or equal to 0"),
    ("train.seed=4294967296", "train.seed = 4294967296: must be less than 4294967296"),
    ("eval.every_steps=0", "eval.every_steps = 0: must be greater than or equal to 1"),
    ("save.keep_last=0", "save.keep_last = 0: must be greater than or equal to 1"),
    ("track.every_steps=0", "track.every_steps = 0: must be greater than or equal to 1"),
    ("parallel.nodes=0", "parallel.nodes = 0: must be greater than or equal to 1"),
    ("parallel.data_workers=-1", "parallel.data_workers = -1: must be greater than or equal to 0"),
    # One of a few words.
    ("train.schedule=cosin", "train.schedule = \"cosin\": must be 'linear', 'cosine' or 'constant'"),
    ("train.schedule=3", "train.schedule = 3: must be 'linear', 'cosine' or 'constant'"),
    ("train.precision=fp8", "train.precision = \"fp8\": must be 'fp32', 'bf16' or 'fp16'"),
    ("train.optimizer=adam", "train.optimizer = \"adam\": must be 'adamw', 'adafactor' or 'sgd'"),
    (
        "train.on_spike=rewind",
        "train.on_spike = rewind: needs checkpoints to go back to, after the same updates whatever happens; set "
        "save.every_steps",
    ),
    ("train.sgd_momentum=0.9", "train.sgd_momentum = 0.9: needs train.optimizer=sgd, not adamw"),
    ("track.wandb=yes", "track.wandb = \"yes\": must be 'off', 'offline' or 'online'"),
    (
        "parallel.strategy=fsdp",
        "parallel.strategy = \"fsdp\": must be 'auto', 'single', 'ddp', 'fsdp2', 'fsdp2_offload', 'zero1', 'zero2', "
        "'zero3', 'zero2_offload', 'zero3_offload' or 'xla'",
    ),
    # A word or a number: one line, not one for each kind it is not.
    ("parallel.devices=two", "parallel.devices = \"two\": must be 'auto' or must be a whole number, got text"),
    ("parallel.devices=1.5", "parallel.devices = 1.5: must be 'auto' or must be a whole number"),
    ("parallel.devices=null", "parallel.devices = null: must be 'auto' or must be a whole number"),
    ("parallel.devices=0", 'parallel.devices = 0: must be at least 1, or "auto"'),
    ("parallel.devices=-2", 'parallel.devices = -2: must be at least 1, or "auto"'),
    # Combinations that cannot be.
    (
        "train.max_steps=3 train.epochs=2",
        "train.epochs = 2.0: excludes train.max_steps = 3 (command line); state one of the two",
    ),
    (
        "train.warmup_steps=0 train.warmup_ratio=0.0",
        "train.warmup_steps = 0: excludes train.warmup_ratio = 0.0 (command line); state one of the two",
    ),
    (
        "train.warmup_steps=30 train.max_steps=10",
        "train.warmup_steps = 30: is more than train.max_steps = 10; the peak learning rate would never be reached",
    ),
    (
        "train.early_stopping_patience=2",
        "train.early_stopping_patience = 2: "
        "needs evaluations while training; set eval.every_steps or eval.every_epochs",
    ),
    (
        "parallel.strategy=single parallel.devices=2",
        "parallel.strategy = single: is one process, but parallel.devices = 2 and parallel.nodes = 1; "
        "use parallel.strategy=ddp, or one device",
    ),
    (
        "parallel.strategy=single parallel.nodes=2",
        "parallel.strategy = single: is one process, but parallel.devices = auto and parallel.nodes = 2; "
        "use parallel.strategy=ddp, or one device",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[given for given, _ in REFUSED])
def test_a_bad_value_gives_one_exact_line(given: str, message: str) -> None:
    overrides = [given] if "[" in given else given.split(" ")
    assert refusal(["recipe=x", *overrides]) == f"command line: {message}"


def test_problems_are_told_all_at_once_a_line_each() -> None:
    said = refusal(["recipe=x", "save.keep_last=0", "train.seeds=1", "train.max_steps=many"])
    assert sorted(said.splitlines()) == [
        "command line: save.keep_last = 0: must be greater than or equal to 1",
        'command line: train.max_steps = "many": must be a whole number, got text',
        "command line: train.seeds = 1: unknown key; did you mean train.seed?",
    ]


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    path = file_with(tmp_path, f"recipe: x\ntrain:\n  seed: {'z' * 500}\n")
    assert refusal([], path) == f'{path}:3: train.seed = "{"z" * 56}…: must be a whole number, got text'


def test_the_place_is_the_line_of_the_key_and_the_command_line_wins(tmp_path: Path) -> None:
    path = file_with(tmp_path, "recipe: x\n\ntrain:\n  max_steps: many\n  sead: 1\n")
    assert refusal([], path).splitlines() == [
        f'{path}:4: train.max_steps = "many": must be a whole number, got text',
        f"{path}:5: train.sead = 1: unknown key; did you mean train.seed?",
    ]
    assert refusal(["train.max_steps=most"], path).splitlines()[0] == (
        'command line: train.max_steps = "most": must be a whole number, got text'
    )


def test_two_keys_that_exclude_each_other_are_told_with_both_places(tmp_path: Path) -> None:
    path = file_with(tmp_path, "recipe: x\ntrain:\n  max_steps: 3\n  epochs: 2\n")
    assert refusal([], path) == (
        f"{path}:4: train.epochs = 2.0: excludes train.max_steps = 3 ({path}:3); state one of the two"
    )


def test_a_missing_recipe_is_told_with_the_file(tmp_path: Path) -> None:
    path = file_with(tmp_path, "train:\n  max_steps: 3\n")
    assert refusal([], path) == f"{path}: recipe: must be set"


def test_recipe_args_are_checked_by_the_recipe_alone() -> None:
    config = load(None, ["recipe=x", "recipe_args.anything={a: [1, null]}"]).config
    assert config.recipe_args == {"anything": {"a": [1, None]}}


def test_a_recipe_argument_that_json_cannot_hold_is_refused() -> None:
    assert refusal(["recipe=x", "recipe_args.a=.nan"]).startswith("command line: recipe_args.a = NaN: ")
    assert refusal(["recipe=x", "recipe_args.a=[.inf]"]).startswith("command line: recipe_args.a")


def test_text_that_is_not_unicode_is_refused_under_its_own_key() -> None:
    # What Python makes of bytes on the command line that are not UTF-8.
    assert refusal(["recipe=x", "recipe_args.file=caf\udce9.txt"]).startswith("command line: recipe_args.file")


# --- secrets ---------------------------------------------------------------------------------------------

HUB_TOKEN = "hf_" + "aB3" * 9
ADVICE = (
    "looks like a secret (value not shown); a run file and a command line are recorded, so put it into the "
    "environment instead (HF_TOKEN, WANDB_API_KEY, …)"
)


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "apikey", "apiKey", "API_KEY", "wandb_api_key", "aws_secret_access_key", "access_key"),
        *("secret", "client_secret", "secret_key", "private_key", "password", "db_password", "passwd"),
        *("credentials", "hf_token", "HF_TOKEN", "hub_token", "auth_token", "access_token", "bearer_token"),
        *("wandb_token", "token"),
    ],
)
@pytest.mark.parametrize("depth", ["", "logins."])
def test_a_secret_is_known_by_its_key(key: str, depth: str) -> None:
    dotted = f"recipe_args.{depth}{key}"
    assert refusal(["recipe=x", f"{dotted}=pale-blue-dot"]) == f"command line: {dotted}: {ADVICE}"


@pytest.mark.parametrize(
    ("value", "bare"),
    [
        pytest.param("pale-blue-dot", "pale-blue-dot", id="text"),
        pytest.param("[one, pale-blue-dot]", "pale-blue-dot", id="list"),
        pytest.param("2718281828", "2718281828", id="number"),
        pytest.param("{user: pale-blue-dot}", "pale-blue-dot", id="mapping"),
    ],
)
def test_whatever_stands_under_a_secret_key_is_refused_and_not_shown(value: str, bare: str) -> None:
    said = refusal(["recipe=x", f"recipe_args.password={value}"])
    assert ADVICE in said
    assert bare not in said


SECRET_VALUES = [
    HUB_TOKEN,
    "sk-" + "aB3-" * 7,
    "ghp_" + "aB3" * 12,
    "gho_" + "aB3" * 12,
    "wandb_v1_" + "aB3" * 9,
    "AKIA" + "ABCD1234" * 2,
    "https://user:pale-blue-dot@host/data",
    "s3://user:pale-blue-dot@bucket",
    f"https://user:{HUB_TOKEN}@huggingface.co/x",
]


@pytest.mark.parametrize("value", SECRET_VALUES)
@pytest.mark.parametrize(
    ("item", "key"),
    [
        ("recipe_args.a={}", "recipe_args.a"),
        ("recipe_args.a.b={}", "recipe_args.a.b"),
        ('recipe_args.a=[x, "{}"]', "recipe_args.a"),
        ('recipe_args.a=[[x], {{b: ["{}"]}}]', "recipe_args.a.b"),
        ("track.project={}", "track.project"),
        ("recipe={}", "recipe"),
    ],
)
def test_a_secret_is_known_by_its_shape(item: str, key: str, value: str) -> None:
    said = refusal(["recipe=x", item.format(value)])
    assert said == f"command line: {key}: {ADVICE}"
    assert value not in said and "pale-blue-dot" not in said


def test_a_secret_in_a_file_is_told_with_its_line_and_not_shown(tmp_path: Path) -> None:
    path = file_with(tmp_path, f"recipe: x\nrecipe_args:\n  deep:\n    - {{er: [{HUB_TOKEN}]}}\n  hub_token: pale\n")
    assert refusal([], path).splitlines() == [
        f"{path}:3: recipe_args.deep.er: {ADVICE}",
        f"{path}:5: recipe_args.hub_token: {ADVICE}",
    ]


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(f"recipe_args.hf_token=[{HUB_TOKEN}", id="unfinished list"),
        pytest.param(f'recipe_args.hf_token="{HUB_TOKEN}', id="unfinished quotes"),
        pytest.param(f"recipe_args..hf_token={HUB_TOKEN}", id="bad key"),
        pytest.param(HUB_TOKEN, id="no key"),
    ],
)
def test_a_secret_is_not_shown_by_other_messages_either(item: str) -> None:
    assert HUB_TOKEN not in refusal(["recipe=x", item])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "gpt2"),
        ("eos_token", "<|endoftext|>"),
        ("pad_token", "<pad>"),
        ("mask_token", "mask"),
        ("sort_key", "length"),
        ("key", "text"),
        ("keys", ["a", "b"]),
        ("token_type", "word"),
        ("max_new_tokens", 20),
        ("author", "me"),
        ("secretary", "Ann"),
        ("model", "hf-internal-testing/tiny-random-gpt2"),
        ("model", "sk-learn"),
        ("dataset", "https://host/data"),
        ("dataset", "https://host/@user/data:3"),
        ("password", None),
        ("password", ""),
    ],
)
def test_an_innocent_argument_is_not_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = file_with(tmp_path, json.dumps({"recipe": "x", "recipe_args": {key: value}}))
    assert load(path, []).config.recipe_args == {key: value}


# --- what a stated key becomes ---------------------------------------------------------------------------


def test_defaults_and_one_epoch_where_no_length_is_stated(tmp_path: Path) -> None:
    config = load(file_with(tmp_path, "recipe: x\n"), []).config
    assert (config.train.epochs, config.train.max_steps) == (1.0, None)
    assert config == RunConfig(recipe="x", train=TrainSection(epochs=1.0))
    assert load(None, ["recipe=x", "train.max_steps=3"]).config.train.epochs is None
    assert load(None, ["recipe=x", "train.max_steps=null"]).config.train.epochs == 1.0


def test_the_command_line_displaces_the_other_key_of_a_group(tmp_path: Path) -> None:
    path = file_with(tmp_path, "recipe: x\ntrain: {epochs: 2, warmup_ratio: 0.1}\n")
    train = load(path, ["train.max_steps=30", "train.warmup_steps=3"]).config.train
    assert (train.max_steps, train.epochs, train.warmup_steps, train.warmup_ratio) == (30, None, 3, None)


def test_a_number_without_a_point_is_a_number() -> None:
    assert load(None, ["recipe=x", "train.learning_rate=1", "train.epochs=2"]).config.train.learning_rate == 1.0


def test_place_and_origin(tmp_path: Path) -> None:
    path = file_with(tmp_path, "recipe: x\ntrain:\n  max_steps: 3\n")
    loaded = load(path, ["train.seed=1"])
    assert [loaded.origin(key) for key in ("train.max_steps", "train.seed", "train.epochs", "eval.every_steps")] == [
        *(f"{path}:3", "command line", "default", "default")
    ]
    assert loaded.place("train.epochs") == f"{path}:2", "the nearest section above"
    assert loaded.place("eval.every_steps") == "default"


def test_a_mapping_on_the_command_line_is_the_origin_of_its_keys() -> None:
    loaded = load(None, ["recipe=x", "train={max_steps: 3}"])
    assert loaded.config.train.max_steps == 3
    assert loaded.origin("train.max_steps") == "command line"


def test_a_recipe_path_is_relative_to_who_states_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = file_with(folder, "recipe: own/mine.py\n")
    assert load(path, []).config.recipe == f"{folder}/own/mine.py"
    assert load(Path("../project/run.yaml"), []).config.recipe == f"{elsewhere}/../project/own/mine.py"
    assert load(path, ["recipe=own/mine.py"]).config.recipe == f"{elsewhere}/own/mine.py"
    assert load(None, ["recipe=own/mine.py"]).config.recipe == f"{elsewhere}/own/mine.py"
    assert load(path, ["recipe=/abs/mine.py"]).config.recipe == "/abs/mine.py"
    assert load(path, ["recipe=causal_lm"]).config.recipe == "causal_lm"


def test_a_configuration_cannot_be_changed() -> None:
    config = load(None, ["recipe=x"]).config
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3  # type: ignore[misc]


# --- round trip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.max_steps=30", "train.warmup_steps=3", "train.learning_rate=1.5e-3", "train.adam_epsilon=1e-12"],
        ["train.epochs=0.1", "train.max_grad_norm=null", "save.keep_last=null", "save.export=false"],
        ["parallel.devices=4", "parallel.strategy=ddp", "parallel.device=cuda", "track.wandb=off"],
        ["recipe=/folder with space/mine.py", "track.project=Ünïcode: yes"],
        ['recipe_args={a: "off", b: "010", c: "1.5", d: null, e: [1, "2", {f: ""}], g: 1e-30, h: "null"}'],
        ['recipe_args.dataset_config="1e-3"'],
        ['recipe_args.dataset_config="09"'],
        ['recipe_args.dataset_config="0o7"'],
    ],
)
def test_a_dumped_configuration_loads_to_the_same(overrides: list[str], tmp_path: Path) -> None:
    config = load(None, ["recipe=x", *overrides]).config
    assert load(file_with(tmp_path, dump_yaml(config)), []).config == config


# What scalars are made of, so that many a text looks like a number, a date, a word or YAML's own signs.
TEXTS = st.text(st.sampled_from("0123456789eExXob+-_.:~ #'\"[]{}&*!|>%@,=\n\tnulltrfayNTÜ\x07🐟"), max_size=8)
PLAIN_VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
KEYS_WITHOUT_DOTS = TEXTS.map(lambda text: text.replace(".", ""))
VALUES = (
    PLAIN_VALUES | st.lists(PLAIN_VALUES, max_size=4) | st.dictionaries(KEYS_WITHOUT_DOTS, PLAIN_VALUES, max_size=4)
)


@settings(database=None, deadline=None, max_examples=100)
@given(value=VALUES)
def test_any_recipe_argument_survives_being_recorded(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = RunConfig(recipe="x", recipe_args={"value": value}, train=TrainSection(epochs=1.0))
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load(path, []).config.model_dump_json() == config.model_dump_json()


# --- documentation ---------------------------------------------------------------------------------------


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, info in model.model_fields.items():
        section = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        names += leaves(info.annotation, f"{prefix}{name}.") if section else [f"{prefix}{name}"]  # type: ignore[arg-type]
    return names


KEYS = describe(RunConfig)


def test_every_key_is_described_once() -> None:
    assert [key.name for key in KEYS] == leaves(RunConfig) == all_keys()
    assert len(KEYS) >= 30
    assert {name.partition(".")[0] for name in all_keys()} == set(SECTIONS.split(", "))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_description_is_one_sentence(key: Any) -> None:
    assert re.fullmatch(r"[A-Za-z].{10,}\.", key.description), key.description
    assert ". " not in key.description, "one sentence"
    assert "\n" not in key.description
    assert key.kind and "typing" not in key.kind and "|None" not in key.kind
    assert key.default


def without_spaces(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("command", ["run", "plan"])
def test_help_documents_every_key(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    text = without_spaces(shown.stdout)
    for key in KEYS:
        assert f"\n  {key.name}  (" in shown.stdout
        assert without_spaces(key.description) in text, key.name


def test_the_json_schema_documents_every_key() -> None:
    shown = CliRunner().invoke(app, ["config-schema"])
    assert shown.exit_code == 0
    schema = json.loads(shown.stdout)
    found = dict(schema_leaves(schema, schema))
    assert found == {key.name: key.description for key in KEYS}
    assert schema["required"] == ["recipe"]
    assert schema["additionalProperties"] is False


def schema_leaves(node: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, inner in node["properties"].items():
        if "$ref" in inner:
            found += schema_leaves(schema["$defs"][inner["$ref"].rpartition("/")[2]], schema, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", inner.get("description", "")))
    return found
