"""How heavy packages are imported."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

SCIPY = "scipy.optimize"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import inside without collections of garbage: they find none, and take a fifth of the time of the imports.

    What lives afterwards is not walked over again (`gc.freeze`). That spares a rank pauses of about 0.2 s (400,000
    objects of torch and Transformers), in which the others would wait for it.

    SciPy is imported when it is first used: 0.3 s and 37 MB.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _scipy_later():
            yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


class _Optimize(ModuleType):
    """Stands in for scipy.optimize while Transformers is imported, whose losses of object detection want one function.

    They are imported with any model (transformers 5.23, `loss/loss_utils.py`).
    """

    @staticmethod
    def linear_sum_assignment(*args: Any, **kwargs: Any) -> Any:
        """The real one."""
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        return linear_sum_assignment(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Who wants more than that one gets all of it; not who asks every module for such as `__file__`."""
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(SCIPY) is self:
            del sys.modules[SCIPY]
        import scipy.optimize  # type: ignore[import-untyped]

        return getattr(scipy.optimize, name)


@contextlib.contextmanager
def _scipy_later() -> Iterator[None]:
    """Meanwhile SciPy is not imported for that one function."""
    if SCIPY in sys.modules:
        yield
        return
    stand_in = sys.modules[SCIPY] = _Optimize(SCIPY)
    try:
        yield
    finally:
        if sys.modules.get(SCIPY) is stand_in:
            del sys.modules[SCIPY]
