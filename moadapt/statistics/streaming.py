"""Adds up what many routers decided in one pass, all of them together and on their device, without waiting for it.

Shapes: R routers, B sequences, S rows of a sequence (tokens, or turns), T = B * S, P = 2 parts (prompt, answer), N
experts, L tasks, M sequences of the sample, V vocabulary.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.routing import Phase, RoutingRecord
from moadapt.statistics.counts import ENTROPY_BINS, PHASES, RouterCounts

_CHUNK = 2**22
"""Numbers (R * T * N) that are worked on at a time: bounds the memory beside what the pass itself holds."""


@dataclass(frozen=True)
class PassRows:
    """The rows that the routers of one group decided about in one pass.

    Attributes:
        phase: of the pass.
        real_BS: bool, the rows that count.
        answer_BS: bool, those of them that are of answers.
        tasks_B: int64, index of the task of each sequence; None when there is one task.
        ids_BS: int64 token ids; None when not known, or not wanted.
        keys_B: random numbers of the sequences, by which a sample is drawn; None for passes that continue sequences.
    """

    phase: Phase
    real_BS: Tensor
    answer_BS: Tensor
    tasks_B: Tensor | None
    ids_BS: Tensor | None
    keys_B: Sequence[float] | None


def shares_of(probs_TN: Tensor) -> Tensor:
    """Probabilities over their sum, in float64: (..., N). Rows of zeros, or of what is not finite, become uniform."""
    probs = probs_TN.to(torch.float64).clamp(min=0.0)
    total = probs.sum(-1, keepdim=True)
    usable = (total > 0) & total.isfinite()
    return torch.where(usable, probs / torch.where(usable, total, 1.0), 1.0 / probs.shape[-1])


def top_of(selected_TN: Tensor, weights_TN: Tensor) -> Tensor:
    """The selected expert with the largest weight, the first of equals: int64 (...); 0 where none is selected."""
    return weights_TN.masked_fill(~selected_TN, -math.inf).argmax(-1)


class _Sample:
    """Which sequences stay: those with the M smallest random numbers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.keys: list[float] = []
        self._largest: list[tuple[float, int]] = []  # a heap of (-key, slot)

    def offer(self, keys_B: Sequence[float]) -> dict[int, int]:
        """Take some more sequences: slot -> index of the one that now has it."""
        taken: dict[int, int] = {}
        for index, key in enumerate(keys_B):
            if len(self.keys) < self.size:
                slot = len(self.keys)
                self.keys.append(key)
                heapq.heappush(self._largest, (-key, slot))
            elif self.size > 0 and key < -self._largest[0][0]:
                slot = self._largest[0][1]
                self.keys[slot] = key
                heapq.heapreplace(self._largest, (-key, slot))
            else:
                continue
            taken[slot] = index
        return taken


