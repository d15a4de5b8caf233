"""The recipe of `own_recipe`, with samples that are slow to prepare and a note of each that was."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path

from pydantic import Field

from launch.errors import DataError
from launch.recipe import LocalPath, Prepared, RecipeContext
from tests import own_recipe


class Args(own_recipe.Args):
    """What a run file may set."""

    notes: LocalPath
    """A file that gets a line for each prepared sample: process, split and number."""
    seconds: float = Field(0.0, ge=0)
    """How long all samples take together."""
    breaks_at: int | None = None
    """A training sample that cannot be prepared, for a reason nobody thought of."""
    refused: bool = False
    """Whether that reason was thought of."""


SIZES = {"train": 16, "validation": 4}


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """Each split in a folder of its own."""
    prepared = own_recipe.prepare(args, context)
    folders = {split: context.cache.folder(split, split, partial(write, args, split)) for split in SIZES}
    rows = {split: [json.loads(path.read_text()) for path in sorted(folders[split].iterdir())] for split in SIZES}
    assert {split: len(rows[split]) for split in SIZES} == SIZES, "half a cache was loaded"
    return dataclasses.replace(prepared, train=rows["train"], validation=rows["validation"])


def write(args: Args, split: str, folder: Path) -> None:
    """A file for each sample."""
    for number in range(SIZES[split]):
        with Path(args.notes).open("a") as notes:
            notes.write(f"{os.getpid()} {split} {number}\n")
        if (split, number) == ("train", args.breaks_at):
            if args.refused:
                raise DataError(f"sample {number}: is not to be had; leave it out")
            raise ValueError(f"sample {number} is odd")
        time.sleep(args.seconds / sum(SIZES.values()))
        (folder / f"{number:02d}.json").write_text(json.dumps([(number + step) % 11 for step in range(8)]))
