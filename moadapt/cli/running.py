"""What `moadapt train` does: trains each mixture of a config, measures it, and writes down what came of it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moadapt.cli.console import is_main_process, note
from moadapt.cli.processes import progress_bar
from moadapt.cli.report import RunReport, write_cards
from moadapt.errors import ConfigError
from moadapt.model import MixtureModel
from moadapt.passes import PassRequest, requesting
from moadapt.pretrained import empty_base, empty_mixture, load_mixture, load_tokenizer
from moadapt.run_config import CONFIG_FILE, RunConfig
from moadapt.train.callbacks import TrainerCallback, TrainerState
from moadapt.train.checkpoint import list_checkpoints, seed_everything
from moadapt.train.evaluation import EvaluationResult, evaluating
from moadapt.train.logging import read_metrics
from moadapt.train.task_ids import TaskIds
from moadapt.train.tasks import Task, load_tasks
from moadapt.train.trainer import MultiTaskTrainer
from moadapt.usage import DECIDED, ExpertUsage

if TYPE_CHECKING:
    from moadapt.train.encoding import Example

RESULTS_FILE = "results.json"


def train_all(config: RunConfig) -> list[RunReport]:
    """Train the mixture and those of `compare`, and write `results.json` and the model cards.

    Raises:
        MoadaptError: a mistake in the config, the data, or the run.
    """
    runs = config.runs()
    _check_early(runs)
    tokenizer = load_tokenizer(config)
    encoder_decoder = bool(empty_base(config).config.is_encoder_decoder)
    assert config.data is not None
    tasks = load_tasks(config.data, tokenizer, is_encoder_decoder=encoder_decoder, seed=config.training.seed)
    for task in tasks:
        note(task.report())
    reports = []
    for position, (name, run) in enumerate(runs.items()):
        if len(runs) > 1:
            note(f"training {name} ({position + 1} of {len(runs)})")
        if position > 0:
            run = _without_first_evaluation(run)
        reports.append(_train_one(name, run, tokenizer, tasks, compared=position > 0))
        gc.collect()  # the next mixture gets a base model of its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if is_main_process():
        document = {"base_model": config.model_name_or_path, "runs": [report.to_dict() for report in reports]}
        path = Path(config.training.output_dir) / RESULTS_FILE
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        write_cards(reports)
    return reports


def _without_first_evaluation(run: RunConfig) -> RunConfig:
    """A compared mixture starts from the same base model, which has its scores already.

    Early stopping and the best checkpoint count that evaluation as one, so with them it stays.
    """
    training = run.training
    if training.early_stopping_patience is not None or training.load_best_model_at_end:
        return run
    return run.model_copy(update={"training": training.model_copy(update={"eval_on_start": False})})


def _check_early(runs: dict[str, RunConfig]) -> None:
    """Put every mixture into a model without weights: what does not fit must not show after hours of training.

    Raises:
        ConfigError: names the mixture where there are several.
    """
    for name, run in runs.items():
        try:
            empty_mixture(run)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}" if len(runs) > 1 else str(error)) from None


@dataclass
class Recorder(TrainerCallback):
    """Writes the run's config when training begins, and measures the time of the steps alone.

    Attributes:
        config: the run.
        seconds: duration of each step, evaluations and saving left out.
        evaluated: the step of the last evaluation.
    """

    config: RunConfig
    seconds: list[float] = field(default_factory=list)
    evaluated: int = -1
    _since: float = 0.0

    def on_train_begin(self, trainer: MultiTaskTrainer, state: TrainerState) -> None:
        """Now the output folder is this run's."""
        if trainer.processes.is_main:
            path = Path(self.config.training.output_dir) / CONFIG_FILE
            path.write_text(self.config.to_yaml(), encoding="utf-8")
        self._since = time.perf_counter()

    def on_step_end(self, trainer: MultiTaskTrainer, state: TrainerState) -> None:
        """One step more."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now

    def on_evaluate(self, trainer: MultiTaskTrainer, state: TrainerState, result: EvaluationResult) -> None:
        """The clock starts again."""
        self.evaluated = state.global_step
        self._since = time.perf_counter()

    def on_save(self, trainer: MultiTaskTrainer, state: TrainerState, checkpoint: Path) -> None:
        """The clock starts again."""
        self._since = time.perf_counter()

    def seconds_per_step(self) -> float | None:
        """The mean without the first step, which sets things up."""
        steps = self.seconds[1:] or self.seconds
        return sum(steps) / len(steps) if steps else None


def _train_one(name: str, run: RunConfig, tokenizer: Any, tasks: Sequence[Task], *, compared: bool) -> RunReport:
    seed_everything(run.training.seed)  # every process draws the same adapters
    model = load_mixture(run)
    recorder = Recorder(run)
    trainer = MultiTaskTrainer(
        model, tokenizer, run.data or [], run.training, run.deepspeed, callbacks=[recorder], tasks=tasks
    )
    if is_main_process():
        Path(run.training.output_dir).mkdir(parents=True, exist_ok=True)
    result = trainer.train(_resume(run, compared))
    final: EvaluationResult | None = None
    usage: dict[str, Any] | None = None
    if any(task.eval for task in tasks):
        kept_best = run.training.load_best_model_at_end and trainer.state.best_step != recorder.evaluated
        is_final = recorder.evaluated == result.global_step and not kept_best
        if not is_final:
            note(f"evaluating {name}")
        final = trainer.evaluation if is_final else trainer.evaluate()
        usage = _usage(trainer, tasks)
    report = RunReport(
        name=name,
        output_dir=run.training.output_dir,
        steps=result.global_step,
        stop_reason=result.stop_reason,
        trainable_parameters=sum(
            _full_size(weight) for _, weight in model.adapter_parameters() if weight.requires_grad
        ),
        seconds_per_step=recorder.seconds_per_step(),
        before=_first_scores(run.training.output_dir, tasks),
        after=None if final is None else final.to_dict(),
        metrics={task.name: task.metric for task in tasks if task.eval},
        usage=usage,
    )
    trainer.close()
    return report


def _resume(run: RunConfig, compared: bool) -> str | bool | None:
    """Where a run continues. A compared mixture that has no checkpoint yet starts from the beginning."""
    resume = run.training.resume_from_checkpoint
    if not compared or not resume:
        return resume
    return bool(list_checkpoints(run.training.output_dir))


def _full_size(parameter: torch.nn.Parameter) -> int:
    """Elements of a tensor, also where ZeRO-3 has taken it apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _first_scores(output_dir: str, tasks: Sequence[Task]) -> dict[str, dict[str, float]] | None:
    """The evaluation before the first step, as the log holds it; None without one."""
    entry = next((entry for entry in read_metrics(output_dir) if entry["step"] == 0 and "eval/loss" in entry), None)
    if entry is None:
        return None
    scores = {}
    for task in tasks:
        prefix = f"eval/{task.name}/"
        scores[task.name] = {key.removeprefix(prefix): entry[key] for key in entry if key.startswith(prefix)}
    flat = [key.removeprefix("eval/") for key in entry if key.startswith("eval/")]
    scores["mean"] = {key: entry[f"eval/{key}"] for key in flat if "/" not in key}
    return {name: values for name, values in scores.items() if values}


