"""Hooks into the training loop, and early stopping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moadapt.errors import ConfigError

if TYPE_CHECKING:
    from moadapt.train.evaluation import EvaluationResult
    from moadapt.train.trainer import MultiTaskTrainer


@dataclass
class TrainerState:
    """Where a run stands. It is saved in every checkpoint.

    Attributes:
        global_step: optimizer steps done.
        micro_batch: index of the next micro-batch of the data stream, counted over all processes.
        max_steps: optimizer steps of the whole run.
        epoch: passes over the data so far.
        tokens: tokens trained on so far (padding not counted).
        best_value: best value of `metric_for_best_model` so far.
        best_step: the optimizer step of that value.
        should_stop: set by a callback (on any process) to end the run after this step.
        stop_reason: why the run was ended before `max_steps`.
    """

    global_step: int = 0
    micro_batch: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    tokens: int = 0
    best_value: float | None = None
    best_step: int | None = None
    should_stop: bool = field(default=False)
    stop_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class TrainerCallback:
    """Base of the callbacks. Each hook runs on every process, and does nothing here."""

    def on_train_begin(self, trainer: MultiTaskTrainer, state: TrainerState) -> None:
        """Before the first step."""

    def on_step_end(self, trainer: MultiTaskTrainer, state: TrainerState) -> None:
        """After each optimizer step, before evaluation and saving."""

    def on_log(self, trainer: MultiTaskTrainer, state: TrainerState, values: dict[str, float]) -> None:
        """After a log entry was written; `values` is what was logged."""

    def on_evaluate(self, trainer: MultiTaskTrainer, state: TrainerState, result: EvaluationResult) -> None:
        """After an evaluation."""

    def on_save(self, trainer: MultiTaskTrainer, state: TrainerState, checkpoint: Path) -> None:
        """After a checkpoint was written."""

    def on_train_end(self, trainer: MultiTaskTrainer, state: TrainerState) -> None:
        """After the last step, before the final adapter is saved."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must remember of this callback, as plain JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class EarlyStoppingCallback(TrainerCallback):
    """Ends a run when the metric has not improved for `patience` evaluations in a row.

    Args:
        metric: a name as in `metric_for_best_model`.
        patience: evaluations without a new best that are tolerated.
        threshold: a value must be better than the best by more than this to count.
        greater_is_better: whether larger values are better.
    """

    def __init__(self, metric: str, patience: int, threshold: float = 0.0, greater_is_better: bool = False) -> None:
        if patience < 1:
            raise ConfigError(f"early_stopping_patience: needs a number of evaluations from 1 up (got {patience})")
        self.metric = metric
        self.patience = patience
        self.threshold = threshold
        self.greater_is_better = greater_is_better
        self.best: float | None = None
        self.waited = 0

    def on_evaluate(self, trainer: MultiTaskTrainer, state: TrainerState, result: EvaluationResult) -> None:
        """Compare with the best value so far. The evaluation before the first step counts as one."""
        value = result.value(self.metric)
        gain = 0.0 if self.best is None else (value - self.best) * (1 if self.greater_is_better else -1)
        if self.best is None or gain > self.threshold:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            state.should_stop = True
            state.stop_reason = (
                f"{self.metric} did not improve on {self.best:.6g} in {self.waited} evaluations (early stopping)"
            )

    def state_dict(self) -> dict[str, Any]:
        """The best value and how long it has been waited for."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue waiting where the checkpoint was written."""
        self.best, self.waited = state["best"], int(state["waited"])


def callback_states(callbacks: Iterable[TrainerCallback]) -> dict[str, dict[str, Any]]:
    """The states of callbacks that have one, by class name (and position, where a class comes twice)."""
    states: dict[str, dict[str, Any]] = {}
    for position, callback in enumerate(callbacks):
        state = callback.state_dict()
        if state:
            name = type(callback).__name__
            states[name if name not in states else f"{name}.{position}"] = state
    return states


def restore_callbacks(callbacks: Iterable[TrainerCallback], states: dict[str, dict[str, Any]]) -> None:
    """Give each callback its state of the checkpoint; one that the checkpoint does not know starts afresh."""
    seen: set[str] = set()
    for position, callback in enumerate(callbacks):
        name = type(callback).__name__
        key = f"{name}.{position}" if name in seen else name
        if callback.state_dict():
            seen.add(name)
        if key in states:
            callback.load_state_dict(states[key])
