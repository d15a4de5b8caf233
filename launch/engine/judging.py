"""When a run is evaluated, by which metric it is judged, and which of its evaluations is the best."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from launch.engine.agree import from_main
from launch.engine.scoring import Score
from launch.engine.stopping import EarlyStopping, Judgement
from launch.engine.streams import is_stream
from launch.errors import ConfigError
from launch.recipe import Prepared
from launch.schedule import updates_per_epoch
from launch.sections import RunConfig


class Judge:
    """Hears one score after the other. Every rank must have one and let it hear each."""

    def __init__(self, accelerator: Accelerator, config: RunConfig, prepared: Prepared) -> None:
        self.best: dict[str, float] = {}
        """The update with the best evaluation, and its metrics."""
        self._accelerator, self._config, self._prepared = accelerator, config.eval, prepared
        self._highest = self._highest_is_best()
        self._patience = config.train.early_stopping_patience
        self._stopping = EarlyStopping(self._patience, config.train.early_stopping_min_delta, highest=self._highest)
        self._every = [config.eval.every_steps] if config.eval.every_steps else []
        if config.eval.every_epochs and not is_stream(prepared.train):
            per_epoch = updates_per_epoch(len(prepared.train), config.train.global_batch_size)
            self._every.append(config.eval.every_epochs * per_epoch)

    def is_time(self, update: int) -> bool:
        """Whether to evaluate after this update."""
        return any(update % every == 0 for every in self._every)

    def metrics(self, score: Score) -> dict[str, float]:
        """The validation loss, and what the recipe makes of it and of its predictions."""
        return {"loss": score.loss, **self._prepared.loss_metrics(score.loss), **score.metrics}

    def judge(self, update: int, metrics: dict[str, float]) -> Judgement:
        """What an evaluation means for the run; rank 0 judges, lest a last bit split the ranks.

        Raises:
            ConfigError: the recipe gives no such metric as `eval.best_metric`.
        """
        judgement = from_main(self._accelerator, self._stopping.judge(self._deciding(metrics)))
        if judgement.best:
            self.best = {"update": update, **metrics}
        return judgement

    def rank(self, metrics: dict[str, float]) -> float:
        """What ranks an evaluation among others, the lower the better."""
        return -self._deciding(metrics) if self._highest else self._deciding(metrics)

    def verdict(self) -> str:
        """Why the run was stopped early."""
        name = self._config.best_metric
        return (
            f"{self._patience} evaluations in a row without a better validation {name} than "
            f"{self.best.get(name, float('nan')):.4f}"
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"best": self.best, "early_stopping": self._stopping.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best = state["best"]
        self._stopping.restore(state["early_stopping"])

    def _highest_is_best(self) -> bool:
        scoring = self._prepared.scoring
        if self._config.best_is != "auto":
            return self._config.best_is == "highest"
        lowest = ("loss", *self._prepared.loss_metrics(0.0), *(scoring.lowest_is_best if scoring else ()))
        return self._config.best_metric not in lowest

    def _deciding(self, metrics: dict[str, float]) -> float:
        name = self._config.best_metric
        if name not in metrics:
            raise ConfigError(f"eval.best_metric = {name}: an evaluation gives {', '.join(metrics)}; name one of these")
        return metrics[name]
