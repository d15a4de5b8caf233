"""What Colab's TPU runtime brings along, torch_xla and the torch that goes with it, and shoal beside them.

These run by `make test-xla`, in an environment of their own, in which XLA's device is the CPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.commands import ROOT, shoal
from tests.xla.install import PAIR

pytestmark = pytest.mark.xla

SAY_WHETHER_A_DEVICE_IS_STARTED = """
import torch_xla
print("started" if torch_xla._XLAC._xla_runtime_is_initialized() else "not started")
"""

EVERYTHING = """
import importlib, pathlib
found = [path for name in ("launch", "recipes") for path in sorted(pathlib.Path(name).rglob("*.py"))]
names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found]
names = [name for name in names if name != "launch.__main__"]
assert len(names) > 150 and {"launch.train", "launch.engine.loop", "recipes.causal_lm"} <= {*names}
for name in names:
    importlib.import_module(name)
import accelerate, datasets, torch, transformers
"""


def test_accelerate_cannot_start_a_pod() -> None:
    """Why several hosts are refused: where this fails, torch_xla has again what Accelerate starts them with."""
    from accelerate.commands import launch

    assert "from torch_xla.distributed import xla_dist" in inspect.getsource(launch.tpu_pod_launcher)
    assert importlib.util.find_spec("torch_xla.distributed.xla_dist") is None


def in_a_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_versions_are_those_that_go_together() -> None:
    for requirement in PAIR:
        name, version = requirement.split("==")
        assert metadata.version(name) == version
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    for name in ("accelerate", "transformers", "datasets", "numpy", "safetensors"):
        assert metadata.version(name) == pinned[name]


def test_xla_has_a_device_and_computes() -> None:
    program = "import torch, torch_xla; print(int((torch.ones(3, device=torch_xla.device()) * 2).sum()))"
    assert in_a_process(program) == "6"


def test_no_gpu_is_seen() -> None:
    """The libraries of CUDA are stand-ins, which say so."""
    assert in_a_process("import torch; print(torch.cuda.is_available(), torch.cuda.device_count())") == "False 0"


def test_importing_everything_starts_no_device() -> None:
    assert in_a_process(EVERYTHING + SAY_WHETHER_A_DEVICE_IS_STARTED) == "not started"


def test_a_device_that_is_started_would_be_noticed() -> None:
    started = "import torch_xla; torch_xla.device()"
    assert in_a_process(EVERYTHING + started + SAY_WHETHER_A_DEVICE_IS_STARTED) == "started"


def test_a_run_on_the_cpu_is_as_ever(tmp_path: Path) -> None:
    """Trained, saved, evaluated and exported with this torch, with XLA switched off."""
    done = shoal(
        tmp_path,
        *("run", "causal_lm", "--out", "run", "parallel.strategy=single"),
        *("train.max_steps=6", "save.every_steps=3", "eval.every_steps=null"),
        USE_TORCH_XLA="0",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["validation"]["after"]["loss"] < result["validation"]["before"]["loss"]
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["versions"]["torch"].partition("+")[0] == "2.9.0"
    assert (tmp_path / "run/checkpoints/step-000006/COMPLETE").is_file()
