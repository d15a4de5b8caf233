"""How heavy packages are imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import inside without collections of garbage: they find none, and take a fifth of the time of the imports.

    What lives afterwards is not walked over again (`gc.freeze`). That spares a rank pauses of about 0.2 s (400,000
    objects of torch and Transformers), in which the others would wait for it.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
