"""What a contender's process notes while it works: when each update was over, and how many tokens it had.

Needs the standard library alone: it is imported in the environments of all peers.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class Ticks:
    """One rank's notes."""

    def __init__(self) -> None:
        self.times: list[float] = []
        """When each update was over: seconds since 1970."""
        self.tokens: list[int] = []
        """Input tokens of each update that are no padding, of this rank."""
        self.ranks = 1
        """Of how many ranks these are the notes."""
        self.evaluations: list[tuple[float, int, int]] = []
        """Seconds of each evaluation, its rows, and the tokens that were written for them."""
        self.loss: float | None = None
        """The last one, of Trainer and TRL the mean of all: to see that contenders learn."""

    def update(self, tokens: int) -> None:
        """An update is over."""
        self.times.append(time.time())
        self.tokens.append(tokens)

    def write(self, path: str | Path) -> None:
        """As a file beside `path`, named by this rank."""
        rank = os.environ.get("LOCAL_RANK", "0")  # all are on this machine; Lightning sets no RANK
        Path(f"{path}.{rank}").write_text(json.dumps(vars(self)))
