"""What was counted about one router. Memory does not grow with the tokens that were seen.

Shapes: L tasks, N experts, M sequences of the sample, V vocabulary. The axes of size two are the part (0 prompt,
1 answer) and the phase (0 prefill, 1 decode).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.routing import Granularity

PARTS = ("prompt", "answer")
PHASES = ("prefill", "decode")
ENTROPY_BINS = 32
ALL = "all"
"""The task of rows when no task ids are known."""
_BY_TASK = ("rows", "selections", "weights", "probs", "entropy", "top")
_ADDED = ("entropy_histogram", "pairs", "active", "violation")


@dataclass
class RouterCounts:
    """Everything that was streamed about one router: exact integers, and sums in float64.

    A row is a real token; for granularity `prompt` the decision about a turn, for `task` that about a sequence.

    Attributes:
        name: the router's name in the model.
        experts: names of its experts.
        granularity: what one row is.
        layer: the transformer layer, None outside of any.
        module: what it rules inside the layer, as `self_attn.q_proj` or `mlp`; empty for the whole layer. Where both an
            encoder and a decoder have layers, behind `encoder.` or `decoder.`.
        tasks: names of the tasks; `["all"]` when no task ids were known.
        rows: int64 (L, 2, 2), by part and phase.
        selections: int64 (L, 2, 2, N), how many rows selected the expert.
        weights: float64 (L, 2, 2, N), sums of the gate weights.
        probs: float64 (L, N), sums over the rows of p: the router's probabilities over their sum. Where these are all
            zero, or not finite, p is uniform.
        entropy: float64 (L, 2), sums of H(p) and of H(p)^2, in nats.
        entropy_histogram: int64 (32,), rows by H(p), in equal bins from 0 to ln N.
        pairs: int64 (N, N), rows that selected both experts; on the diagonal those that selected the expert.
        active: int64 (N + 1,), rows by the number of experts that they selected.
        top: int64 (L, N), rows by the selected expert with the largest gate weight (of equals the first). Rows that
            selected none are in no entry.
        violation: float64 (2,), the sum over the passes that were no decoding of max_i c_i / mean_i c_i - 1, and how
            many these passes were.
        sequence_tasks: int64 (M,), the task of each sequence of a random sample of those seen in prefill.
        sequence_counts: int32 (M, N), how many rows of that sequence selected the expert. Sequences without any are
            left out.
        sequence_keys: float64 (M,), the random numbers of these sequences: the sample is those with the smallest.
        max_sequences: the largest M.
        vocabulary: int32 (V, N), rows by input token and top expert; None when it was not asked for.
    """

    name: str
    experts: list[str]
    granularity: Granularity
    layer: int | None
    module: str
    tasks: list[str]
    rows: Tensor
    selections: Tensor
    weights: Tensor
    probs: Tensor
    entropy: Tensor
    entropy_histogram: Tensor
    pairs: Tensor
    active: Tensor
    top: Tensor
    violation: Tensor
    sequence_tasks: Tensor
    sequence_counts: Tensor
    sequence_keys: Tensor
    max_sequences: int = 4096
    vocabulary: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        name: str,
        experts: Sequence[str],
        tasks: Sequence[str] = (ALL,),
        *,
        granularity: Granularity = "token",
        layer: int | None = None,
        module: str = "",
        max_sequences: int = 4096,
        vocabulary_size: int | None = None,
    ) -> RouterCounts:
        """Nothing counted yet.

        Args:
            name: the router.
            experts: names of its experts.
            tasks: names of the tasks.
            granularity: what one row is.
            layer: its transformer layer.
            module: what it rules there.
            max_sequences: size of the sample of sequences.
            vocabulary_size: V, to count by input token; None not to.
        """
        num_tasks, num_experts = len(tasks), len(experts)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        def real(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(
            name=name,
            experts=list(experts),
            granularity=granularity,
            layer=layer,
            module=module,
            tasks=list(tasks),
            rows=whole(num_tasks, 2, 2),
            selections=whole(num_tasks, 2, 2, num_experts),
            weights=real(num_tasks, 2, 2, num_experts),
            probs=real(num_tasks, num_experts),
            entropy=real(num_tasks, 2),
            entropy_histogram=whole(ENTROPY_BINS),
            pairs=whole(num_experts, num_experts),
            active=whole(num_experts + 1),
            top=whole(num_tasks, num_experts),
            violation=real(2),
            sequence_tasks=whole(0),
            sequence_counts=torch.zeros(0, num_experts, dtype=torch.int32),
            sequence_keys=real(0),
            max_sequences=max_sequences,
            vocabulary=(
                None if vocabulary_size is None else torch.zeros(vocabulary_size, num_experts, dtype=torch.int32)
            ),
        )

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.experts)

    def of_task(self, task: str) -> int:
        """How many rows of a task were counted."""
        return int(self.rows[self.tasks.index(task)].sum())

    def copy(self) -> RouterCounts:
        """One that shares no tensor with this one."""
        changes: dict[str, Any] = {name: value.clone() for name, value in self.tensors().items()}
        return replace(self, tasks=list(self.tasks), **changes)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by attribute."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def merge(self, other: RouterCounts) -> None:
        """Add the counts of the same router over other rows; its tasks are found by their names.

        Raises:
            ConfigError: another router.
        """
        mine, theirs = (self.name, self.experts, self.granularity), (other.name, other.experts, other.granularity)
        if mine != theirs:
            raise ConfigError(
                f"statistics: the counts of {other.name} ({other.num_experts} experts, by {other.granularity}) cannot "
                f"be added to those of {self.name} ({self.num_experts} experts, by {self.granularity}); merge "
                "recordings of one model"
            )
        self.with_tasks([*self.tasks, *(task for task in other.tasks if task not in self.tasks)])
        place_L = torch.tensor([self.tasks.index(task) for task in other.tasks], dtype=torch.int64)
        for name in _BY_TASK:
            getattr(self, name).index_add_(0, place_L, getattr(other, name))
        for name in _ADDED:
            getattr(self, name).add_(getattr(other, name))
        if other.vocabulary is not None:
            self.vocabulary = (
                other.vocabulary.clone() if self.vocabulary is None else self.vocabulary + other.vocabulary
            )
        self.add_sequences(other.sequence_keys, place_L[other.sequence_tasks], other.sequence_counts)

    def add_sequences(self, keys_M: Tensor, tasks_M: Tensor, counts_MN: Tensor) -> None:
        """Join a sample of further sequences; what remains is a sample of both.

        Args:
            keys_M: float64, their random numbers.
            tasks_M: int64, indices of `tasks`.
            counts_MN: int32.
        """
        keys = torch.cat([self.sequence_keys, keys_M])
        kept = keys.argsort(stable=True)[: self.max_sequences]
        self.sequence_keys = keys[kept]
        self.sequence_tasks = torch.cat([self.sequence_tasks, tasks_M])[kept]
        self.sequence_counts = torch.cat([self.sequence_counts, counts_MN])[kept]

    def with_tasks(self, tasks: Sequence[str]) -> None:
        """Reorder, or add, tasks.

        Args:
            tasks: names, all of the present ones that have rows among them.

        Raises:
            ConfigError: a task that has rows is missing.
        """
        if list(tasks) == self.tasks:
            return
        gone = [task for task in self.tasks if task not in tasks and self.of_task(task) > 0]
        if gone:
            raise ConfigError(f"statistics: router {self.name} has counted rows of the task {gone[0]}; keep its name")
        kept = [task for task in self.tasks if task in tasks]
        source = torch.tensor([self.tasks.index(task) for task in kept], dtype=torch.int64)
        target = torch.tensor([list(tasks).index(task) for task in kept], dtype=torch.int64)
        for name in _BY_TASK:
            old = getattr(self, name)
            setattr(self, name, old.new_zeros(len(tasks), *old.shape[1:]).index_copy_(0, target, old[source]))
        place_L = torch.zeros(len(self.tasks), dtype=torch.int64).index_copy_(0, source, target)
        self.sequence_tasks = place_L[self.sequence_tasks]
        self.tasks = list(tasks)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without loss. Of `vocabulary` only the tokens that were seen."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}
        if self.vocabulary is not None:
            seen = self.vocabulary.any(-1).nonzero().flatten()
            plain["vocabulary"] = {
                "size": self.vocabulary.shape[0],
                "tokens": seen.tolist(),
                "counts": self.vocabulary[seen].tolist(),
            }
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RouterCounts:
        """What `to_dict` returned."""
        seen = values["vocabulary"]
        made = cls.zeros(
            values["name"], values["experts"], values["tasks"], vocabulary_size=None if seen is None else seen["size"]
        )
        for name in ("granularity", "layer", "module", "max_sequences"):
            setattr(made, name, values[name])
        for name, zeros in made.tensors().items():
            if name == "vocabulary":
                tokens = torch.tensor(seen["tokens"], dtype=torch.int64)
                zeros[tokens] = torch.tensor(seen["counts"], dtype=zeros.dtype).reshape(-1, made.num_experts)
            else:
                value = torch.tensor(values[name], dtype=zeros.dtype)
                setattr(made, name, value.reshape(-1, made.num_experts) if name == "sequence_counts" else value)
        return made
