"""How a run starts: with which processes and tasks, and afresh or from a checkpoint that fits the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moadapt.errors import ConfigError, DataError
from moadapt.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
    step_of,
)
from moadapt.train.engine import Processes, pick_device, refuse_many_processes
from moadapt.train.evaluation import EvaluationResult
from moadapt.train.sampling import MixtureSampler
from moadapt.train.tasks import Task
from moadapt.train.training_config import TrainingConfig


def start_processes(config: TrainingConfig, deepspeed: str | Path | dict[str, Any] | None) -> Processes:
    """Join the other processes of the run, if there are any.

    Raises:
        ConfigError: several processes without DeepSpeed, or a DeepSpeed configuration that cannot be used.
    """
    if deepspeed is None:
        refuse_many_processes()
        return Processes(device=pick_device(config.use_cpu))
    from moadapt.train.deepspeed_config import read_deepspeed
    from moadapt.train.deepspeed_engine import bootstrap

    read_deepspeed(deepspeed)
    return bootstrap(config)


def leave_processes() -> None:
    """Leave the process group at the end of a program; without one it does nothing."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def check_tasks(tasks: Sequence[Task], config: TrainingConfig) -> None:
    """Whether there is something to train on, and to evaluate where that is asked for.

    Raises:
        DataError: there is no task.
        ConfigError: there are no evaluation rows, or they do not give the metric that decides.
    """
    if not tasks:
        raise DataError("data: there is no task")
    wanted = [name for name in ("eval_strategy", "eval_on_start") if getattr(config, name) not in ("no", False)]
    if wanted and not any(task.eval for task in tasks):
        raise ConfigError(
            f"training.{wanted[0]}: no task has evaluation examples; give eval_path, eval_split or eval_fraction"
        )
    if wanted:  # a name that is never evaluated must not come to light after hours
        evaluated = [task for task in tasks if task.eval]
        scores = {task.name: dict.fromkeys(["loss", *filter(None, [task.metric])], 0.0) for task in evaluated}
        EvaluationResult(scores).value(config.best_metric)


def sampler_identity(sampler: MixtureSampler) -> dict[str, Any]:
    """What must not change between a checkpoint and its continuation: it gives the data position its meaning."""
    return {
        "per_device_train_batch_size": sampler.batch_size,
        "data_seed": sampler.seed,
        "training rows of each task": sampler.sizes,
        "data.sampling": sampler.config.model_dump(mode="json"),
        "shares of the tasks": sampler.probabilities,
    }


def open_checkpoint(
    resume: str | bool | None, config: TrainingConfig, sampler: MixtureSampler, processes: Processes
) -> Checkpoint | None:
    """The checkpoint to continue from, or None. Collective.

    Raises:
        ConfigError: there is no complete checkpoint, or it was written with other data settings.
        AdapterError: the checkpoint is broken.
    """
    newest = resume is True or str(resume).lower() == "true"
    if newest and processes.world_size > 1:  # the first process looks: the others might see an older folder
        found = list_checkpoints(config.output_dir) if processes.is_main else []
        step = int(processes.all_max(torch.tensor([step_of(found[-1]) if found else -1]))[0])
        resume = str(Path(config.output_dir) / f"checkpoint-{step}") if step >= 0 else resume
    path = find_checkpoint(resume, config.output_dir)
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    problems = [
        f"  {name}: {checkpoint.sampler.get(name)} in the checkpoint, {value} now"
        for name, value in sampler_identity(sampler).items()
        if checkpoint.sampler.get(name) != value
    ]
    if problems:
        raise ConfigError(
            f"training.resume_from_checkpoint: {path} was written with other data settings, so its position in the "
            "data means nothing here; set them back, or start afresh\n" + "\n".join(problems)
        )
    return checkpoint


def clear_output(config: TrainingConfig, processes: Processes) -> None:
    """See to it that a fresh run does not mix its checkpoints with those of an earlier one. Collective.

    Raises:
        ConfigError: there are checkpoints in `output_dir`, and `overwrite_output_dir` is not set.
    """
    old = list_checkpoints(config.output_dir) if processes.is_main else []
    if processes.any(bool(old) and not config.overwrite_output_dir):
        raise ConfigError(
            f"training.output_dir: {config.output_dir} holds checkpoints of an earlier run. Continue it with "
            "resume_from_checkpoint: true, delete them with overwrite_output_dir: true, or choose another folder"
        )
    for path in old:
        remove_checkpoint(path)
