"""What held the memory of a rank when it ran out: found, counted once, named, and told by a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from launch.engine.exhaustion import asked_bytes, holders_file, write_holders
from launch.engine.holding import Held, find_holders
from launch.record import put_aside
from tests import hoarding_recipe
from tests.commands import shoal
from tests.own_recipe import Args
from tests.own_recipe import prepare as prepare_own

RECIPE = Path(hoarding_recipe.__file__)


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An AdamW that has made an update of it."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum((parameter**2).sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def held(model: torch.nn.Module, optimizer: Any, error: BaseException | None = None) -> list[Held]:
    return find_holders(model, optimizer, error or MemoryError()).all()


def sums(found: list[Held]) -> dict[str, int]:
    return {kind: sum(each.bytes for each in found if each.kind == kind) for kind in {each.kind for each in found}}


def one_of(found: list[Held], tensor: torch.Tensor) -> Held:
    """What is said of the storage of a tensor, once."""
    pointer = tensor.untyped_storage().data_ptr()
    (only,) = (each for each in found if each.tensor.untyped_storage().data_ptr() == pointer)
    return only


def test_each_storage_counts_once_as_what_it_is_first_of_all() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    tied = torch.nn.ModuleList([model, torch.nn.Linear(10, 10, bias=False)])
    tied[1].weight = model[0].weight
    tied.register_buffer("mask", torch.ones(5, dtype=torch.bool))
    optimizer = trained(tied)
    bucket = torch.zeros(2, 10, 10)  # DDP's gradients are views of such a one
    for parameter, view in zip(tied.parameters(), bucket, strict=True):
        parameter.grad = view
    rows = torch.zeros(1000)
    parts = [rows[:10], rows[10:20].view(2, 5), tied[1].weight.detach()]
    found = held(tied, optimizer)

    steps = 2 * 4
    expected = {"parameters": 800, "gradients": 800, "optimizer state": 1600 + steps, "buffers": 5}
    ours = [each for each in found if each.names and each.kind != "activations"]
    assert sums(ours) == expected
    weight, gradients, other = one_of(found, parts[2]), one_of(found, bucket), one_of(found, parts[0])
    assert (weight.kind, weight.names) == ("parameters", ["0.0.weight"])
    assert gradients.as_json() == {
        "bytes": 800,
        "kind": "gradients",
        "name": "0.0.weight and 1 more",
        "shape": [2, 10, 10],
        "dtype": "float32",
        "device": "cpu",
    }
    assert (other.kind, other.bytes, other.as_json()["shape"]) == ("other", 4000, [1000])
    assert {name.partition(" of ")[0] for each in ours for name in each.names if each.kind == "optimizer state"} == {
        *("step", "exp_avg", "exp_avg_sq")
    }


def test_activations_are_found_that_only_the_graph_holds() -> None:
    model = torch.nn.Linear(8, 777, bias=False)
    loss = cross_entropy(model(torch.ones(33, 8)), torch.zeros(33, dtype=torch.long))
    activations = [each for each in held(model, torch.optim.SGD(model.parameters())) if each.kind == "activations"]
    assert [each.bytes for each in activations if each.tensor.numel() == 33 * 777] == [33 * 777 * 4], "log_softmax's"
    del activations
    loss.backward()
    after = held(model, torch.optim.SGD(model.parameters()))
    assert not [each for each in after if each.tensor.numel() == 33 * 777], "it has let go of them"


def test_what_is_to_be_computed_again_is_not() -> None:
    model, passes = torch.nn.Linear(4, 4), []

    def block(inputs: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        result: torch.Tensor = model(inputs).exp()
        return result

    loss = checkpoint(block, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum()
    held(model, torch.optim.SGD(model.parameters()))
    assert len(passes) == 1
    loss.backward()
    assert len(passes) == 2


def test_the_batch_is_known_by_the_frames_of_the_error() -> None:
    model = torch.nn.Linear(4, 4)

    def step(batch: dict[str, Any]) -> None:
        raise MemoryError(len(batch))

    inputs, labels = torch.ones(6, 4), torch.ones(6)
    try:
        try:
            step({"inputs": inputs, "more": [labels], "text": "two"})
        except MemoryError as cause:
            raise RuntimeError("a library's own") from cause
    except RuntimeError as error:
        found = held(model, torch.optim.SGD(model.parameters()), error)
    assert [one_of(found, tensor).kind for tensor in (inputs, labels)] == ["batch", "batch"]


def test_tensors_of_every_make_are_looked_at() -> None:
    model = torch.nn.Embedding(50, 3, sparse=True)
    model(torch.tensor([4, 5])).sum().backward()
    model.register_buffer("nowhere", torch.empty(9, device="meta"))
    found = held(model, torch.optim.SGD(model.parameters()))
    assert sorted(each.bytes for each in found if each.kind == "gradients") == [2 * 8, 2 * 3 * 4]
    assert not [each for each in found if each.names == ["nowhere"]]


class Odd(torch.Tensor):
    """Of a library that has its memory elsewhere."""

    def untyped_storage(self) -> Any:
        raise ValueError("elsewhere")


def test_a_tensor_that_tells_nothing_keeps_no_other_from_being_told() -> None:
    model, odd = torch.nn.Linear(4, 4), torch.ones(3).as_subclass(Odd)
    holders = find_holders(model, torch.optim.SGD(model.parameters()), MemoryError())
    assert holders.unread == 1 and sums(holders.all())["parameters"] >= 4 * (16 + 4), type(odd)


class Greedy(torch.nn.Module):
    """Asks for too much."""

    def forward(self) -> torch.Tensor:
        """Never return."""
        return torch.empty(2**50)


class Around(torch.nn.Module):
    """Holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Greedy()

    def forward(self) -> Any:
        """Never return."""
        return self.inner()


