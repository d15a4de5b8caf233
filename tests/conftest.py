"""The one thing that tests of several files share, a SLURM cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, started for the first test that asks. Every test finds them idle."""
    if lacking := missing():
        reason = f"no SLURM cluster here: {lacking}"
        if os.environ.get("SHOAL_SLURM") == "required":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _settle_the_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    shared = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if shared:
        shared.settle()
