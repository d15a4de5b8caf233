"""What tests of several files share: a cluster, a browser, and how they are dealt out to pytest-xdist's processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.browser import program
from tests.cluster import Cluster, missing

# Threads that wait for work leave the processor to other processes, of which the tests start many.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nor does each of those compile shoal again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, the tests of a file, which may share a run, or those of the cluster, stay together.

    Groups with the most slow tests come first, so that no process has a long one left when the others are done. Tests
    of XLA run in the environment that was made for them alone.
    """
    if not find_spec("torch_xla"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("xla")])
        items[:] = [item for item in items if not item.get_closest_marker("xla")]
    slow: Counter[str] = Counter()
    for item in items:
        group = _group_of(item)
        item.add_marker(pytest.mark.xdist_group(group))
        slow[group] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: (-slow[_group_of(item)], _group_of(item)))


def _group_of(item: pytest.Item) -> str:
    return "cluster" if "cluster" in getattr(item, "fixturenames", ()) else item.path.name


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skips where no cluster can be started; fails if SHOAL_SLURM=required says that one must."""
    if lacking := missing():
        reason = f"no SLURM cluster here: {lacking}"
        if os.environ.get("SHOAL_SLURM") == "required":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> None:
    """Skips where there is no browser; fails if SHOAL_BROWSER=required says that one must be there."""
    if program() is None:
        reason = "no browser here: chromium is not installed"
        if os.environ.get("SHOAL_BROWSER") == "required":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _browser_tests(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("browser"):
        request.getfixturevalue("browser")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes, started for the first test that asks. Every test finds them idle."""
    request.getfixturevalue("slurm")
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _slurm_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Marked tests need SLURM, also those with a cluster of their own; the shared one is left as it was found."""
    if request.node.get_closest_marker("slurm"):
        request.getfixturevalue("slurm")
    shared = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if shared:
        shared.settle()
