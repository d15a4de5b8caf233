"""A run in Weights & Biases, made of its run folder. Runs in a process of its own, never in one that trains.

The step of a row is its update, so the server itself says how far it was sent. Offline the run is written anew from
the first update on, for what was written before may be cut off.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import traceback
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from launch.checkpoints import listed, outer_damage
from launch.errors import TopologyError
from launch.history import Row, tables
from launch.record import read_json, write_json
from launch.source import shown
from launch.validation import rule_of

REACH_SECONDS = 5.0
"""How long the server may take to answer at all."""

INIT_SECONDS = 60.0
"""How long it may take to open the run."""

IDENTITY = "wandb.json"
"""The id of the run, and the team or user it was begun under, in its folder."""


class UnreachableError(TopologyError):
    """The server of Weights & Biases cannot be used now; the run can be shown offline."""


@dataclass(frozen=True)
class UserSettings:
    """What the environment and wandb's own files of settings say for any run."""

    server: str
    """Its URL."""
    entity: str | None
    """A team or user; None: that of the key."""
    limit: Literal["offline", "disabled"] | None
    """The most that is allowed where not all is."""

    @property
    def limited(self) -> str:
        """Why not all is allowed."""
        return f"{self.limit} by WANDB_MODE or `wandb {self.limit}`"


def user_settings() -> UserSettings:
    """Read them, which starts wandb's service.

    Raises:
        TopologyError: there is one that it does not take.
    """
    import wandb

    try:
        said = wandb.setup(wandb.Settings(silent=True)).settings
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))} = {shown(first['input'])}: {rule_of(first)}"
        raise TopologyError(f"wandb does not take its settings (WANDB_…, or its file): {told}") from None
    limits: dict[str, Literal["offline", "disabled"]] = {
        "offline": "offline",
        "dryrun": "offline",
        "disabled": "disabled",
    }
    return UserSettings(said.base_url, said.entity, limits.get(said.mode))


def end_service() -> None:
    """End wandb's service, once it has done all; only now it may write the file of an offline run."""
    import wandb

    wandb.teardown()


def identity_of(run: Path) -> dict[str, str]:
    """The `id` of a run, drawn once, and its `entity` once that is known; the same after every start."""
    known: dict[str, str] | None = read_json(run / IDENTITY)
    if known is None:
        known = {"id": secrets.token_hex(4)}
        write_json(run / IDENTITY, known)
    return known


