"""What a user can get wrong, one class per exit code.

A message names the key or file, what was got, what is allowed and the fix. It is shown alone, without a
traceback. Any other exception is a defect of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterator


class LaunchError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1


class ConfigError(LaunchError):
    """A run file, an override or a combination of settings that cannot be; nothing was started."""

    exit_code = 2


class DataError(LaunchError):
    """A dataset, tokenizer or model that cannot be read or does not fit the recipe."""

    exit_code = 3


class TopologyError(LaunchError):
    """The devices or processes asked for are not there, or are not the ones planned."""

    exit_code = 4


class RunFolderError(LaunchError):
    """The run folder cannot be created, written or read."""

    exit_code = 5


class NonFiniteError(LaunchError):
    """The loss or the gradient norm is NaN or infinite, or the loss has leapt."""

    exit_code = 6


class SpikeError(NonFiniteError):
    """The loss is far above those of the updates before."""


class ExportError(LaunchError):
    """The exported model does not reload to the model that was trained."""

    exit_code = 7


class ParityError(LaunchError):
    """Runs that should have given the same numbers gave different ones."""

    exit_code = 8


class MemoryExhaustedError(LaunchError):
    """A device, or the machine, has run out of memory."""

    exit_code = 9


class EndedError(LaunchError):
    """Workers that did not end well, with the exit code of their ending."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedError(EndedError):
    """Workers that the user or the system stopped."""


INTERRUPTED = 130
"""Exit code after Ctrl-C (SIGINT), as shells expect: 128 + 2."""

PREEMPTED = 75
"""Exit code after any other signal that asks for a stop: EX_TEMPFAIL of sysexits.h, which means: try again."""

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "unexpected error (the traceback is shown)",
    **{
        kind.exit_code: (kind.__doc__ or "").strip().rstrip(".")
        for kind in (
            *(ConfigError, DataError, TopologyError, RunFolderError),
            *(NonFiniteError, ExportError, ParityError, MemoryExhaustedError),
        )
    },
    PREEMPTED: "stopped by SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP; run it again to go on",
    INTERRUPTED: "stopped by Ctrl-C",
}


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those behind it, which it was raised from or while handling, the nearest first."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__
