"""How heavy packages are imported."""

from __future__ import annotations

import gc

import pytest

from launch.imports import importing


def test_no_garbage_is_collected_inside_and_what_is_there_is_not_walked_over_again() -> None:
    before = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()


def test_it_is_collected_again_after_an_import_that_fails_and_not_where_nobody_wants_it() -> None:
    try:
        with pytest.raises(ImportError), importing():
            import launch.nothing  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled()
        gc.disable()
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
