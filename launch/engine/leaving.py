"""How ranks leave their process group: none before all have come out of their last exchange."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import Store, distributed_c10d  # type: ignore[attr-defined]

OUT, GONE = "shoal/out", "shoal/gone"


def leave() -> None:
    """Leave the process group, if there is one. Every rank must call this, after its last collective.

    gloo closes its connections with SO_LINGER 0 (`Pair::close` in gloo/transport/tcp/pair.cc): what a rank that has
    gone had still to send is lost, and one that waits for it ends with "Connection reset by peer". So the ranks tell
    each other in the store that they wait for nothing more; and whoever serves the store leaves last.
    """
    if not dist.is_initialized():
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    if size > 1:
        store = distributed_c10d._get_default_store()
        _count(store, OUT, size)
        store.wait([OUT + "/all"])
        if rank:
            _count(store, GONE, size - 1)
        else:
            store.wait([GONE + "/all"])
    dist.destroy_process_group()


def _count(store: Store, name: str, size: int) -> None:
    """Add one to a number, and say so in the store when it is `size`."""
    if store.add(name, 1) == size:
        store.set(name + "/all", "")
