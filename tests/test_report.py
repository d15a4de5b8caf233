"""The page about runs: what is on it of runs of every kind, and that nothing of a run can break it."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from launch.errors import RunFolderError
from launch.record import held, write_json
from launch.report.charts import COLOURS, DASHES, PHASES
from launch.report.curves import Curve, thin
from launch.report.facts import read_facts
from launch.report.page import names_of, page, write_page
from launch.report.parts import command
from launch.report.settings import ABSENT, settings
from launch.root_cause import Cause, write_cause
from launch.status import by_folder, status
from launch.sweep import write_sweep
from tests.commands import shoal
from tests.run_folders import BEGAN, evaluation, run_folder, update, write_records

OWN = Path(__file__).with_name("own_recipe.py")


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, dict[str, Any]] = {}
        self._within: list[str] = []
        self._script: dict[str, str | None] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within.append(tag)
        if tag == "script":
            self._script = dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._within and self._script.get("id") == "figures":
            self.figures = {each["key"]: each for each in json.loads(data)}
        elif not {"script", "style"} & {*self._within}:
            self.text += f"{data}\n"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def points(self, chart: str, trace: int = 0) -> list[tuple[Any, Any]]:
        found = self.figures[chart]["data"][trace]
        return list(zip(found["x"], found["y"], strict=True))


def page_of(*folders: Path) -> Page:
    return Page(page([read_facts(by_folder(folder)) for folder in folders]))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two processes. It is not to be changed."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copy(OWN, folder / "own.py")
    (folder / "own.yaml").write_text("recipe: ./own.py\n")
    keys = ["train.max_steps=12", "train.global_batch_size=4", "eval.every_steps=4", "save.every_steps=6"]
    done = shoal(folder, "run", "own.yaml", *keys, "parallel.devices=2", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_ends_with_a_page_about_it(real: Path) -> None:
    found = Page((real / "report.html").read_text(encoding="utf-8"))
    assert [attributes for tag, attributes in found.elements if tag == "h1"] and "finished" in found.text
    records = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    losses = [(each["update"], float(f"{each['loss']:.6g}")) for each in records if each["kind"] == "train"]
    assert found.points("chart-loss") == losses and len(losses) == 12
    assert [x for x, _ in found.points("chart-loss", 1)] == [0, 4, 8, 12]
    result = json.loads((real / "result.json").read_text())
    assert [y for _, y in found.points("chart-memory")] == [round(each / 1e9, 4) for each in result["peak_memory"]]
    assert "shoal run own.yaml train.max_steps=12" in found.text and f"shoal run {real / 'run.yaml'}" in found.text
    assert re.search(r"train\.max_steps\n12\nnull", found.text), "what was set otherwise than usual"
    assert "went into waiting for other ranks" in found.text
    assert not list(real.glob("*.tmp"))


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    source = page([read_facts(by_folder(run_folder(tmp_path / "run", updates=9)))])
    assert len(source) < 8_000_000
    found = Page(source)
    policy = next(each["content"] for each in found.all("meta") if each.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert {tag for tag, _ in found.elements} & {"img", "iframe", "object", "base", "form"} == set()
    asked = [each.get("src") or each.get("href") for _, each in found.elements if "src" in each or "href" in each]
    assert asked and all(str(each).startswith(("#", "data:")) for each in asked)
    assert len(found.all("script")) == 3, "the figures, the library once, and ours"


def test_the_page_can_be_read_without_eyes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=9)
    write_records(folder, [evaluation(each, 4.5, best=True, f1=0.1 * each) for each in (4, 8)])
    found = page_of(folder)
    tags = [tag for tag, _ in found.elements]
    assert [tags.count(each) for each in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert found.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    assert tags.count("caption") == tags.count("table") > 5
    assert all(each.get("scope") in ("col", "row") for each in found.all("th"))
    ids = [each["id"] for _, each in found.elements if "id" in each]
    assert len(ids) == len(set(ids))
    for _, each in found.elements:
        assert {each.get("aria-labelledby"), each.get("aria-describedby")} - {None} <= set(ids)
    charts = [each for each in found.all("div") if each.get("class") == "chart"]
    assert {each["id"] for each in charts} == set(found.figures) and len(charts) >= 6
    assert all(each["aria-label"] and each["aria-describedby"] for each in charts)
    assert found.text.count(": the numbers") >= len(charts), "each has the table of its numbers"
    assert {f"#{each}" for each in ids} >= {each["href"] for each in found.all("a")}


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_curves_stand_out_on_light_and_on_dark() -> None:
    style = (Path(__file__).parents[1] / "launch/report/page.css").read_text()
    surfaces = re.findall(r"--surface: (#\w{6})", style)
    assert len(surfaces) == 2
    for colour in {*COLOURS, *(each for each, _ in PHASES.values())}:
        for surface in surfaces:
            dark, light = sorted((luminance(colour), luminance(surface)))
            assert (light + 0.05) / (dark + 0.05) >= 3, f"{colour} on {surface}"
    assert len(set(COLOURS)) * len(set(DASHES)) == 32


# --- runs of every kind ----------------------------------------------------------------------------------


def test_a_run_without_an_update(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    found = page_of(folder)
    assert "No update was recorded (yet)." in found.text and "There was no evaluation (yet)." in found.text
    assert found.figures == {}


def test_a_line_that_is_being_written_and_what_is_no_record(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    write_records(
        folder,
        [update(4, loss=4.0, gradient_norm="odd", seconds={"compute": math.nan, "data": "x"}), {"kind": "train"}],
    )
    write_records(
        folder, [{"update": 7}, {**evaluation(3, 4.0, best=True), "samples": "x"}, {"kind": "eval", "update": []}]
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\nnull\n\x00\n{"kind": "train", "update": 5, "lo')
    found = page_of(folder)
    assert [x for x, _ in found.points("chart-loss")] == [1, 2, 3, 4]
    assert found.figures["chart-time"]["data"][0]["x"] == [66.667], "what is not finite took no time"


def test_losses_that_are_not_finite_leave_a_gap_and_are_told(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=2)
    write_records(folder, [update(3, math.nan), update(4, math.inf), update(5, 4.0)])
    found = page_of(folder)
    assert [y for _, y in found.points("chart-loss")] == [4.99, 4.98, None, None, 4]
    assert found.text.count("loss not finite\n") == 2
    only_nan = run_folder(tmp_path / "nan")
    write_records(only_nan, [update(each, math.nan, gradient_norm=math.nan) for each in (1, 2)])
    assert set(page_of(only_nan).figures) >= {"chart-learning_rate"}
    assert "chart-gradient_norm" not in page_of(only_nan).figures


def test_interruptions_lie_on_the_clock_and_updates_made_again_are_told(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=6)
    attempt = folder / "attempts/1"
    attempt.mkdir(parents=True)
    write_json(attempt / "stopped.json", {"signal": "SIGUSR1", "update": 8, "checkpoint": None, "time": BEGAN + 25})
    write_records(folder, [update(each) for each in (7, 8)], "metrics-discarded.jsonl")
    resumed = {"kind": "resume", "update": 6, "checkpoint": "step-000006", "time": BEGAN + 1000}
    write_records(folder, [resumed, *(update(each, time=BEGAN + 1000 + 3 * each) for each in (7, 8, 9))])
    spike = {"kind": "skipped", "update": 8, "reason": "loss 50 is far above", "time": BEGAN + 1025}
    slow = {"kind": "straggler", "update": 9, "rank": 1, "message": "rank 1 (n2) keeps the others waiting"}
    write_records(folder, [spike, {**slow, "time": BEGAN + 1030}])
    found = page_of(folder)
    line, again = found.points("chart-clock"), found.points("chart-clock", 1)
    assert [y for _, y in line] == [1, 2, 3, 4, 5, 6, None, 7, 8, 9]
    assert [y for _, y in again] == [7, 8]
    assert line[7][0] > line[5][0] + 16, "minutes went by"
    for told in ("stopped by SIGUSR1", "went on from step-000006", "loss 50 is far above; it was skipped"):
        assert told in found.text
    assert "rank 1 (n2) keeps the others waiting" in found.text


def test_a_long_run_is_thinned_and_no_spike_is_lost(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    spike = 54_321
    write_records(folder, (update(each, 99.0 if each == spike else 5 - each / 1e5) for each in range(1, 100_001)))
    write_records(folder, (evaluation(each, 4.0, best=False) for each in range(100, 100_000, 100)))
    source = page([read_facts(by_folder(folder))])
    assert len(source) < 6_000_000
    points = Page(source).points("chart-loss")
    assert len(points) <= 1_500
    assert (spike, 99.0) in points and points[0][0] == 1 and points[-1][0] == 100_000
    assert "99 at 54,321" in Page(source).text, "the table says so too"


def test_thinning_keeps_the_extremes_of_every_part() -> None:
    values = [math.sin(each / 7) for each in range(1000)]
    values[333] = math.nan
    kept = thin(values, 100)
    assert len(kept) <= 100 and kept == sorted(set(kept)) and {0, 999} <= set(kept)
    for part in range(49):
        places = range(1000 * part // 49, 1000 * (part + 1) // 49)
        finite = [place for place in places if not math.isnan(values[place])]
        assert {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} <= set(kept)
    assert thin([1.0, 2.0], 10) == [0, 1]
    assert Curve([1, 2, 3], [1.0, math.inf, 2.0]).thinned(9) == ([1, 2, 3], [1.0, None, 2.0])


def test_several_runs_of_different_lengths_lie_over_one_another(tmp_path: Path) -> None:
    short = run_folder(tmp_path / "a/short", updates=3)
    long = run_folder(tmp_path / "b/long", "train.learning_rate=0.01", updates=50)
    bare = run_folder(tmp_path / "c/long", updates=0, devices=1)
    write_records(long, [evaluation(10, 4.9, best=True, accuracy=0.5), evaluation(20, 4.8, best=True, accuracy=0.6)])
    found = page_of(short, long, bare)
    traces = found.figures["chart-loss"]["data"]
    assert [(trace["name"], len(trace["x"])) for trace in traces] == [("a/short", 3), ("b/long", 50), ("b/long", 2)]
    assert traces[0]["line"] != traces[1]["line"]
    assert found.points("chart-metric-0") == [(10, 0.5), (20, 0.6)]
    assert re.search(r"train\.learning_rate\n0\.0003\n0\.01\n0\.0003\n", found.text)
    assert "3 runs" in found.text


def test_what_is_the_same_for_all_runs_is_told_once(tmp_path: Path) -> None:
    """And the table is as wide as what differs."""
    found = page_of(run_folder(tmp_path / "one", updates=3), run_folder(tmp_path / "two", updates=50, devices=1))
    overview = found.text[found.text.index("The runs of this page") : found.text.index("Training loss of each")]
    titles, same = overview.split("one\n", 1)[0].splitlines()[1:], overview.split("The same for all:\n")[1].splitlines()
    assert titles == ["run", "state", "updates", "last training loss", "time of updates", "processes", "batch"]
    assert same[:6] == ["tokens per second", "167", "recipe", "causal_lm", "numbers", "float32"]


def test_a_hundred_runs_make_no_huge_page(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "000")
    write_records(first, (update(each) for each in range(1, 201)))
    for number in range(1, 100):
        shutil.copytree(first, tmp_path / f"{number:03d}")
    source = page([read_facts(by_folder(tmp_path / f"{number:03d}")) for number in range(100)])
    assert len(source) < 8_000_000
    assert len(Page(source).figures["chart-loss"]["data"]) == 100


def test_a_failure_comes_first(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=5)
    log = str(folder / "logs/rank-1.log")
    message = "rank 1 (n2): ValueError: the fifth batch is odd\nafter update 5; log: there"
    write_cause(folder, Cause(1, message, 1, "n2", 5, log, "Traceback (most recent call last):\n  boom"))
    found = page_of(folder)
    text = found.text
    assert text.index("the fifth batch is odd") < text.index("What came out\n", text.index("the fifth batch is odd"))
    for told in ("n2", log, "Traceback (most recent call last):", "failed"):
        assert told in text
    sections = [each.get("id") for each in found.all("section")]
    assert sections[0] == "failure"
    write_json(folder / "result.json", {"summary": "went on well"})
    assert "failure" not in [each.get("id") for each in page_of(folder).all("section")]


def test_predictions_labels_and_memory(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=5)
    (folder / "eval").mkdir()
    for old in (2, 4, 8):
        write_json(folder / f"eval/step-{old:06d}.json", {"update": old, "examples": [{"source": "old"}]})
    examples = [{"source": "5 May", "prediction": "0005", "references": ["2005-05-05", "05"], "score": 0.5}]
    labels = {"labels": ["yes", "no"], "confusion_matrix": [[7, 1], [2, 9]], "by_label": {"yes": {"f1": 0.875}}}
    write_json(folder / "eval/step-000010.json", {"update": 10, "loss": 1.0, "examples": examples, **labels})
    (folder / "eval/step-000011.json").write_text('{"update": 11, "exam')
    peaks = {"peak_memory": [2_000_000_000, None], "planned_memory": 4_000_000_000}
    write_json(folder / "result.json", {"summary": "done", **peaks, "sample": "once upon"})
    write_json(folder / "environment.json", {"gpus": {"0": "a card"}, "packages": ["one", "two"]})
    found = page_of(folder)
    for told in ("2005-05-05 | 05", "Predictions at update 10", "0.8750", "Confusion matrix", "once upon", "gpus.0"):
        assert told in found.text
    assert "old" not in found.text.split()
    assert found.points("chart-memory") == [("rank 0", 2.0), ("rank 1", None)]
    assert re.search(r"0\n2\.0 GB\n4\.0 GB\n50\.0 %", found.text)


def test_profiles_are_linked_from_where_the_page_is(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a run", updates=3)
    assert "profiles" not in [each.get("id") for each in page_of(folder).all("section")]
    (folder / "profile").mkdir()
    for name in ("rank-0.json.gz", "rank-0.txt", "memory-rank-1.json", "memory-rank-1.pickle", "something else"):
        (folder / "profile" / name).write_bytes(b"12345")
    for page_file in (folder / "report.html", tmp_path / "pages/report.html"):
        page_file.parent.mkdir(exist_ok=True)
        write_page([by_folder(folder)], page_file)
        assert " (5 bytes): what held the memory when it ran out: sums by kind" in Page(page_file.read_text()).text
        links = [each["href"] for each in Page(page_file.read_text()).all("a") if "profile/" in (each["href"] or "")]
        reached = [(page_file.parent / unquote(link or "")).resolve() for link in links]
        assert [path.name for path in reached] == [
            *("memory-rank-1.json", "memory-rank-1.pickle", "rank-0.json.gz", "rank-0.txt")
        ]
        assert all(path.is_file() for path in reached)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&\ud800"


def test_nothing_of_a_run_becomes_part_of_the_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "<b>&run", updates=3)
    write_cause(folder, Cause(1, HOSTILE.replace("\ud800", ""), 0, "<i>host", 3, "<u>", "<s>trace"))
    slow = {"kind": "straggler", "update": 3, "message": HOSTILE, "time": BEGAN, "rank": 0}
    records = [evaluation(2, 4.0, best=True, **{HOSTILE: 1.0}), evaluation(3, 4.0, best=True, **{HOSTILE: 2.0})]
    write_records(folder, [slow, *records, update(4, seconds={HOSTILE: 1.0})])
    (folder / "eval").mkdir()
    (folder / "eval/step-000001.json").write_text(json.dumps({"update": HOSTILE, "examples": [{HOSTILE: HOSTILE}]}))
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {"host": HOSTILE, "arguments": ["shoal", "run", HOSTILE], "git": {"commit": HOSTILE, "modified": True}}
    (folder / "plan.json").write_text(json.dumps(plan))
    write_page([by_folder(folder)], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = Page(source)
    assert {tag for tag, _ in found.elements} & {"img", "i", "b", "u", "s"} == set()
    assert len(found.all("script")) == 3
    escaped = ("&lt;script&gt;alert(1)", "\\u003cscript\\u003ealert(1)")
    assert source.count("alert(1)") == sum(map(source.count, escaped))
    assert found.text.count("alert(1)") > 6


def test_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    with held(folder):
        assert "load it anew to see more" in page_of(folder).text
    assert "load it anew" not in page_of(folder).text


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", updates=3)
    (folder / "environment.json").write_text("{")
    (folder / "attempts/1").mkdir(parents=True)
    (folder / "attempts/1/stopped.json").write_text("[]")
    assert "environment.json: " in page_of(folder).text
    (folder / "plan.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"plan\.json: cannot be read"):
        page_of(folder)


def test_what_a_run_was_set_to_is_compared_with_what_is_usual(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "one"), run_folder(tmp_path / "two", "train.seed=7", 'recipe_args={"stride": 9}')]
    found = {each.key: each for each in settings([read_facts(by_folder(folder)).plan for folder in folders])}
    assert found["train.seed"].differs and found["train.seed"].unusual
    assert found["train.max_steps"].unusual and not found["train.max_steps"].differs
    assert not found["train.weight_decay"].unusual
    assert found["recipe_args.stride"].values == (ABSENT, 9) and found["recipe_args.stride"].unusual
    keys = list(found)
    assert keys.index("recipe") < keys.index("train.seed") < keys.index("parallel.devices")


def test_names_and_commands() -> None:
    assert names_of([Path("/a/x"), Path("/b/y")]) == ("x", "y")
    assert names_of([Path("/a/x"), Path("/b/x")]) == ("a/x", "b/x")
    assert command(["/v/bin/shoal", "run", "a b"]) == "shoal run 'a b'"
    assert command(["/x/launch/__main__.py", "run", "f"]) == "shoal run f"
    assert command(["/x/launch/job.py", "r"]) == "python -m launch.job r" and command([]) == ""


# --- the commands ----------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A folder with two runs and a sweep of two, and with what is none."""
    one = run_folder(tmp_path / "runs/one", updates=40)
    run_folder(tmp_path / "runs/two", "train.learning_rate=0.01", "train.schedule=cosine", updates=20, devices=1)
    for name in ("000", "001"):
        run_folder(tmp_path / "runs/many" / name, updates=5)
    write_sweep(tmp_path / "runs/many", {"000": ("train.seed=1",), "001": ("train.seed=2",)})
    write_records(one, [evaluation(10, 4.9, best=True), evaluation(20, 4.75, best=True), evaluation(30, 5, best=False)])
    broken = run_folder(tmp_path / "runs/zzz")
    (broken / "plan.json").write_text("{")
    (tmp_path / "runs/notes").mkdir()
    return tmp_path


