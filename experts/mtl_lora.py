"""MTL-LoRA experts (2410.09437): one down-projection, a transform for each task, several up-projections.

    y = W0 x + s sum_e g_e B_e Lambda_t A dropout(x),    s = lora_alpha / r, t the task of the sequence

A (R, I) and the up-projections B_e are shared by all tasks. Lambda_t is R x R and starts as the identity, A is
Kaiming-uniform (a = sqrt 5), B_e = 0. In the paper the gates are a softmax over a learned row of each task (router
`task_table`); here any router can give them, at any granularity. The authors' code has a full Lambda, other
descriptions of the method a diagonal one: `task_transform` has both.

The ids of the tasks are checked where they are on the CPU, in every pass. On a GPU that would wait for the device in
every layer: there an id outside of the table fails the device's own check of indices.

Shapes: B sequences, S tokens of a sequence (T = B*S), I in, O out, N experts, R rank, U tasks.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.experts.base import ExpertBank, LowRankConfig, Role
from moadapt.experts.low_rank import Base, project_down
from moadapt.experts.sequence import base_output, mix_shared_up, skips_all
from moadapt.registry import EXPERTS
from moadapt.routing import Routing, current_context

_WAY_OUT = "give its id with the batch (task_ids), or use expert.unknown_task: mean"


class MtlLoraExpertConfig(LowRankConfig):
    """Options of the `mtl_lora` experts.

    Attributes:
        num_tasks: U; filled in from `mixture.tasks`, the names of the tasks.
        task_transform: a `full` Lambda (R x R) for each task, or a `diagonal` one.
        unknown_task: what a sequence without a known task (id -1, or no ids at all) gets: an `error`, or the `mean` of
            all tasks' transforms, which then also get its gradient.
    """

    kind: Literal["mtl_lora"] = "mtl_lora"
    num_tasks: int | None = Field(default=None, ge=1)
    task_transform: Literal["full", "diagonal"] = "full"
    unknown_task: Literal["error", "mean"] = "error"


@EXPERTS.register("mtl_lora", MtlLoraExpertConfig)
class MtlLoraBank(ExpertBank):
    """N up-projections of one linear layer behind one down-projection and U transforms.

    Parameters: `shared_A` (R, I), `mtl_lambda` (U, R, R) or (U, R), `mtl_B` (N, R, O).

    Raises:
        ConfigError: the number of tasks is not known.
    """

    config: MtlLoraExpertConfig
    per_sequence: ClassVar[bool] = True
    roles: ClassVar[dict[str, Role]] = {"shared_A": "shared_down", "mtl_lambda": "other", "mtl_B": "up"}

    def __init__(
        self,
        config: MtlLoraExpertConfig,
        in_features: int,
        out_features: int,
        num_experts: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, in_features, out_features, num_experts, device, dtype)
        if config.num_tasks is None:
            raise ConfigError(
                "expert.num_tasks: the mtl_lora experts have a transform for each task but their number is not known; "
                "list the names of the tasks in mixture.tasks, or set expert.num_tasks"
            )
        assert isinstance(config.r, int)
        self.r, self.num_tasks, self.scaling = config.r, config.num_tasks, config.scaling()
        size = (self.num_tasks, self.r, self.r) if config.task_transform == "full" else (self.num_tasks, self.r)
        self.shared_A = nn.Parameter(torch.empty(self.r, in_features, device=device, dtype=dtype))
        self.mtl_lambda = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.mtl_B = nn.Parameter(torch.empty(num_experts, self.r, out_features, device=device, dtype=dtype))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A Kaiming-uniform, Lambda the identity, B = 0."""
        bound = self.in_features**-0.5  # Kaiming-uniform with a = sqrt(5) and fan-in I
        self.shared_A.uniform_(-bound, bound)
        self.mtl_B.zero_()
        if self.config.task_transform == "full":
            self.mtl_lambda.copy_(torch.eye(self.r, device=self.mtl_lambda.device))
        else:
            self.mtl_lambda.fill_(1.0)

    def forward(self, x_TI: Tensor, routing: Routing, base: Base) -> Tensor:
        """(T, I) -> (T, O); see the base class. The tasks are those of the running pass.

        Raises:
            ConfigError: a task id outside of 0 to U - 1, or none where one is needed.
        """
        self._check_rows(x_TI, routing)
        if skips_all(routing):
            return base_output(base, x_TI)
        rows_B = self._task_rows(x_TI.shape[0])
        dropped_TI = self.dropout(x_TI) if self.training and self.dropout.p > 0.0 else None
        base_TO, z_TR = project_down(base, x_TI, self.shared_A, dropped_TI)
        return mix_shared_up(base_TO, self._transform(z_TR, rows_B), routing, self.mtl_B, self.scaling)

    def delta_weight(self, expert: int) -> Tensor:
        """s B_e Lambda_t A: (O, I), for the one task of the running pass, or the only one that there is.

        Raises:
            ConfigError: the running pass has several tasks, or outside of any pass the experts know several.
        """
        known = current_context().task_ids_B is not None
        rows = set(self._task_rows(0).tolist()) if known else set(range(self.num_tasks))
        if len(rows) > 1:
            raise ConfigError(
                f"an expert of kind mtl_lora has another delta for each of its tasks, and there are {len(rows)} here; "
                "merge for the sequences of one task at a time, or keep the adapter beside the base model"
            )
        transform = self._table()[rows.pop()]
        h_RI = transform @ self.shared_A if transform.dim() == 2 else transform.unsqueeze(-1) * self.shared_A
        return self.scaling * self.mtl_B[expert].T @ h_RI

    def num_active_params(self, num_experts_per_tok: int) -> int:
        """r I + one transform + K r O."""
        transform = self.mtl_lambda[0].numel()
        return self.r * (self.in_features + num_experts_per_tok * self.out_features) + transform

    def _transform(self, z_TR: Tensor, rows_B: Tensor) -> Tensor:
        """Lambda_t z for every token, with the t of its sequence."""
        transforms = self._table().index_select(0, rows_B).to(z_TR.dtype)
        z_BSR = z_TR.view(len(rows_B), z_TR.shape[0] // max(1, len(rows_B)), self.r)
        if transforms.dim() == 2:
            return (z_BSR * transforms.unsqueeze(1)).flatten(0, 1)
        return torch.bmm(z_BSR, transforms.transpose(1, 2)).flatten(0, 1)

    def _table(self) -> Tensor:
        """The transforms, with their mean behind them where unknown tasks get it."""
        if self.config.unknown_task == "error":
            return self.mtl_lambda
        return torch.cat([self.mtl_lambda, self.mtl_lambda.mean(dim=0, keepdim=True)])

    def _task_rows(self, tokens: int) -> Tensor:
        """Rows of the table for each sequence: U, one past its end, for an unknown task. One row serves all tokens."""
        ids_B = current_context().task_ids_B
        if ids_B is None:
            if self.config.unknown_task == "error":
                raise ConfigError(
                    f"the mtl_lora experts need the task of every sequence, and none is given; {_WAY_OUT}"
                )
            ids_B = torch.full((1,), -1, device=self.mtl_lambda.device)
        if (tokens % len(ids_B) if len(ids_B) else tokens) != 0:
            raise ConfigError(
                f"task_ids: {len(ids_B)} ids do not fit the {tokens} tokens of this layer; give one for each sequence, "
                "and leave out layers that do not see whole sequences (exclude_modules)"
            )
        if ids_B.device.type == "cpu":
            self._check_ids(ids_B)
        ids_B = ids_B.to(self.mtl_lambda.device)
        # Never a valid row by accident: an index of -1, or one that falls on the row of the mean.
        beyond_B = torch.where(ids_B < 0, self.num_tasks, self.num_tasks + 1)
        return torch.where((ids_B >= 0) & (ids_B < self.num_tasks), ids_B, beyond_B)

    def _check_ids(self, ids_B: Tensor) -> None:
        for row, task in enumerate(ids_B.tolist()):
            if task >= self.num_tasks:
                raise ConfigError(
                    f"task_ids: row {row} is of task {task}, but the mtl_lora experts have {self.num_tasks} tasks, 0 "
                    f"to {self.num_tasks - 1}; add its name to mixture.tasks and train it, or pass -1 with "
                    "expert.unknown_task: mean"
                )
            if task < 0 and self.config.unknown_task == "error":
                raise ConfigError(f"task_ids: row {row} is of no known task ({task}); {_WAY_OUT}")
