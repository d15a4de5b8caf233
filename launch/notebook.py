"""Runs of shoal from a notebook: `run` is `shoal run` in a process of its own, and its lines appear in the cell.

    from launch.notebook import run
    run("causal_lm", {"train.max_steps": 100}, out="runs/first")

The kernel imports no torch and starts no device. So a cell can be run again, can be stopped, and when it is done the
device is free for others. The same cell run again goes on with the run in its folder, or shows the result where that
is finished. The stop button is Ctrl-C: the run saves a checkpoint and leaves; pressed again, it leaves at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch.errors import EXIT_CODES, INTERRUPTED, PREEMPTED, ConfigError, EndedError, LaunchError
from launch.notebook_facts import Facts, facts, where
from launch.plan import python_environment
from launch.processes import die_with_parent
from launch.record import read_json
from launch.report.markup import text
from launch.source import write_yaml
from launch.topology import child_of_notebook
from launch.words import figure

__all__ = ["Facts", "Result", "RunError", "facts", "run", "where"]

LAST_LINES = 10
"""Of what a run has said, so many lines are in the error, where it has not said itself what is wrong."""


class RunError(EndedError):
    """A run that did not end well, or was stopped; a notebook shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows."""
        return [str(self)]


@dataclass(frozen=True)
class Result:
    """A run that has ended well; as the last expression of a cell it is a table."""

    folder: Path
    """The run folder, absolute."""
    values: Mapping[str, Any]
    """All of result.json."""

    @property
    def metrics(self) -> dict[str, float]:
        """The validation after training, by name."""
        return dict(self.values["validation"]["after"])

    @property
    def metrics_before(self) -> dict[str, float]:
        """The validation before training, by name; empty where there was none."""
        return dict(self.values["validation"].get("before", {}))

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation, with its `update`; None where there was none."""
        return self.values.get("best")

    @property
    def report(self) -> Path:
        """The page about the run, which needs no network."""
        return self.folder / "report.html"

    @property
    def model(self) -> Path | None:
        """The trained model as a Hugging Face folder; None where none was exported."""
        return Path(self.values["export"]) if "export" in self.values else None

    def __repr__(self) -> str:
        return str(self.values["summary"])

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><th>{text(name)}</th><td>{figure(self.metrics_before.get(name))}</td><td>{figure(value)}</td></tr>"
            for name, value in self.metrics.items()
        ]
        best = ""
        if self.best:
            told = ", ".join(f"{name} {figure(value)}" for name, value in self.best.items() if name != "update")
            best = f"<p>best after update {self.best['update']}: {text(told)}</p>"
        files = [("run folder", self.folder), ("model", self.model), ("report", self.report)]
        shown = "<br>".join(f"{name}: <code>{text(path)}</code>" for name, path in files if path and path.exists())
        head = "<tr><th>validation</th><th>before</th><th>after</th></tr>"
        return f"<table>{head}{''.join(rows)}</table>{best}<p>{shown}</p>"


def run(run_file: str | Path | Mapping[str, Any], *overrides: str | Mapping[str, Any], out: str | Path) -> Result:
    """Begin the run in the folder `out`, or go on with it, and see it through; shows its lines meanwhile.

    Args:
        run_file: a run file, the name of a shipped one, or the content of one.
        overrides: `"train.max_steps=20"`, or `{"train.max_steps": 20, "train.learning_rate": 1e-3}`; later ones win.
        out: the run folder, on a mounted Google Drive say; run again with the same one, the run goes on.

    Raises:
        RunError: it did not end well, with the exit code of `shoal run`, or was stopped (130).
    """
    try:
        settings = [each for override in overrides for each in _as_arguments(override)]
        with _as_file(run_file) as file:
            return _carry_out([file, *settings, "--out", str(out)], Path(out).absolute())
    except RunError:
        raise
    except LaunchError as error:
        raise RunError(str(error), error.exit_code) from None


def _carry_out(arguments: list[str], folder: Path) -> Result:
    said: deque[str] = deque(maxlen=200)
    asked: list[int] = []
    with _started(arguments, asked) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line.rstrip("\n"))
        code = process.wait()
    if not code:
        return Result(folder, read_json(folder / "result.json"))
    if asked and code not in (INTERRUPTED, PREEMPTED):
        raise RunError("stopped by Ctrl-C before it had begun", INTERRUPTED)
    raise RunError(_why(code, list(said)), code if code > 0 else 128 - code)


@contextlib.contextmanager
def _started(arguments: list[str], asked: list[int]) -> Iterator[subprocess.Popen[str]]:
    """`shoal run` as a child that gets each Ctrl-C of the kernel, and does not outlive what is inside, nor the kernel.

    It is in a session of its own, lest the stop button, which interrupts all processes of the kernel's, tells it twice.
    """
    started: list[subprocess.Popen[str]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, pass_on))
        process = subprocess.Popen(
            [sys.executable, "-m", "launch", "run", *arguments],
            env=child_of_notebook({**python_environment(), "PYTHONUNBUFFERED": "1"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        started.append(stack.enter_context(process))
        if asked:
            process.send_signal(asked[0])
        try:
            yield process
        except BaseException:
            process.terminate()  # it saves, and leaves
            process.communicate()
            raise


def _why(code: int, said: list[str]) -> str:
    """What is wrong, in the words of the run itself: what it has complained of last."""
    complaints = [line.removeprefix("shoal: ") for line in said if line.startswith("shoal: ")]
    if code in (INTERRUPTED, PREEMPTED):
        return f"{complaints[-1] if complaints else EXIT_CODES[code]}; or run this cell again"
    last = [*itertools.takewhile(lambda line: line.startswith("shoal: "), reversed(said))]
    if last:
        return "\n".join(line.removeprefix("shoal: ") for line in reversed(last))
    return "\n".join([f"the run has ended with exit code {code}, and said last:", *said[-LAST_LINES:]])


@contextlib.contextmanager
def _as_file(run_file: str | Path | Mapping[str, Any]) -> Iterator[str]:
    """The path or name of a run file, written for as long as that takes where its content is given."""
    if not isinstance(run_file, Mapping):
        yield str(run_file)
        return
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        path = Path(folder, "run.yaml")
        path.write_text(write_yaml({key: json.loads(_as_json(key, run_file[key])) for key in run_file}), "utf-8")
        yield str(path)


def _as_arguments(override: str | Mapping[str, Any]) -> list[str]:
    if isinstance(override, str):
        return [override]
    return [f"{key}={_as_json(key, value)}" for key, value in override.items()]


def _as_json(key: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key} = {value!r}: {error}; settings are numbers, text, true, false, None, lists and dicts of these"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a {type(value).__name__} cannot be written to a run file")
