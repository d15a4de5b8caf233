"""Our commands as a user starts them: in a process of their own, from a folder of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(
    folder: Path, module: str, *arguments: str, cache: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module`, started in `folder`; prepared data is kept in `cache`, else in the folder."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SHOAL_CACHE": str(cache or folder.absolute() / "cache"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def shoal(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user in `folder` types it."""
    return python(folder, "launch", *arguments, **environment)