class Accumulator:
    """The counts of routers that decide about the same rows.

    Args:
        names: of the routers.
        num_experts: N.
        tasks: names of the L tasks.
        max_sequences: size of the sample of sequences.
        vocabulary_size: V, to count by token; None not to.
        device: where the counts are.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_experts: int,
        tasks: Sequence[str],
        max_sequences: int,
        vocabulary_size: int | None,
        device: torch.device,
    ) -> None:
        self.names = tuple(names)
        self.num_experts = num_experts
        self.tasks = list(tasks)
        routers, num_tasks = len(names), len(tasks)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(routers, *shape, dtype=dtype, device=device)

        # The integers of a task, and the real numbers, are added up in float64, which is exact for both up to 2^53.
        self.rows_RL22 = zeros(num_tasks, 2, 2, dtype=torch.float64)
        self.selections_RL22N = zeros(num_tasks, 2, 2, num_experts, dtype=torch.float64)
        self.weights_RL22N = zeros(num_tasks, 2, 2, num_experts, dtype=torch.float64)
        self.probs_RLN = zeros(num_tasks, num_experts, dtype=torch.float64)
        self.entropy_RL2 = zeros(num_tasks, 2, dtype=torch.float64)
        self.top_RLN = zeros(num_tasks, num_experts, dtype=torch.float64)
        self.histogram_RK = zeros(ENTROPY_BINS)
        self.pairs_RNN = zeros(num_experts, num_experts)
        self.active_RK = zeros(num_experts + 1)
        self.violation_R2 = zeros(2, dtype=torch.float64)
        self.vocabulary_RVN: Tensor | None = None
        if vocabulary_size is not None:
            self.vocabulary_RVN = zeros(vocabulary_size * num_experts, dtype=torch.int32)
        self._sample = _Sample(max_sequences)
        self._sequence_tasks_M = torch.zeros(0, dtype=torch.int64, device=device)
        self._sequence_counts_RMN = zeros(0, num_experts, dtype=torch.int32)

    def add(self, records: Sequence[RoutingRecord], rows: PassRows) -> Tensor:
        """Count one pass.

        Args:
            records: of the routers, in the order of `names`.
            rows: what they decided about.

        Returns:
            The top expert of each row, int64 (R, T); -1 where there is none, or where the row does not count.
        """
        batch_size, length = rows.real_BS.shape
        num_tasks = self.rows_RL22.shape[1]
        if rows.tasks_B is None:
            tasks_LB = torch.ones(1, batch_size, dtype=torch.float64, device=rows.real_BS.device)
        else:
            tasks_LB = (torch.arange(num_tasks, device=rows.tasks_B.device).unsqueeze(-1) == rows.tasks_B).double()
        parts_BPS = torch.stack([rows.real_BS & ~rows.answer_BS, rows.real_BS & rows.answer_BS], dim=1)
        phase = PHASES.index(rows.phase)
        self.rows_RL22[:, :, :, phase] += tasks_LB @ parts_BPS.sum(-1).double()
        slots = self._sample.offer(rows.keys_B) if rows.keys_B is not None else {}
        self._make_room(rows, slots)
        size = max(1, _CHUNK // max(1, batch_size * length * self.num_experts))
        tops = [
            self._add_chunk(slice(first, first + size), records[first : first + size], rows, parts_BPS, tasks_LB, slots)
            for first in range(0, len(records), size)
        ]
        return torch.cat(tops)

    def _add_chunk(
        self,
        chunk: slice,
        records: Sequence[RoutingRecord],
        rows: PassRows,
        parts_BPS: Tensor,
        tasks_LB: Tensor,
        slots: dict[int, int],
    ) -> Tensor:
        shape = (len(records), *rows.real_BS.shape, self.num_experts)
        real_RBS = rows.real_BS.expand(shape[:3])
        ignored_BS1 = ~rows.real_BS.unsqueeze(-1)
        selected = torch.stack([record.routing.selected_TN for record in records]).view(shape) & ~ignored_BS1
        weights = torch.stack([record.routing.weights_TN for record in records]).view(shape).double()
        weights = weights.masked_fill(ignored_BS1, 0.0)  # what a router gives for padding may be no number
        shares = shares_of(torch.stack([record.routing.probs_TN for record in records]).view(shape))
        shares = shares.masked_fill(ignored_BS1, 0.0)
        phase = PHASES.index(rows.phase)

        def by_task(values_RBX: Tensor) -> Tensor:
            flat_RBX = values_RBX.double().flatten(2)
            return (tasks_LB @ flat_RBX).view(flat_RBX.shape[0], -1, *values_RBX.shape[2:])

        # Products with zeros and ones in fp32 are exact for up to 2^24 rows of a pass.
        chosen = selected.float()
        counts_RBPN = parts_BPS.float() @ chosen
        self.selections_RL22N[chunk, :, :, phase] += by_task(counts_RBPN)
        self.weights_RL22N[chunk, :, :, phase] += by_task(parts_BPS.double() @ weights)
        self.probs_RLN[chunk] += by_task(shares.sum(2))
        chosen_RTN = chosen.flatten(1, 2)
        self.pairs_RNN[chunk] += (chosen_RTN.transpose(1, 2) @ chosen_RTN).round().long()

        entropy_RBS = torch.special.entr(shares).sum(-1)
        self.entropy_RL2[chunk] += by_task(torch.stack([entropy_RBS.sum(-1), entropy_RBS.square().sum(-1)], dim=-1))
        widest = math.log(self.num_experts) if self.num_experts > 1 else 1.0
        bins_RBS = (entropy_RBS * (ENTROPY_BINS / widest)).long().clamp(0, ENTROPY_BINS - 1)
        count_RT = real_RBS.flatten(1).long()
        self.histogram_RK[chunk].scatter_add_(1, bins_RBS.flatten(1), count_RT)

        active_RBS = selected.sum(-1)
        self.active_RK[chunk].scatter_add_(1, active_RBS.flatten(1), count_RT)
        top_RBS = top_of(selected, weights)
        routed_RBS = active_RBS > 0
        sequence_B1 = torch.arange(shape[1], device=top_RBS.device).unsqueeze(-1)
        tops_RBN = torch.zeros(shape[0], shape[1] * shape[3], dtype=torch.int64, device=top_RBS.device)
        tops_RBN.scatter_add_(1, (sequence_B1 * self.num_experts + top_RBS).flatten(1), routed_RBS.flatten(1).long())
        self.top_RLN[chunk] += by_task(tops_RBN.view(shape[0], shape[1], shape[3]))
        if self.vocabulary_RVN is not None and rows.ids_BS is not None:
            index_RT = (rows.ids_BS.clamp(min=0) * self.num_experts + top_RBS).flatten(1)
            self.vocabulary_RVN[chunk].scatter_add_(1, index_RT, routed_RBS.flatten(1).int())

        if rows.phase == "prefill":
            counts_RN = counts_RBPN.double().sum((1, 2))
            mean_R = counts_RN.mean(-1)
            counted_R = mean_R > 0
            excess_R = torch.where(counted_R, counts_RN.amax(-1) / mean_R - 1.0, 0.0)
            self.violation_R2[chunk] += torch.stack([excess_R, counted_R.double()], dim=-1)
        if slots:
            device = counts_RBPN.device
            taken = torch.tensor([list(slots), list(slots.values())], dtype=torch.int64).to(device)
            self._sequence_counts_RMN[chunk, taken[0]] = counts_RBPN.sum(2)[:, taken[1]].int()
        return torch.where(routed_RBS, top_RBS, -1).flatten(1)

    def _make_room(self, rows: PassRows, slots: dict[int, int]) -> None:
        """Let the sample's tensors grow, and note the tasks of the new sequences."""
        if not slots:
            return
        have, need = self._sequence_tasks_M.shape[0], len(self._sample.keys)
        if need > have:
            more = min(max(need, 2 * have, 64), self._sample.size) - have
            self._sequence_tasks_M = torch.cat([self._sequence_tasks_M, self._sequence_tasks_M.new_zeros(more)])
            shape = (self._sequence_counts_RMN.shape[0], more, self.num_experts)
            grown = [self._sequence_counts_RMN, self._sequence_counts_RMN.new_zeros(shape)]
            self._sequence_counts_RMN = torch.cat(grown, dim=1)
        if rows.tasks_B is not None:
            taken = torch.tensor([list(slots), list(slots.values())], dtype=torch.int64).to(rows.tasks_B.device)
            self._sequence_tasks_M[taken[0]] = rows.tasks_B[taken[1]]

    def settle(self, routers: dict[str, RouterCounts]) -> None:
        """Add what was counted to the counts on the host. The accumulator is used up.

        Args:
            routers: counts by router.
        """
        keys_M = torch.tensor(self._sample.keys, dtype=torch.float64)
        used = slice(0, len(self._sample.keys))
        sequence_tasks_M = self._sequence_tasks_M[used].cpu()
        sequence_counts = self._sequence_counts_RMN[:, used].cpu()
        parts = {
            "rows": self.rows_RL22.round().long().cpu(),
            "selections": self.selections_RL22N.round().long().cpu(),
            "weights": self.weights_RL22N.cpu(),
            "probs": self.probs_RLN.cpu(),
            "entropy": self.entropy_RL2.cpu(),
            "top": self.top_RLN.round().long().cpu(),
            "entropy_histogram": self.histogram_RK.cpu(),
            "pairs": self.pairs_RNN.cpu(),
            "active": self.active_RK.cpu(),
            "violation": self.violation_R2.cpu(),
        }
        if self.vocabulary_RVN is not None:
            parts["vocabulary"] = self.vocabulary_RVN.view(len(self.names), -1, self.num_experts).cpu()
        for index, name in enumerate(self.names):
            counts = routers[name]
            found_MN = sequence_counts[index]
            seen = found_MN.any(-1)
            more = RouterCounts.zeros(
                name, counts.experts, self.tasks, granularity=counts.granularity, max_sequences=counts.max_sequences
            )
            for part, values in parts.items():
                setattr(more, part, values[index])
            more.add_sequences(keys_M[seen], sequence_tasks_M[seen], found_MN[seen])
            counts.merge(more)
