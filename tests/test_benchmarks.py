"""Beside other trainers: all do the work they are told to do, or are refused, and numbers are told as they are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers import contenders, with_shoal
from benchmarks.peers.contenders import CONTENDERS, check
from benchmarks.peers.hugging_face import rows_of
from benchmarks.peers.rounds import Column, CommandError, table
from benchmarks.peers.saving import stalls
from benchmarks.peers.ticks import Ticks
from benchmarks.peers.workload import Workload, make

LENGTH, BATCH, UPDATES = 32, 4, 3


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("workload")
    rows = folder / "rows.txt"
    rows.write_text("".join(f"the {number} ducks swim to the other side of the pond\n" for number in range(200)))
    make("blocks", folder, "tiny", None, None, rows, LENGTH)
    return Workload("blocks", folder, LENGTH, BATCH, UPDATES)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the environments of the peers the one that we run in, which has all that these need."""
    monkeypatch.setattr(contenders, "interpreter", lambda name: Path(sys.executable))


def test_the_others_are_given_the_very_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"source": f"July {day}th, 1979", "target": f"1979-07-{day}"} for day in range(10, 20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(Workload("translation", tmp_path, LENGTH, BATCH, UPDATES), "train").to_list() == rows


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["shoal", "Trainer", "Accelerate loop"])
def test_a_contender_makes_the_updates_and_counts_the_tokens_that_it_is_asked_for(
    workload: Workload, name: str
) -> None:
    _, (ticks,) = CONTENDERS[name].measure(workload)
    assert ticks.tokens == [BATCH * LENGTH] * UPDATES
    assert ticks.times == sorted(ticks.times) and len(set(ticks.times)) == UPDATES


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_an_accelerate_loop_on_two_ranks_trains_two(workload: Workload) -> None:
    _, ticks = CONTENDERS["Accelerate loop"].measure(replace(workload, ranks=2))
    assert [each.tokens for each in ticks] == [[BATCH * LENGTH // 2] * UPDATES] * 2


def notes(updates: int) -> Ticks:
    found = Ticks()
    for _ in range(updates):
        found.update(BATCH * LENGTH)
    return found


def test_a_run_of_fewer_ranks_or_updates_than_asked_for_is_refused(workload: Workload) -> None:
    two = replace(workload, ranks=2)
    check(two, [notes(UPDATES), notes(UPDATES)])
    with pytest.raises(CommandError, match="trained on 1 ranks instead of 2"):
        check(two, [notes(UPDATES)])
    with pytest.raises(CommandError, match=f"made {UPDATES - 1} updates instead of {UPDATES}"):
        check(two, [notes(UPDATES), notes(UPDATES - 1)])


def test_how_many_ranks_shoal_had_is_read_from_its_run(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"peak_memory": [1, 1]}))
    lines = [{"kind": "train", "time": 5.0 + number, "tokens": 128 * number, "loss": 1.0} for number in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = with_shoal.ticks(workload, tmp_path)
    assert (found.ranks, found.tokens, found.times) == (2, [128, 128, 128], [6.0, 7.0, 8.0])


def test_a_table_has_medians_and_how_many_times_the_first_row_each_is() -> None:
    found = {
        "shoal": [{"speed": 100.0, "bytes": 2e6}, {"speed": 400.0, "bytes": 4e6}, {"speed": 200.0, "bytes": 3e6}],
        "other": [{"speed": 50.0, "bytes": 6e6}, {"speed": 150.0, "bytes": 12e6}],
    }
    columns = (Column("tokens/s", "speed", against=True), Column("MB", "bytes", ".1f", unit=1e6, against=True))
    assert table(found, columns).splitlines() == [
        "|  | tokens/s | ratio | MB | ratio | least to most |",
        "|---|---|---|---|---|---|",
        "| shoal | 200 | 1.000 | 3.0 | 1.000 | 100 to 400 |",
        "| other | 100 | 0.500 | 9.0 | 3.000 | 50 to 150 |",
    ]


def test_a_stall_is_what_the_update_with_the_save_takes_more_than_those_before() -> None:
    times = [0.0, 9.0, 10.0, 11.0, 12.0, 15.0, 16.5, 17.5]  # saved after the fifth
    found = stalls(times, save_after=5, skip=2)
    assert found == {"stall_seconds": 2.0, "lost_seconds": 2.5, "update_seconds": 1.0}