def test_the_lines_that_asked_are_named_without_those_that_only_call(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        Around()()
    write_holders(tmp_path, 0, caught.value, "cpu")
    content = json.loads(holders_file(tmp_path, 0).read_text())
    assert [line.rpartition(" in ")[2] for line in content["asked_in"]][1:] == ["forward", "forward"]
    assert content["asked_in"][-1].startswith(f"{__file__}:")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503 bytes. Error code 12", 4503),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB", 5 * 2**29),
        ("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 256.00 MB on shared pool.", 2**28),
        ("Unable to allocate 7.45 GiB for an array with shape (1000000000,)", int(7.45 * 2**30)),
        ("RESOURCE_EXHAUSTED: Attempting to reserve 1.50G at the bottom of memory", 3 * 2**29),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes.", 1024),
        ("CUDA error: out of memory", None),
    ],
)
def test_how_much_was_asked_for(said: str, expected: int | None) -> None:
    assert asked_bytes(RuntimeError(said)) == expected


def test_what_cannot_be_written_is_told_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    assert re.match(
        r"warning: what held the memory could not be written: (FileExists|NotADirectory)Error: ",
        write_holders(tmp_path, 0, MemoryError(), "cpu"),
    )


def test_while_the_model_is_made_nothing_has_a_name(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(12345))
    told = write_holders(tmp_path, 3, MemoryError("no room"), "cuda" if torch.cuda.is_available() else "cpu")
    content = json.loads(holders_file(tmp_path, 3).read_text())
    assert told.startswith("seen on cpu: ") and told.endswith(
        f"; largest tensors: {tmp_path}/profile/memory-rank-3.json"
    )
    assert content["ran_out"] == "cpu", "Python's own memory is no device's"
    assert (content["rank"], content["after_update"], content["error"]) == (3, None, "MemoryError: no room")
    ours = {"bytes": 4 * 12345, "kind": "parameters", "name": None, "shape": list(weight.shape)}
    assert [each for each in content["largest"] if ours.items() <= each.items()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_held_a_gpu_s_memory_is_told(tmp_path: Path) -> None:
    held_there = [torch.empty(2**28, dtype=torch.uint8, device="cuda") for _ in range(3)]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    told = write_holders(tmp_path, 0, caught.value, "cuda")
    assert re.match(
        r"seen on cuda: other 8\d\d\.\d MB.*; torch has handed out 8\d\d\.\d MB; largest tensors: ", told
    ), told
    content = json.loads(holders_file(tmp_path, 0).read_text())
    assert content["asked_bytes"] == 2**50
    assert content["memory_of_cuda"]["allocated"] >= content["seen_bytes"]["cuda"]["other"] >= 3 * 2**28
    assert content["largest"][0]["count"] == len(held_there)


# --- by the real command ---------------------------------------------------------------------------------


def halves(weights: list[torch.nn.Parameter]) -> list[list[tuple[torch.nn.Parameter, int]]]:
    """Each weight with its rows in the smaller half, and in the larger one."""
    return [[(each, (each.shape[0] + more) // 2) for each in weights] for more in (0, 1)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2), ("fsdp2", 2)])
def test_a_run_whose_memory_runs_out_says_what_held_it(strategy: str, ranks: int, tmp_path: Path) -> None:
    hoards = ranks - 1
    (tmp_path / "run.yaml").write_text(
        f"recipe: {RECIPE}\nrecipe_args: {{hoarding_rank: {hoards}}}\n"
        f"train: {{global_batch_size: 16, micro_batch_size: {8 // ranks}, max_steps: 4}}\n"
        f"parallel: {{device: cpu, devices: {ranks}, strategy: {strategy}}}\n"
        "eval: {batch_size: 1}\nsave: {export: false}\n"
    )
    done = shoal(tmp_path, "run", "run.yaml", "--out", "one")
    assert done.returncode == 9, done.stderr
    assert "Traceback" not in done.stderr
    before, last = done.stderr.splitlines()[-2:]
    assert f"shoal: rank {hoards} (" in before and f"you tried to allocate {hoarding_recipe.PIECE} bytes" in before
    file = holders_file(tmp_path / "one", hoards)
    assert re.match(r"shoal: seen on cpu: activations 134\.\d MB, optimizer state ", last)
    assert re.search(r"; the process holds \d+\.\d MB; largest tensors: ", last) and last.endswith(str(file))
    assert [path.name for path in file.parent.iterdir()] == [file.name], "only the rank that ran out of memory"

    content = json.loads(file.read_text())
    weights = list(prepare_own(Args(), None).build_model().parameters())  # type: ignore[arg-type]  # it needs none
    whole = sum(weight.numel() * weight.element_size() for weight in weights)
    (seen,) = content["seen_bytes"].values()
    held_of = {kind: seen[kind] for kind in ("parameters", "gradients", "optimizer state")}
    steps = 4 * len(weights)
    if strategy == "fsdp2":  # rank 1 has the smaller half of the rows, in as much room as rank 0
        mine, room = (sum(4 * rows * each[0].numel() for each, rows in split) for split in halves(weights))
        assert room <= held_of.pop("parameters") <= room + whole, "those in use are whole, beside their shards"
        assert held_of == {"gradients": room, "optimizer state": 2 * mine + steps}
    else:
        assert held_of == {"parameters": whole, "gradients": whole, "optimizer state": 2 * whole + steps}
    assert seen["activations"] > hoarding_recipe.FIT * hoarding_recipe.PIECE
    rows = 8 // ranks
    batches = 3 if strategy == "ddp" else 2  # it has that in use twice: once on the device cpu, once on cpu:0
    assert seen["batch"] == batches * rows * 8 * 8, "rows of 8 numbers of 8 bytes"
    assert content["largest"][0] == {
        "count": hoarding_recipe.FIT,
        "bytes": hoarding_recipe.PIECE,
        "kind": "activations",
        "name": "ExpBackward0",
        "shape": [hoarding_recipe.PIECE // 4],
        "dtype": "float32",
        "device": "cpu",
    }
    assert [content[key] for key in ("rank", "after_update", "asked_bytes", "ran_out", "unread_tensors")] == [
        *(hoards, 1, hoarding_recipe.PIECE, "cpu", 0)
    ]
    assert re.fullmatch(rf"{RECIPE}:\d+ in loss", content["asked_in"][-1])
    memory = content["memory_of_process"]
    assert memory["resident"] > seen["activations"] and memory["address_space"] < memory["address_space_limit"]
    assert len(file.read_text().splitlines()) < 60, "for people"
    assert file.name in (tmp_path / "one/report.html").read_text()

    put_aside(tmp_path / "one")
    assert not file.exists() and (tmp_path / "one/attempts/1" / file.name).is_file(), "it tells of that start alone"
