"""Every key of every file we ship, one mistake at a time: each is told with its line, and with what was meant."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.accelerate_file import read_accelerate_file
from launch.accelerate_keys import PREFIXED, AccelerateFile
from launch.assets import recipes_folder, shipped_folder
from launch.cache import Cache
from launch.cli import app
from launch.cluster import profile
from launch.config import load
from launch.deepspeed_file import read_deepspeed_file
from launch.deepspeed_keys import DeepSpeedFile
from launch.errors import ConfigError, DataError
from launch.keys import names_of
from launch.recipe import RecipeContext
from launch.registry import load_module, load_recipe
from launch.sections import ClusterSection, RunConfig
from launch.source import Layer, read_json_file, read_run_file, read_yaml_1_1_file, shown
from tests.mutations import Keys, Tally, moved, paths_of, typos, with_change, wrong_types
from tests.test_accelerate_file import RICH as RICH_ACCELERATE
from tests.test_deepspeed_file import RICH as RICH_DEEPSPEED

RUN_FILES = tuple(sorted(recipes_folder().glob("*.yaml")))

CLUSTER = """\
partition: gpu
account: lab
qos: long
time: 2-12:00:00
cpus_per_process: 8
memory: 64G
gpu_type: h100
sbatch: [--constraint=ib]
srun: [--mpi=none]
modules: [cuda/12]
environment: {NCCL_DEBUG: INFO}
setup: ulimit -l unlimited
container: [apptainer, exec, image.sif]
python: /opt/python
scratch: $SCRATCH
network_interface: ib0
launcher: torchrun
notice_seconds: 120
requeue: false
max_fruitless_starts: 5
"""


def checked_run_file(path: Path) -> None:
    """All that is known to be wrong before a device, or the Hub, is looked at."""
    recipe = load_recipe(load(path, []))
    with contextlib.suppress(DataError):  # the data that it names is not here
        recipe.preview(RecipeContext(Cache(path.parent), 0))


def with_profile(_: Path) -> None:
    load(RUN_FILES[0], [], beneath=profile())


def names_of_run_file(values: dict[str, Any]) -> list[str]:
    return [*names_of(RunConfig), *names_of(load_module(values["recipe"], "here").Args, "recipe_args.")]


def names_of_accelerate(_: dict[str, Any]) -> list[str]:
    names = names_of(AccelerateFile)
    short = {f"{section}.{prefix}": f"{section}." for section, (prefix, _) in PREFIXED.items()}
    return names + [name.replace(long, short[long], 1) for name in names for long in short if name.startswith(long)]


@dataclass(frozen=True)
class Kind:
    """A kind of file, and all of its files that we ship."""

    name: str
    files: tuple[tuple[str, str], ...]
    """The name and the text of each."""
    place: str
    """Where one is read from, in the folder of a test."""
    parse: Callable[[Path], Layer]
    check: Callable[[Path], Any]
    names: Callable[[dict[str, Any]], list[str]]
    """Every key that a file with these values might have."""
    prefix: str = ""
    """What messages put in front of a key."""

    def tally(self, folder: Path) -> Tally:
        path = folder / self.place
        path.parent.mkdir(parents=True, exist_ok=True)
        return Tally(self.check, path, self.prefix)

    def parsed(self, folder: Path) -> Iterator[tuple[str, Layer]]:
        """The text of each file, and what it states."""
        path = self.tally(folder).path
        for _, text in self.files:
            path.write_text(text, encoding="utf-8")
            yield text, self.parse(path)


def texts(paths: tuple[Path, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((path.stem, path.read_text(encoding="utf-8")) for path in paths)


ACCELERATE = texts(tuple(sorted(shipped_folder("accelerate_configs").glob("*.yaml"))))
DEEPSPEED = texts(tuple(sorted(shipped_folder("ds_configs").glob("*.json"))))
KINDS = (
    Kind("run file", texts(RUN_FILES), "mine.yaml", read_run_file, checked_run_file, names_of_run_file),
    Kind(
        *("cluster profile", (("every key", CLUSTER),), "shoal/cluster.yaml", read_run_file, with_profile),
        *(lambda _: names_of(ClusterSection), "cluster."),
    ),
    Kind(
        *("Accelerate file", (*ACCELERATE, ("rich", RICH_ACCELERATE)), "mine.yaml"),
        *(lambda path: read_yaml_1_1_file(path, "a file", ""), read_accelerate_file, names_of_accelerate),
    ),
    Kind(
        *("DeepSpeed file", (*DEEPSPEED, *texts((RICH_DEEPSPEED,))), "mine.json"),
        *(lambda path: read_json_file(path, "a file"), read_deepspeed_file, lambda _: names_of(DeepSpeedFile)),
    ),
)
FREE = ("environment", "data_sampling", "params", "arg_mappings")
"""Sections in which any key may stand."""

RICH = (RICH_ACCELERATE, RICH_DEEPSPEED.read_text(encoding="utf-8"))
"""Files with far more keys than those we ship."""

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def keys_of(values: dict[str, Any]) -> Iterator[tuple[Keys, Any]]:
    yield from (found for found in paths_of(values) if not set(FREE) & {*found[0][:-1]})


def told(kind: Kind, tally: Tally, what: str, least: float) -> None:
    """See that nothing was accepted, and that what was meant was told often enough."""
    meant = f"; what was meant is told of {tally.share:.2%}" if least else ""
    print(f"{kind.name}: {tally.tried:,} {what}, {len(tally.unnoticed)} not refused{meant}")
    assert tally.unnoticed == []
    assert tally.share >= least, "\n".join(tally.mistaken)


def test_every_file_we_ship_is_looked_at() -> None:
    assert [len(kind.files) for kind in KINDS] == [13, 1, 12, 6]
    assert set(re.findall(r"^\w+", CLUSTER, re.MULTILINE)) == set(ClusterSection.model_fields)


@every_kind
def test_a_file_without_a_mistake_is_taken(kind: Kind, tmp_path: Path) -> None:
    for text, _ in kind.parsed(tmp_path):
        tally = kind.tally(tmp_path)
        tally.path.write_text(text, encoding="utf-8")
        kind.check(tally.path)


@every_kind
def test_no_typo_gets_through(kind: Kind, tmp_path: Path) -> None:
    """In the text as it is; every letter of a key where we ship it first, else two places of it."""
    tally, seen = kind.tally(tmp_path), set[Keys]()
    for text, layer in kind.parsed(tmp_path):
        known, lines = set(kind.names(layer.values)), text.split("\n")
        for path, _ in keys_of(layer.values):
            number = int(layer.places[".".join(path)].rpartition(":")[2])
            for typo in typos(path[-1])[: 2 if path in seen or text in RICH else None]:
                at = (*path[:-1], typo)
                if ".".join(at) not in known:
                    line = re.sub(rf'(?<!\w){path[-1]}(?="?:)', typo, lines[number - 1], count=1)
                    tally.try_text("\n".join([*lines[: number - 1], line, *lines[number:]]), at, number, path)
            seen.add(path)
    assert tally.tried > (300 if kind.prefix else 800)
    told(kind, tally, "letters left out or swapped", least=0.99)


@every_kind
def test_no_value_of_another_type_gets_through(kind: Kind, tmp_path: Path) -> None:
    tally = kind.tally(tmp_path)
    for _, layer in kind.parsed(tmp_path):
        for path, value in keys_of(layer.values):
            for wrong in wrong_types(value):
                if path != ("downcast_bf16",) or wrong is not False:  # which may be either
                    tally.try_values(with_change(layer.values, path, path[-1], wrong), path)
    assert tally.tried > (50 if kind.prefix else 500)
    told(kind, tally, "values of another type", least=0)


@every_kind
def test_no_key_in_a_wrong_section_gets_through(kind: Kind, tmp_path: Path) -> None:
    """Each key in each section that the file has, and at the top; again only where it was not yet."""
    tally, seen = kind.tally(tmp_path), set[tuple[Keys, Keys]]()
    of_a_metric = kind.tally(tmp_path)  # whose options only the metric knows
    for text, layer in kind.parsed(tmp_path):
        known = set(kind.names(layer.values))
        sections = [(), *(path for path, value in keys_of(layer.values) if isinstance(value, dict))]
        for path, _ in keys_of(layer.values):
            for section in sections[:: len(sections) // 4 if text in RICH else 1]:
                at = (*section, path[-1])
                free, same = set(section[-1:]) & set(FREE), section == path[:-1] or section[: len(path)] == path
                if not (free or same or (path, section) in seen or ".".join(at) in known):
                    seen.add((path, section))
                    told_of = of_a_metric if "metric_options" in (*path[:-1], *section) else tally
                    told_of.try_values(moved(layer.values, path, section), at, path)
    assert of_a_metric.unnoticed == []
    if not kind.prefix:  # which has no sections
        assert tally.tried > 150
        told(kind, tally, "keys in a wrong section", least=0.9)


@every_kind
def test_no_key_is_stated_twice(kind: Kind, tmp_path: Path) -> None:
    tally = kind.tally(tmp_path)
    for _, layer in kind.parsed(tmp_path):
        for path, _ in keys_of(layer.values):
            tally.try_twice(layer.values, path)
    assert tally.tried >= 20
    told(kind, tally, "keys stated twice", least=0)


def test_no_key_with_dots_gets_through(tmp_path: Path) -> None:
    """As one writes them on the command line."""
    kind = KINDS[0]
    tally = kind.tally(tmp_path)
    for _, layer in kind.parsed(tmp_path):
        for path, value in keys_of(layer.values):
            if len(path) > 1:
                name = ".".join(path)
                rule = f" = .*: unknown key; dots .* write `{path[-1]}:` within `{name.rpartition('.')[0]}:`"
                tally.try_text(f"recipe: {layer.values['recipe']}\n{name}: {shown(value)}\n", (name,), 2, rule=rule)
    assert tally.tried > 150
    told(kind, tally, "keys with dots", least=0)


def test_no_typo_on_the_command_line_gets_through() -> None:
    right = tried = 0
    for name, _ in KINDS[0].files:
        path = recipes_folder() / f"{name}.yaml"
        values = read_run_file(path).values
        known = set(names_of_run_file(values))
        for keys, value in keys_of(values):
            if len(keys) == 1 or isinstance(value, dict) or "metric_options" in keys:
                continue
            key = ".".join(keys)
            for typo in typos(keys[-1])[:2]:
                mistyped = f"{key.rpartition('.')[0]}.{typo}"
                if mistyped not in known:
                    tried += 1
                    with pytest.raises(ConfigError) as caught:
                        load_recipe(load(path, [f"{mistyped}={json.dumps(value)}"]))
                    said = str(caught.value)
                    assert re.fullmatch(rf"command line: {re.escape(mistyped)} = .*: unknown key; .+", said)
                    right += said.endswith(f"did you mean {key}?")
    assert tried > 250
    assert right / tried >= 0.99


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: {partition: gpu}\n", "1: cluster: its keys stand in this file without their section; write them at "
         "the top"),
        ("train: {seed: 1}\n", "1: train: this file holds keys of the section cluster only; the rest goes into a run "
         "file"),
        ("train.seed: 1\n", '1: cluster.train.seed = 1: unknown key; dots are for the command line: in a file, write '
         "`seed:` within `train:`"),
    ],
)  # fmt: skip
def test_a_profile_that_was_written_as_a_run_file(text: str, message: str, tmp_path: Path) -> None:
    path = KINDS[1].tally(tmp_path).path
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        with_profile(path)
    assert str(caught.value) == f"{path}:{message}"


def test_the_command_tells_it_before_a_device_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched() -> None:
        raise AssertionError("the machine was looked at")

    monkeypatch.setattr("launch.plan.read_machine", touched)
    files = {"recipe.yaml": "recipe: causal_lm\ntrain:\n  sead: 1\n"}
    for key, name, text in (
        ("accelerate_config", "a.yaml", "distributed_type: FSDP\nfsdp_config:\n  fsdp_verison: 2\n"),
        ("deepspeed_config", "d.json", '{"zero_optimization": {\n\n"stag": 2}}'),
    ):
        (tmp_path / name).write_text(text)
        files[f"{key}.yaml"] = f"recipe: causal_lm\nparallel:\n  {key}: {name}\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        done = CliRunner().invoke(app, ["plan", str(tmp_path / name)])
        assert isinstance(done.exception, ConfigError), done.exception
        assert re.fullmatch(rf"{tmp_path}/[\w.]+:3: .* = .: unknown key; did you mean .*\?", str(done.exception))
