"""The pages for people: their commands and code run in the order of the page and say what is shown; links lead on.

In a page a block marked `console` holds commands (`$ `, continued by `> `), each with what it says; one marked `python`
is run in the page's one Python, and a `text` block right behind it is what that prints. Where the first line of a block
is a comment with the name of a file, the block is that file. What needs GPUs, SLURM or the Hub stands in `text` blocks,
a command in a line: it is seen to be one that shoal understands, with a run file that loads.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.main import get_command

from launch.cli import app
from launch.config import load
from launch.registry import find_run_file, load_recipe
from tests.commands import shoal

ROOT = Path(__file__).parents[1]
LEARN = ROOT / "docs/learn.md"
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
PAGES = [LEARN, *GUIDES]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")
COMMAND = re.compile(r"(?:\$ )?((?:shoal|accelerate|sbatch) .*)")

PYTHON = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(json.loads(line), "page", "exec"), names)
        ended = "done"
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        ended = "failed"
    print(f"\\n\\0{ended}", flush=True)
"""
"""A Python that runs one block after the other, and ends what each prints by a line that no block prints."""


@dataclass
class Step:
    """Something to do in a page: a command, a block of Python, or a file to write; and what shall come of it."""

    kind: str
    text: str
    shown: list[str] = field(default_factory=list)
    file: str = ""


def steps(page: Path) -> Iterator[Step]:
    """What a reader does who follows the page."""
    text = page.read_text(encoding="utf-8")
    behind, end = None, 0
    for match in BLOCK.finditer(text):
        kind, block = match.groups()
        follows = not text[end : match.start()].strip()
        end = match.end()
        if named := FILE_NAME.match(block):
            yield Step("file", block, file=named[1])
        elif kind == "console":
            yield from _commands(block)
        elif kind == "python":
            behind = Step(kind, block)
            yield behind
            continue
        elif kind == "text" and behind and follows:
            behind.shown = block.splitlines()
        elif kind == "text":
            yield from (Step("unrun", found[1]) for line in block.splitlines() if (found := COMMAND.fullmatch(line)))
        behind = None


def _commands(block: str) -> Iterator[Step]:
    command: Step | None = None
    for line in block.splitlines():
        if line.startswith("$ "):
            if command:
                yield command
            command = Step("command", line.removeprefix("$ "))
        elif command and line.startswith("> "):
            command.text += f"\n{line.removeprefix('> ')}"
        else:
            assert command, f"{line!r}: what is said by no command"
            command.shown.append(line)
    assert command, block
    yield command


def _plain(line: str) -> str:
    """A line without what may differ: numbers, and how wide a table is."""
    line = re.sub(r"\d[\d.,]*(?:e[+-]\d+)?", "#", line)
    return re.sub(r"─+", "─", " ".join(line.split()))


def unsaid(shown: list[str], said: str) -> str | None:
    """The first line shown that was not said behind those before it; `…` stands for anything."""
    lines = iter([_plain(line) for line in said.splitlines()])
    for line in shown:
        if line.strip(" …"):
            pattern = re.compile(".*".join(re.escape(part.strip()) for part in _plain(line).split("…")))
            if not any(pattern.fullmatch(each) for each in lines):
                return line
    return None


# --- running a page ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, which the pages share."""
    return tmp_path_factory.mktemp("cache")


