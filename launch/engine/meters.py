"""How fast a run is: time spent on updates, without evaluations and saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Throughput:
    """Tokens per second between two readings; time inside `paused()` does not count."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens since the beginning of the run."""
        self._tokens_then = 0
        self._since = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count the tokens of one update."""
        self.tokens += tokens

    def resume(self, tokens: int) -> None:
        """Go on from a count."""
        self.tokens = self._tokens_then = tokens
        self._since = time.perf_counter()

    def read(self) -> float:
        """Tokens per second since the last reading."""
        now = time.perf_counter()
        rate = (self.tokens - self._tokens_then) / max(now - self._since, 1e-9)
        self._since, self._tokens_then = now, self.tokens
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began
