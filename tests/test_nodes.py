"""Several machines without SLURM: a launcher on each, over real networks of their own."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError, TopologyError
from launch.nodes import Address, is_here, read_address
from tests.cluster import Cluster
from tests.commands import ROOT

RECIPE = Path(__file__).with_name("own_recipe.py")


@pytest.mark.parametrize("text", ["n1", "n1:", ":29400", "n1:x", "n1:0", "n1:70000"])
def test_an_address_is_host_and_port(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_address(text)
    assert str(caught.value) == f"command line: --rdzv {text}: write host:port, for example --rdzv node1:29400"
    assert read_address("n1:29400") == Address("n1", 29400)


def test_whose_address_it_is() -> None:
    assert is_here(Address("localhost", 1))
    assert not is_here(Address("192.0.2.1", 1))  # for documentation, RFC 5737
    with pytest.raises(TopologyError, match=r"--rdzv no-such-host.invalid:1: no-such-host.invalid: "):
        is_here(Address("no-such-host.invalid", 1))


class Machines:
    """Two of them, each with a user who types the same command."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.done: dict[str, Any] = {}
        (folder / "run.yaml").write_text(
            f"recipe: {RECIPE}\ntrain: {{max_steps: 12, global_batch_size: 8, learning_rate: 0.01}}\n"
            "parallel: {device: cpu, devices: 2, nodes: 2}\n"
        )

    def start(self, node: str, *overrides: str) -> None:
        """Type the command on one of them."""
        self.type(node, "run", "run.yaml", *overrides, "--rdzv", "n1:29400", "--out", "run")

    def type(self, node: str, *arguments: str, path: str = str(ROOT), within: tuple[str, ...] = ()) -> None:
        """Type a command of `shoal`; `path` is where its Python finds what is imported, `within` what starts it."""
        self.command(node, sys.executable, "-m", "launch", *arguments, path=path, within=within)

    def command(self, node: str, *command: str, path: str = str(ROOT), within: tuple[str, ...] = ()) -> None:
        """Type any command."""

        def work() -> None:
            environment = {
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "SHOAL_CACHE": f"{self.folder}/cache-{node}",
            }
            begin = [*within, "env", *(f"{name}={value}" for name, value in environment.items())]
            self.done[node] = self.cluster.run(*begin, *command, node=node, cwd=self.folder, timeout=300)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()

    def train_slowly(self) -> None:
        """Have both train together until three updates are done, of many more."""
        for node in ("n1", "n2"):
            self.start(node, "recipe_args.seconds_per_batch=0.1", "train.max_steps=400", "eval.at_start=false")
        self.until(lambda: len(self.updates()) >= 3)

    def until(self, what: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            said = {node: done.stderr for node, done in self.done.items()}
            assert time.monotonic() < deadline, said
            time.sleep(0.1)

    def end(self, seconds: float = 90) -> None:
        self.until(lambda: len(self.done) == 2, seconds)

    def updates(self) -> list[dict[str, Any]]:
        path = self.folder / "run/metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.fixture
def machines(cluster: Cluster, tmp_path: Path) -> Machines:
    return Machines(cluster, tmp_path)


@pytest.mark.slurm
@pytest.mark.dist
@pytest.mark.slow
def test_two_machines_train_together(machines: Machines) -> None:
    machines.start("n2")
    machines.start("n1")
    machines.end()
    assert [machines.done[node].returncode for node in ("n1", "n2")] == [0, 0], [
        done.stderr for done in machines.done.values()
    ]
    assert "waiting for 1 more at n1:29400: run the same command on each machine" in machines.done["n1"].stderr
    assert len(machines.updates()) == 12
    assert (machines.folder / "run/result.json").exists() and (machines.folder / "run/report.html").exists()
    logs = sorted(path.name for path in (machines.folder / "run/logs").glob("rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(4)]


@pytest.mark.slurm
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_launcher_that_is_killed_is_told_and_nothing_is_lost(node: str, machines: Machines) -> None:
    machines.train_slowly()
    machines.cluster.run("pkill", "-KILL", "-f", "launch run run.yaml", node=node)
    machines.end()
    other = "n2" if node == "n1" else "n1"
    assert (machines.done[node].returncode, machines.done[other].returncode) == (-9, 1 if other == "n2" else 75)
    told, last = machines.done[other].stderr.splitlines()[-2:]
    update, again = len(machines.updates()), f"shoal resume {machines.folder}/run --rdzv n1:29400 (on each machine)"
    if other == "n1":
        assert told == "shoal: the launcher on n2 has ended"
        saved = f"checkpoint checkpoints/step-{update:06d}; go on"
        assert last == f"shoal: stopped by SIGTERM after update {update}; {saved} with: {again}"
    else:
        assert told == "shoal: n2: lost the launcher on n1"
        assert last == f"shoal: go on from update {update} with: {again}"
    for name in ("n1", "n2"):
        assert not machines.cluster.run("pgrep", "-f", "launch.train", node=name).stdout, "no process is left"


@pytest.mark.slurm
@pytest.mark.dist
@pytest.mark.slow
def test_a_machine_with_other_settings_is_refused(machines: Machines) -> None:
    machines.start("n1", "parallel.nodes=2")
    machines.start("n2", "train.learning_rate=0.5")
    machines.until(lambda: "n2" in machines.done)
    told = "it was started with other settings: train.learning_rate: 0.01 → 0.5"
    assert machines.done["n2"].returncode == 4
    assert machines.done["n2"].stderr.splitlines()[-1] == f"shoal: refused by n1:29400: {told}"
    machines.start("n2")
    machines.end()
    assert f"shoal: n2 is refused: {told}" in machines.done["n1"].stderr
    assert machines.done["n1"].returncode == 0


@pytest.mark.slurm
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("how", ["cable", "switch"])
def test_a_cut_link_ends_all_soon_and_each_names_the_other(how: str, machines: Machines) -> None:
    machines.train_slowly()
    if how == "cable":
        machines.cluster.link("n2", up=False)
    else:
        machines.cluster.port("n2", open_=False)
    cut = time.monotonic()
    machines.end(75)
    assert time.monotonic() - cut < 75
    first, second = (machines.done[node] for node in ("n1", "n2"))
    assert (first.returncode, second.returncode) == (1, 1)
    assert "shoal: no answer from n2 (rank 2, 3): the host is down, or the network between" in first.stderr
    assert second.stderr.splitlines()[-1] == ("shoal: n2: no answer from n1: that host is down, or the network between")
    for node in ("n1", "n2"):
        left = machines.cluster.run("pgrep", "-f", "launch.train", node=node)
        assert not left.stdout, "no process is left"


@pytest.mark.slurm
def test_silence_is_noticed_also_while_something_is_on_its_way(machines: Machines) -> None:
    """Keep-alive asks nothing then; without a limit it would be sent again for a quarter of an hour."""
    begin = "import socket, sys, time; from launch import silence; silence.SILENT_SECONDS = (1, 1, 1)"
    hears = "line, _ = socket.create_server(('', 29401)).accept(); line.recv(1); time.sleep(60)"
    tells = """
line = socket.create_connection(("n1", 29401))
silence.notice_silence(line)
line.sendall(b"x")
open("told", "w").close()
line.settimeout(0.1)
until = time.monotonic() + 30
while time.monotonic() < until:
    try:
        line.send(b"x")
        line.recv(1)
    except OSError as error:
        if error.errno is not None:  # else it is the time-out set here
            sys.exit(0 if silence.is_silence(error) else 1)
sys.exit("nothing was noticed")
"""
    for node, script in (("n1", hears), ("n2", tells)):
        machines.command(node, sys.executable, "-c", f"{begin}\n{script}")
        time.sleep(1)
    machines.until(lambda: (machines.folder / "told").exists())
    machines.cluster.port("n2", open_=False)
    machines.until(lambda: "n2" in machines.done)
    assert machines.done["n2"].returncode == 0, machines.done["n2"].stderr


@pytest.mark.slurm
@pytest.mark.dist
@pytest.mark.slow
def test_the_doctor_looks_at_what_is_between_machines(machines: Machines) -> None:
    """One machine is as it should be; of the other the clock, a package, and the file system of runs are not."""
    command = ("doctor", "run.yaml", "--rdzv", "n1:29400")
    (machines.folder / "runs").mkdir()
    for node in ("n2", "n1"):
        machines.type(node, *command, *(["--json"] if node == "n1" else []))
    machines.end()
    assert [machines.done[node].returncode for node in ("n1", "n2")] == [0, 0], machines.done
    content = json.loads(machines.done["n1"].stdout)
    found = {(each["host"], each["name"]): each for each in content["findings"]}
    assert content["healthy"] and ("n2", "disk of runs") in found and ("", "disk of runs") in found
    between = {name: found["", name]["found"] for name in ("versions", "folder of runs", "clocks", "names of hosts")}
    assert between["versions"] == "the same on n1, n2"
    assert between["folder of runs"] == f"{machines.folder}/runs: each of 2 machines sees what all wrote"
    assert between["names of hosts"] == "each of n1, n2 finds the others by name"
    assert re.fullmatch(r"at most 0\.0\d\d s from that of n1", between["clocks"])
    exchange = r"4 processes on 2 machines \(gloo\) add up 67\.1 MB each, \d+\.\d\d GB/s, the sum is right"
    assert re.fullmatch(exchange, found["", "exchange"]["found"])
    assert not list((machines.folder / "runs").iterdir()), "nothing is left behind"

    machines.done.clear()
    (machines.folder / "odd").mkdir()
    (machines.folder / "odd/sitecustomize.py").write_text(
        "import time, importlib.metadata as metadata\n"
        "now, version = time.time, metadata.version\n"
        "time.time = lambda: now() + 90\n"
        "metadata.version = lambda name: '9.9' if name == 'numpy' else version(name)\n"
    )
    hidden = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {machines.folder}/runs && exec "$@"', "sh")
    machines.type("n2", *command, path=f"{machines.folder}/odd:{ROOT}", within=hidden)
    machines.type("n1", *command)
    machines.end()
    first = machines.done["n1"]
    assert (first.returncode, machines.done["n2"].returncode) == (4, 4)
    assert first.stderr.splitlines()[-1] == "shoal: not healthy: versions, folder of runs"
    runs = f"{machines.folder}/runs: n1 does not see what n2 wrote; n2 does not see what n1 wrote"
    assert f"BAD      folder of runs     {runs}" in first.stdout
    assert re.search(r"^warning  clocks             n2 is 90\.\d s ahead of n1$", first.stdout, re.MULTILINE)
    assert re.search(r"^BAD      versions           n2: numpy 9\.9, but \S+ on n1$", first.stdout, re.MULTILINE)
    assert "-> choose an --out on a file system that all machines share" in first.stdout
