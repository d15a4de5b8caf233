"""A rank that only meets the others, as real ones do: `stand_in_rank.py … RUN_FOLDER`, before a real one's command.

It writes down where they met and what it may use. TORCH=1: also how many threads torch computes with.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch.meeting import Meeting, answer
from launch.topology import read_world, roll_call


def greet(meeting: Meeting, size: int, job: str) -> list[str]:
    """Exchange the number of the job with every other rank, at the port that rank 0 holds; what was heard."""
    if meeting.listener is None:
        while True:
            try:
                with socket.create_connection((meeting.address, meeting.port), timeout=5) as peer:
                    peer.sendall(job.encode())
                    return [peer.makefile().read()]
            except ConnectionRefusedError:  # rank 0 does not listen yet
                time.sleep(0.05)
    meeting.listener.listen(size)
    heard = []
    for _ in range(size - 1):
        peer, _ = meeting.listener.accept()
        with peer:
            heard.append(peer.recv(64).decode())
            peer.sendall(job.encode())
    return heard


def main() -> None:
    folder, job = Path(sys.argv[-1]), os.environ["SLURM_JOB_ID"]
    world, announced = read_world(), roll_call()
    assert announced is not None, "several ranks have a roll call"
    cpus = len(os.sched_getaffinity(0))
    meeting = answer(announced, world.rank, world.size, cpus)
    told = {"heard": greet(meeting, world.size, job), "port": meeting.port, "cpus": cpus}
    if "TORCH" in os.environ:
        import torch

        told["threads"] = torch.get_num_threads()
    (folder / f"met-{world.rank}.json").write_text(json.dumps(told))
    if world.rank == 0:
        time.sleep(float(os.environ.get("STAYS", "0")))
        (folder / "result.json").write_text(json.dumps({"summary": "they met"}))


if __name__ == "__main__":
    main()