def follow(page: Path, folder: Path, cache: Path) -> dict[str, str]:
    """Do all that the page says, in an empty folder; what was said, by command."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SHOAL_CACHE": str(cache),
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "COLUMNS": "200",
    }
    said = {}
    todo = list(steps(page))
    python = Interpreter(folder, environment) if any(step.kind == "python" for step in todo) else None
    try:
        for step in todo:
            if step.kind == "file":
                (folder / step.file).write_text(step.text, encoding="utf-8")
            elif step.kind == "python":
                assert python
                said[step.text] = python.run(step.text)
            elif step.kind == "command":
                said[step.text] = _run(step.text, folder, environment)
            missing = unsaid(step.shown, said.get(step.text, ""))
            assert missing is None, f"{page.name}: {missing!r} is shown, but this is said:\n{said[step.text]}"
    finally:
        if python:
            python.end()
    return said


def _run(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


class Interpreter:
    """The Python of a page."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PYTHON],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, block: str) -> str:
        """Run a block; what it prints."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(block) + "\n")
        self._process.stdin.flush()
        printed: list[str] = []
        for line in self._process.stdout:
            if line.startswith("\0"):
                assert line == "\0done\n", f"{block}\n{''.join(printed)}"
                return "".join(printed)
            printed.append(line)
        raise AssertionError(f"Python has ended\n{block}\n{''.join(printed)}")

    def end(self) -> None:
        """No more blocks follow."""
        self._process.communicate(timeout=60)


@pytest.mark.slow
def test_who_learns_gets_what_is_shown(tmp_path: Path, cache: Path) -> None:
    said = follow(LEARN, tmp_path, cache)
    assert sum(text.startswith("shoal ") for text in said) >= 9
    assert sum(not text.startswith("shoal ") for text in said) >= 10, "blocks of Python"
    generated = next(output for text, output in said.items() if text.startswith("shoal generate"))
    assert generated.splitlines()[0].startswith("On Sunday noon the rabbit gnaws carrots."), "it has learnt the text"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_does_what_it_says(page: Path, tmp_path: Path, cache: Path) -> None:
    assert any(text.startswith("shoal ") for text in follow(page, tmp_path, cache))


# --- what is not run ---------------------------------------------------------------------------------------


def test_every_page_is_there_and_a_guide_is_short() -> None:
    others = {"workstation", "slurm", "debugging", "recipe", "resuming", "report"}
    assert {page.stem for page in GUIDES} == {*others, "colab-tpu"}
    for page in GUIDES:
        assert len(BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines()) <= 120, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_not_run_are_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    found = list(steps(page))
    for step in found:
        if step.kind == "file":
            Path(step.file).write_text(step.text, encoding="utf-8")
    for step in found:
        if step.kind == "unrun":
            check(step.text)


def check(command: str) -> None:
    """See that shoal understands a command: verb, options, and keys of the run file.

    Raises:
        ClickException: no such verb or option.
        LaunchError: no such file, recipe or key.
    """
    words = shlex.split(command, comments=True)
    if words[0] == "sbatch":
        words = [word for word in words[1:] if not word.startswith("--")]
        assert (ROOT / words[0]).is_file(), command
        words = ["shoal", "run", *words[1:]]
    if words[0] == "accelerate":
        assert words[words.index("-m") + 1] == "launch.train", command
        words = ["shoal", "run", *words[words.index("launch.train") + 1 :]]
    verb = get_command(app).commands[words[1]]
    arguments = verb.make_context(words[1], words[2:]).params
    if (file := arguments.get("file")) and not str(file).startswith("runs/"):
        load_recipe(load(find_run_file(file), arguments.get("overrides") or []))


def test_links_lead_to_what_is_there() -> None:
    for page in [*PAGES, ROOT / "README.md"]:
        linked = set()
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            name, _, heading = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not heading or heading in anchors(path), f"{page.name}: {target}"
            linked.add(path)
        assert page.name != "README.md" or linked >= set(PAGES), "the README leads to each"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tour_of_the_readme_begins_with_the_plan(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = readme.partition("## In 60 seconds")[2].partition("```text\n")[2].partition("\n…\n")[0].splitlines()
    planned = shoal(tmp_path, "plan", "causal_lm", "parallel.device=cpu")
    assert planned.returncode == 0, planned.stderr
    assert len(tour) >= 6 and unsaid(tour, planned.stdout) is None, unsaid(tour, planned.stdout)


@pytest.mark.parametrize(
    "wrong",
    [
        "```console\n$ false\n```\n",
        "```console\n$ echo one\ntwo\n```\n",
        "```python\nassert number == 2\n```\n",
        "```python\nprint(number)\n```\n\n```text\nnone\n```\n",
    ],
)
def test_a_page_that_is_wrong_is_found(wrong: str, tmp_path: Path) -> None:
    right = "```python\nnumber = 1\nprint(number)\n```\n\n```text\n1\n```\n\n```console\n$ echo a \\\n> b\na b\n```\n\n"
    page = tmp_path / "page.md"
    page.write_text(right, encoding="utf-8")
    assert len(follow(page, tmp_path, tmp_path)) == 2
    page.write_text(right + wrong, encoding="utf-8")
    with pytest.raises(AssertionError):
        follow(page, tmp_path, tmp_path)


def test_what_is_shown_and_not_said_is_found() -> None:
    said = "first  line: 1.25\nsecond: 17 of 20\nthird\n"
    assert unsaid(["first line: 3.5", "…", "sec…of 9"], said) is None
    assert unsaid(["second: 1 of 2", "first line: 1"], said) == "first line: 1"
    assert unsaid(["first line: one"], said) == "first line: one"
