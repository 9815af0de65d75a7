"""How sure a measure is: confidence intervals of loads, and whether tasks are routed differently at all.

The tokens of a sequence are routed alike, so a thousand tokens of ten sequences are nearer to ten observations than to
a thousand. Everything here takes the sequence as the unit: variances are between sequences, and the permutation test
permutes the tasks of whole sequences. What comes out is about sequences like those that were recorded.

A sequence's counts are what its tokens selected. They need not be whole: for a router that always uses all experts they
can be sums of gate weights.

Shapes: M sequences, N experts, L tasks, P permutations, C columns of sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.statistics.measures import Weighting, task_information

_CHUNK = 1 << 18
"""Sequences that are permuted at a time, over all permutations of a chunk."""
_TIE = 1e-9
"""Statistics nearer than this, relatively, are equal."""


@dataclass(frozen=True)
class TaskTest:
    """Whether tasks get their own experts, and which ones.

    Cells compare a task's share of an expert with the mean share of the other tasks. NaN stands where there is no
    test: fewer than two tasks with two sequences, a cell of such a task, or of an expert that gets nothing or all.

    Attributes:
        information: I(task; expert) of the recorded sequences, in nats.
        normalised: over the smaller of the two entropies: 0 to 1.
        baseline: the mean information with permuted tasks, in nats: what chance alone gives.
        normalised_baseline: the same of the normalised information.
        p_value: of the null hypothesis that all tasks use the experts alike.
        difference_LN: float64, a task's share minus the mean of the others; of shares averaged over sequences.
        p_LN: float64, two-sided p-value of each cell.
        q_LN: float64, the same adjusted for the number of cells (Benjamini-Hochberg): of the cells with q <= 0.05, at
            most 5 % are expected to be false.
        permutations: how many were drawn; no p-value is below 1 / (permutations + 1).
    """

    information: float
    normalised: float
    baseline: float
    normalised_baseline: float
    p_value: float
    difference_LN: Tensor
    p_LN: Tensor
    q_LN: Tensor
    permutations: int

    @property
    def excess(self) -> float:
        """Information over the baseline, in nats; below zero when tasks are more alike than chance makes them."""
        return self.information - self.baseline

    def significant(self, alpha: float = 0.05) -> Tensor:
        """Which cells differ, bool (L, N): q <= alpha, and none unless all tasks together have p <= alpha."""
        return (self.q_LN <= alpha) & (self.p_value <= alpha)


def student_quantile(confidence: float, df: float) -> float:
    """The t that |t| of `df` degrees of freedom stays below with this probability.

    Wallace's (1959) normal approximation, inverted; at 95 % within 0.3 % from 5 df on and on the wide side below
    (12 % at 2 df).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return math.sqrt(df * math.expm1((z * (8 * df + 3) / (8 * df + 1)) ** 2 / df))


# -- confidence intervals ------------------------------------------------------------------------------------------


