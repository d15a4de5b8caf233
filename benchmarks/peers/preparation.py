"""From raw text to blocks of tokens, cold and from the cache: shoal beside datasets.map over 1,000 rows at once.

python -m benchmarks.peers.preparation [--rounds 3] [--rows FILE --tokenizer FOLDER] [--times 5]

Before it, once: python -m benchmarks.peers.install transformers. Rows are lines. A round starts with empty caches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.peers.install import ROOT, interpreter
from benchmarks.peers.rounds import Column, in_turn, machine, run, table
from benchmarks.peers.training import add_data
from benchmarks.peers.workload import make

NAMES = {"shoal": "shoal", "datasets.map": "map"}
LENGTH = 256


def measure(how: str, folder: Path, rows: int) -> dict[str, float]:
    """Cold, then from the cache, each in a process of its own."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as caches:
        variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "SHOAL_CACHE": caches, "HF_DATASETS_CACHE": caches}
        for kind in ("cold", "cached"):
            out = Path(caches) / "numbers.json"
            program = [str(interpreter("transformers")), "-m", "benchmarks.peers.preparing", how]
            seen = run([*program, *map(str, (folder / "train.txt", folder / "model", LENGTH, out))], folder, variables)
            seconds, blocks = json.loads(out.read_text())
            found |= {f"{kind}_seconds": seconds, f"{kind}_rows_per_second": rows / seconds, "blocks": blocks}
            found |= {f"{kind}_bytes": seen.process_bytes}
    return found


COLUMNS = (
    Column("rows/s, cold", "cold_rows_per_second", against=True),
    Column("s, cold", "cold_seconds", ".2f"),
    Column("s, cached", "cached_seconds", ".3f"),
    Column("memory at most, MB, cold", "cold_bytes", unit=1e6),
    Column("blocks", "blocks"),
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=5, help="how often the text is there, one after the other")
    add_data(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make("blocks", folder, "tiny", None, given.tokenizer, given.rows, LENGTH)
        text = (folder / "train.txt").read_text(encoding="utf-8") * given.times
        (folder / "train.txt").write_text(text, encoding="utf-8")
        rows = text.count("\n")
        found = in_turn(NAMES, given.rounds, lambda each: measure(NAMES[each], folder, rows), "preparation")
    print(f"preparation: {rows:,} lines, {len(text) / 1e6:.1f} MB, {given.rounds} rounds; {machine()}\n")
    print(table(found, COLUMNS))


if __name__ == "__main__":
    main()
