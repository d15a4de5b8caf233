"""Saves and finds the checkpoints of a run: each rank writes what it holds, rank 0 makes one checkpoint of it.

What ranks must know of each other goes through collectives of the main thread alone; a background thread only
writes this rank's file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from launch.checkpoints import (
    STATE,
    FileRecord,
    aside_folder,
    checkpoint_folder,
    clean,
    damage,
    disown,
    free_bytes,
    listed,
    publish,
    shard_name,
    update_of,
    write_file,
)
from launch.disk import size_in_words
from launch.engine.agree import from_main, gathered
from launch.engine.pieces import Piece
from launch.engine.shards import Part, parts, write_shard


def model_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """What makes a Hugging Face folder of a checkpoint, besides the weights: configuration and tokenizer.

    Of the model as the recipe built it: wrapped by FSDP2 it is of another class.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if hasattr(model, "get_base_model"):  # with adapters of PEFT around it
            model = model.get_base_model()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Saved:
    """How a save ended, the same on every rank."""

    def __init__(self, update: int, folder: Path | None, problem: str, seconds: float, stall_seconds: float) -> None:
        self.update = update
        self.folder = folder
        """The checkpoint; None where there is none, for the reason in `problem`."""
        self.problem = problem
        self.seconds, self.stall_seconds = seconds, stall_seconds
        """From its beginning to its end, and how long training stood still for it."""


class Checkpointer:
    """Writes one checkpoint at a time. Every rank must have one, and call each method that is said to be collective."""

    def __init__(self, accelerator: Accelerator, run: Path, files: dict[str, bytes], *, asynchronous: bool) -> None:
        self._accelerator, self._run, self._files = accelerator, run, files
        self._asynchronous = asynchronous
        self._buffers: dict[str, torch.Tensor] = {}
        self._save: _Save | None = None
        self.own_seconds = 0.0
        """What this rank has spent on saves so far, but for waiting for the others."""
        if accelerator.is_main_process:
            clean(run)
        accelerator.wait_for_everyone()

    @property
    def pending(self) -> bool:
        """Whether a save has begun and not been finished; the same on every rank."""
        return self._save is not None

    @property
    def written(self) -> bool:
        """Whether this rank has done its part of the pending save, well or not."""
        return self._save is not None and self._save.done

    def begin(self, update: int, held: Sequence[Piece], state: dict[str, Any]) -> Saved | None:
        """Begin a save; how it ended, where it cannot even begin. Collective.

        `state` is what all ranks have in common, as JSON can hold it. With an asynchronous save the live values may
        change as soon as this returns; `finish` must follow.
        """
        assert self._save is None, "one save at a time"
        began = time.perf_counter()
        rank, world_size = self._accelerator.process_index, self._accelerator.num_processes
        written = list(parts(held, rank, world_size))
        wanted = sum(gathered([sum(flat.numel() * flat.element_size() for _, flat in written)]))
        free = from_main(self._accelerator, self._free())
        if wanted > free:
            problem = f"{self._run} has {size_in_words(free)} free, and the checkpoint takes {size_in_words(wanted)}"
            return Saved(update, None, problem, 0.0, 0.0)
        alone = time.perf_counter()
        if self._asynchronous:
            written = self._copies(written)
        self._save = _Save(aside_folder(self._run, update), update, began)
        files = {**self._files, STATE: json.dumps(state, indent=1).encode()} if rank == 0 else {}
        self._save.start(shard_name(rank, world_size), written, files, background=self._asynchronous)
        self.own_seconds += time.perf_counter() - alone
        self._save.stall_seconds = time.perf_counter() - began
        return None

    def _free(self) -> int:
        try:
            return free_bytes(self._run)
        except OSError:
            return 0

    def _copies(self, written: list[Part]) -> list[Part]:
        """In main memory, in buffers that live as long as the run: to get new memory takes longer than to copy."""
        copies = []
        for piece, flat in written:
            buffer = self._buffers.get(piece.name)
            if buffer is None or buffer.numel() != flat.numel() or buffer.dtype != flat.dtype:
                buffer = torch.empty_like(flat, device="cpu", pin_memory=flat.device.type == "cuda")
                self._buffers[piece.name] = buffer
            buffer.copy_(flat, non_blocking=True)
            copies.append((piece, buffer))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def finish(self) -> Saved:
        """Wait for all ranks' files and make a checkpoint of them. Collective.

        A save that failed on any rank has left nothing, and older checkpoints are as they were.
        """
        save, self._save = self._save, None
        assert save is not None, "a save has begun"
        began = time.perf_counter()
        save.wait()
        self.own_seconds += time.perf_counter() - began
        reports = gathered([(save.records, save.problem)])
        problems = [problem for _, problem in reports if problem]
        if self._accelerator.is_main_process:
            alone = time.perf_counter()
            if not problems:
                problems = self._publish(save, [records for records, _ in reports])
            if problems:
                shutil.rmtree(save.aside, ignore_errors=True)
            self.own_seconds += time.perf_counter() - alone
        problems = from_main(self._accelerator, problems)
        now = time.perf_counter()
        folder = None if problems else checkpoint_folder(self._run, save.update)
        stall = save.stall_seconds + now - began
        return Saved(save.update, folder, "; ".join(problems), now - save.began, stall)

    def _publish(self, save: _Save, reports: list[dict[str, FileRecord]]) -> list[str]:
        files = {name: record for records in reports for name, record in records.items()}
        try:
            publish(save.aside, save.update, files)
        except OSError as error:
            return [_told(self._accelerator, error)]
        return []


class _Save:
    """This rank's part of a save."""

    def __init__(self, aside: Path, update: int, began: float) -> None:
        self.aside, self.update, self.began = aside, update, began
        self.stall_seconds = 0.0
        self.records: dict[str, FileRecord] = {}
        self.problem = ""
        self._unexpected: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, name: str, written: list[Part], files: dict[str, bytes], *, background: bool) -> None:
        if background:
            self._thread = threading.Thread(target=self._write_behind, args=(name, written, files), name="checkpoint")
            self._thread.start()
        else:
            self._write(name, written, files)

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._unexpected is not None:  # a defect, not a disk
            raise self._unexpected

    def _write_behind(self, name: str, written: list[Part], files: dict[str, bytes]) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own: hashing must not slow training down
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        self._write(name, written, files)

    def _write(self, name: str, written: list[Part], files: dict[str, bytes]) -> None:
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
            self.records[name] = write_shard(self.aside / name, written)
            for each, content in files.items():
                self.records[each] = write_file(self.aside / each, [content])
        except OSError as error:
            self.problem = f"{socket.gethostname()}: {name}: {error.strerror or error}"
        except BaseException as error:
            self._unexpected = error


def _told(accelerator: Accelerator, error: OSError) -> str:
    return f"rank {accelerator.process_index} ({socket.gethostname()}): {error.strerror or error}"


def find(accelerator: Accelerator, run: Path, say: Callable[[str], None], every: int = 1) -> Path | None:
    """The newest checkpoint of a run that is exactly as it was written, or None where there is none. Collective.

    Of all, or of those after each `every`-th update. The ranks share out the files to be read. Those that are skipped
    are named, with the reason, and disowned.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    for folder in from_main(accelerator, [folder for folder in listed(run) if update_of(folder) % every == 0]):
        found = gathered([damage(folder, rank, world_size)])
        reasons = [reason for reason in found if reason]
        if not reasons:
            return Path(folder)
        say(f"checkpoint {folder.name} is skipped: {reasons[0]}")
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):
                disown(folder)
    return None
