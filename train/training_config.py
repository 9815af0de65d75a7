"""Options of a training run, under the names and with the meanings of `transformers.TrainingArguments`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from moadapt.registry import Config, config_error

Strategy = Literal["no", "steps", "epoch"]

# Schedules that are a function of the step alone. The two others of transformers need a metric at every step.
_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
_NO_WARMUP = ("constant",)


class RoutingAlarmConfig(Config):
    """When a router is collapsed, and what is done about it. One of both thresholds must be given.

    Attributes:
        max_share: as many experts as a row selects on average take this share of all selections (of gate weights, where
            rows select all experts), as 0.95; None does not look at it.
        dead_fraction: this part of the experts is dead, as 0.5; None does not look at it.
        patience: so many times in a row.
        action: `warn` on the terminal, or `stop` the run.
    """

    max_share: float | None = Field(None, gt=0, le=1)
    dead_fraction: float | None = Field(None, gt=0, le=1)
    patience: int = Field(3, ge=1)
    action: Literal["warn", "stop"] = "warn"

    @model_validator(mode="after")
    def _something(self) -> RoutingAlarmConfig:
        if self.max_share is None and self.dead_fraction is None:
            raise ValueError("nothing to watch for; give max_share (such as 0.95), dead_fraction (such as 0.5) or both")
        return self


class TrainingConfig(Config):
    """One training run. Every option has an effect; what is not listed here is refused.

    Attributes:
        output_dir: where checkpoints, the final adapter, `metrics.jsonl` and the trackers' files go.
        overwrite_output_dir: delete checkpoints of an earlier run in `output_dir`; without it they are an error.
        per_device_train_batch_size: rows of one micro-batch on one process.
        per_device_eval_batch_size: rows of one evaluation batch; scores do not depend on the number of processes.
        gradient_accumulation_steps: micro-batches of one optimizer step on one process.
        learning_rate: the learning rate of all adapter tensors except where the options below say otherwise.
        router_learning_rate: the learning rate of the routers; None means `learning_rate`.
        activation_learning_rate: the learning rate of the coefficients of the routers' rational activation (1e-6 in
            MiLoRA, 2410.18035); None means that of the routers.
        bilevel_activation: learn these coefficients from the tasks' evaluation rows, and all else from the training
            rows, in turn (MiLoRA, 2410.18035, as first-order DARTS).
        bilevel_steps: optimizer steps between two steps of the coefficients, with `bilevel_activation`.
        loraplus_lr_ratio: LoRA+ (arXiv:2402.12354): up-projections learn at `learning_rate` times this; None means 1.
        weight_decay: AdamW's decoupled weight decay, on adapter matrices; biases and vectors have none.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's other constants.
        max_grad_norm: gradients are scaled down to this global L2 norm; 0 switches clipping off.
        lr_scheduler_type: a schedule of `transformers.get_scheduler`.
        lr_scheduler_kwargs: further arguments of that schedule.
        warmup_steps: optimizer steps of warmup; below 1 it is a ratio of all steps.
        warmup_ratio: warmup as a ratio of all steps, when `warmup_steps` is 0.
        max_steps: optimizer steps of the run; -1 means `num_train_epochs`.
        num_train_epochs: passes over the training data, when `max_steps` is -1.
        bf16: compute in bfloat16; the optimizer's weights stay in fp32.
        fp16: compute in float16; needs DeepSpeed at stage 1 or higher on CUDA.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        gradient_checkpointing_kwargs: passed on; `use_reentrant: true` is refused (it loses the auxiliary losses).
        eval_strategy: when to evaluate: `no`, every `eval_steps`, or at each `epoch`'s end.
        eval_steps: steps between evaluations, below 1 a ratio of all steps; None means `logging_steps`.
        eval_on_start: evaluate once before the first step.
        save_strategy, save_steps: when to write a checkpoint, as for evaluation.
        save_total_limit: keep this many checkpoints; the best and the newest are never deleted.
        logging_steps: steps between log entries, below 1 a ratio of all steps.
        logging_first_step: also log the first step.
        routing_statistics: log how the routers spread the training tokens (docs/training.md).
        routing_alarm: when a router is collapsed, and whether to warn or to stop; None is off.
        report_to: names of accelerate's trackers, as `tensorboard` or `wandb`; `none` for none.
        run_name: name of the run at the trackers; None means the last part of `output_dir`.
        disable_tqdm: no progress bar.
        seed: seeds python, numpy and torch (each process adds its rank).
        data_seed: seed of the order of the data; None means `seed`.
        resume_from_checkpoint: a checkpoint folder, or true for the newest complete one in `output_dir`.
        load_best_model_at_end: finish with the weights of the best evaluation (each new best is saved).
        metric_for_best_model: `loss`, a metric's name (both are means over tasks), or `task/metric`.
        greater_is_better: None means: false for a name that ends in `loss`, else true.
        early_stopping_patience: stop after this many evaluations in a row without a new best.
        early_stopping_threshold: how much better a value must be to count as a new best for early stopping.
        use_cpu: stay on the CPU where a GPU is present.
        ddp_timeout: seconds after which a collective of several processes gives up.
    """

    output_dir: str = "runs/moadapt"
    overwrite_output_dir: bool = False
    per_device_train_batch_size: int = Field(8, ge=1)
    per_device_eval_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    router_learning_rate: float | None = Field(None, gt=0)
    activation_learning_rate: float | None = Field(None, gt=0)
    bilevel_activation: bool = False
    bilevel_steps: int = Field(1, ge=1)
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    warmup_steps: float = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    max_steps: int = Field(-1, ge=-1)
    num_train_epochs: float = Field(3.0, gt=0)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] = Field(default_factory=dict)
    eval_strategy: Strategy = "no"
    eval_steps: float | None = Field(None, gt=0)
    eval_on_start: bool = False
    save_strategy: Strategy = "steps"
    save_steps: float = Field(500, gt=0)
    save_total_limit: int | None = Field(None, ge=1)
    logging_steps: float = Field(10, gt=0)
    logging_first_step: bool = False
    routing_statistics: bool = True
    routing_alarm: RoutingAlarmConfig | None = None
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])
    run_name: str | None = None
    disable_tqdm: bool = False
    seed: int = Field(42, ge=0)
    data_seed: int | None = Field(None, ge=0)
    resume_from_checkpoint: str | bool | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = Field(None, ge=1)
    early_stopping_threshold: float = Field(0.0, ge=0)
    use_cpu: bool = False
    ddp_timeout: int = Field(1800, ge=1)

    @field_validator("output_dir")
    @classmethod
    def _output_dir(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("needs a folder")
        return value

    @field_validator("lr_scheduler_type")
    @classmethod
    def _schedule(cls, value: str) -> str:
        if value not in _SCHEDULES:
            raise ValueError(f"unknown schedule. Valid schedules: {', '.join(_SCHEDULES)}")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _report_to(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else [] if value is None else value
        return [] if names == ["none"] else names

    @field_validator("warmup_steps", "eval_steps", "save_steps", "logging_steps")
    @classmethod
    def _whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("give a whole number of steps, or a ratio below 1")
        return value

    @field_validator("max_steps")
    @classmethod
    def _max_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("give the number of optimizer steps, or -1 to use num_train_epochs")
        return value

    @model_validator(mode="after")
    def _together(self) -> TrainingConfig:
        problems = []
        evaluates = self.eval_strategy != "no"
        if self.bf16 and self.fp16:
            problems.append("bf16 and fp16 exclude each other; set one of them to false")
        if self.warmup_steps and self.warmup_ratio:
            problems.append("warmup_steps and warmup_ratio exclude each other; leave one of them out")
        if self.lr_scheduler_type in _NO_WARMUP and (self.warmup_steps or self.warmup_ratio):
            problems.append("lr_scheduler_type: constant has no warmup; use constant_with_warmup")
        if self.bilevel_steps != 1 and not self.bilevel_activation:
            problems.append("bilevel_steps needs bilevel_activation: true")
        if self.bilevel_activation and self.fp16:
            problems.append("bilevel_activation has no loss scaling, which fp16 needs; use bf16: true instead of fp16")
        if self.gradient_checkpointing_kwargs and not self.gradient_checkpointing:
            problems.append("gradient_checkpointing_kwargs needs gradient_checkpointing: true")
        if self.gradient_checkpointing_kwargs.get("use_reentrant"):
            problems.append("gradient_checkpointing_kwargs.use_reentrant: true loses the auxiliary losses' gradients")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            problems.append("eval_steps needs eval_strategy: steps")
        if self.load_best_model_at_end and not evaluates:
            problems.append("load_best_model_at_end needs evaluations; set eval_strategy: steps (or epoch)")
        if self.early_stopping_patience is not None and not evaluates:
            problems.append("early_stopping_patience needs evaluations; set eval_strategy: steps (or epoch)")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            problems.append("early_stopping_threshold needs early_stopping_patience")
        if (self.metric_for_best_model or self.greater_is_better is not None) and not evaluates:
            problems.append("metric_for_best_model and greater_is_better need eval_strategy: steps (or epoch)")
        if self.routing_alarm is not None and not self.routing_statistics:
            problems.append("routing_alarm needs routing_statistics: true")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def best_metric(self) -> str:
        """The name of the value that decides which evaluation is the best."""
        return (self.metric_for_best_model or "loss").removeprefix("eval_")

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of `best_metric` is a better one."""
        return not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    @property
    def half_precision(self) -> str | None:
        """`bf16`, `fp16` or None."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else None

    @property
    def tracker_name(self) -> str:
        """The run's name at the trackers."""
        return self.run_name or Path(self.output_dir).resolve().name

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run, where one pass over the data takes `steps_per_epoch` of them."""
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(self.num_train_epochs * steps_per_epoch))

    def warmup(self, total_steps: int) -> int:
        """Optimizer steps of warmup in a run of `total_steps`."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total_steps * (self.warmup_steps or self.warmup_ratio))


def interval(value: float, total_steps: int) -> int:
    """Steps between two events: `value` itself, or where it is below 1 that ratio of all steps."""
    return max(1, math.ceil(value * total_steps)) if value < 1 else int(value)


def training_config_from_dict(data: dict[str, Any] | TrainingConfig) -> TrainingConfig:
    """Parse training options.

    Raises:
        ConfigError: with one line for every problem.
    """
    try:
        return TrainingConfig.model_validate(data)
    except ValidationError as error:
        raise config_error(error, "training") from None
