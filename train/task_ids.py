"""From the data's task ids to the model's: the position of a task's name in `mixture.tasks`.

Rows, losses and counts carry the position of their task in the data section. A model with parameters for each task
knows its tasks by the order in which it was made, which another data section (an adapter that is evaluated, or trained
further) need not have. The ids are changed where a batch goes to the model, and only there.

Shapes: B batch, L tasks of the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moadapt.config import MixtureConfig
from moadapt.errors import ConfigError
from moadapt.registry import closest
from moadapt.train.tasks import Task

UNKNOWN = -1


def takes_unknown_tasks(mixture: MixtureConfig) -> bool:
    """Whether every part with parameters for each task knows what to do without a task: `unknown_task: mean`."""
    return all(getattr(part, "unknown_task", "error") == "mean" for part in _parts(mixture).values())


def unknown_task(name: str, mixture: MixtureConfig) -> str:
    """The message for a task that a mixture has no parameters for."""
    tasks = mixture.tasks or []
    options = " and ".join(f"{part}.unknown_task" for part in _parts(mixture))
    return (
        f"task {name!r} is none of the mixture's tasks{closest(name, tasks)} Its tasks: {', '.join(tasks)}. "
        f"Rename it; an evaluation can take the mean over all tasks with {options}: mean"
    )


def _parts(mixture: MixtureConfig) -> dict[str, Any]:
    """The parts that have parameters for each task, with their options."""
    parts = {"router": mixture.router, "expert": mixture.expert}
    return {name: part for name, part in parts.items() if "num_tasks" in type(part).model_fields}


class TaskIds:
    """Changes task ids of the data into those of a model.

    Args:
        model: a `MixtureModel`; any other model, or a mixture without parameters for each task, gets the ids as they
            are.
        tasks: the data's tasks.
        train: whether the tasks' training rows are used; each task that has some must then be known.

    Attributes:
        names: of the tasks, by the ids that the model is given.

    Raises:
        ConfigError: the model does not know a task, and has no `unknown_task: mean`; or shall be trained on it.
    """

    def __init__(self, model: Any, tasks: Sequence[Task], *, train: bool = False) -> None:
        last = max((task.id for task in tasks), default=-1)
        named = {task.id: task.name for task in tasks}
        self.names: list[str] = [named.get(number, f"id {number}") for number in range(last + 1)]
        mixture: MixtureConfig | None = getattr(model, "mixture_config", None)
        self._ids_L: Tensor | None = None
        if mixture is None or mixture.tasks is None or not mixture.needs_tasks:
            return
        for task in tasks:
            if task.name in mixture.tasks:
                continue
            if train and task.train and takes_unknown_tasks(mixture):
                raise ConfigError(
                    f"data: task {task.name!r} has training rows but is none of the mixture's tasks "
                    f"({', '.join(mixture.tasks)}); unknown_task: mean is for evaluation. Rename the task, or start "
                    "from the base model with all tasks"
                )
            if not takes_unknown_tasks(mixture):
                raise ConfigError(f"data: {unknown_task(task.name, mixture)}")
        self.names = list(mixture.tasks)
        position = {name: index for index, name in enumerate(mixture.tasks)}
        self._ids_L = torch.full((last + 1,), UNKNOWN)
        for task in tasks:
            self._ids_L[task.id] = position.get(task.name, UNKNOWN)

    def __call__(self, task_ids_B: Tensor) -> Tensor:
        """int64 (B,) ids of the model, -1 for a task that it does not know, on the device of the given ones."""
        if self._ids_L is None:
            return task_ids_B
        return self._ids_L.to(task_ids_B.device)[task_ids_B]

    def for_model(self, batch: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a batch on the CPU as the model takes them, on its device."""
        for name, value in batch.items():
            yield name, (self(value) if name == "task_ids" else value).to(device)
