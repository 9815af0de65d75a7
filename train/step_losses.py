"""The parts of one optimizer step's loss, over its micro-batches and processes: for the log, and to find a NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moadapt.train.engine import Processes
from moadapt.train.logging import Window

_CHUNK = 1024  # tokens whose losses are computed together: bounds the memory for large vocabularies


@dataclass
class StepValues:
    """The reduced values, equal on every process.

    Attributes:
        loss: what the step descends.
        parts: `lm`, the auxiliary losses by name, and `aux`: means weighted by response tokens.
        task_losses: mean language-model loss of each task that was in the step.
        task_weights: response tokens of each task that was in the step.
    """

    loss: float
    parts: dict[str, float]
    task_losses: dict[str, float] = field(default_factory=dict)
    task_weights: dict[str, float] = field(default_factory=dict)

    def broken_tasks(self) -> list[str]:
        """Tasks whose own loss is not finite, or all tasks of the step where the trouble lies elsewhere."""
        broken = [name for name, value in self.task_losses.items() if not math.isfinite(value)]
        return broken or list(self.task_weights)

    def add_to(self, window: Window) -> None:
        """Add this step to a log entry."""
        window.add("train/loss", self.loss)
        for name, value in self.parts.items():
            window.add(f"train/{name}_loss" if name in ("lm", "aux") else f"train/aux/{name}", value)
        for name, value in self.task_losses.items():
            window.add(f"train/{name}/loss", value, self.task_weights[name])


class StepLosses:
    """Collects a step's losses on the device, and reduces them in one message.

    Args:
        tasks: the tasks' names, by task id.
        items: response tokens of the whole step.
        is_encoder_decoder: whether labels are aligned with the logits (else they are one position behind).
        processes: to reduce over.
    """

    def __init__(self, tasks: Sequence[str], items: int, is_encoder_decoder: bool, processes: Processes) -> None:
        self._tasks = tasks
        self._items = max(items, 1)
        self._shift = 0 if is_encoder_decoder else 1
        self._processes = processes
        self._loss: list[Tensor] = []
        self._parts: dict[str, list[Tensor]] = {}
        self._task_sums_N = torch.zeros(len(tasks), dtype=torch.float64, device=processes.device)
        self._task_counts_N = torch.zeros(len(tasks), dtype=torch.float64)

    @torch.no_grad()
    def add(self, output: Any, parts: Mapping[str, Tensor], batch: Mapping[str, Tensor], items: int) -> None:
        """Add one micro-batch.

        Args:
            output: the model's output; `loss` is its share of the step's loss.
            parts: `MixtureModel.last_losses`.
            batch: the batch, on the CPU.
            items: its response tokens.
        """
        self._loss.append(output.loss.detach().double())
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value.detach().double() * (items / self._items))
        labels_BS = batch["labels"][:, self._shift :]
        counts_B = (labels_BS != -100).sum(1)
        tasks_B = batch["task_ids"]
        self._task_counts_N.index_add_(0, tasks_B, counts_B.double())
        if len(set(tasks_B.tolist())) == 1:
            self._task_sums_N[int(tasks_B[0])] += parts["lm"].detach().double() * items
        elif output.logits is not None:
            self._add_token_losses(output.logits, labels_BS, tasks_B)

    def _add_token_losses(self, logits_BSV: Tensor, labels_BS: Tensor, tasks_B: Tensor) -> None:
        """Sum the token losses of every row into its task. All indices are made on the CPU: no synchronisation."""
        rows, columns = (labels_BS != -100).nonzero(as_tuple=True)
        device = logits_BSV.device
        for start in range(0, len(rows), _CHUNK):
            row_T, column_T = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
            logits_TV = logits_BSV[row_T.to(device), column_T.to(device)].float()
            losses_T = F.cross_entropy(logits_TV, labels_BS[row_T, column_T].to(device), reduction="none")
            self._task_sums_N.index_add_(0, tasks_B[row_T].to(device), losses_T.double())

    def reduce(self) -> StepValues:
        """The values of the whole step. Collective."""
        names = sorted(self._parts)
        totals = [torch.stack(self._loss).sum(), *(torch.stack(self._parts[name]).sum() for name in names)]
        device = self._processes.device
        message = torch.cat(
            [torch.stack([total.to(device) for total in totals]), self._task_sums_N, self._task_counts_N.to(device)]
        )
        values = self._processes.all_sum(message).tolist()
        parts = dict(zip(names, values[1 : 1 + len(names)], strict=True))
        sums = values[1 + len(names) : 1 + len(names) + len(self._tasks)]
        counts = values[1 + len(names) + len(self._tasks) :]
        present = [index for index, count in enumerate(counts) if count > 0]
        return StepValues(
            values[0],
            parts,
            {self._tasks[index]: sums[index] / counts[index] for index in present},
            {self._tasks[index]: counts[index] for index in present},
        )
