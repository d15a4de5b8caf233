"""The one thing that tests of several files share, a SLURM cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, missing


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skips where no cluster can be started; fails if SHOAL_SLURM=required says that one must."""
    if lacking := missing():
        reason = f"no SLURM cluster here: {lacking}"
        if os.environ.get("SHOAL_SLURM") == "required":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


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
