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
        self.evaluations: list[tuple[float, int]] = []
        """Seconds of each evaluation, and what was evaluated: input tokens, or tokens written where texts are."""
        self.loss: float | None = None
        """The last one, to see that contenders learn the same."""

    def update(self, tokens: int) -> None:
        """An update is over."""
        self.times.append(time.time())
        self.tokens.append(tokens)

    def write(self, path: str | Path) -> None:
        """As a file beside `path`, named by this rank."""
        rank = os.environ.get("RANK", "0")
        found = {"times": self.times, "tokens": self.tokens, "evaluations": self.evaluations, "loss": self.loss}
        Path(f"{path}.{rank}").write_text(json.dumps(found))
