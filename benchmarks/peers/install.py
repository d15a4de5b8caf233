"""Make the environments of the peers: each in a folder of its own under .venv-peers, with the torch of constraints.txt.

python -m benchmarks.peers.install [NAME …]     all of them, without names; about 1 GB each

`transformers` serves shoal, Trainer and the plain loops alike, in the versions of constraints.txt: so loops are
compared, not versions. `trl` has the same versions; it is apart because pip could change them. LitGPT and torchtune ask
for other versions of huggingface_hub and get them; of the constraints only torch holds for them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-peers"

CONSTRAINTS = ROOT / "constraints.txt"

PACKAGES: dict[str, list[list[str]]] = {
    "transformers": [["--constraint", str(CONSTRAINTS), "--editable", str(ROOT)]],
    "trl": [["--constraint", str(CONSTRAINTS), "trl==1.16.0"]],
    "litgpt": [["litgpt==0.5.13"]],
    "torchtune": [["torchao==0.15.0", "torchtune==0.6.1"]],
}
"""By name of an environment what pip is asked for, after torch, one call after the other."""


def interpreter(name: str) -> Path:
    """The Python of an environment, whether or not it is there."""
    return FOLDER / name / "bin" / "python"


def torch_version() -> str:
    """The one of constraints.txt, so that all contenders compute with the same."""
    found = re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert found, "constraints.txt names a torch"
    return found[1]


def install(name: str) -> None:
    """Make one environment anew, and see that pip holds it to be consistent."""
    venv.create(FOLDER / name, clear=True, with_pip=True)
    torch = f"torch=={torch_version()}"
    pip = [str(interpreter(name)), "-m", "pip", "--quiet"]
    # The peers' own requirements may name a newer torch, which comes with gigabytes of libraries for GPUs.
    for asked in ([torch], *([torch, *packages] for packages in PACKAGES[name])):
        subprocess.run([*pip, "install", *asked], check=True)
    subprocess.run([*pip, "check"], check=False)


def main() -> None:
    """Install what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGES))
    names = parser.parse_args().names or list(PACKAGES)
    if unknown := set(names) - set(PACKAGES):
        sys.exit(f"{', '.join(sorted(unknown))}: there are {', '.join(PACKAGES)}")
    for name in names:
        install(name)
        print(f"{name}: {FOLDER / name}", flush=True)


if __name__ == "__main__":
    main()
