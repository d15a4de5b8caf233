"""Who keeps the others waiting, by what: judged of what ranks tell, and found by real ranks of which one is slow."""

from __future__ import annotations

import itertools
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from launch.engine import stragglers
from launch.engine.meters import PHASES
from launch.engine.stragglers import EVERY, REMINDER_SECONDS, WINDOW_SECONDS, Pace, Straggler, find_straggler
from tests.commands import shoal
from tests.own_recipe import ALL_RANKS

OWN = Path(__file__).with_name("own_recipe.py")

EQUAL = [[0.2, 8.0, 0.1]] * 4


def test_a_rank_that_is_clearly_slower_and_costs_much_is_found_with_the_reason() -> None:
    assert find_straggler(EQUAL, 100, 10.0) is None
    slow = [*EQUAL[:2], [4.1, 8.0, 0.1], EQUAL[3]]
    assert find_straggler(slow, 100, 14.0) == Straggler(
        2, "data", pytest.approx(0.041), pytest.approx(0.002), pytest.approx(3.9 / 14)
    )
    assert find_straggler([[0.1, 12.0, 0.0], [0.1, 8.0, 0.0]], 100, 13.0).reason == "compute"
    assert find_straggler([[0.1, 8.0, 0.1], [0.1, 8.0, 4.0]], 100, 13.0).rank == 1
    # Clearly slower, at what hardly costs; and something that costs, at what is hardly slower.
    assert find_straggler([*EQUAL[:3], [1.0, 8.0, 0.1]], 100, 10.0) is None
    assert find_straggler([*EQUAL[:3], [0.2, 10.0, 0.1]], 100, 12.0) is None
    # One that is slow at two things is named with the worse; two that are slow, with the worse.
    assert find_straggler([*EQUAL[:3], [3.0, 14.0, 0.1]], 100, 18.0).reason == "compute"
    assert find_straggler([[0.2, 13.0, 0.1], *EQUAL[1:3], [0.2, 14.0, 0.1]], 100, 15.0).rank == 3


