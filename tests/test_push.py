"""`shoal push` by its real command, against a small server that answers as the Hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.answering import Answering
from tests.commands import shoal


class Hub:
    """What was asked of it, and the files that were committed."""

    def __init__(self) -> None:
        self.status = 200
        """Of every answer that needs a user."""
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, bytes]] = []
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Answer(Answering):
            def do_GET(self) -> None:
                if self.path.startswith("/api/models?"):
                    return self.reply([])
                return self.reply({}, hub.status)

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size) if size else self.chunks()
                hub.tokens.add(self.headers.get("Authorization"))
                if hub.status != 200:
                    return self.reply({"error": "no, because of the test"}, hub.status)
                if self.path == "/api/validate-yaml":
                    return self.reply({"errors": [], "warnings": []})
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    return self.reply({"url": f"{hub.address}/me/mine", "name": "me/mine"})
                if self.path.startswith("/api/models/me/mine/preupload/"):
                    files = [
                        {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                    ]
                    return self.reply({"files": files})
                assert self.path.startswith("/api/models/me/mine/commit/"), self.path
                head, *operations = map(json.loads, body.splitlines())
                hub.messages.append(head["value"]["summary"])
                values = [operation["value"] for operation in operations]
                hub.commits.append({value["path"]: base64.b64decode(value["content"]) for value in values})
                return self.reply({"commitUrl": f"{hub.address}/me/mine/commit/1", "commitOid": "1"})

            def chunks(self) -> bytes:
                """A body without a stated length."""
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.server.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run folder, as far as this command looks into it."""
    folder = tmp_path / "run/export"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# mine\n")
    (folder / "model.safetensors").write_bytes(b"\0" * 2048)
    return tmp_path / "run"


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}


def test_all_files_of_the_export_go_there_in_one_commit(model: Path, hub: Hub) -> None:
    done = shoal(model.parent, "push", "run", "me/mine", "--private", **environment(hub, model))
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "mine" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    there = {path.name: path.read_bytes() for path in (model / "export").iterdir()}
    assert hub.commits == [there] and hub.messages == ["Model trained with shoal"]
    assert hub.tokens == {"Bearer hf_test"}
    assert done.stdout.splitlines()[-1] == f"gone to {hub.address}/me/mine: 2.1 kB"


def test_a_dry_run_shows_the_files_and_asks_nothing_of_the_hub(model: Path, hub: Hub) -> None:
    done = shoal(model.parent, "push", "run", "me/mine", "--dry-run", **environment(hub, model))
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[:-1]] == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert done.stdout.splitlines()[-1] == "would go to me/mine: 2.1 kB"
    assert hub.created == hub.commits == [] and hub.tokens == set()
    told = json.loads(shoal(model.parent, "push", "run", "me/mine", "--dry-run", "--json").stdout)
    assert told["files"]["model.safetensors"] == 2048 and told["url"] is None


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the Hub does not know you; log in by `hf auth login`, or set HF_TOKEN"),
        (403, "your token may not write there; take another name, or a token that may"),
        (507, "the Hub says 507: "),
    ],
)
def test_what_the_hub_refuses_is_one_line(status: int, said: str, model: Path, hub: Hub) -> None:
    hub.status = status
    done = shoal(model.parent, "push", "run", "me/mine", **environment(hub, model))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"shoal: me/mine: {said}") and done.stderr.count("\n") == 1


def test_a_hub_that_is_not_there_is_told_at_once(model: Path, hub: Hub) -> None:
    nowhere = {**environment(hub, model), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = shoal(model.parent, "push", "run", "me/mine", **nowhere)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("shoal: me/mine: the Hub cannot be reached (") and done.stderr.count("\n") == 1
    assert done.stderr.endswith("; the files are in run/export\n")


@pytest.mark.parametrize(
    ("repository", "break_it", "code", "said"),
    [
        ("me/mi ne", "", 2, "command line: REPO = me/mi ne: "),
        ("me/mine", "model.safetensors", 5, "there is no model in it (no .safetensors file)"),
        ("me/mine", "config.json", 5, "no such run or model folder"),
    ],
)
def test_what_cannot_be_pushed_is_told_before(
    repository: str, break_it: str, code: int, said: str, model: Path, hub: Hub
) -> None:
    if break_it:
        (model / "export" / break_it).unlink()
    done = shoal(model.parent, "push", "run", repository, **environment(hub, model))
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert hub.tokens == set()
