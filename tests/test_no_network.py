"""Without a network: what a shipped run file needs of the Hub is told at once, with how to fetch it; the rest plans."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from launch import hub
from launch.assets import recipes_folder
from launch.cache import Cache
from launch.config import load
from launch.errors import ConfigError, DataError
from launch.recipe import RecipeContext
from launch.registry import load_recipe

FROM_THE_HUB = {
    "causal_lm_smollm": ("dataset", "HuggingFaceTB/smoltalk", " --repo-type dataset"),
    "question_answering_squad": ("dataset", "rajpurkar/squad", " --repo-type dataset"),
    "summarization_cnn": ("model", "google-t5/t5-small", ""),
    "translation_opus": ("model", "google-t5/t5-small", ""),
}
"""By run file the first thing that it lacks, and how that is fetched."""

OF_THE_USER = {"text_classification_minilm"}
"""Run files that name files or packages of the user's."""

RUN_FILES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))


class Elsewhere(BaseHTTPRequestHandler):
    """Answers in the place of all others, as the gateways of some networks do."""

    status, error_code = 404, ""

    def do_GET(self) -> None:
        self.send_response(self.status)
        if self.error_code:
            self.send_header("X-Error-Code", self.error_code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Hub(Elsewhere):
    """Says as the Hub does that it has no such thing, or not for everybody."""

    error_code = "RepoNotFound"


class Down(Elsewhere):
    """A proxy that does not reach the Hub."""

    status = 503


def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def silent() -> Iterator[str]:
    """Takes a connection, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def closed() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


NETWORKS = {
    "silent": (silent, "the Hub did not answer within 0.5 s"),
    "closed": (closed, "the Hub cannot be reached ([Errno 111] Connection refused)"),
    "another answers": (lambda: serving(Elsewhere), "is not the Hub (status 404)"),
    "a proxy is down": (lambda: serving(Down), "is not the Hub (status 503)"),
}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.5)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)


def preview(run_file: str, folder: Path, *overrides: str) -> None:
    path = recipes_folder() / f"{run_file}.yaml"
    load_recipe(load(path, list(overrides))).preview(RecipeContext(Cache(folder), 0))


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_missing_is_told_in_one_line_with_how_to_fetch_it(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, why = NETWORKS[network]
    connected = connect()
    monkeypatch.setattr(constants, "ENDPOINT", next(connected))
    for run_file, (key, name, flag) in FROM_THE_HUB.items():
        began = time.monotonic()
        with pytest.raises(DataError) as caught:
            preview(run_file, tmp_path)
        assert time.monotonic() - began < hub.HUB_SECONDS + 2
        said = str(caught.value)
        assert "\n" not in said
        assert said.startswith(f"{recipes_folder()}/{run_file}.yaml:")
        assert f": recipe_args.{key} = {name}: " in said
        assert why in said
        assert f"`hf download {name}{flag}`" in said
    with pytest.raises(ConfigError) as refused:
        preview("translation", tmp_path, "recipe_args.metrics=[someone/metric]")
    assert why in str(refused.value)
    assert "evaluate.load('someone/metric')" in str(refused.value)
    next(connected, None)


def test_what_needs_nothing_of_the_hub_does_not_ask_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(path: str) -> str:
        raise AssertionError(f"asked for {path}")

    monkeypatch.setattr(hub, "_ask_hub", asked)
    local = [name for name in RUN_FILES if name not in FROM_THE_HUB and name not in OF_THE_USER]
    assert len(local) == 8
    for run_file in local:
        preview(run_file, tmp_path)
    for run_file in OF_THE_USER:
        with pytest.raises((ConfigError, DataError), match=r"sst2/train.tsv: no such file|pip install"):
            preview(run_file, tmp_path)


def test_what_the_hub_says_itself_is_left_to_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = serving(Hub)
    monkeypatch.setattr(constants, "ENDPOINT", next(connected))
    for run_file in FROM_THE_HUB:
        preview(run_file, tmp_path)
    next(connected, None)