def _usage(trainer: MultiTaskTrainer, tasks: Sequence[Task]) -> dict[str, Any] | None:
    """Where the evaluation rows go; None where no router has a choice."""
    if all(site.router.num_experts == 1 for site in trainer.model.injection.routers.values()):
        return None
    return count_usage(trainer, tasks).to_dict()


def count_usage(trainer: MultiTaskTrainer, tasks: Sequence[Task]) -> ExpertUsage:
    """Where the evaluation rows go, over all processes: their tokens (prompt and answer), or their prompts.

    Args:
        trainer: with its engine set up, after `train` or `evaluate`.
        tasks: the loaded tasks.
    """
    model: MixtureModel = trainer.model
    task_ids_of = TaskIds(model, tasks)
    processes, usage = trainer.processes, ExpertUsage([task.name for task in tasks], model.expert_names)
    site = next(iter(model.injection.routers.values()))
    what = f"counting where {DECIDED[site.granularity]} go"
    examples: list[Example] = sorted(
        (example for task in tasks for example in task.eval),
        key=lambda example: (-len(example.input_ids), example.task_id, example.row),
    )
    size = trainer.config.per_device_eval_batch_size
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    with torch.no_grad(), evaluating(model), trainer.engine.computing(), progress_bar() as progress:
        for first in range(0, len(batches), processes.world_size):
            number = first + processes.rank
            counts = number < len(batches)  # a surplus pass keeps the processes in step (ZeRO-3)
            batch = trainer.collator(batches[number if counts else -1])
            batch = {key: value.to(processes.device) for key, value in batch.items()}
            task_ids, prompt_mask = batch.pop("task_ids"), batch.pop("prompt_mask")
            with requesting(PassRequest(prompt_mask, task_ids_of(task_ids), record=True)) as request:
                model.base_model(**batch)
            assert request.context is not None
            usage.add(request.context.records, task_ids, counts=counts)
            progress(what, min(first + processes.world_size, len(batches)), len(batches))
    usage.reduce(processes.all_sum)
    return usage
