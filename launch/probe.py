"""python -m launch.probe BYTES: what torch sees here, as a line of JSON; among several processes, a timed exchange."""

from __future__ import annotations

import json
import sys

from launch.meeting import answer
from launch.topology import World, enter_world, read_world, roll_call, usable_cores


def main() -> None:
    """Meet the others, if there are any, measure, and print what was found."""
    announced, listener = roll_call(), None
    world = read_world() if announced else World()  # alone, though this may be one of several tasks of SLURM
    if announced:
        meeting = answer(announced, world.rank, world.size, usable_cores())
        enter_world(world, meeting.address, meeting.port, meeting.interface)
        listener = meeting.listener
    from launch.engine.exchange import measure

    place = (world.rank, world.size, world.local_rank, world.local_size)
    print(json.dumps(measure(int(sys.argv[1]), *place, listener)))


if __name__ == "__main__":
    main()
