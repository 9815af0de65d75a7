"""Routing by task: one row of learned logits for each task, whatever the input.

    softmax:    g = softmax(w_t / temperature)
    bernoulli:  a = sigmoid((z_t + log u - log(1 - u)) / temperature) in training, u ~ U(0, 1) for every row and expert
                a = sigmoid(z_t) in evaluation
                g_e = a_e / (sum_j a_j + 1e-12)

`softmax` is the mixing of MTL-LoRA (2410.09437; its script's temperature is 0.1, and `init: kaiming` its start,
U(-1/sqrt(N), 1/sqrt(N))). `bernoulli` is Poly (2202.13914), as peft computes it (temperature 1, `init: uniform`).

A row of the batch without a known task (task id -1, or no task ids at all) is an error, or with `unknown_task: mean` it
has the mean of the table's rows of logits, which then also get its gradient.

The check of the ids needs their values on the host. Where they are on the CPU it is made in every pass and names the
way out. Where they are on a GPU it would wait for the device in every layer, so they are not read there: an id outside
of the table then fails the device's own check of indices.

Shapes: B sequences, U tasks, N experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.registry import ROUTERS
from moadapt.routers.base import Router, RouterConfig
from moadapt.routing import Routing, RoutingContext, router_dtype


class TaskTableRouterConfig(RouterConfig):
    """Options of the `task_table` router.

    Attributes:
        num_tasks: U; filled in from `mixture.tasks`, the names of the tasks.
        gate: how a task's logits become its gates: `softmax`, or `bernoulli`, a noisy sigmoid of each, normalised.
        temperature: divides the logits before the softmax, and the noisy logits of `bernoulli` in training.
        init: how the logits start: `normal` (N(0, init_std²)), `uniform` (U(-0.001, 0.001)) or `kaiming`
            (U(-1/sqrt(N), 1/sqrt(N))).
        unknown_task: what a row without a known task gets: an `error`, or the `mean` of all tasks' logits.
    """

    granularities = ("task",)

    kind: Literal["task_table"] = "task_table"
    granularity: Literal["task"] = "task"
    num_tasks: int | None = Field(default=None, ge=1)
    gate: Literal["softmax", "bernoulli"] = "softmax"
    temperature: float = Field(default=1.0, gt=0.0)
    init: Literal["normal", "uniform", "kaiming"] = "normal"
    unknown_task: Literal["error", "mean"] = "error"


@ROUTERS.register("task_table", TaskTableRouterConfig)
class TaskTableRouter(Router):
    """Looks the gates of a sequence up by its task. See the module's docstring for the equations."""

    selects_all = True
    config: TaskTableRouterConfig

    def create_parameters(self, device: torch.device | None) -> None:
        """`weight` (U, N).

        Raises:
            ConfigError: the number of tasks is not known.
        """
        if self.config.num_tasks is None:
            raise ConfigError(
                "router.num_tasks: the router task_table has one row for each task but their number is not known; list "
                "the names of the tasks in mixture.tasks, or set router.num_tasks"
            )
        shape = (self.config.num_tasks, self.num_experts)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the logits as `init` says."""
        if self.config.init == "normal":
            super().reset_parameters()
            return
        bound = 1e-3 if self.config.init == "uniform" else self.num_experts**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(B, D) -> Routing of granularity `task` with all N experts selected. Only the number of rows is read.

        Raises:
            ConfigError: a task id that the table does not have, or none where one is needed.
        """
        ids_B = self._task_ids(hidden_states, context)
        table_UN = self.weight.to(router_dtype(hidden_states))
        if self.config.unknown_task == "mean":
            table_UN = torch.cat([table_UN, table_UN.mean(dim=0, keepdim=True)])
        logits_BN = table_UN.index_select(0, ids_B)
        weights_BN = self._gates(logits_BN)
        return Routing(
            weights_TN=weights_BN,
            selected_TN=torch.ones_like(weights_BN, dtype=torch.bool),
            logits_TN=logits_BN,
            probs_TN=weights_BN,
            granularity="task",
        )

    def _gates(self, logits_BN: Tensor) -> Tensor:
        temperature = self.config.temperature
        if self.config.gate == "softmax":
            return torch.softmax(logits_BN / temperature, dim=-1)
        if self.training:
            tiny = torch.finfo(logits_BN.dtype).eps
            uniform_BN = torch.rand_like(logits_BN).clamp(tiny, 1.0 - tiny)
            logits_BN = (logits_BN + torch.logit(uniform_BN)) / temperature
        gates_BN = torch.sigmoid(logits_BN)
        return gates_BN / (gates_BN.sum(dim=-1, keepdim=True) + 1e-12)

    def _task_ids(self, hidden_states: Tensor, context: RoutingContext) -> Tensor:
        """Rows of the table: U, one past its end, for an unknown task, and U + 1 for what is never in it."""
        num_rows, num_tasks = hidden_states.shape[0], self.weight.shape[0]
        ids_B = context.task_ids_B
        if ids_B is None:
            if self.config.unknown_task == "error":
                raise ConfigError(f"the router task_table needs the task of every row, and none is given; {_WAY_OUT}")
            ids_B = torch.full((num_rows,), -1, device=self.weight.device)
        if ids_B.shape != (num_rows,):
            raise ConfigError(
                f"task_ids: {tuple(ids_B.shape)} for a batch of {num_rows} sequences; give one id for each of them"
            )
        if ids_B.device.type == "cpu":
            self._check(ids_B)
        ids_B = ids_B.to(self.weight.device)
        # Never a valid row by accident: an index of -1, or one that falls on the row of the mean.
        beyond_B = torch.where(ids_B < 0, num_tasks, num_tasks + 1)
        return torch.where((ids_B >= 0) & (ids_B < num_tasks), ids_B, beyond_B)

    def _check(self, ids_B: Tensor) -> None:
        num_tasks = self.weight.shape[0]
        for row, task in enumerate(ids_B.tolist()):
            if task >= num_tasks:
                raise ConfigError(
                    f"task_ids: row {row} is of task {task}, but the router task_table has {num_tasks} tasks, 0 to "
                    f"{num_tasks - 1}; add its name to mixture.tasks and train it, or pass -1 with "
                    "router.unknown_task: mean"
                )
            if task < 0 and self.config.unknown_task == "error":
                raise ConfigError(f"task_ids: row {row} is of no known task ({task}); {_WAY_OUT}")


_WAY_OUT = "pass `task_ids`, one for each row, in the order of mixture.tasks, or set router.unknown_task: mean"
