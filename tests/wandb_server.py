"""A server that wandb takes for the one of Weights & Biases: runs by id, their history as it was sent, artifacts."""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from tests.answering import Answering

KEY = "0123456789" * 4


class WandbServer:
    """Serves on a port of its own until it is closed; what it was sent can be looked at meanwhile."""

    def __init__(self, key: str = KEY) -> None:
        self.key = key
        self.lines: dict[str, list[str]] = {}
        """The history of each run."""
        self.configs: dict[str, dict[str, Any]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.entities: list[str | None] = []
        """Under whom a run was opened, each time; None: under the owner of the key."""
        self.exit_codes: list[int] = []
        """How runs were closed."""
        self.asked: list[str] = []
        """Every operation, in its order."""
        self.artifacts: list[str] = []
        """`type/name` of each that was sent."""
        self.answers = threading.Event()
        """Cleared, it answers nothing until it is set again."""
        self.answers.set()
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_of_runs = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes wandb use this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The history of a run."""
        with self._lock:
            return [json.loads(line) for line in self.lines[run]]

    def close(self) -> None:
        """Stop serving."""
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()

    # --- what is asked -----------------------------------------------------------------------------------

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        with self._lock:
            self.asked.append(operation)
            method = getattr(self, f"_{operation}", None)
            return method(given) if method else {}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = given["name"]
        if run not in self.lines:
            return {"model": {"id": "p", "name": given["project"], "entity": _owner(given), "bucket": None}}
        lines = self.lines[run]
        config = {name: {"value": value} for name, value in self.configs.get(run, {}).items()}
        bucket = {
            "id": run,
            "name": run,
            "summaryMetrics": json.dumps(self.summaries.get(run, {})),
            "displayName": run,
            "logLineCount": 0,
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(lines[-1:]),
            "eventsTail": "[]",
            "config": json.dumps(config),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),  # the run has really begun
        }
        return {"model": {"id": "p", "name": given["project"], "entity": _owner(given), "bucket": bucket}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        run = given["name"]
        inserted = run not in self.lines
        self.lines.setdefault(run, [])
        if given.get("config"):
            self.configs[run] = {name: each["value"] for name, each in json.loads(given["config"]).items()}
        self.entities.append(given["entity"])
        project = {"id": "p", "name": given["project"], "entity": _owner(given)}
        bucket = {"id": run, "name": run, "displayName": given.get("displayName") or run, "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": len(self.lines[run])}, "inserted": inserted}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return {"viewer": {"id": "v", "username": "fish", "name": "fish", "flags": "{}", "teams": {"edges": []}}}

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        """As if the server had its files already, so that none is sent."""
        asked = given["input"]
        self.artifacts.append(f"{asked['artifactTypeName']}/{asked['artifactCollectionName']}")
        artifact = {"id": f"a{len(self.artifacts)}", "state": "COMMITTED", "artifactSequence": {"id": "s"}}
        return {"createArtifact": {"artifact": artifact}}

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        """Rows, last values and the end of a run."""
        with self._lock:
            files = sent.get("files") or {}
            if history := files.get("wandb-history.jsonl"):
                known = self.lines.setdefault(run, [])
                known[history["offset"] :] = history["content"]
            if summary := files.get("wandb-summary.json"):
                self.summaries[run] = json.loads(summary["content"][-1])
            if sent.get("complete"):
                self.exit_codes.append(sent["exitcode"])


def _owner(given: dict[str, Any]) -> dict[str, str]:
    """Whose project it is: that of the key's owner, unless another is asked for."""
    return {"id": "e", "name": given["entity"] or "fish"}


def _name(asked: dict[str, Any]) -> str:
    found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
    return asked.get("operationName") or (found[1] if found else "")


class _Server(ThreadingHTTPServer):
    def handle_error(self, *connection: object) -> None:
        """wandb's service hangs up when it ends."""


class _Handler(Answering):
    protocol_version = "HTTP/1.1"
    server_of_runs: WandbServer

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        self._body()
        self.reply({})

    def do_POST(self) -> None:
        body, server = self._body(), self.server_of_runs
        server.answers.wait()
        expected = "Basic " + base64.b64encode(f"api:{server.key}".encode()).decode()
        if self.headers.get("authorization") != expected:
            return self.reply({"errors": [{"message": "user is not logged in"}]}, 401)
        if self.path == "/graphql":
            asked = json.loads(body)
            return self.reply({"data": server.answer(_name(asked), asked.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            server.stream(self.path.split("/")[-2], json.loads(body))
        return self.reply({})
