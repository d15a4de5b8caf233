"""GPUs and TPUs are found in the files of their drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.accelerators import count_gpus, find_tpus, xla_on_cpu

# --- GPUs ------------------------------------------------------------------------------------------------


def root_with(folder: Path, *, driver: int = 0, nodes: tuple[str, ...] = ()) -> Path:
    for number in range(driver):
        (folder / "proc/driver/nvidia/gpus" / f"0000:{number:02x}:00.0").mkdir(parents=True)
    (folder / "dev").mkdir()
    for name in nodes:
        (folder / "dev" / name).touch()
    return folder


def test_gpus_are_counted_from_the_driver_else_from_the_device_files(tmp_path: Path) -> None:
    assert count_gpus({}, tmp_path / "nothing") == 0
    (tmp_path / "a").mkdir()
    assert count_gpus({}, root_with(tmp_path / "a", driver=8)) == 8
    (tmp_path / "b").mkdir()
    others = ("nvidiactl", "nvidia-uvm", "nvidia-modeset", "nvidia-caps")
    assert count_gpus({}, root_with(tmp_path / "b", nodes=("nvidia0", "nvidia1", "nvidia10", *others))) == 3
    (tmp_path / "c").mkdir()
    assert count_gpus({}, root_with(tmp_path / "c", driver=2, nodes=("nvidia0", *others))) == 2


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0,1,2,3", 4),
        ("0", 1),
        ("3", 1),
        ("2,0", 2),
        (" 1 , 2 ", 2),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1932f937-d72c-4106-c12f-20bd9faed9f6", 2),
        ("MIG-3eb87630-93d5-b2b6-b8ff-9b359caf4ee2", 1),
        # CUDA ignores everything from the first invalid name on.
        ("0,1,2,3,4,5", 4),
        ("0,9", 1),
        ("9,0", 0),
        ("0,,1", 1),
        ("NoDevFiles", 0),  # what SLURM sets for a job without GPUs
        ("none", 0),
    ],
)
def test_cuda_visible_devices_narrows_the_count(visible: str, count: int, tmp_path: Path) -> None:
    root = root_with(tmp_path, driver=4)
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}, root) == count


def test_cuda_visible_devices_makes_no_gpu(tmp_path: Path) -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, root_with(tmp_path)) == 0


# --- TPUs ------------------------------------------------------------------------------------------------

PCI = {"v3": "0x0027", "v5e": "0x0063", "network": "0x0042"}


def computer(folder: Path, *devices: str, accel: int = 0, vfio: int = 0) -> Path:
    """The root of a file system with devices on its PCI bus, all of Google's, and with device files."""
    for number, name in enumerate(devices):
        device = folder / f"sys/bus/pci/devices/0000:00:0{number}.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1ae0\n")
        (device / "device").write_text(f"{PCI[name]}\n")
    (folder / "dev/vfio").mkdir(parents=True)
    for path in (*(f"accel{number}" for number in range(accel)), *(f"vfio/{number}" for number in range(vfio))):
        (folder / "dev" / path).touch()
    (folder / "dev/vfio/vfio").touch()
    return folder


@pytest.mark.parametrize(
    ("variables", "devices", "files", "found"),
    [
        ({}, (), {}, (0, "")),
        ({}, ("network",), {}, (0, "")),
        ({}, (), {"vfio": 4}, (0, "")),  # a GPU, say, that is handed to a virtual machine
        ({}, ("network", "v5e"), {}, (1, "TPU v5e")),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, ("v5e",) * 8, {}, (8, "TPU v5e")),
        ({}, ("v3",) * 4, {}, (8, "TPU v2 or v3")),
        ({"PJRT_DEVICE": "CPU"}, ("v5e",), {}, (0, "")),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-4"}, (), {"accel": 4}, (4, "TPU v5e")),
        ({"TPU_ACCELERATOR_TYPE": "v6e-8"}, (), {"vfio": 8}, (8, "TPU v6e")),
        ({"PJRT_DEVICE": "TPU"}, (), {}, (1, "TPU")),
        ({"TPU_NAME": "local"}, (), {}, (1, "TPU")),
    ],
)
def test_tpus_are_found_on_the_bus_else_by_device_files_else_by_what_is_said(
    variables: dict[str, str], devices: tuple[str, ...], files: dict[str, int], found: tuple[int, str], tmp_path: Path
) -> None:
    assert find_tpus(variables, computer(tmp_path, *devices, **files)) == found


def test_another_make_with_the_number_of_a_chip_is_no_tpu(tmp_path: Path) -> None:
    root = computer(tmp_path, "v5e", "v5e")
    (root / "sys/bus/pci/devices/0000:00:01.0/vendor").write_text("0x10de\n")
    assert find_tpus({}, root) == (1, "TPU v5e")


def test_a_device_on_the_bus_that_says_nothing_is_none(tmp_path: Path) -> None:
    root = computer(tmp_path, "v5e", "v5e")
    (root / "sys/bus/pci/devices/0000:00:01.0/device").unlink()
    assert find_tpus({}, root) == (1, "TPU v5e")


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, 0),
        ({"PJRT_DEVICE": "TPU"}, 0),
        ({"PJRT_DEVICE": "cpu"}, 1),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}, 2),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "two"}, 1),
    ],
)
def test_the_cpu_has_xla_devices_where_that_is_said(variables: dict[str, str], devices: int) -> None:
    assert xla_on_cpu(variables) == devices
