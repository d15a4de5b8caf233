"""Makes stand-ins for the CUDA libraries that torch's wheel on PyPI is linked to, so that it is imported without them.

Only ever for the environment of the tests of XLA, never for what users install. torch_xla 2.9 goes with torch 2.9, of
which PyPI has a build for CUDA alone; the libraries of NVIDIA that it wants are 3 GB, and no test here has a GPU. Each
function of a stand-in does nothing but say that there is no device, which is what `torch.cuda.is_available()` asks.

A library is loaded only where each function that it names is found. The linker does not ask in which library, but for
functions with a version. So those go where they belong, and all others into each library that has no versions.

Needs gcc, and readelf of binutils.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

NO_DEVICE = 100
"""cudaErrorNoDevice."""


OF_CUDA = ("cu", "nccl")
"""How functions without a version begin that are CUDA's, and not C++'s or Python's."""


def make_stand_ins(torch: Path) -> list[str]:
    """Write stand-ins for all libraries that those in `torch`, the installed package, want and that are not there.

    Returns: their names; none where torch wants nothing that is not there.
    """
    folder = torch / "lib"
    libraries = [*sorted(folder.glob("*.so*")), *sorted(torch.glob("_C*.so"))]
    missing = sorted({name for library in libraries for name in _needed(library) if not _is_there(name, folder)})
    if not missing:
        return []
    functions, versions = _functions(libraries, missing)
    for name in missing:
        _build(folder / name, functions[name], versions.get(name))
    return missing


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _read("--dynamic", library))


def _is_there(name: str, folder: Path) -> bool:
    if (folder / name).exists():
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _functions(libraries: Iterable[Path], missing: list[str]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """The functions that each of the `missing` is to have, and their version where they have one."""
    wanted: set[tuple[str, str]] = set()
    defined: set[str] = set()
    versions: dict[str, str] = {}
    for library in libraries:
        for line in _read("--dyn-syms", library).splitlines():
            columns = line.split()
            if len(columns) < 8 or not columns[0].rstrip(":").isdecimal():
                continue
            name, _, version = columns[7].partition("@")
            if columns[6] != "UND":
                defined.add(name)
            elif columns[4] != "WEAK":  # a weak one may be missing
                wanted.add((name, version))
        for name, version in re.findall(r"File: (\S+) +Cnt: 1\n.*Name: (\S+)", _read("--version-info", library)):
            if name in missing:
                versions[name] = version
    homes = {version: [name] for name, version in versions.items()}
    homes[""] = [name for name in missing if name not in versions]
    functions: dict[str, set[str]] = defaultdict(set)
    for name, version in wanted - {(name, "") for name in defined}:
        if version or name.startswith(OF_CUDA):
            for home in homes.get(version, ()):
                functions[home].add(name)
    return functions, versions


def _build(library: Path, functions: set[str], version: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions")
        source.write_text("".join(_in_c(name) for name in sorted(functions)))
        script.write_text(f"{version} {{ global: *; }};\n")
        subprocess.run(
            [
                *("gcc", "-w", "-shared", "-fPIC", "-fno-builtin", str(source), "-o", str(library)),
                *(f"-Wl,-soname,{library.name}", *([f"-Wl,--version-script={script}"] if version else [])),
            ],
            check=True,
        )


def _in_c(name: str) -> str:
    if re.search(r"String|Name|ncclGetLastError", name):
        return f'const char *{name}(void) {{ return "there is no CUDA here"; }}\n'
    return f"int {name}(void) {{ return {NO_DEVICE}; }}\n"


def _read(what: str, library: Path) -> str:
    command = ["readelf", "--wide", what, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
