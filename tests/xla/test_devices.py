"""What `launch.engine.xla` offers, piece by piece."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.commands import ROOT

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.xla


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)


def tied() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))


def names(model: torch.nn.Module) -> list[list[str]]:
    from launch.engine.sharding import tied_names

    return tied_names(model)


def test_weights_that_were_one_are_one_on_the_device(accelerator: Any) -> None:
    from launch.engine.xla import moved

    assert names(tied().to(accelerator.device)) == [], "why `moved` is needed"
    model = moved(tied(), accelerator.device)
    assert names(model) == [["lm_head.weight", "transformer.wte.weight"]]
    assert {weight.device.type for weight in model.parameters()} == {"xla"}
    assert len([*model.parameters()]) == len([*tied().parameters()])


def test_on_the_cpu_for_a_while(accelerator: Any) -> None:
    import torch

    from launch.engine.xla import moved, on_cpu

    model = moved(tied(), accelerator.device).eval()
    before = dict(model.named_parameters())
    ids = torch.arange(4)[None]
    on_device = model(ids.to(accelerator.device)).logits.cpu()
    with on_cpu(model):
        assert {weight.device.type for weight in model.parameters()} == {"cpu"}
        assert names(model) == [["lm_head.weight", "transformer.wte.weight"]]
        assert torch.allclose(model(ids).logits, on_device, atol=1e-5)
    after = dict(model.named_parameters())
    assert all(after[name] is weight for name, weight in before.items()), "the optimizer has these"


def test_pieces_are_fetched_without_a_program_and_loaded_in_place(accelerator: Any) -> None:
    import torch
    import torch_xla

    from launch.engine.pieces import pieces
    from launch.engine.xla import compiles, fetched, moved

    model = moved(tied(), accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(4)[None].to(accelerator.device)).logits.sum().backward()
    optimizer.step()
    torch_xla.sync()
    held, before = pieces(accelerator, model, optimizer), compiles()
    on_host = fetched(held)
    assert compiles() == before > 0
    assert {piece.values.device.type for piece in on_host} == {"cpu"} and len(on_host) > len([*model.parameters()])
    for piece in held:
        with torch.no_grad():
            piece.values.copy_(torch.full(piece.values.shape, 2.0))
    assert all(bool((weight.cpu() == 2).all()) for weight in model.parameters())
    assert optimizer.state[model.lm_head.weight]["exp_avg"].cpu().unique().tolist() == [2.0]


def test_attention_masks_are_not_looked_at(accelerator: Any) -> None:
    """transformers leaves out a mask that masks nothing: that would be another program, and a wait for the device."""
    import torch
    import torch_xla

    from launch.engine.xla import compiles, moved, start

    start(1)
    model = moved(tied(), accelerator.device).eval()
    ids, counted = torch.arange(4)[None].to(accelerator.device), []
    for hidden in (0, 1, 0, 2):
        mask = torch.tensor([[1] * (4 - hidden) + [0] * hidden])
        with torch.no_grad():
            logits = model(ids, attention_mask=mask.to(accelerator.device)).logits
        torch_xla.sync()
        assert logits.cpu().isfinite().all()
        counted.append(compiles())
    assert counted[0] > 0 and len(set(counted)) == 1, counted


def test_the_peak_of_memory_is_told_or_not_known(accelerator: Any) -> None:
    from launch.engine.memory import PeakMemory

    assert PeakMemory(accelerator.device).read() is None, "XLA's CPU device does not tell"


SHARED = """
import torch, torch_xla
from accelerate import Accelerator
from launch.engine.xla import XlaDevices, start
start(2)
devices, accelerator = XlaDevices(2, 4, {4}), Accelerator()
batch = {"ids": torch.arange(32).reshape(4, 8), "label": torch.arange(4)}
batch |= {"odd": torch.ones(3, 8), "one": torch.ones(())}
placed = devices.place(accelerator, batch)
for name, tensor in placed.items():
    print(name, torch_xla._XLAC._get_xla_sharding_spec(tensor) or "-", bool((tensor.cpu() == batch[name]).all()))
"""


def in_a_process(program: str) -> subprocess.CompletedProcess[str]:
    """With two devices: how many there are is settled once."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_each_device_gets_a_part_of_the_rows() -> None:
    """Of what does not divide each has all."""
    done = in_a_process(SHARED)
    assert done.stdout.splitlines() == [
        "ids {devices=[2,1]0,1} True",
        "label {devices=[2]0,1} True",
        "odd {replicated} True",
        "one - True",
    ], done.stderr


def test_another_number_of_devices_than_planned_is_refused() -> None:
    done = in_a_process("from launch.engine.xla import start; start(3)")
    assert done.stderr.splitlines()[-1] == (
        "launch.errors.TopologyError: the plan says 3 XLA devices, torch_xla finds 2 (CPU); use parallel.devices=2, "
        "for one process has all of a host"
    )


def test_the_random_state_comes_back(accelerator: Any) -> None:
    import torch
    import torch_xla
    import torch_xla.core.xla_model as xm

    from launch.engine.xla import random_state, restore_random_state

    def drawn() -> list[float]:
        numbers: list[float] = torch.rand(4, device=accelerator.device).cpu().tolist()
        return numbers

    for seed in (3, 2**64 - 5):
        xm.set_rng_state(seed)
        torch_xla.sync()
        state = random_state()
        first = drawn()
        assert drawn() != first
        restore_random_state(state)
        assert drawn() == first


def test_sums_are_fetched_exactly(accelerator: Any) -> None:
    import torch

    from launch.engine.xla import XlaDevices, compiles

    devices = XlaDevices(1, 4, {2})
    values = [torch.tensor(0.1, device=accelerator.device), torch.tensor(3.0, device=accelerator.device)]
    devices.settle()
    before = compiles()
    found = devices.precise(values)
    assert (found.dtype, found.tolist()) == (torch.float64, [float(torch.tensor(0.1)), 3.0])
    assert devices.precise(values * 3).shape == (6,)
    assert compiles() == before, "for any number of them"


def test_shapes_are_counted_by_purpose(accelerator: Any) -> None:
    import torch

    from launch.engine.xla import XlaDevices

    def batch(rows: int, columns: int, *more: str) -> dict[str, torch.Tensor]:
        return {name: torch.ones(rows, columns, dtype=torch.long) for name in ("ids", *more)}

    devices = XlaDevices(1, 2, {4})
    for columns in (8, 16, 8):
        devices.place(accelerator, batch(4, columns))
    devices.place(accelerator, batch(4, 8, "offsets"))
    assert devices.facts()["shapes"] == 3
    assert devices.news() is None
    devices.place(accelerator, batch(4, 24))
    assert "for one more shape: ids 4 × 24; 4 so far" in (devices.news() or "")
    assert devices.news() is None, "told once"
    devices.place(accelerator, batch(3, 8))
    assert "ids 3 × 8" in (devices.news() or "")
