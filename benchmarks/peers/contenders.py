"""Who takes part, in which environment each runs, by which command, and how what it noted is read."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import with_shoal
from benchmarks.peers.install import ROOT, interpreter
from benchmarks.peers.rounds import CommandError, Measured, run
from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload

ALL = ("blocks", "classification", "translation", "instruction")


@dataclass(frozen=True)
class Contender:
    """One of those that are compared."""

    name: str
    environment: str
    """Of `benchmarks.peers.install`."""
    module: str = ""
    """Of its program; none: shoal itself."""
    options: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("blocks",)
    most_ranks: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    """Of shoal's run file, on top."""

    def takes(self, workload: Workload) -> bool:
        """Whether it can do this."""
        return workload.task in self.tasks and workload.ranks <= self.most_ranks

    def installed(self) -> bool:
        """Whether its environment is there."""
        return interpreter(self.environment).is_file()

    def measure(self, workload: Workload) -> tuple[Measured, list[Ticks]]:
        """Run it once; what was seen of it from outside, and what it noted, by rank (of shoal: of all ranks at once).

        Raises:
            CommandError: it failed, or it did not do what it was told.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = self._own_command(workload, folder) if self.module else self._shoal_command(workload, folder)
            measured = run(command, folder, self._variables(workload), workload.threads * workload.ranks)
            if self.module:
                ticks = [_read(path) for path in sorted(folder.glob("ticks.*[0-9]"))]
            else:
                ticks = [with_shoal.ticks(workload, folder / "out")]
        check(workload, ticks)
        return measured, ticks

    def _own_command(self, workload: Workload, folder: Path) -> list[str]:
        given, out = folder / "workload.json", folder / "ticks"
        workload.write(given)
        return [*self._starter(workload.ranks), "-m", self.module, str(given), str(out), *self.options]

    def _shoal_command(self, workload: Workload, folder: Path) -> list[str]:
        (folder / "run.yaml").write_text(yaml.safe_dump(with_shoal.run_file(workload, self.settings)))
        return [str(interpreter(self.environment).with_name("shoal")), "run", "run.yaml", "--out", "out"]

    def _starter(self, ranks: int) -> list[str]:
        """For several ranks torchrun: on CPUs `accelerate launch` starts one process, unless there is MPI."""
        python = interpreter(self.environment)
        if ranks > 1 and not self.module.endswith("litgpt"):  # whose Fabric starts the other ranks itself
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            return [str(python), *torchrun]
        if self.module.endswith("accelerate"):
            machine = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            return [str(python.with_name("accelerate")), "launch", "--cpu", "--num_processes", "1", *machine]
        return [str(python)]

    def _variables(self, workload: Workload) -> dict[str, str]:
        """What was prepared is kept between rounds."""
        caches = {name: str(workload.folder / "cache") for name in ("SHOAL_CACHE", "HF_DATASETS_CACHE")}
        always = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        return {"OMP_NUM_THREADS": str(workload.threads), **always, **caches}


def check(workload: Workload, ticks: list[Ticks]) -> None:
    """See that as many ranks as asked for took part, each with as many updates.

    Raises:
        CommandError: they did not, so nothing can be compared.
    """
    ranks = sum(each.ranks for each in ticks)
    if ranks != workload.ranks:
        raise CommandError(f"trained on {ranks} ranks instead of {workload.ranks}\n")
    if updates := {len(each.times) for each in ticks} - {workload.updates}:
        raise CommandError(f"made {updates.pop()} updates instead of {workload.updates}\n")


def _read(path: Path) -> Ticks:
    found = Ticks()
    vars(found).update(json.loads(path.read_text()))
    return found


_HERE = "benchmarks.peers."

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("shoal", "transformers", tasks=ALL),
        Contender("shoal, compiled", "transformers", settings={"train": {"compile": True}}),
        Contender(
            "shoal, packed", "transformers", tasks=("instruction",), settings={"recipe_args": {"packing": "isolated"}}
        ),
        Contender("shoal, padded", "transformers", tasks=ALL[1:], settings={"train": {"padding_free": "off"}}),
        Contender("PyTorch alone", "transformers", f"{_HERE}with_torch"),
        Contender("Accelerate loop", "transformers", f"{_HERE}with_accelerate", tasks=ALL),
        Contender("Trainer", "transformers", f"{_HERE}with_trainer", tasks=ALL),
        Contender("Trainer, by length", "transformers", f"{_HERE}with_trainer", ("by-length",), tasks=ALL[1:]),
        Contender("TRL", "trl", f"{_HERE}with_trl", tasks=("instruction",)),
        Contender("TRL, packed", "trl", f"{_HERE}with_trl", ("packed",), tasks=("instruction",)),
        Contender("LitGPT", "litgpt", f"{_HERE}with_litgpt", ("plain",)),
        Contender("LitGPT, compiled", "litgpt", f"{_HERE}with_litgpt"),
        Contender("torchtune", "torchtune", f"{_HERE}with_torchtune", most_ranks=1),
    )
}
