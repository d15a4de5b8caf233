"""The recipe of `own_recipe`, with a rank whose memory runs out in its second update: its address space is limited."""

from __future__ import annotations

import dataclasses
import itertools
import os
import resource
from typing import Any

import psutil

from launch.recipe import Prepared, RecipeContext
from tests import own_recipe

FIT = 2
"""Pieces that there is room for."""

PIECE = 2**26
"""Bytes of one. What is too little for one more is enough for all that follows."""


class Args(own_recipe.Args):
    """What a run file may set."""

    hoarding_rank: int = 0
    """The rank of which that is so."""
    trained_before: int = 3
    """How many of its micro-batches are trained on before."""


def prepare(args: Args, context: RecipeContext) -> Prepared:
    """The loss needs more memory than there is."""
    import torch

    prepared = own_recipe.prepare(args, context)
    hoards = os.environ.get("RANK", "0") == str(args.hoarding_rank)
    trained = itertools.count()

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        total = prepared.loss(model, batch)
        if not hoards or not total.requires_grad or next(trained) < args.trained_before:
            return total
        room = psutil.Process().memory_info().vms + FIT * PIECE + PIECE * 3 // 4
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        hoard = []
        while True:
            hoard.append(torch.exp(total.expand(PIECE // 4)))

    return dataclasses.replace(prepared, loss=loss)
