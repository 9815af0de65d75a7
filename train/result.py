"""What a training run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moadapt.train.evaluation import EvaluationResult


@dataclass
class TrainResult:
    """What a run came to.

    Attributes:
        global_step: optimizer steps done, those before a resume included.
        loss: mean over this run's steps of the training loss.
        tokens: tokens trained on, those before a resume included.
        seconds: time of this run, evaluations and saving included.
        stop_reason: why it ended before `max_steps`, or None.
        best_value: best value of `metric_for_best_model`, or None without evaluations.
        best_checkpoint: its checkpoint, where one was saved.
        evaluation: the last evaluation, or None.
        history: the log entries, as in `metrics.jsonl` (first process only).
        output_dir: where the final adapter is.
    """

    global_step: int
    loss: float
    tokens: int
    seconds: float
    stop_reason: str | None
    best_value: float | None
    best_checkpoint: Path | None
    evaluation: EvaluationResult | None
    history: list[dict[str, float]] = field(default_factory=list)
    output_dir: Path = Path()
