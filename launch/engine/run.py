"""One rank's share of a run: model, optimizer and data put together, trained, evaluated and saved as planned."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.parallel import DistributedDataParallel

from launch.engine.agree import Requests, any_rank, gathered
from launch.engine.batching import Position, Window, Work
from launch.engine.blocks import checkpoint_activations, compile_blocks
from launch.engine.checkpoint import model_files
from launch.engine.contract import check_sums, checked
from launch.engine.data import Data
from launch.engine.devices import devices_of, moved
from launch.engine.export import write_all
from launch.engine.frozen import hashes
from launch.engine.inference import Inference
from launch.engine.judging import Judge
from launch.engine.keeping import Keeper
from launch.engine.loop import Step, StepResult, fit, settle_buckets
from launch.engine.loss import Counts
from launch.engine.memory import Load, PeakMemory
from launch.engine.meters import Clock, Meter
from launch.engine.optim import make_optimizer
from launch.engine.padding_free import PaddingFree, padding_free, some_rows
from launch.engine.precision import Autocast, LossScale, check, forward_dtypes, in_autocast
from launch.engine.profiling import memory_noted, profiler
from launch.engine.progress import Display
from launch.engine.records import Records
from launch.engine.scoring import Evaluation, Score
from launch.engine.sharding import spread, unwrapped
from launch.engine.stopping import Judgement
from launch.engine.stragglers import Pace
from launch.engine.streams import amount_of, first_samples, size_of
from launch.engine.tracking import Tracker
from launch.engine.updating import seen_dtypes, updates
from launch.engine.waiting import Waiting
from launch.engine.watch import Incident, LossWatch
from launch.plan import Plan
from launch.recipe import Prepared
from launch.strategy import Dtypes
from launch.trackers import trackers
from launch.utilisation import utilisation_of_a_token


class Run:
    """Built, trained and asked for its scores. Every rank must build one and call each method."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        prepared: Prepared,
        data: Data,
        accelerator: Accelerator,
        display: Display,
        signal: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`signal` tells the number of the signal that wants this rank to stop, if one has come."""
        config = plan.config
        self.plan, self.folder, self.prepared, self._data = plan, folder, prepared, data
        self.accelerator, self.display = accelerator, display
        self.schedule = plan.schedule(size_of(prepared.train))
        self.scores: dict[str, Score] = {}
        """Validation scores `before` and `after` training."""
        self.judge = Judge(accelerator, config, prepared)
        self.dtypes: Dtypes | None = None
        """The number formats in use, once an update has shown them."""
        self.position = Position()
        """How far the run is."""
        self.stopped: int | None = None
        """The number of the signal that has ended training early; the run can go on from its newest checkpoint."""
        self._signal = signal
        self._trained = False
        self._evaluated = True
        self._memory = PeakMemory(accelerator.device)
        self.peaks: list[int | None] = []
        """Bytes that each rank has taken at the peak of training, once it is over."""
        model = self._build()
        self.parameters, self.trainable = (
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)
            for trained in (False, True)
        )
        """How many numbers the whole model has, each tied weight once, and how many of them are trained."""
        self._model_files = model_files(model, prepared.tokenizer) if accelerator.is_main_process else {}
        self._frozen = hashes(model)
        self._rows = self._padding_free(model) if plan.padding_free else None
        if config.train.activation_checkpointing:
            checkpoint_activations(model)
        if config.train.compile:
            compile_blocks(model)
        if not plan.processes.strategy.shards:
            model = moved(accelerator, model)
        self._seed_by_rank()
        optimizer = make_optimizer(model, config.train, fused=accelerator.device.type in ("cpu", "cuda"))
        self.model, self.optimizer = spread(accelerator, model, optimizer)
        self.devices = devices_of(accelerator, plan)
        autocast = self._autocast()
        self.loss = in_autocast(checked(prepared.loss), autocast)
        """The recipe's loss, computed in the planned number format."""
        self.evaluation = Evaluation(
            accelerator,
            data.validation,
            self.loss,
            prepared.count,
            plan.eval_rows,
            config.eval.max_samples,
            prepared.scoring,
            lambda model: Inference(accelerator, model, autocast, self.devices),
            self.devices,
        )
        scale = LossScale() if config.train.precision == "fp16" else None
        self.step = Step(
            accelerator,
            self.model,
            updates(accelerator, self.model, self.optimizer, config.train.max_grad_norm, scale, self.devices),
            self.loss,
            prepared.count,
            self._requests,
            LossWatch(config.train),
            Clock(accelerator.device.type, accelerator.num_processes),
            Pace(accelerator.process_index, gathered([socket.gethostname()]), self._spent),
            self.devices,
            self._rows.laid if self._rows else nullcontext,
        )
        self._meter = Meter(self.step.clock)
        self.tracker: Tracker | None = None
        """On rank 0 only, once training has begun."""
        self.keeper: Keeper | None = None
        """Once training has begun."""

    def _build(self) -> Any:
        """The recipe's model as it is before training, the same on every rank."""
        set_seed(self.plan.config.train.seed)
        return self.prepared.build_model()

    def _padding_free(self, model: Any) -> PaddingFree | None:
        """What lays the rows of a batch of this model end to end, if its blocks can compute them so."""
        lengths = getattr(self._data.train, "lengths", None)
        batch = some_rows(self.prepared.train, lengths, self.prepared.collate)
        found = padding_free(model, self.prepared.loss, batch) if batch else None
        if batch and found is None:
            self.display.say(f"{type(model).__name__} computes padded rows: its blocks cannot take them end to end")
        return found

    @property
    def updates_done(self) -> int:
        """Over all attempts."""
        return self.position.update

    def _seed_by_rank(self, update: int = 0) -> None:
        """Dropout differs between ranks."""
        set_seed((self.plan.config.train.seed + 1 + self.accelerator.process_index + 1_000_003 * update) % 2**32)

    def _autocast(self) -> Autocast:
        """DeepSpeed computes in its low-precision image of the weights instead."""
        name = "float32" if self.plan.processes.strategy.kind == "zero" else self.plan.dtypes.forward
        return Autocast(self.accelerator.device.type, getattr(torch, name))

    def train(self) -> None:
        """Evaluate, train, evaluate, export, from where an earlier attempt was; numbers go to metrics.jsonl."""
        config, prepared, total = self.plan.config, self.prepared, self.schedule.total
        self.display.say(
            f"{self.parameters:,} parameters, {amount_of(prepared.train)} training and "
            f"{amount_of(prepared.validation)} validation samples, {total:,} updates"
        )
        if self.trainable < self.parameters:
            share = 100 * self.trainable / self.parameters
            self.display.say(f"trainable: {self.trainable:,} of {self.parameters:,} parameters ({share:.2g} %)")
        rank, noted = self.accelerator.process_index, config.track.memory_snapshot
        with memory_noted(self.folder, rank, wanted=noted):
            self._train(self._begin())
        assert self.keeper is not None
        self.keeper.finish()
        if self.stopped is None and "after" not in self.scores:
            score, _ = self._evaluate(self.updates_done)
            if score is None:
                self._stop()
                self.keeper.save(self.position, self._state)
            else:
                self.scores["after"] = score
        if self.stopped is None and config.save.export:
            with self.step.clock.phase("save"):
                write_all(self.accelerator, self.model, prepared, self.folder, self._build)

    # --- beginning and resuming ------------------------------------------------------------------------------

    def _begin(self) -> Work:
        """Find out where to go on, and put everything there; the work that is left."""
        config, accelerator = self.plan.config, self.accelerator
        self.keeper = Keeper(
            accelerator,
            self.folder,
            config.save,
            self._model_files,
            self.model,
            self.optimizer,
            self.display.say,
            self._signal,
            self._frozen,
            rewinds=config.train.on_spike == "rewind",
        )
        found = self.keeper.find(config, self.prepared)
        state = found.state if found else {}
        if accelerator.is_main_process:
            shown_in, say = trackers(config.track), self.display.say
            self.tracker = Tracker(self.folder, state.get("tracker", {}), shown_in, say)
            self.keeper.tracker = self.tracker
        every, load, use = config.track.every_steps, Load(accelerator.device), utilisation_of_a_token(self.plan)
        self._records = Records(
            self.display, self.tracker, self._meter, self.schedule, every, load, use, self.devices.facts
        )
        if found is None:
            self.keeper.refuse_without_space(
                self.trainable if self._frozen else self.parameters, self.optimizer, self.schedule.total
            )
            check_sums(accelerator, self.model, self.prepared, self.loss)
            return self._work()
        self._restore(state)
        restore_random_states = self.keeper.restore(found)
        if isinstance(self.model, DistributedDataParallel):
            settle_buckets(self.step, self.prepared.collate(first_samples(self.prepared.train, 1)))
        work = self._work()
        if not restore_random_states():  # last: what was built until now has drawn numbers of its own
            self._seed_by_rank(self.updates_done)
        self.display.say(
            f"resumed from {found.folder.name}: {self.schedule.total - self.updates_done:,} updates are left"
        )
        if self.tracker:
            self.tracker.write("resume", self.updates_done, checkpoint=found.folder.name)
        return work

    def _state(self) -> dict[str, Any]:
        """What all ranks have in common, besides what `Keeper` knows itself."""
        return {
            "config": self.plan.config.model_dump(mode="json"),
            "position": asdict(self.position),
            "trained": self._trained,
            "evaluated": self._evaluated,
            "scores": {when: [score.loss, *astuple(score.counts)] for when, score in self.scores.items()},
            "metrics": {when: score.metrics for when, score in self.scores.items()},
            **self.judge.state(),
            "loss_scale": self.step.updates.scale_state(),
            "watch": self.step.watch.state(),
            "tokens": self._meter.tokens,
            "seconds": self._meter.totals(),
            "dtypes": asdict(self.dtypes) if self.dtypes else None,
            "learning_rate": self.schedule.learning_rate(self.updates_done) if self.updates_done else None,
            "tracker": self.tracker.state() if self.tracker else {},
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.position = Position(**state["position"])
        self._trained, self._evaluated = state["trained"], state["evaluated"]
        metrics = state.get("metrics", {})  # which checkpoints of the first releases lack
        self.scores = {
            when: Score(loss, Counts(*counts), metrics.get(when, {}))
            for when, (loss, *counts) in state["scores"].items()
        }
        self.judge.restore(state)
        self.step.updates.restore_scale(state["loss_scale"])
        self.step.watch.restore(state.get("watch", {}))
        self._meter.resume(state["tokens"], state.get("seconds", {}))
        if self._trained and state["dtypes"]:  # no update will show them again
            self.dtypes = Dtypes(**state["dtypes"])

    # --- training --------------------------------------------------------------------------------------------

    def _train(self, work: Work) -> None:
        config, total = self.plan.config, self.schedule.total
        if self.updates_done == 0 and config.eval.at_start:
            score, _ = self._evaluate(0)
            if score is None:
                return self._stop()
            self.scores["before"] = score
        if not self._evaluated:  # a signal came while it was
            judgement = self._evaluate_and_judge(self.updates_done)
            if judgement is None:
                return self._stop()
            self._evaluated, self._trained = True, self._trained or judgement.stop
        if self._trained:
            return None
        self.display.start("training", total, self.updates_done)
        self._waiting = Waiting(config.parallel)
        self._meter.read()
        self._memory.forget()
        track, rank = config.track, self.accelerator.process_index
        self._profiler = profiler(self.folder, rank, track.profile_ranks, track.profile, self.accelerator.device)
        with forward_dtypes(unwrapped(self.model)) as self._forward_dtypes, self._profiler:
            fit(self.step, work, self.schedule.learning_rate, self._after_update)
        self._waiting.long()
        self.peaks = gathered([self._memory.read()])
        self.display.finish()
        return None

    def _work(self) -> Work:
        """The windows of the run that are left, with this rank's batches."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        laid = self._rows is not None
        return self._data.work(self.plan, self.schedule.total, self.position, rank, world_size, laid=laid)

    def _requests(self) -> Requests:
        """What this rank wants, to be added up over all ranks with the counts of the next update."""
        save, written = self.keeper.wishes() if self.keeper else (False, False)
        return Requests(int(self._signal() is not None), int(save), int(written))

    def _after_update(self, window: Window, result: StepResult) -> bool:
        """Record, evaluate and save as configured; True to stop, on every rank alike."""
        update, total = window.update, self.schedule.total
        assert self.keeper is not None
        self._waiting.long()
        self.position = Position(update, window.epoch, window.consumed)
        if self.dtypes is None and result.applied:
            self._check_dtypes()
        self._records.update(window, result)
        if result.incident:
            self._records.incident(window, result, self._rewind(window, result.incident))
        self._records.pace(window, result, self.step.pace)
        if line := self.devices.news():
            self.display.say(f"update {update}: {line}")
        if self._profiler.after_update():
            self.display.say(f"profile: {self._profiler.folder}; look at a trace in https://ui.perfetto.dev")
        stop, best = bool(result.requests.stop), False
        self._trained = update == total
        saves, evaluates = self.keeper.saves, self.judge.is_time(update)
        if evaluates:
            judgement = self._evaluate_and_judge(update)
            self._evaluated = judgement is not None
            if judgement is not None:
                best, self._trained = judgement.best, self._trained or judgement.stop
            stop = judgement is None or stop or self._any_signal()
        with self.step.clock.phase("save"):
            stop = self.keeper.after_update(self.position, self._state, result.requests, best=best, stop=stop) or stop
        if self.keeper.saves > saves:
            self.display.note("saved", f"after update {update}")
        if stop:
            self._stop()
        self.devices.excuse()
        self._waiting.after_update(plain=not (evaluates or result.incident or self.keeper.saves > saves))
        return stop or self._trained

    def _spent(self) -> tuple[float, float, float]:
        """Seconds that this rank itself has spent on data, on computing and on saving."""
        clock = self.step.clock
        return clock.seconds["data"], clock.own_compute(), self.keeper.own_seconds if self.keeper else 0.0

    def _any_signal(self) -> bool:
        return any_rank(self.accelerator, self._signal() is not None)

    def _stop(self) -> None:
        """Find out which signal it was, wherever it came. Every rank must call this."""
        numbers = [number for number in gathered([self._signal()]) if number]
        self.stopped = numbers[0] if numbers else 0

    def _check_dtypes(self) -> None:
        """See, after the first update, that the number formats are the planned ones."""
        self.dtypes = seen_dtypes(self.step.updates, self.model, self._forward_dtypes)
        check(self.plan.dtypes, self.dtypes)
        formats = "  ".join(f"{name} {value or 'nothing'}" for name, value in asdict(self.dtypes).items())
        self.display.say(f"number formats in use: {formats}")

    def _rewind(self, window: Window, incident: Incident) -> int | None:
        """Where the watch wants it, put weights, optimizer, random states and losses back; the update they are of.

        The position stays: the windows from there up to this one are left out, and rates and samples go on as they
        are functions of the update. So a run that is interrupted after this and goes on from the same checkpoint meets
        the same spike and comes to the same weights. Every rank must call this.
        """
        if incident.action != "rewind":
            return None
        assert self.keeper is not None
        with self.step.clock.phase("save"):
            found = self.keeper.last_scheduled()
            self.step.watch.count_rewind(window, incident, found.update if found else None)
            assert found is not None, "the watch has seen to it"
            restore_random_states = self.keeper.restore(found)
            self.step.watch.rewind(found.state.get("watch", {}))
            self.step.updates.restore_scale(found.state["loss_scale"])
            if not restore_random_states():
                self._seed_by_rank(found.update)
        return found.update

    # --- evaluating ------------------------------------------------------------------------------------------

    def _evaluate_and_judge(self, update: int) -> Judgement | None:
        """Evaluate while training; None where a signal broke it off."""
        score, judgement = self._evaluate(update)
        if score is None:
            return None
        if judgement.stop or update == self.schedule.total:
            self.scores["after"] = score
        if judgement.stop and update < self.schedule.total:
            self.display.say(f"stopped early at update {update}: {self.judge.verdict()}")
        return judgement

    def _evaluate(self, update: int) -> tuple[Score | None, Judgement]:
        """The score, and what it means; None where a signal broke it off."""
        with self.step.clock.phase("evaluate"):
            score = self._score(lambda: self._signal() is not None)
            if score is None:
                return None, Judgement(best=False, stop=False)
            metrics = self.judge.metrics(score)
            judgement = self.judge.judge(update, metrics)
            if self.keeper:
                self.keeper.heard(update, score.loss, self.judge.rank(metrics))
            self._records.evaluation(update, score, metrics, judgement)
            return score, judgement

    def _score(self, interrupted: Callable[[], bool]) -> Score | None:
        self.display.start("evaluating", self.evaluation.size)
        score = self.evaluation(self.model, self.display.advance, interrupted)
        self.display.finish()
        return score

    def score(self) -> Score:
        """The score of the model as it is."""
        score = self._score(lambda: False)
        assert score is not None, "nothing interrupts it"
        return score

    def _planned_memory(self) -> int | None:
        """What `peaks` are to be compared with: on a GPU they hold no libraries, and no profile is planned on a CPU."""
        memory, processes = self.plan.memory, self.plan.processes
        on_cpu = processes.device == "cpu"
        if memory is None or (on_cpu and self.plan.config.track.profile):
            return None
        return memory.needs[processes.strategy].total + memory.libraries * on_cpu

    def result(self) -> dict[str, Any]:
        """What came out, as plain data."""
        return {
            "updates": self.updates_done,
            "parameters": {"all": self.parameters, "trainable": self.trainable},
            "validation": {when: self.judge.metrics(score) for when, score in self.scores.items()},
            "best": self.judge.best,
            "dtypes": asdict(self.dtypes) if self.dtypes else None,
            "peak_memory": self.peaks,
            "planned_memory": self._planned_memory(),
            "most_deviations": round(self.step.watch.farthest, 2),
            "seconds": {phase: round(spent, 3) for phase, spent in self._meter.totals().items()},
            "failed_saves": self.keeper.failed if self.keeper else [],
            "run_folder": str(self.folder),
        }