def wilson_interval(successes: Tensor, trials: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Wilson's score interval of shares of independent trials.

    Args:
        successes: any shape.
        trials: broadcasts; need not be whole (an effective number).
        confidence: probability that the interval holds the share.

    Returns:
        Low and high ends, float64; NaN without trials.
    """
    z = torch.as_tensor(NormalDist().inv_cdf((1 + confidence) / 2), dtype=torch.float64)
    return _score_interval(successes.double() / trials, trials.double(), z)


def _score_interval(share: Tensor, trials: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    centre = (share + z.square() / (2 * trials)) / (1 + z.square() / trials)
    half = z * (share * (1 - share) / trials + (z / (2 * trials)).square()).sqrt() / (1 + z.square() / trials)
    low, high = (centre - half).clamp(min=0.0), (centre + half).clamp(max=1.0)
    return torch.where(share == 0, 0.0, low), torch.where(share == 1, 1.0, high)


def load_interval(
    selections_N: Tensor, sequence_counts_MN: Tensor | None = None, confidence: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Confidence interval of each expert's load f_e = c_e / sum c.

    With sequences, Wilson's interval for the effective number of selections: all selections over the design effect, the
    ratio of the variance by sequences to that of independent selections. Student's quantile of M - 1 degrees of
    freedom stands for the normal one. An effect below 1 counts as 1. Where a share is 0 or 1 in all sequences its
    variance says nothing, and each sequence counts as one observation. With fewer than two sequences the interval is
    0 to 1. Without sequences all selections count as independent, and the interval is too narrow.

    Args:
        selections_N: all selections of each expert.
        sequence_counts_MN: selections by sequence, of all sequences or of a random sample.
        confidence: probability that the interval holds the load.

    Returns:
        Low and high ends, (N,) float64; NaN without selections.
    """
    total = selections_N.sum().double()
    share_N = selections_N.double() / total
    if sequence_counts_MN is None:
        return wilson_interval(selections_N, total, confidence)
    counts_MN = sequence_counts_MN.double()
    counts_MN = counts_MN[counts_MN.sum(-1) > 0]
    sequences = counts_MN.shape[0]
    if sequences < 2:
        return torch.where(share_N.isnan(), share_N, 0.0), torch.where(share_N.isnan(), share_N, 1.0)
    sizes_M = counts_MN.sum(-1, keepdim=True)
    sampled_N = counts_MN.sum(0) / sizes_M.sum()
    changes_MN = (counts_MN - sampled_N * sizes_M) / (sizes_M.sum() - sizes_M)
    variance_N = (sequences - 1) / sequences * changes_MN.square().sum(0)
    independent_N = sampled_N * (1 - sampled_N) / sizes_M.sum()
    effect_N = torch.where(independent_N > 0, variance_N / independent_N, sizes_M.mean()).clamp(min=1.0)
    z = torch.as_tensor(student_quantile(confidence, sequences - 1), dtype=torch.float64)
    return _score_interval(share_N, total / effect_N, z)


# -- tasks ---------------------------------------------------------------------------------------------------------


class _Sequences:
    """The sequences of tasks with at least two, ordered by task; those that select nothing are left out.

    Attributes:
        tasks_L: ids of these tasks.
        sizes_L: their sequences.
        num_experts: N.
        mean_N: share of each expert, averaged over the sequences.
        columns_MC: what is summed by task: the counts (N), each sequence's shares (N) and their squares (N), and one
            over its selections.
    """

    def __init__(self, sequence_tasks_M: Tensor, sequence_counts_MN: Tensor, num_tasks: int) -> None:
        tasks_M, counts_MN = sequence_tasks_M.long().cpu(), sequence_counts_MN.double().cpu()
        if tasks_M.shape[0] != counts_MN.shape[0]:
            raise ConfigError(
                f"{tasks_M.shape[0]} sequence tasks were given for {counts_MN.shape[0]} rows of sequence counts; "
                "give one task id for each sequence"
            )
        if tasks_M.numel() and not (int(tasks_M.min()) >= 0 and int(tasks_M.max()) < num_tasks):
            raise ConfigError(
                f"sequence tasks are {int(tasks_M.min())} to {int(tasks_M.max())} but there are {num_tasks} tasks; "
                f"give ids from 0 to {num_tasks - 1}"
            )
        some_M = counts_MN.sum(-1) > 0
        sizes_L = torch.bincount(tasks_M[some_M], minlength=num_tasks)
        kept_M = (some_M & (sizes_L >= 2)[tasks_M]).nonzero().squeeze(-1)
        kept_M = kept_M[tasks_M[kept_M].argsort(stable=True)]
        counts_MN = counts_MN[kept_M]
        totals_M1 = counts_MN.sum(-1, keepdim=True)
        shares_MN = counts_MN / totals_M1
        self.tasks_L = (sizes_L >= 2).nonzero().squeeze(-1)
        self.sizes_L = sizes_L[self.tasks_L]
        self.num_experts = counts_MN.shape[1]
        self.mean_N = shares_MN.mean(0)
        self.columns_MC = torch.cat([counts_MN, shares_MN, shares_MN.square(), 1 / totals_M1], -1)
        self._starts_L = self.sizes_L.cumsum(0) - self.sizes_L

    def __len__(self) -> int:
        return self.columns_MC.shape[0]

    def sums(self, order_PM: Tensor) -> Tensor:
        """(P, L, C): the columns summed over the sequences that each order puts in a task's places."""
        offsets_PL = torch.arange(order_PM.shape[0]).unsqueeze(-1) * len(self) + self._starts_L
        sums = F.embedding_bag(order_PM.flatten(), self.columns_MC, offsets_PL.flatten(), mode="sum")
        return sums.view(*offsets_PL.shape, -1)

    def statistics(self, sums_PLC: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics of `task_permutation_test`: of all tasks (P,), and of each cell, without sign (P, L, N)."""
        share_PLN, squares_PLN = (sums_PLC[..., n * self.num_experts : (n + 1) * self.num_experts] for n in (1, 2))
        inverse_PL1 = sums_PLC[..., -1:]
        sizes_L1 = self.sizes_L.double().unsqueeze(-1)
        mean_PLN = share_PLN / sizes_L1
        variance_PLN = (squares_PLN / sizes_L1 - mean_PLN.square()) / (sizes_L1 - 1)
        independent_PLN = self.mean_N * (1 - self.mean_N) * inverse_PL1 / sizes_L1.square()
        tiny = torch.finfo(torch.float64).tiny
        total_PL = torch.maximum(variance_PLN.sum(-1), independent_PLN.sum(-1)).clamp(min=tiny)
        weight_PL1 = (total_PL.amin(-1, keepdim=True) / total_PL).unsqueeze(-1)
        centre_P1N = (weight_PL1 * mean_PLN).sum(1, keepdim=True) / weight_PL1.sum(1, keepdim=True)
        overall_P = ((mean_PLN - centre_P1N).square().sum(-1) / total_PL).sum(-1)
        variance_PLN = torch.maximum(variance_PLN, independent_PLN)
        others = len(self.tasks_L) - 1
        variance_PLN = variance_PLN + (variance_PLN.sum(1, keepdim=True) - variance_PLN) / others**2
        return overall_P, self.differences(mean_PLN).abs() / variance_PLN.clamp(min=tiny).sqrt()

    def differences(self, mean_PLN: Tensor) -> Tensor:
        """Each task's mean shares minus the mean of the other tasks'."""
        return mean_PLN - (mean_PLN.sum(-2, keepdim=True) - mean_PLN) / (len(self.tasks_L) - 1)


def task_permutation_test(
    sequence_tasks_M: Tensor,
    sequence_counts_MN: Tensor,
    num_tasks: int,
    *,
    weighting: Weighting = "tasks",
    permutations: int = 1000,
    seed: int = 0,
) -> TaskTest:
    """Test whether tasks use the experts differently, by permuting the tasks of whole sequences.

    With s_m the shares of sequence m over the experts, and m_l and v_l their mean and its variance over the sequences
    of task l, the statistic compares the tasks as Welch's test does:

        sum_l |m_l - m_0|^2 / v_l,    v_l = sum_e v_le,    m_0 = sum_l (m_l / v_l) / sum_l (1 / v_l)

    and a cell's is |m_le - mean of the other m_ke| over the standard error of this difference. v_le is at least what it
    would be if each token chose independently: m_e (1 - m_e) sum_m (1 / n_m) / M_l^2.

    Information would not do as the statistic: a task with shorter sequences is noisier than any mixture of
    sequences, and unrelated tasks would look related. The studentised statistic is exact where sequences are
    exchangeable, and right for many sequences where only the mean shares are equal (Chung and Romano, 1304.5939). A
    p-value is (1 + permuted statistics that reach the observed one) / (1 + permutations).

    Args:
        sequence_tasks_M: task id of each sequence.
        sequence_counts_MN: its selections by expert.
        num_tasks: L.
        weighting: of tasks in the information: each the same, or by rows.
        permutations: to draw.
        seed: of the draws.

    Raises:
        ConfigError: the tasks do not fit the counts, or are not among the L; no permutations.
    """
    if permutations < 1:
        raise ConfigError(f"permutations is {permutations}; a permutation test needs at least 1, and 1000 are usual")
    sequences = _Sequences(sequence_tasks_M, sequence_counts_MN, num_tasks)
    num_experts = sequences.num_experts
    difference_LN, p_LN = torch.full((2, num_tasks, num_experts), math.nan, dtype=torch.float64)
    if len(sequences.tasks_L) < 2:
        return TaskTest(math.nan, math.nan, math.nan, math.nan, math.nan, difference_LN, p_LN, p_LN.clone(), 0)
    sums_1LC = sequences.sums(torch.arange(len(sequences)).unsqueeze(0))
    information, normalised = task_information(sums_1LC[0, :, :num_experts], weighting)
    overall_1, cells_1LN = (statistic * (1 - _TIE) for statistic in sequences.statistics(sums_1LC))
    reached, reached_LN, drawn = 0, torch.zeros_like(cells_1LN[0]), 0
    baselines = torch.zeros(2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    while drawn < permutations:
        chunk = min(permutations - drawn, max(1, _CHUNK // len(sequences)))
        sums_PLC = sequences.sums(
            torch.stack([torch.randperm(len(sequences), generator=generator) for _ in range(chunk)])
        )
        overall_P, cells_PLN = sequences.statistics(sums_PLC)
        reached += int((overall_P >= overall_1).sum())
        reached_LN += (cells_PLN >= cells_1LN).sum(0)
        baselines += torch.stack(task_information(sums_PLC[..., :num_experts], weighting)).sum(-1)
        drawn += chunk
    means_LN = sums_1LC[0, :, num_experts : 2 * num_experts] / sequences.sizes_L.unsqueeze(-1)
    varies_N = (sequences.mean_N > _TIE) & (sequences.mean_N < 1 - _TIE)
    difference_LN[sequences.tasks_L] = sequences.differences(means_LN)
    p_LN[sequences.tasks_L] = torch.where(varies_N, (1 + reached_LN) / (1 + permutations), math.nan)
    baseline, normalised_baseline = (baselines / permutations).tolist()
    return TaskTest(
        information=float(information),
        normalised=float(normalised),
        baseline=baseline,
        normalised_baseline=normalised_baseline,
        p_value=(1 + reached) / (1 + permutations),
        difference_LN=difference_LN,
        p_LN=p_LN,
        q_LN=benjamini_hochberg(p_LN),
        permutations=permutations,
    )


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p-values q of any shape: the smallest false discovery rate at which each would be significant.

    q of the p with rank r of m is the least of p_s m / s over all ranks s >= r. NaN stay and do not count.
    """
    q = torch.full_like(p, math.nan, dtype=torch.float64)
    known = ~p.isnan()
    ordered, order = p[known].double().sort(descending=True)
    ranks = torch.arange(len(ordered), 0, -1)
    adjusted = torch.empty_like(ordered)
    adjusted[order] = (ordered * len(ordered) / ranks).cummin(0).values if len(ordered) else ordered
    q[known] = adjusted.clamp(max=1.0)
    return q