class Hands:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Ranks:
    """Two ranks that tell of updates of a second each, and what rank 0 says of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hands = Hands()
        monkeypatch.setattr(stragglers, "time", self.hands)
        self.spent = [[0.0, 0.0, 0.0] for _ in range(2)]
        self.paces = [Pace(rank, ("one", "two"), lambda rank=rank: tuple(self.spent[rank])) for rank in range(2)]
        self.updates = itertools.count(1)

    def work(self, seconds: float, slow: float = 0.0) -> list[str]:
        said = []
        for update in itertools.islice(self.updates, round(seconds)):
            told = [pace.tell(update) for pace in self.paces]
            news = self.paces[0].hear([sum(each) for each in zip(*told, strict=True)])
            said += [news[0]] if news else []
            self.hands.now += 1
            for rank in range(2):
                self.spent[rank][1] += 0.5
            self.spent[1][0] += slow
        return said


def test_it_is_said_once_and_when_it_is_over_and_again_after_long(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    assert ranks.work(200) == []
    said = ranks.work(200, slow=0.4)
    assert said == [
        "rank 1 (two) keeps the others waiting: data 0.4 s per update, others 0 s; it costs 40 % of the time"
    ]
    assert ranks.work(WINDOW_SECONDS + EVERY, slow=0.0) == [], "one window does not tell"
    assert ranks.work(100, slow=0.4) == [], "it is still the same"
    assert ranks.work(200) == ["rank 1 (two) no longer keeps the others waiting"]
    assert ranks.work(200) == []
    assert len(ranks.work(REMINDER_SECONDS + 300, slow=0.4)) == 2


def test_most_updates_and_a_process_on_its_own_tell_nothing() -> None:
    pace = Pace(1, ("one", "two", "three"), lambda: (1.0, 2.0, 3.0))
    assert [bool(pace.tell(update)) for update in range(1, 2 * EVERY + 1)] == 2 * [*[False] * (EVERY - 1), True]
    assert [Pace().tell(update) for update in (EVERY, 2 * EVERY)] == [[], []]


def test_what_a_rank_has_spent_since_the_last_time_stands_in_its_places() -> None:
    spent = [1.0, 2.0, 3.0]
    pace = Pace(1, ("one", "two", "three"), lambda: tuple(spent))
    pace.tell(EVERY)
    spent[:] = [1.5, 2.25, 3.0]
    assert pace.tell(2 * EVERY) == [0, 0, 0, 500_000, 250_000, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks of which one is late with its data; after a while it is killed and starts again."""
    folder = tmp_path_factory.mktemp("late")
    (folder / "run.yaml").write_text(
        f"recipe: {OWN}\n"
        "recipe_args: {late_rank: 1, dying_rank: 1, dying_after: 75}\n"
        "train: {global_batch_size: 8, max_steps: 96}\n"
        "eval: {at_start: false}\n"
        "save: {every_steps: 64, export: false}\n"
        "parallel: {device: cpu, devices: 2, max_restarts: 1}\n"
    )
    done = shoal(folder, "run", "run.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder / "run"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_is_late_with_its_data_is_named(late: Path) -> None:
    told = [record for record in records(late) if record["kind"] == "straggler"]
    before = [record for record in told if record["update"] <= 64]
    assert [(record["rank"], record["reason"]) for record in before] == [(1, "data")], told
    assert before[0]["seconds"] == pytest.approx(0.04, rel=0.2) and before[0]["others"] < 0.005
    host = socket.gethostname()
    assert (late.parent / "said").read_text().count(f"rank 1 ({host}) keeps the others waiting: data 0.04") >= 1


@pytest.mark.dist
@pytest.mark.slow
def test_time_and_tokens_are_what_is_counted_from_outside(late: Path) -> None:
    found = records(late)
    places = [place for place, record in enumerate(found) if record["kind"] == "train"]
    resumed = next(place for place, record in enumerate(found) if record["kind"] == "resume")
    within = [(a, b) for a, b in itertools.pairwise(places) if not a < resumed < b]
    assert len(within) == 94
    accounted = sum(sum(found[b]["seconds"].values()) for _, b in within)
    outside = sum(found[b]["time"] - found[a]["time"] for a, b in within)
    assert accounted == pytest.approx(outside, rel=0.02)
    seconds = {phase: sum(found[b]["seconds"][phase] for _, b in within) for phase in PHASES}
    assert min(seconds.values()) >= 0
    assert seconds["data"] < 0.1 * outside, "rank 0 has its own data at once"
    assert seconds["sync"] > 0.5 * outside, "and waits for rank 1"

    # 8 rows of 8 tokens an update: over the last ones, and of the very first one after the resumption.
    last = [found[place] for place in places[-25:]]
    rate = 64 * 24 / (last[-1]["time"] - last[0]["time"])
    assert sum(64 / record["tokens_per_second"] for record in last[1:]) == pytest.approx(64 * 24 / rate, rel=0.02)
    first = found[next(place for place in places if place > resumed)]
    assert first["update"] == 65 and first["tokens"] == 64 * 65
    assert 64 / first["tokens_per_second"] == pytest.approx(first["time"] - found[resumed]["time"], rel=0.2)


@pytest.mark.dist
@pytest.mark.slow
def test_the_end_of_a_run_says_where_its_time_went(late: Path) -> None:
    result = json.loads((late / "result.json").read_text())
    assert set(result["seconds"]) == set(PHASES)
    assert re.search(r"^time: \w+ \d+ %, ", result["summary"], re.MULTILINE)
    recorded = sum(sum(record["seconds"].values()) for record in records(late) if record["kind"] == "train")
    assert sum(result["seconds"].values()) > recorded, "of both attempts"


def told_of(folder: Path, strategy: str, slow_rank: int) -> list[dict[str, Any]]:
    """What is told of a run of two ranks, of which one, or all, sleep for a tenth of a second in their loss.

    The model is so wide that ZeRO-3 gathers some of its weights: of fewer than 100,000 numbers each rank keeps all.
    """
    (folder / "run.yaml").write_text(
        f"recipe: {OWN}\n"
        f"recipe_args: {{slow_rank: {slow_rank}, seconds_per_batch: 0.1, width: 256}}\n"
        "train: {global_batch_size: 8, max_steps: 48}\n"
        "eval: {at_start: false}\n"
        "save: {export: false}\n"
        f"parallel: {{device: cpu, devices: 2, strategy: {strategy}}}\n"
    )
    done = shoal(folder, "run", "run.yaml", "--out", "run", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return [record for record in records(folder / "run") if record["kind"] == "straggler"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_a_rank_that_sleeps_in_its_loss_is_named_where_others_wait_for_weights_meanwhile(
    strategy: str, tmp_path: Path
) -> None:
    told = told_of(tmp_path, strategy, 1)
    assert [(record["rank"], record["reason"]) for record in told] == [(1, "compute")], told
    assert 0.1 < told[0]["seconds"] < 0.2 and told[0]["others"] < 0.1, "the others' waiting is not their computing"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_nobody_is_named_where_all_sleep_in_their_loss(strategy: str, tmp_path: Path) -> None:
    assert told_of(tmp_path, strategy, ALL_RANKS) == []
    train = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert len(train) == 48 and sum(record["seconds"]["compute"] for record in train) > 48 * 0.1, "they did sleep"
