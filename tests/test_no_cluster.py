"""Where no SLURM cluster can be started its tests are skipped, in one line; where they must run, they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import missing
from tests.commands import ROOT


@pytest.mark.parametrize(("wish", "code", "outcome"), [("", 0, "2 skipped"), ("required", 1, "2 errors")])
def test_without_root(wish: str, code: int, outcome: str) -> None:
    tests = ("test_nodes_are_hosts_of_their_own", "test_tasks_are_bound_to_their_cpus")
    arguments = ["-q", *(f"tests/test_cluster.py::{test}" for test in tests)]
    script = f"import os, pytest; os.geteuid = lambda: 1000; raise SystemExit(pytest.main({arguments}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "SHOAL_SLURM": wish},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert outcome in done.stdout.splitlines()[-1]
    assert "no SLURM cluster here: not root" in done.stdout


@pytest.mark.parametrize(
    ("programs", "complaint"),
    [
        ({"slurmctld", "slurmd", "srun"}, "not installed: slurm-wlm"),
        ({"munged", "ip"}, "not installed: iproute2, munge"),
    ],
)
def test_packages_that_are_missing(programs: set[str], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program, path: None if program in programs else f"{path}/{program}")
    assert missing() == complaint


def test_namespaces_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "unshare: Operation not permitted\n")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program, path: f"{path}/{program}")
    monkeypatch.setattr(subprocess, "run", refuse)
    assert missing() == "no namespaces: unshare: Operation not permitted"


def test_as_many_tests_need_a_cluster_as_there_are() -> None:
    """None of them is lost by a name or a mark; where SHOAL_SLURM=required, each that cannot run fails."""
    files = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if "mark.slurm" in path.read_text()
    )
    assert [Path(file).stem for file in files] == [
        "test_cluster",
        "test_job",
        "test_no_cluster",
        "test_nodes",
        "test_slurm_names",
    ]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slurm", *files]
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # such as -v
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert len([line for line in done.stdout.splitlines() if "::" in line]) == 47
