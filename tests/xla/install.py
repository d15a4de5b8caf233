"""Installs torch_xla, the torch that goes with it, and shoal, into the environment whose Python runs this.

`make test-xla` runs it, in an environment that has nothing but pip. All else is as in constraints.txt.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from tests.xla.cuda_stand_ins import make_stand_ins

ROOT = Path(__file__).parents[2]

PAIR = ("torch==2.9.0", "torch_xla==2.9.0")
"""The newest torch_xla and its torch, which Colab's TPU runtime has as well (2026-08)."""

WANTED_BY_THE_PAIR = (
    *("absl-py", "filelock", "fsspec", "jinja2", "networkx", "numpy", "PyYAML", "requests", "setuptools", "sympy"),
    "typing_extensions",
)
"""But for NVIDIA's libraries and Triton."""

WANTED_BY_TESTS = ("pytest", "pytest-xdist")

WITHOUT_TORCH = ("torch", "accelerate", "peft")
"""What would bring torch's own requirements along: 3 GB of libraries of NVIDIA."""


def main() -> None:
    """Install everything, or fail."""
    pip("--no-deps", *PAIR)
    made = make_stand_ins(Path(sysconfig.get_path("platlib"), "torch"))
    print(f"stand-ins for {', '.join(made) or 'nothing'}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [each for each in project["dependencies"] if named(each) not in WITHOUT_TORCH]
    pip("--constraint", str(ROOT / "constraints.txt"), *wanted, *WANTED_BY_THE_PAIR, *WANTED_BY_TESTS)
    pip("--constraint", str(ROOT / "constraints.txt"), "--no-deps", "accelerate", "peft")
    pip("--no-deps", "--editable", str(ROOT))


def named(requirement: str) -> str:
    """The name of the package that is required."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return match[0]


def pip(*arguments: str) -> None:
    """Run `pip install`. Of what it installs the tests import little, which is compiled then."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", *arguments], check=True)


if __name__ == "__main__":
    main()
