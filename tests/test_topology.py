"""What is read from the environment and the machine, and what of it is never written down."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from launch.errors import TopologyError
from launch.topology import (
    World,
    _cpu_has_bf16,
    cache_folder,
    hub_is_off,
    is_supervised,
    read_machine,
    read_world,
    recorded_environment,
    stray_variables,
    worker_environment,
)

# --- the world -------------------------------------------------------------------------------------------


def ranks(**names: str) -> dict[str, str]:
    return {"PATH": "/bin", **names}


@pytest.mark.parametrize(
    "environ",
    [ranks(), ranks(LOCAL_RANK="0"), ranks(LOCAL_WORLD_SIZE="4"), ranks(RANK="", WORLD_SIZE="", LOCAL_RANK="")],
)
def test_without_a_launcher_we_are_alone(environ: dict[str, str]) -> None:
    assert read_world(environ) == World(rank=0, size=1, local_rank=0, local_size=1, launched=False)


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        (ranks(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"), World(0, 1, 0, 1, launched=True)),
        (ranks(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3"), World(3, 4, 3, 4, launched=True)),
        (ranks(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"), World(5, 8, 1, 4, launched=True)),
        (ranks(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE=""), World(1, 2, 1, 2, launched=True)),
    ],
)
def test_the_world_of_a_launcher(environ: dict[str, str], world: World) -> None:
    assert read_world(environ) == world


HOW = "start the workers with `shoal run`, `accelerate launch`, `torchrun` or `srun`, which set all of them"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (ranks(RANK="0"), f"the environment sets RANK but not WORLD_SIZE, LOCAL_RANK; {HOW}"),
        (ranks(WORLD_SIZE="2"), f"the environment sets WORLD_SIZE but not RANK, LOCAL_RANK; {HOW}"),
        (ranks(RANK="0", WORLD_SIZE="2"), f"the environment sets RANK, WORLD_SIZE but not LOCAL_RANK; {HOW}"),
        (
            ranks(RANK="0", LOCAL_RANK="0", WORLD_SIZE=""),
            f"the environment sets RANK, LOCAL_RANK but not WORLD_SIZE; {HOW}",
        ),
        (
            ranks(RANK="0", WORLD_SIZE="two", LOCAL_RANK="0"),
            "the environment holds RANK=0 WORLD_SIZE=two LOCAL_RANK=0, which are not all whole numbers",
        ),
        (
            ranks(RANK="0.5", WORLD_SIZE="2", LOCAL_RANK="0"),
            "the environment holds RANK=0.5 WORLD_SIZE=2 LOCAL_RANK=0, which are not all whole numbers",
        ),
    ],
)
def test_a_partial_or_garbled_world_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        read_world(environ)
    assert str(caught.value) == message


def test_a_garbled_local_size_is_shown() -> None:
    environ = ranks(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="both")
    with pytest.raises(TopologyError, match="LOCAL_WORLD_SIZE=both"):
        read_world(environ)


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param(ranks(RANK="0", WORLD_SIZE="0", LOCAL_RANK="0"), id="world of none"),
        pytest.param(ranks(RANK="-1", WORLD_SIZE="2", LOCAL_RANK="0"), id="negative rank"),
        pytest.param(ranks(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0"), id="rank outside its world"),
        pytest.param(ranks(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="0"), id="no local processes"),
        pytest.param(ranks(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4"), id="more here than at all"),
        pytest.param(ranks(RANK="0", WORLD_SIZE="4", LOCAL_RANK="2", LOCAL_WORLD_SIZE="2"), id="local rank outside"),
    ],
)
def test_a_world_that_cannot_be_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(TopologyError, match="WORLD_SIZE"):
        read_world(environ)


# --- the machine -----------------------------------------------------------------------------------------


def test_this_machine() -> None:
    machine = read_machine()
    assert machine.host == os.uname().nodename
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.gpus >= 0


# --- folders and switches --------------------------------------------------------------------------------


def test_the_cache_folder_by_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert cache_folder({}) == home / ".cache/shoal"
    assert cache_folder({"XDG_CACHE_HOME": ""}) == home / ".cache/shoal"
    assert cache_folder({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/shoal")
    assert cache_folder({"XDG_CACHE_HOME": "/xdg", "SHOAL_CACHE": "/own"}) == Path("/own")
    assert cache_folder({"XDG_CACHE_HOME": "/xdg", "SHOAL_CACHE": ""}) == Path("/xdg/shoal")
    assert cache_folder({"SHOAL_CACHE": "~/own"}) == home / "own"
    assert cache_folder({"SHOAL_CACHE": "own"}) == tmp_path / "own"


@pytest.mark.parametrize(
    ("value", "off"),
    [("1", True), ("true", True), ("YES", True), ("on", True), ("0", False), ("", False), ("false", False)],
)
def test_whether_the_hub_is_off(value: str, off: bool) -> None:
    assert hub_is_off({"HF_HUB_OFFLINE": value}) is off


def test_switches_that_are_not_set() -> None:
    assert not hub_is_off({})
    assert not is_supervised({})
    assert not is_supervised({"SHOAL_SUPERVISED": "0"})
    assert is_supervised({"SHOAL_SUPERVISED": "1"})


def test_the_environment_of_a_worker_is_ours_with_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_TEST_KEPT", "kept")
    monkeypatch.setenv("SHOAL_TEST_CHANGED", "old")
    environment = worker_environment({"SHOAL_TEST_CHANGED": "new", "SHOAL_TEST_ADDED": "more"})
    assert environment["SHOAL_TEST_KEPT"] == "kept"
    assert environment["SHOAL_TEST_CHANGED"] == "new"
    assert environment["SHOAL_TEST_ADDED"] == "more"
    assert os.environ["SHOAL_TEST_CHANGED"] == "old"


# --- the record ------------------------------------------------------------------------------------------

SECRET_NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
    *("SLURM_JWT", "NCCL_FAKE_PASSWORD", "ACCELERATE_AUTH", "ACCELERATE_AUTH_TOKEN", "SHOAL_SECRET"),
    *("TORCH_CREDENTIALS", "CUDA_COOKIE", "TRANSFORMERS_TOKEN", "HF_HOME_KEY", "XLA_passwd", "TOKENIZERS_AUTH"),
    *("GITHUB_TOKEN", "OPENAI_API_KEY"),
)
NOT_OURS = ("DATABASE_URL", "HOME", "USER", "HTTPS_PROXY", "PATH", "RANKING", "LS_COLORS")
INTERESTING = {
    "CUDA_VISIBLE_DEVICES": "0,1",
    "NCCL_DEBUG": "INFO",
    "NCCL_SOCKET_IFNAME": "eth0",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "OMP_NUM_THREADS": "4",
    "MKL_NUM_THREADS": "4",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/cache",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "SLURM_JOB_ID": "42",
    "SHOAL_CACHE": "/cache",
    "PJRT_DEVICE": "CPU",
    "XLA_FLAGS": "--a",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
}


def test_the_record_holds_what_changes_a_run_and_nothing_else() -> None:
    environ = {**dict.fromkeys((*SECRET_NAMES, *NOT_OURS), "pale-blue-dot"), **INTERESTING}
    recorded = recorded_environment(environ)
    assert recorded == INTERESTING
    assert list(recorded) == sorted(recorded)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_not_recorded_under_one_of_our_own_names_either(name: str) -> None:
    for spelled in (f"SHOAL_{name}", f"SLURM_{name.lower()}", f"NCCL_{name}_2"):
        assert recorded_environment({spelled: "pale-blue-dot"}) == {}


@pytest.mark.parametrize("value", ["hf_" + "aB3" * 9, "https://user:pale-blue-dot@host", "sk-" + "aB3" * 9])
def test_a_secret_under_an_innocent_name_is_not_recorded(value: str) -> None:
    assert value not in str(recorded_environment({"SLURM_JOB_COMMENT": value, "SHOAL_NOTE": value}))


def test_variables_that_would_change_a_run_behind_its_plan_are_kept_from_the_workers() -> None:
    environ = {
        **{"ACCELERATE_MIXED_PRECISION": "fp16", "FSDP_VERSION": "1", "DEEPSPEED_X": "1", "DS_ACCELERATOR": "cuda"},
        **{"PATH": "/bin", "HF_HOME": "/hub", "DSA": "1", "NCCL_DEBUG": "INFO"},
    }
    assert stray_variables(environ) == ["ACCELERATE_MIXED_PRECISION", "DEEPSPEED_X", "DS_ACCELERATOR", "FSDP_VERSION"]
    assert worker_environment({"ACCELERATE_USE_CPU": "true"}, environ) == {
        **{"PATH": "/bin", "HF_HOME": "/hub", "DSA": "1", "NCCL_DEBUG": "INFO"},
        "ACCELERATE_USE_CPU": "true",
    }


@pytest.mark.parametrize(
    ("flags", "known"), [("fpu amx_bf16 avx512f", True), ("fpu avx512_bf16 avx512f", False), (None, False)]
)
def test_a_cpu_with_units_for_bf16_is_known_by_its_flags(tmp_path: Path, flags: str | None, known: bool) -> None:
    path = tmp_path / "cpuinfo"
    if flags:
        path.write_text(f"processor\t: 0\nmodel name\t: some amx_bf16 name\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert _cpu_has_bf16(path) is known


@pytest.mark.parametrize("built", [False, True])
def test_what_torch_was_built_for_is_seen_without_importing_it(
    built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "torch/lib/libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('imported')")
    if built:
        library.touch()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert read_machine().torch_has_cuda == built
