"""What is told of a run while it goes on: records in metrics.jsonl, and lines for people. Rank 0 alone is heard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from launch.disk import size_in_words
from launch.engine.batching import Window
from launch.engine.loop import StepResult
from launch.engine.memory import Load
from launch.engine.meters import Meter
from launch.engine.progress import Display
from launch.engine.scoring import Score
from launch.engine.stopping import Judgement
from launch.engine.stragglers import Pace
from launch.engine.tracking import Tracker
from launch.schedule import Schedule


class Records:
    """Tells of updates, evaluations and what was odd about them."""

    def __init__(
        self,
        display: Display,
        tracker: Tracker | None,
        meter: Meter,
        schedule: Schedule,
        every: int,
        load: Load,
        utilisation: float | None,
        device: Callable[[], dict[str, int]] = dict,
    ) -> None:
        """`tracker` on rank 0 only; an update in `every` is recorded, and all that were not made.

        `utilisation` is what one token a second is of all that the devices can do, where that is known. `device` gives
        what is to be recorded of them besides.
        """
        self.tracker, self.meter, self._load, self._utilisation = tracker, meter, load, utilisation
        self._display, self._schedule, self._every = display, schedule, every
        self._device, self._speed = device, 0.0

    def update(self, window: Window, result: StepResult) -> None:
        """An update that was made, or left out."""
        self.meter.add(result.counts.tokens)
        rate = self._schedule.learning_rate(window.update)
        if result.applied and (window.update % self._every == 0 or window.update == self._schedule.total):
            self._made(window, result, rate)
        self._display.advance(1, f"loss {result.loss:.4f}  lr {rate:.2e}  {self._speed:,.0f} tokens/s")

    def _made(self, window: Window, result: StepResult, rate: float) -> None:
        reading = self.meter.read()
        self._speed = reading.tokens_per_second
        if self.tracker:
            load = self._load.read()
            on_gpu = f", {size_in_words(load['gpu_memory_bytes'])} of the GPU" if "gpu_memory_bytes" in load else ""
            self._display.note("memory", f"{size_in_words(load['memory_bytes'])}{on_gpu} (rank 0)")
            mfu = None if self._utilisation is None else self._speed * self._utilisation
            self.tracker.write(
                "train",
                window.update,
                epoch=window.epoch,
                consumed=window.consumed,
                loss=result.loss,
                learning_rate=rate,
                gradient_norm=result.gradient_norm,
                samples=result.counts.samples,
                targets=result.counts.targets,
                tokens=self.meter.tokens,
                tokens_per_second=round(self._speed, 1),
                seconds={phase: round(seconds, 6) for phase, seconds in reading.seconds.items()},
                system=load,
                **self._device(),
                **({} if mfu is None else {"mfu": round(mfu, 4)}),
                **({"overflows": result.overflows} if result.overflows else {}),
            )

    def incident(self, window: Window, result: StepResult, went_back_to: int | None = None) -> None:
        """What was wrong with an update, and what has become of it."""
        incident = result.incident
        assert incident is not None, "something was wrong"
        kinds = {"warn": "spike", "skip": "skipped", "rewind": "rewound"}
        done = {"warn": "it is made all the same", "skip": "it is skipped"}.get(incident.action, "")
        more = {}
        if went_back_to is not None:
            first = went_back_to + 1
            skipped = f"the samples of updates {first} to {window.update} are left out"
            done = f"back to the weights of step-{went_back_to:06d}; {skipped}"
            more = {"checkpoint": went_back_to, "first_skipped": first}
        self._display.say(f"update {window.update}: {incident.what}; {done}")
        if self.tracker:
            where = {"epoch": window.epoch, "consumed": window.consumed}
            self.tracker.write(kinds[incident.action], window.update, **where, **incident.record(), **more)

    def pace(self, window: Window, result: StepResult, pace: Pace) -> None:
        """A rank that has begun to keep the others waiting, or no longer does."""
        news = pace.hear(result.told) if self.tracker else None
        if news and self.tracker:
            line, straggler = news
            self._display.say(line)
            self._display.note("slowest", line if straggler else None)
            facts = asdict(straggler) if straggler else {}
            self.tracker.write("straggler", window.update, message=line, **facts)

    def evaluation(self, update: int, score: Score, metrics: dict[str, float], judgement: Judgement) -> None:
        """What came out."""
        if self.tracker:
            counts = {"samples": score.counts.samples, "targets": score.counts.targets}
            self.tracker.write("eval", update, **metrics, **counts, best=judgement.best)
            self.tracker.keep_evaluation(update, metrics | score.details)
        shown = "  ".join(f"{name} {value:,.4f}" for name, value in metrics.items())
        self._display.say(f"update {update:>5}: validation {shown}")
        best = "  (the best so far)" if judgement.best else ""
        self._display.note("evaluated", f"after update {update}: {shown}{best}")
