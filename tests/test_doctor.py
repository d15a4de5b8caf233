"""`shoal doctor`: each check on the real machine, and each on one where that is broken."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import wandb

from launch import doctor
from launch.doctor import Finding, devices, disks, environment, examine, host_name, names, packages, scheduler, tracker
from tests.commands import python, shoal


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.mark.dist
@pytest.mark.slow
def test_this_machine_is_healthy(tmp_path: Path) -> None:
    done = shoal(tmp_path, "doctor", "--ranks", "3", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert content["healthy"] is True
    found = {finding["name"]: finding for finding in content["findings"]}
    assert {"python", "torch", "devices", "exchange", "host name", "disk of runs", "SLURM"} <= {*found}
    assert found["exchange"]["state"] == "good"
    assert found["exchange"]["found"].startswith("3 processes (gloo) add up 67.1 MB each, ")
    assert all(finding["fix"] for finding in content["findings"] if finding["state"] in ("bad", "warning"))
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_who_looks_alone_waits_for_nobody_though_it_is_one_of_several_tasks_of_slurm(tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    task = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    done = python(tmp_path, "launch.probe", "1000", **step, **task)
    assert done.returncode == 0, done.stderr
    assert "torch" in json.loads(done.stdout) and "right" not in json.loads(done.stdout)


def test_packages_that_lack_or_are_too_old() -> None:
    found = by_name(packages(["torch>=99", "no-such-package>=1", "numpy>=1", "wandb>=99; extra == 'wandb'"]))
    assert found["torch"].state == "bad" and found["torch"].fix == "pip install 'torch>=99'"
    assert (found["no-such-package"].state, found["no-such-package"].found) == ("bad", "not installed")
    assert found["numpy"].state == "good"
    assert found["wandb"].state != "bad", "an extra that nobody asked for"
    assert doctor._python((3, 10, 4)) == ("bad", "3.10.4", "use Python 3.11 or newer")


def test_another_package_of_our_name(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/__init__.py").touch()
    (tmp_path / "ask.py").write_text("from launch.doctor import names\nprint(*names(), sep='\\n')\n")
    done = python(tmp_path, "ask")
    assert f"{tmp_path / 'recipes'} hides " in done.stdout and "state='bad'" in done.stdout, done.stderr
    assert all(finding.state == "good" for finding in names())


def test_variables_that_other_launchers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment().state == "good"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert environment().state == "warning" and environment().found == "ACCELERATE_MIXED_PRECISION"


def test_processes_that_cannot_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.12: no such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    (found,) = devices(2)
    assert (found.state, found.found) == ("bad", "ImportError: libcudart.so.12: no such file")


@pytest.mark.parametrize(
    ("gpus", "right", "states"),
    [(0, True, ["good", "good"]), (0, False, ["good", "bad"]), (4, True, ["bad", "good"])],
)
def test_what_processes_answer_counts(
    gpus: int, right: bool, states: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"torch": "2.13", "cuda": None, "gpus": 0, "backend": "gloo", "right": right, "gigabytes_per_second": 1.0}
    machine = doctor.read_machine()
    monkeypatch.setattr(doctor, "read_machine", lambda: type(machine)(machine.host, machine.cores, gpus))
    monkeypatch.setattr(doctor, "_probe", lambda size: [answer] * size)
    assert [finding.state for finding in devices(2)] == states


def test_names_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")
    assert host_name().state == "good"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert host_name().state == "warning" and "127.0.1.1, which other hosts cannot reach" in host_name().found

    def fail(*_: object) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", fail)
    assert host_name().state == "warning" and host_name().found.endswith(": Name or service not known")


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "not/yet"))
    found = by_name(disks(tmp_path / "runs/of/mine"))
    assert found["disk of runs"].found.startswith(f"{tmp_path}: ")
    monkeypatch.setattr(doctor, "LOW_DISK", 10**18)
    assert by_name(disks(tmp_path))["disk of cache"].state == "warning"
    unwritable = by_name(disks(Path("/proc/runs")))["disk of runs"]
    assert unwritable.state == "bad" and unwritable.found.startswith("/proc: ") and "--out" in unwritable.fix


def test_schedulers_and_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = {*psutil.Process().children()}  # of other tests
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scheduler().state == "skipped"
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    assert scheduler().state == "warning" and scheduler().found == "only srun"
    monkeypatch.chdir(tmp_path)  # where `wandb offline` writes its settings, so that no others count
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    known_in(tmp_path, "wandb.lab.example")
    assert tracker().state == "skipped"
    host = urlsplit(wandb.Settings().base_url).netloc
    assert tracker().found == f"no key for {host} (WANDB_API_KEY or ~/.netrc)"

    def unreachable(*_: object, **__: object) -> None:
        raise OSError(101, "no net")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    for name in ("api.wandb.ai", host):
        known_in(tmp_path, name)
        found = tracker()
        assert (found.state, found.found) == ("warning", f"{host}: no net") and "secret" not in str(found)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.lab.example:8443")
    assert tracker().found == "no key for wandb.lab.example:8443 (WANDB_API_KEY or ~/.netrc)"
    known_in(tmp_path, "wandb.lab.example:8443")
    assert tracker().found == "wandb.lab.example:8443: no net"
    (tmp_path / ".netrc").write_bytes(b"machine wandb.lab.example:8443 login m\xfcller password secret\n")
    assert tracker().state == "skipped", "wandb cannot read it either"
    (tmp_path / ".netrc").write_text(f"default login user password {'secret' * 8}\n")
    assert tracker().found == "wandb.lab.example:8443: no net"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (tracker().state, tracker().found) == ("skipped", "disabled by WANDB_MODE or `wandb disabled`")
    monkeypatch.setenv("WANDB_MODE", "onlin")
    assert tracker().state == "warning" and 'mode = "onlin": must be' in tracker().found
    assert not {*psutil.Process().children()} - before, "wandb's service has ended"


def known_in(home: Path, host: str) -> None:
    (home / ".netrc").write_text(f"machine {host} login user password {'secret' * 8}\n")


def test_what_is_bad_ends_with_4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda size: "no torch")
    assert "bad" in [finding.state for finding in examine(2, tmp_path)]
    done = shoal(tmp_path, "doctor", "--out", "/proc/runs")
    assert done.returncode == 4
    assert done.stderr == "shoal: not healthy: disk of runs\n"
    assert "BAD      disk of runs       /proc: " in done.stdout and "-> choose another folder, by --out" in done.stdout
