"""Where each task's tokens, or prompts, went: selections and gate weights of every expert by task, counted exactly.

What one decision of a router is about depends on its granularity: a token, the prompt of a turn, or a row.

Shapes: T tokens (or prompts, or rows) that one router decided about, B batch, N experts, L tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moadapt.routing import Granularity, RoutingRecord

DECIDED: dict[Granularity, str] = {"token": "tokens", "prompt": "prompts", "task": "rows"}
"""What is counted, by granularity."""


class ExpertUsage:
    """Adds up routing records.

    Args:
        tasks: the tasks' names, by task id.
        expert_names: gives the names of a router's experts; None numbers them.

    Attributes:
        counts: for each router, int64 (L, N): how many of a task's real tokens selected an expert.
        weights: for each router, float64 (L, N): the sum of their gate weights.
        tokens: for each router, int64 (L,): a task's real tokens; with prompts, its turns.
        granularity: of the routers.
    """

    def __init__(self, tasks: Sequence[str], expert_names: Callable[[str], Sequence[str]] | None = None) -> None:
        self.tasks = list(tasks)
        self.granularity: Granularity = "token"
        self._expert_names = expert_names
        self.counts: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, records: Iterable[RoutingRecord], task_ids_B: Tensor, *, counts: bool = True) -> None:
        """Count the records of one forward pass.

        Args:
            records: of any number of routers.
            task_ids_B: int64 task of each row of the batch.
            counts: false makes the routers known and counts nothing, for a pass that only keeps processes in step.
        """
        for record in records:
            self.granularity = record.routing.granularity
            selected_TN = record.routing.selected_TN.cpu()
            weights_TN = record.routing.weights_TN.double().cpu()
            rows, num_experts = selected_TN.shape
            tasks_T = task_ids_B.cpu().repeat_interleave(rows // record.batch_size)
            if record.mask_T is not None:
                mask_T = record.mask_T.cpu()
                selected_TN, weights_TN, tasks_T = selected_TN[mask_T], weights_TN[mask_T], tasks_T[mask_T]
            if record.name not in self.counts:
                self.counts[record.name] = torch.zeros(len(self.tasks), num_experts, dtype=torch.int64)
                self.weights[record.name] = torch.zeros(len(self.tasks), num_experts, dtype=torch.float64)
                self.tokens[record.name] = torch.zeros(len(self.tasks), dtype=torch.int64)
            if not counts:
                continue
            self.counts[record.name].index_add_(0, tasks_T, selected_TN.long())
            self.weights[record.name].index_add_(0, tasks_T, weights_TN)
            self.tokens[record.name] += torch.bincount(tasks_T, minlength=len(self.tasks))

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Add up the processes' counts; every process must have seen the same routers.

        Args:
            all_sum: gives the sum of a tensor over the processes, on the CPU.
        """
        for sums in (self.counts, self.weights, self.tokens):
            for name, value in sums.items():
                sums[name] = all_sum(value)

    def expert_names(self, router: str) -> list[str]:
        """What the experts of a router are called."""
        if self._expert_names is not None:
            return list(self._expert_names(router))
        return [str(number) for number in range(self.counts[router].shape[-1])]

    @property
    def selects_all(self) -> bool:
        """Whether every router gave every token to all of its experts, so that only gate weights tell them apart."""
        return all(bool((self.counts[name] == self.tokens[name].unsqueeze(-1)).all()) for name in self.counts)

    def shares(self, router: str) -> dict[str, list[float]]:
        """For each task that has tokens at a router, the share of each expert; a task's shares add up to 1.

        Of a sparse router's selections, or where all experts are always selected, of its gate weights.
        """
        sums_LN = self.weights[router] if self.selects_all else self.counts[router].double()
        share_LN = sums_LN / sums_LN.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        seen_L = self.tokens[router] > 0
        return {task: share_LN[index].tolist() for index, task in enumerate(self.tasks) if seen_L[index]}

    def task_information(self, router: str) -> float:
        """Mutual information of task and expert at a router, over the smaller of their entropies: 0 to 1.

        0 where every task uses the experts alike, 1 where the expert tells the task (or the task the expert). Tasks
        count equally, however many tokens they have.
        """
        joint = torch.tensor(list(self.shares(router).values()), dtype=torch.float64)
        joint = joint / max(joint.shape[0], 1)
        task, expert = joint.sum(1), joint.sum(0)
        information = _entropy(task) + _entropy(expert) - _entropy(joint.flatten())
        smaller = min(_entropy(task), _entropy(expert))
        return max(0.0, information) / smaller if smaller > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values.

        `router` is the one that tells the tasks apart best, and `shares` are its shares, of what `share_of` says. For
        each of `routers` there are the names of its experts, its tokens (or `prompts`, or `rows`: what `counted` says)
        and selections by task, and its `task_information`.
        """
        counted = DECIDED[self.granularity]
        information = {name: self.task_information(name) for name in self.counts}
        routers = {
            name: {
                "experts": self.expert_names(name),
                counted: dict(zip(self.tasks, self.tokens[name].tolist(), strict=True)),
                "selections": dict(zip(self.tasks, counts.tolist(), strict=True)),
                "task_information": information[name],
            }
            for name, counts in self.counts.items()
        }
        clearest = max(information, key=lambda name: information[name])
        measure = "gate weight" if self.selects_all else "selections"
        return {
            "counted": counted,
            "share_of": measure,
            "router": clearest,
            "shares": self.shares(clearest),
            "routers": routers,
        }


def _entropy(probabilities: Tensor) -> float:
    """In nats; 0 log 0 is 0."""
    return float(torch.special.entr(probabilities).sum())
