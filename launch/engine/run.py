"""One rank's share of a run: model, optimizer and data put together, trained, evaluated and saved as planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.nn.parallel import DistributedDataParallel

from launch.engine.agree import Requests, any_rank
from launch.engine.batching import Order, Position, Window, Work
from launch.engine.blocks import checkpoint_activations, compile_blocks
from launch.engine.checkpoint import model_files
from launch.engine.contract import check_sums, checked
from launch.engine.data import Data
from launch.engine.export import has_adapters, write_model, write_probe
from launch.engine.frozen import hashes
from launch.engine.inference import Inference
from launch.engine.judging import Judge
from launch.engine.keeping import Keeper
from launch.engine.loop import Step, StepResult, fit
from launch.engine.loss import Counts
from launch.engine.meters import Throughput
from launch.engine.optim import make_optimizer
from launch.engine.precision import Autocast, LossScale, check, forward_dtypes
from launch.engine.progress import Display
from launch.engine.scoring import Evaluation, Score
from launch.engine.sharding import seen_dtypes, spread, unwrapped, updates
from launch.engine.stopping import Judgement
from launch.engine.streams import Reader, first_samples, is_stream
from launch.engine.tracking import Tracker
from launch.plan import Plan
from launch.recipe import Batch, Prepared, Samples, Stream
from launch.strategy import Dtypes


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
        self.schedule = plan.schedule(_size(prepared.train))
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
        model = self._build()
        self.parameters, self.trainable = (
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)
            for trained in (False, True)
        )
        """How many numbers the whole model has, each tied weight once, and how many of them are trained."""
        self._model_files = model_files(model, prepared.tokenizer) if accelerator.is_main_process else {}
        self._frozen = hashes(model)
        if config.train.activation_checkpointing:
            checkpoint_activations(model)
        if config.train.compile:
            compile_blocks(model)
        if not plan.processes.strategy.shards:
            model = model.to(accelerator.device)
        self._seed_by_rank()
        optimizer = make_optimizer(model, config.train, fused=accelerator.device.type == "cuda")
        self.model, self.optimizer = spread(accelerator, model, optimizer)
        autocast = self._autocast()
        self.loss = _in_autocast(checked(prepared.loss), autocast)
        """The recipe's loss, computed in the planned number format."""
        self.evaluation = Evaluation(
            accelerator,
            data.validation,
            self.loss,
            prepared.count,
            plan.batch.eval_batch_size,
            config.eval.max_samples,
            prepared.scoring,
            lambda model: Inference(accelerator, model, autocast),
        )
        scale = LossScale() if config.train.precision == "fp16" else None
        self.step = Step(
            accelerator,
            self.model,
            updates(accelerator, self.model, self.optimizer, config.train.max_grad_norm, scale),
            self.loss,
            prepared.count,
            self._requests,
        )
        self._meter = Throughput()
        self._speed = 0.0
        self.tracker: Tracker | None = None
        """On rank 0 only, once training has begun."""
        self.keeper: Keeper | None = None
        """Once training has begun."""

    def _build(self) -> Any:
        """The recipe's model as it is before training, the same on every rank."""
        set_seed(self.plan.config.train.seed)
        return self.prepared.build_model()

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
            f"{self.parameters:,} parameters, {_amount(prepared.train)} training and {_amount(prepared.validation)} "
            f"validation samples, {total:,} updates"
        )
        if self.trainable < self.parameters:
            share = 100 * self.trainable / self.parameters
            self.display.say(f"trainable: {self.trainable:,} of {self.parameters:,} parameters ({share:.2g} %)")
        work = self._begin()
        self._train(work)
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
            self._export()

    def _export(self) -> None:
        accelerator, model, tokenizer = self.accelerator, self.model, self.prepared.tokenizer
        if has_adapters(model):
            from launch.engine.adapters import write_adapted  # needs PEFT

            sums = write_adapted(accelerator, model, tokenizer, self.folder, self._build)
        else:
            sums = write_model(accelerator, model, tokenizer, self.folder / "export")
        write_probe(accelerator, model, self.prepared, sums, self.folder / "probe.safetensors")

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
        )
        found = self.keeper.find(config, self.prepared)
        state = found.state if found else {}
        if accelerator.is_main_process:
            settings = config.model_dump(mode="json")
            track = config.track
            self.tracker = Tracker(self.folder, track.wandb, track.project, settings, state.get("tracker", {}))
            self.keeper.tracker = self.tracker
        if found is None:
            self.keeper.refuse_without_space(
                self.trainable if self._frozen else self.parameters, self.optimizer, self.schedule.total
            )
            check_sums(accelerator, self.model, self.prepared, self.loss)
            return self._work()
        self._restore(state)
        restore_random_states = self.keeper.restore(found)
        if isinstance(self.model, DistributedDataParallel):
            self._settle_buckets()
        work = self._work()
        if not restore_random_states():  # last: what was built until now has drawn numbers of its own
            self._seed_by_rank(self.updates_done)
        self.display.say(
            f"resumed from {found.folder.name}: {self.schedule.total - self.updates_done:,} updates are left"
        )
        if self.tracker:
            self.tracker.write("resume", self.updates_done, checkpoint=found.folder.name)
        return work

    def _settle_buckets(self) -> None:
        """Let DDP put its gradients into the groups it will keep. Every rank must call this.

        It regroups them after the first backward pass (torch 2.13, reducer.cpp, `rebuild_buckets`), and three ranks or
        more add up in another order in other groups: an update after a resumption would differ in its last bits.
        """
        batch = self.prepared.collate(first_samples(self.prepared.train, 1))
        self.model.train()
        (self.loss(self.model, send_to_device(batch, self.accelerator.device)) * 0.0).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()

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
            "tokens": self._meter.tokens,
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
        self._meter.resume(state["tokens"])
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
        self._meter.read()
        with forward_dtypes(unwrapped(self.model)) as self._forward_dtypes:
            fit(self.step, work, self.schedule.learning_rate, self._after_update)
        self.display.finish()
        return None

    def _work(self) -> Work:
        """The windows of the run that are left, with this rank's batches."""
        batch, total, done = self.plan.batch, self.schedule.total, self.position
        if isinstance(self._data.train, Reader):
            return self._data.train.windows(total, done.update, done.epoch, done.consumed)
        order = Order(
            len(self._data.train.samples),
            batch.global_batch_size,
            batch.micro_batch_size,
            self.plan.config.train.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return self._data.train.load(lambda: order.windows(done.update + 1, total))

    def _requests(self) -> Requests:
        """What this rank wants, to be added up over all ranks with the counts of the next update."""
        save, written = self.keeper.wishes() if self.keeper else (False, False)
        return Requests(int(self._signal() is not None), int(save), int(written))

    def _after_update(self, window: Window, result: StepResult) -> bool:
        """Record, evaluate and save as configured; True to stop, on every rank alike."""
        config, update, total = self.plan.config, window.update, self.schedule.total
        assert self.keeper is not None
        self.position = Position(update, window.epoch, window.consumed)
        if self.dtypes is None:
            self._check_dtypes()
        self._meter.add(result.counts.tokens)
        if update % config.track.every_steps == 0 or update == total:
            self._record(window, result)
        rate = self.schedule.learning_rate(update)
        self.display.advance(1, f"loss {result.loss:.4f}  lr {rate:.2e}  {self._speed:,.0f} tokens/s")
        stop, best = bool(result.requests.stop), False
        with self._meter.paused():
            self._trained = update == total
            if self.judge.is_time(update):
                judgement = self._evaluate_and_judge(update)
                self._evaluated = judgement is not None
                if judgement is not None:
                    best, self._trained = judgement.best, self._trained or judgement.stop
                stop = judgement is None or stop or self._any_signal()
            stop = self.keeper.after_update(self.position, self._state, result.requests, best=best, stop=stop) or stop
            if stop:
                self._stop()
        return stop or self._trained

    def _any_signal(self) -> bool:
        return any_rank(self.accelerator, self._signal() is not None)

    def _stop(self) -> None:
        """Find out which signal it was, wherever it came. Every rank must call this."""
        numbers = [number for number in gather_object([self._signal()]) if number]
        self.stopped = numbers[0] if numbers else 0

    def _check_dtypes(self) -> None:
        """See, after the first update, that the number formats are the planned ones."""
        self.dtypes = seen_dtypes(self.step.updates, self.model, self._forward_dtypes)
        check(self.plan.dtypes, self.dtypes)
        formats = "  ".join(f"{name} {value or 'nothing'}" for name, value in asdict(self.dtypes).items())
        self.display.say(f"number formats in use: {formats}")

    def _record(self, window: Window, result: StepResult) -> None:
        self._speed = self._meter.read()
        if self.tracker:
            self.tracker.write(
                "train",
                window.update,
                epoch=window.epoch,
                consumed=window.consumed,
                loss=result.loss,
                learning_rate=self.schedule.learning_rate(window.update),
                gradient_norm=result.gradient_norm,
                samples=result.counts.samples,
                targets=result.counts.targets,
                tokens=self._meter.tokens,
                tokens_per_second=round(self._speed, 1),
                **({"overflows": result.overflows} if result.overflows else {}),
            )

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
        score = self._score(lambda: self._signal() is not None)
        if score is None:
            return None, Judgement(best=False, stop=False)
        metrics = self.judge.metrics(score)
        judgement = self.judge.judge(update, metrics)
        if self.keeper:
            self.keeper.heard(update, score.loss, self.judge.rank(metrics))
        if self.tracker:
            self.tracker.write(
                "eval",
                update,
                **metrics,
                samples=score.counts.samples,
                targets=score.counts.targets,
                best=judgement.best,
            )
            self.tracker.keep_evaluation(update, metrics | score.details)
        shown = "  ".join(f"{name} {value:,.4f}" for name, value in metrics.items())
        self.display.say(f"update {update:>5}: validation {shown}")
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

    def result(self) -> dict[str, Any]:
        """What came out, as plain data."""
        return {
            "updates": self.updates_done,
            "parameters": {"all": self.parameters, "trainable": self.trainable},
            "validation": {when: self.judge.metrics(score) for when, score in self.scores.items()},
            "best": self.judge.best,
            "dtypes": asdict(self.dtypes) if self.dtypes else None,
            "failed_saves": self.keeper.failed if self.keeper else [],
            "run_folder": str(self.folder),
        }


def _size(data: Samples | Stream) -> int | None:
    return None if is_stream(data) else len(data)


def _amount(data: Samples | Stream) -> str:
    size = _size(data)
    return "streamed" if size is None else f"{size:,}"


Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


def _in_autocast(loss: Loss, autocast: Autocast) -> Loss:
    def inside(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with autocast():
            return loss(model, batch)

    return inside