def test_runs_are_listed_with_the_best_of_their_evaluations(several: Path) -> None:
    done = shoal(several, "runs", "--json")
    assert done.returncode == 0, done.stderr
    found = {each["run"].removeprefix("runs/"): each for each in json.loads(done.stdout)}
    assert list(found) == ["many/000", "many/001", "one", "two", "zzz"]
    assert found["one"]["best"] == {"metric": "loss", "value": 4.75, "update": 20}
    assert found["two"]["best"] is None
    assert (found["zzz"]["state"], found["one"]["update"]) == ("unreadable", 40)
    shown = shoal(several, "runs").stdout
    assert re.search(r"runs/one +begun +40 of 100 +loss +4\.7500 +20 ", shown)
    assert shoal(several, "runs", "runs/many").stdout.count("begun") == 2
    nowhere = shoal(several, "runs", "nowhere")
    assert (nowhere.returncode, nowhere.stderr) == (
        5,
        "shoal: nowhere: no such folder; name the one that holds your runs\n",
    )
    assert shoal(several, "runs", "runs", "more").returncode == 2


def test_runs_are_compared(several: Path) -> None:
    shown = shoal(several, "runs", "--compare", "runs/one", "runs/two")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"train\.learning_rate +0\.0003 +0\.01 +\+0\.0097", shown.stdout)
    assert re.search(r"train\.schedule +linear +cosine", shown.stdout)
    assert re.search(r"updates +40 +20 +-20", shown.stdout)
    assert "train.weight_decay" not in shown.stdout and "tokens per second" not in shown.stdout, "they are the same"
    found = json.loads(shoal(several, "runs", "--compare", "runs/many", "runs/one", "--json").stdout)
    assert [Path(each).name for each in found["runs"]] == ["000", "001", "one"]
    assert found["settings"] == []
    assert {"what": "best loss", "values": [None, None, 4.75]} in found["results"]
    alone = shoal(several, "runs", "--compare", "runs/one")
    assert (alone.returncode, alone.stderr.count("needs two runs or more")) == (2, 1)


def test_a_page_is_written_where_it_is_asked_for(several: Path) -> None:
    one = shoal(several, "report", "runs/one")
    assert (one.returncode, one.stdout) == (0, "runs/one/report.html\n"), one.stderr
    more = shoal(several, "report", "runs/many", "runs/one", "runs/one", "-o", "side by side.html")
    assert (more.returncode, more.stdout) == (0, "side by side.html\n"), more.stderr
    names = [each["name"] for each in Page((several / "side by side.html").read_text()).figures["chart-loss"]["data"]]
    assert names[:3] == ["000", "001", "one"]
    for asked, said in (
        (["runs/notes"], "runs/notes: is not a run folder (no plan.json in it), nor that of a sweep"),
        (["runs/one", "-o", "no/such/page.html"], "no/such/page.html: the report cannot be written: No such file"),
    ):
        refused = shoal(several, "report", *asked)
        assert refused.returncode == 5 and refused.stderr.startswith(f"shoal: {said}")
    assert len(status(several / "runs/many")) == 2
