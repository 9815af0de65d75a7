"""Whether data, training and routing go together.

Prompt-level routing needs prompts, task-level routing the names of the tasks, and learned activations of routers may
need evaluation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moadapt.config import MixtureConfig
from moadapt.errors import ConfigError
from moadapt.train.data_config import DataConfig, RowsConfig
from moadapt.train.task_ids import takes_unknown_tasks, unknown_task
from moadapt.train.tasks import Task
from moadapt.train.training_config import TrainingConfig

Path = tuple[str | int, ...]


def granularity_problems(data: DataConfig, mixture: MixtureConfig, where: Path) -> Iterator[tuple[Path, str]]:
    """What a config says that its routing cannot do.

    Args:
        data: the data section.
        mixture: a mixture that is trained on it.
        where: the mixture's place in the run's config.

    Yields:
        The place of each mistake, and what it is.
    """
    if getattr(mixture.router, "granularity", "token") != "prompt":
        return
    option = ".".join(str(part) for part in (*where, "router", "granularity"))
    sections: list[tuple[Path, RowsConfig]] = [(("data",), data)]
    if data.tasks is not None:
        sections = [(("data", "tasks", index), task) for index, task in enumerate(data.tasks)]
    for path, rows in sections:
        if rows.is_text:
            yield (
                (*path, "packing" if rows.packing else "text_column"),
                f"plain text, in packed rows or not, has no prompt that {option}: prompt could decide from; give "
                "prompts and responses, or set it to token",
            )


def task_problems(data: DataConfig, mixture: MixtureConfig, where: Path) -> Iterator[tuple[Path, str]]:
    """Tasks of the data that a mixture with parameters for each task does not know.

    Args:
        data: the data section.
        mixture: a mixture that is trained on it.
        where: the mixture's place in the run's config.

    Yields:
        The place of each mistake, and what it is.
    """
    if not mixture.needs_tasks:
        return
    if mixture.tasks is None:
        if data.tasks is None:
            yield (
                (*where, "tasks"),
                f"missing; this mixture has parameters for each task, and the tasks' names are in the column "
                f"{data.task_column!r} of data.path: list them here",
            )
    elif not takes_unknown_tasks(mixture):
        for index, task in enumerate(data.tasks or []):
            if task.name not in mixture.tasks:
                yield ("data", "tasks", index, "name"), unknown_task(task.name, mixture)


def activation_problems(training: TrainingConfig, mixture: MixtureConfig, where: Path) -> Iterator[tuple[Path, str]]:
    """Training options for the coefficients of a routers' activation that has none.

    Args:
        training: the training options.
        mixture: a mixture that is trained with them.
        where: the mixture's place in the run's config.

    Yields:
        The place of each mistake, and what it is.
    """
    if getattr(mixture.router, "activation", None) == "rational":
        return
    name = ".".join(str(part) for part in (*where, "router", "activation"))
    for option in ("activation_learning_rate", "bilevel_activation"):
        if getattr(training, option):
            yield (
                ("training", option),
                f"there are no coefficients to learn; set {name}: rational, or leave the option out",
            )


def bilevel_problems(training: TrainingConfig, data: DataConfig | None, zero_stage: int) -> Iterator[tuple[Path, str]]:
    """What learning from evaluation rows needs.

    Args:
        training: the training options.
        data: the data section, if there is one.
        zero_stage: DeepSpeed's ZeRO stage, 0 without DeepSpeed.

    Yields:
        The place of each mistake, and what it is.
    """
    option = ("training", "bilevel_activation")
    if not training.bilevel_activation:
        return
    if zero_stage == 3:
        yield option, "does not go with ZeRO-3, which takes the coefficients apart; use deepspeed: zero1 or zero2"
    if data is not None and not any(rows.has_eval for rows in (data, *(data.tasks or []))):
        yield option, "learns from evaluation rows, and no task has any; give eval_path, eval_split or eval_fraction"


def check_prompts(model: Any, tasks: Sequence[Task]) -> None:
    """See to it that every row begins with a prompt where a model routes by prompt.

    Args:
        model: a `MixtureModel`; any other model takes every row.
        tasks: the loaded tasks.

    Raises:
        ConfigError: names the first task with a row that does not.
    """
    mixture: MixtureConfig | None = getattr(model, "mixture_config", None)
    if mixture is None or getattr(mixture.router, "granularity", "token") != "prompt":
        return
    for task in tasks:
        for example in (*task.train, *task.eval):
            if not example.prompt_mask[:1] == [1]:
                raise ConfigError(
                    f"router.granularity: prompt decides from the prompt, and row {example.row} of task {task.name!r} "
                    "does not begin with one; give prompts and responses, or use granularity: token for plain text"
                )
