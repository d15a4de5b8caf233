"""When a run is saved, what of it, which checkpoints stay, and from which one it goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from launch.checkpoints import (
    DamagedError,
    by_update,
    free_bytes,
    listed,
    newest_complete,
    outer_damage,
    prune,
    ranking,
    read_state,
    update_of,
)
from launch.disk import size_in_words
from launch.engine.agree import Requests, any_rank, from_main, raise_together
from launch.engine.batching import Position
from launch.engine.checkpoint import Checkpointer, Saved, find
from launch.engine.devices import fetched
from launch.engine.frozen import Frozen
from launch.engine.pieces import Piece, after_loading, pieces, remember
from launch.engine.randomness import random_states, restore_random_states
from launch.engine.sharding import innermost
from launch.engine.shards import Stored
from launch.engine.streams import is_stream
from launch.engine.tracking import Tracker
from launch.errors import ConfigError, DataError, LaunchError, RunFolderError
from launch.recipe import Prepared, any_width
from launch.resume import harmless_changes
from launch.sections import RunConfig, SaveSection
from launch.versions import versions

State = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    folder: Path
    state: dict[str, Any]

    @property
    def update(self) -> int:
        """After which it was made."""
        return update_of(self.folder)


class Keeper:
    """Decides when to save, has it done, and says how it went. Every rank must have one and call each method."""

    def __init__(
        self,
        accelerator: Accelerator,
        run: Path,
        save: SaveSection,
        files: dict[str, bytes],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
        signal: Callable[[], int | None],
        frozen: dict[str, str],
        *,
        rewinds: bool = False,
    ) -> None:
        """`frozen` are the hashes of the weights beneath adapters, as the recipe has built them.

        `rewinds`: whether the newest checkpoint by `save.every_steps` must stay, because the run may go back to it.
        """
        self.tracker: Tracker | None = None
        """On rank 0 only."""
        self.failed: list[int] = []
        """Updates after which a save was tried and failed."""
        self.saves = 0
        """How often a save has begun or ended."""
        self._accelerator, self._run, self._config, self._say = accelerator, run, save, say
        self._model, self._optimizer, self._signal = model, optimizer, signal
        self._checkpointer = Checkpointer(accelerator, run, files, asynchronous=save.asynchronous)
        self._frozen = Frozen(frozen, self._pieces() if frozen else ())
        self._rewinds = rewinds
        self._losses: dict[int, float] = {}
        self._ranks: dict[int, float] = {}
        self._saved = 0
        self._data: dict[str, Any] = {}
        self._last_save = time.monotonic()

    # --- saving ----------------------------------------------------------------------------------------------

    def wishes(self) -> tuple[bool, bool]:
        """Whether it is time for a checkpoint, which only rank 0 says, and whether this rank has written its part."""
        minutes = self._config.every_minutes
        due = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        return due and self._accelerator.is_main_process, self._checkpointer.written

    def heard(self, update: int, loss: float, rank: float) -> None:
        """Take note of a validation loss, and of the value that ranks evaluations, the lower the better."""
        self._losses[update], self._ranks[update] = loss, rank

    def after_update(self, position: Position, state: State, requests: Requests, *, best: bool, stop: bool) -> bool:
        """Save if it is time to; True where a signal came in the meantime, on every rank alike."""
        every = self._config.every_steps
        if self._checkpointer.pending and requests.written == self._accelerator.num_processes:
            self.finish()
        due = (every is not None and position.update % every == 0) or requests.save > 0
        if not (due or stop or (best and self._config.keep_best)):
            return False
        before = self._checkpointer.pending
        self.save(position, state, wait=stop)
        waited = before or not self._checkpointer.pending
        return not stop and waited and any_rank(self._accelerator, self._signal() is not None)

    def save(self, position: Position, state: State, *, wait: bool = True) -> None:
        """Save now; with `wait`, also an asynchronous save is done when this returns."""
        self.finish()
        self.saves += 1
        self._last_save = time.monotonic()
        if position.update == self._saved:
            return
        held = [*self._pieces(), *self._random_pieces()]
        frozen = self._frozen.unchanged(held)
        content = {
            **state(),
            "frozen": frozen,
            "world_size": self._accelerator.num_processes,
            "data": self._data,
            "losses": self._losses,
            "ranking": self._ranks,
            "versions": versions(),
        }
        stored = [piece for piece in held if piece.name not in frozen]
        failed = self._checkpointer.begin(position.update, stored, content)
        if failed:
            self._report(failed)
        elif wait or not self._config.asynchronous:
            self.finish()

    def _pieces(self) -> list[Piece]:
        return fetched(self._accelerator, pieces(self._accelerator, self._model, self._optimizer))

    def _random_pieces(self) -> list[Piece]:
        rank = self._accelerator.process_index
        return [
            Piece(f"random/{rank}/{name}", values, 0, tuple(values.shape), shared=False)
            for name, values in random_states().items()
        ]

    def finish(self) -> None:
        """Wait for the save that has begun, if any."""
        if self._checkpointer.pending:
            self.saves += 1
            self._report(self._checkpointer.finish())

    def _report(self, saved: Saved) -> None:
        update = saved.update
        if saved.folder is None:
            self.failed.append(update)
            newest = newest_complete(self._run)
            rest = f"{newest.name} is the newest one" if newest else "there is none yet"
            self._say(f"NO CHECKPOINT was saved after update {update}: {saved.problem}; training goes on, {rest}")
            if self.tracker:
                self.tracker.write("save_failed", update, problem=saved.problem)
            return
        self._saved = update
        if self._accelerator.is_main_process:
            prune(self._run, self._config.keep_last, [*self._best(), *self._scheduled()])
        if self.tracker:
            folder = str(saved.folder.relative_to(self._run))
            seconds, stall = round(saved.seconds, 3), round(saved.stall_seconds, 3)
            self.tracker.write("save", update, folder=folder, seconds=seconds, stall_seconds=stall)

    def _best(self) -> list[int]:
        """Updates of the saved checkpoints with the best evaluations; of equals the first."""
        saved = [update_of(folder) for folder in listed(self._run)]
        scored = sorted((self._ranks[update], update) for update in saved if update in self._ranks)
        return [update for _, update in scored[: self._config.keep_best]]

    def _scheduled(self) -> list[int]:
        """The update of the checkpoint that the run may go back to, if there is one."""
        every = self._config.every_steps
        if not self._rewinds or every is None:
            return []
        whole = (update_of(folder) for folder in listed(self._run) if outer_damage(folder) is None)
        return [update for update in whole if update % every == 0][:1]

    @property
    def own_seconds(self) -> float:
        """What this rank has spent on saves so far, but for waiting for the others."""
        return self._checkpointer.own_seconds

    def refuse_without_space(self, stored: int, optimizer: torch.optim.Optimizer, updates: int) -> None:
        """See, before there is anything to lose, that the disk has room for the checkpoints that will be kept.

        `stored` is how many numbers of the model are.

        Raises:
            RunFolderError: it has not.
        """
        problem: LaunchError | None = None
        if self._accelerator.is_main_process:
            try:
                self._check_space(4 * stored * (1 + _memories(optimizer)), updates)
            except RunFolderError as error:
                problem = error
        raise_together(self._accelerator, problem)

    def _check_space(self, size: int, updates: int) -> None:
        config, free = self._config, free_bytes(self._run)
        if config.every_steps is None and config.every_minutes is None and not config.keep_best:
            return
        there = sum(1 for folder in listed(self._run) if outer_damage(folder) is None)
        planned = updates // config.every_steps if config.every_steps else None
        kept = config.keep_last if planned is None or config.keep_last is None else min(config.keep_last, planned)
        wanted = ((kept or planned or 1) + config.keep_best + self._rewinds + 1 - there) * size
        if free < min(size, wanted) or (config.every_steps and planned and free < wanted):
            raise RunFolderError(
                f"{self._run}: {size_in_words(free)} are free, but checkpoints will take up to "
                f"{size_in_words(wanted)} ({size_in_words(size)} each, "
                f"save.keep_last = {'all' if config.keep_last is None else config.keep_last}, save.keep_best = "
                f"{config.keep_best}, and one that is being written); free some space, choose another --out, keep "
                "fewer, or save none: save.every_steps=null save.every_minutes=null"
            )

    # --- going on --------------------------------------------------------------------------------------------

    def find(self, config: RunConfig, prepared: Prepared) -> Found | None:
        """The newest good checkpoint of an earlier attempt, or None where there is none.

        Raises:
            ConfigError: it was made with settings that mean other numbers.
            DataError: the training data, or the weights beneath adapters, are not those it was made with.
        """
        self._data = _fingerprint(prepared)
        folder = find(self._accelerator, self._run, self._say)
        if folder is None:
            if from_main(self._accelerator, bool(listed(self._run))):
                self._say("no checkpoint of this run is good: it begins anew")
            return None
        state = read_state(folder)
        problem = _contradiction(folder, state, config, self._data) or self._frozen.contradiction(folder, state)
        raise_together(self._accelerator, problem)
        self._losses = by_update(state["losses"])
        self._ranks = ranking(state)
        self._saved = state["position"]["update"]
        return Found(folder, state)

    def last_scheduled(self) -> Found | None:
        """The newest good checkpoint by `save.every_steps`: those made for other reasons must not change the numbers.

        Waits for the one that is being written. Every rank must call this.
        """
        self.finish()
        folder = find(self._accelerator, self._run, self._say, self._config.every_steps or 1)
        return None if folder is None else Found(folder, read_state(folder))

    def restore(self, found: Found) -> Callable[[], bool]:
        """Put weights and optimizer back; then, to be called last, the random states, False where they do not fit.

        Raises:
            RunFolderError: the checkpoint lacks something that this model has.
        """
        stored = Stored(found.folder)
        remember(self._accelerator, self._model, self._optimizer, stored.shapes)
        problem: LaunchError | None = None
        try:
            for piece in pieces(self._accelerator, self._model, self._optimizer):
                if piece.name not in found.state.get("frozen", {}):  # these are there already
                    stored.load(piece)
        except DamagedError as error:  # maybe on one rank only, and the others would wait for it
            problem = RunFolderError(f"{found.folder}: {error}; move it away to go on from an older one")
        raise_together(self._accelerator, problem)
        after_loading(self._accelerator, self._model)
        rank, same = self._accelerator.process_index, found.state["world_size"] == self._accelerator.num_processes

        def random() -> bool:
            if not same:
                return False
            head = f"random/{rank}/"
            restore_random_states(
                {name.removeprefix(head): stored.whole(name) for name in stored.shapes if name.startswith(head)}
            )
            return True

        return random


def _memories(optimizer: torch.optim.Optimizer) -> int:
    """How many numbers an optimizer remembers of each weight."""
    optimizer = innermost(optimizer)
    if isinstance(optimizer, torch.optim.Adafactor):
        return 0  # of a matrix a row and a column
    if isinstance(optimizer, torch.optim.SGD):
        return int(any(group["momentum"] for group in optimizer.param_groups))
    return 2


def _fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What tells one training set from another, at the cost of reading three samples; of a stream, nothing."""
    train = prepared.train
    if is_stream(train):
        return {"samples": None, "sha256": None}
    digest = hashlib.sha256()
    for index in sorted({0, len(train) // 2, len(train) - 1}):
        with any_width():
            batch = prepared.collate([train[index]])
        for name, values in sorted(batch.items()):
            digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return {"samples": len(train), "sha256": digest.hexdigest()}


def _contradiction(folder: Path, state: dict[str, Any], config: RunConfig, data: dict[str, Any]) -> LaunchError | None:
    try:
        harmless_changes(f"{folder.name} was made", state["config"], config)
    except ConfigError as error:
        return error
    if state["data"] != data:
        return DataError(
            f"{folder.name} was made with other training data ({state['data']['samples']} samples, now "
            f"{data['samples']}); put them back, or begin a new run with another --out"
        )
    return None