class WeightsAndBiases:
    """One run in Weights & Biases, open."""

    def __init__(self, run: Path, mode: Literal["offline", "online"], process: int | None = None) -> None:
        """`process` is rank 0, whose memory and CPU are shown; without one nobody works on the run.

        Raises:
            UnreachableError: the server cannot be reached, does not open the run, or has no key of us that it takes.
        """
        import wandb

        self.starts_over = mode == "offline"
        """Whether all rows are sent again at each start; else more may come to the newest one."""
        self._folder, self._process = run, process
        self._record = read_json(run / "plan.json")
        known = identity_of(run)
        self._identity = known["id"]
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            git_commit=(self._record.get("git") or {}).get("commit"),
            init_timeout=INIT_SECONDS,
        )
        # Its file could be full before the network fails, and then drops rows that were never sent.
        settings.x_skip_transaction_log = mode == "online"
        if process:
            settings.x_stats_pid = process
        user = user_settings()
        server = user.server
        if mode == "online":
            _reach(server)
        forget(run, self._identity, ("offline-run-", "run-") if self.starts_over else ("run-",))
        try:
            self._run = wandb.init(
                project=self._config["track"]["project"],
                entity=self._config["track"].get("entity") or known.get("entity") or user.entity,
                name=run.name,
                dir=str(run),
                mode=mode,
                id=self._identity,
                resume="allow" if mode == "online" else None,
                config=self._settings(),
                settings=settings,
            )
        except wandb.errors.UsageError as error:  # there is no key
            raise UnreachableError(f"{error}".splitlines()[0].rstrip(".")) from None
        except wandb.errors.CommError as error:
            told = f"{error}".splitlines()[0]
            refused = isinstance(error, wandb.errors.AuthenticationError) or "error 401" in told
            why = "refuses the key that it is given; try `wandb login`" if refused else f"does not open the run: {told}"
            raise UnreachableError(f"{server} {why}") from None
        if self._run.entity and self._run.entity != known.get("entity"):
            write_json(run / IDENTITY, {**known, "entity": self._run.entity})
        self._run.define_metric("*", step_metric="update")
        self.first = 0 if self.starts_over else int(self._run.starting_step)
        """The first update that is not there yet."""

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._record["plan"]["config"]
        return config

    @property
    def url(self) -> str | None:
        """Where it is shown."""
        return self._run.url if not self.starts_over else None

    def _settings(self) -> dict[str, Any]:
        """The run file at the top; plan, versions, git commit and environment below names of their own."""
        plan = {name: value for name, value in self._record["plan"].items() if name != "config"}
        return {**self._config, "plan": plan, **{name: value for name, value in self._record.items() if name != "plan"}}

    def send(self, row: Row) -> None:
        """Add a row; a later one must be of a later update."""
        values: dict[str, Any] = {"update": row.update, **row.numbers}
        shown = self._tables(row.update) if row.evaluated else {}
        try:
            self._run.log({**values, **shown}, step=row.update, commit=True)
        except Exception:
            if not shown:
                raise
            traceback.print_exc()  # the curve does not miss a point for a table that cannot be sent
            self._run.log(values, step=row.update, commit=True)

    def _tables(self, update: int) -> dict[str, Any]:
        import wandb

        found = {}
        for name, entries in tables(self._folder, update).items():
            columns = list(dict.fromkeys(column for entry in entries for column in entry))
            data = [[_cell(entry.get(column)) for column in columns] for entry in entries]
            found[f"eval/{name}"] = wandb.Table(columns=columns, data=data)
        return found

    def finish(self, newest: Row | None, complete: bool) -> None:
        """Close it; `newest` is a row to which more may come, so that only its last values are shown.

        Checkpoints and the export are sent, where that was asked for, once the run is complete or nobody works on it.

        Raises:
            TopologyError: these could not be sent.
        """
        if newest is not None:
            self._run.summary.update({"update": newest.update, **newest.numbers})
        problem = None
        if not self.starts_over and (complete or self._process is None):
            try:
                self._send_artifacts()
            except Exception as error:
                traceback.print_exc()
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
        self._run.finish(exit_code=0 if complete else 1)
        end_service()
        if problem:
            raise TopologyError(f"checkpoints or the export could not be sent: {problem}")

    def _send_artifacts(self) -> None:
        """The server keeps what has the same content once, however often it is sent."""
        import wandb

        wanted = self._config["track"].get("artifacts", [])
        folders: list[tuple[Path, str, list[str]]] = []
        if "checkpoints" in wanted:
            whole = [folder for folder in reversed(listed(self._folder)) if outer_damage(folder) is None]
            folders += [(folder, "checkpoint", [folder.name]) for folder in whole]
        if "export" in wanted:
            exported = (self._folder / "export", self._folder / "adapter")
            folders += [(folder, "model", [folder.name]) for folder in exported if folder.is_dir()]
        for folder, kind, aliases in folders:
            name = kind if kind == "checkpoint" else folder.name
            artifact = wandb.Artifact(f"{self._identity}-{name}", type=kind)
            artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=[*aliases, "latest"])


def forget(run: Path, identity: str, beginnings: tuple[str, ...]) -> None:
    """Remove what earlier starts have written in wandb's own format: it is made of metrics.jsonl anew."""
    for beginning in beginnings:
        for folder in run.glob(f"wandb/{beginning}*-{identity}"):
            shutil.rmtree(folder, ignore_errors=True)
    for link in run.glob("wandb/*"):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def mark_sent(run: Path) -> None:
    """Have `wandb sync` leave out what lies in the folder of a run that was sent, and drop copies of what was."""
    identity = identity_of(run)["id"]
    forget(run, identity, ("run-",))
    for path in run.glob(f"wandb/offline-run-*-{identity}/run-*.wandb"):
        with contextlib.suppress(OSError):
            path.with_name(f"{path.name}.synced").touch()


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)


def _reach(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        reason = getattr(error, "reason", error)
        told = getattr(reason, "strerror", None) or (
            "no answer" if isinstance(reason, TimeoutError) or not str(reason) else str(reason)
        )
        raise UnreachableError(f"cannot reach {url}: {told}") from None
