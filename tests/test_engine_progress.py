"""What a person sees while a run goes on: bars with facts below them on a real terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

PROGRAM = """
from launch.engine.progress import Display
display = Display(True)
display.note("saved", "after update 1")
display.start("training", 3)
for update in range(3):
    display.note("evaluated", f"after update {update}: [loss] {update}.5")
    display.advance(1, f"loss {update}.25")
    display._progress.refresh()
display.note("saved", None)
display._progress.refresh()
display.say("a line")
display._progress.refresh()
display.finish()
display.close()
"""


def on_a_terminal(program: str) -> str:
    """What a terminal of 100 columns is sent."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=follower, stderr=follower, stdin=follower, env=environment
    )
    os.close(follower)
    found = b""
    while True:
        try:
            found += (piece := os.read(leader, 65536))
        except OSError:  # the other end is closed
            break
        if not piece:
            break
    os.close(leader)
    assert process.wait(30) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found.decode())


def test_a_terminal_shows_facts_below_the_bar_while_they_hold() -> None:
    shown = on_a_terminal(PROGRAM)
    assert "[dim]" not in shown and "a line" in shown
    frames = shown.split("training")
    assert re.search(r"3/3\s+loss 2\.25", frames[-2])
    assert (
        re.search(r"\n\r?saved +after update 1\s", frames[2]) and "evaluated  after update 2: [loss] 2.5" in frames[-2]
    )
    assert "after update 1\r" not in frames[-2] and "saved" not in frames[-2], "it no longer holds"


def test_elsewhere_there_are_plain_lines_and_no_facts() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "training 3/3  loss 2.25\na line\n"
