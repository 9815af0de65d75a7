"""Measures of routing, from counts that were streamed. docs/statistics.md has the formulas and how to read them.

Every function is pure: integer or float tensors in, float64 out (bool for `dead_experts`). Leading dimensions, where a
shape begins with `...`, are independent tables. A measure of nothing, such as a share where no row was counted, is NaN.
Entropies and information are in nats.

Shapes: N experts, L tasks, V vocabulary, M sequences, T rows (tokens, or the decisions of a prompt router).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["tasks", "rows"]
"""Whether every task counts the same, or as much as it has rows (selections)."""
DEAD_SHARE = 0.01
"""An expert that gets less than this part of its fair share of the rows, 1 / N, is dead."""
MIN_OCCURRENCES = 10
"""How often a token must occur before its experts mean anything."""


def entropy(shares: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, with 0 ln 0 = 0: (...)."""
    terms: Tensor = torch.special.entr(shares.double())
    return terms.sum(-1)


def usage(selections_LN: Tensor, weights_LN: Tensor, rows_L: Tensor) -> Tensor:
    """What loads and task tables are made of: selections.

    Where every row selects every expert these say nothing, and it is gate weights.

    Args:
        selections_LN: (..., N) rows that selected the expert.
        weights_LN: (..., N) sums of its gate weights.
        rows_L: (...) rows.

    Returns:
        (..., N) float64.
    """
    selects_all = bool((selections_LN == rows_L.unsqueeze(-1)).all())
    return (weights_LN if selects_all else selections_LN).double()


# -- balance -------------------------------------------------------------------------------------------------------


def load(counts_N: Tensor) -> Tensor:
    """f_e = c_e / sum c: (..., N)."""
    return counts_N.double() / counts_N.double().sum(-1, keepdim=True)


def max_violation(counts_N: Tensor) -> Tensor:
    """MaxVio = max c / mean c - 1 (2408.15664): 0 when balanced, N - 1 when one expert gets all: (...)."""
    counts_N = counts_N.double()
    return counts_N.amax(-1) / counts_N.mean(-1) - 1


def mean_violation(violation: Tensor) -> Tensor:
    """MaxVio of single passes, averaged: from (sum, number of passes)."""
    return violation[0].double() / violation[1].double()


def coefficient_of_variation(counts_N: Tensor) -> Tensor:
    """Standard deviation over mean, of the N counts as a whole population: 0 to sqrt(N - 1): (...)."""
    counts_N = counts_N.double()
    return counts_N.std(-1, correction=0) / counts_N.mean(-1)


def gini(counts_N: Tensor) -> Tensor:
    """Half the mean absolute difference of two experts over the mean: 0 to 1 - 1 / N: (...)."""
    ordered_N = counts_N.double().sort(-1).values
    num_experts = ordered_N.shape[-1]
    ranks_N = 2 * torch.arange(1, num_experts + 1, dtype=torch.float64, device=ordered_N.device) - num_experts - 1
    return (ranks_N * ordered_N).sum(-1) / (num_experts * ordered_N.sum(-1))


def effective_experts(counts_N: Tensor) -> Tensor:
    """exp H(f), the number of equally loaded experts with the same entropy: 1 to N: (...)."""
    return entropy(load(counts_N)).exp()


def dead_experts(selections_N: Tensor, rows: Tensor | int, threshold: float = DEAD_SHARE) -> Tensor:
    """Which experts are selected in less than `threshold` / N of the rows: bool (N,). None are where no row is."""
    return selections_N.double() / torch.as_tensor(rows).double() < threshold / selections_N.shape[-1]


def drop_rate(counts_N: Tensor, capacity: Tensor | int) -> tuple[Tensor, Tensor]:
    """What a capacity drops in one pass, or in passes along leading dimensions.

    Args:
        counts_N: (..., N) assignments before any is dropped, as DeepSpeed's `exp_counts`.
        capacity: most assignments that an expert takes; (..., 1) when passes differ.

    Returns:
        The share of all assignments that is dropped, and (N,) the share of each expert's.
    """
    counts_N = counts_N.double()
    dropped_N = (counts_N - capacity).clamp(min=0.0).reshape(-1, counts_N.shape[-1]).sum(0)
    counts_N = counts_N.reshape(-1, counts_N.shape[-1]).sum(0)
    return dropped_N.sum() / counts_N.sum(), dropped_N / counts_N


# -- single decisions ----------------------------------------------------------------------------------------------


def token_entropy(entropy_sums: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of H(p) over rows, from sums of H and H^2.

    Args:
        entropy_sums: (..., 2).
        rows: (...).
    """
    mean, square = (entropy_sums.double() / rows.double().unsqueeze(-1)).unbind(-1)
    return mean, (square - mean.square()).clamp(min=0.0).sqrt()


def normalised_entropy(mean_entropy: Tensor, num_experts: int) -> Tensor:
    """H / ln N: 0 where every row is sure of one expert, 1 where all are uniform; NaN for one expert."""
    return mean_entropy.double() / torch.tensor(math.log(num_experts), dtype=torch.float64)


def entropy_quantile(histogram: Tensor, num_experts: int, quantile: float) -> float:
    """The entropy that this share of the rows stays below, linear within the histogram's equal bins over 0 to ln N."""
    cumulative = histogram.double().cumsum(0)
    total = float(cumulative[-1])
    if total == 0:
        return math.nan
    wanted = quantile * total
    place = int((cumulative < wanted).sum())
    before = float(cumulative[place - 1]) if place else 0.0
    inside = (wanted - before) / max(float(histogram[place]), 1.0)
    return (place + inside) / len(histogram) * math.log(num_experts)


def token_information(probs_N: Tensor, entropy_sum: Tensor, rows: Tensor) -> Tensor:
    """I(row; expert) = H(mean p) - mean H(p), how much the choice depends on the row: 0 to ln N.

    Args:
        probs_N: (..., N) sums of normalised router probabilities.
        entropy_sum: (...) sum of their entropies.
        rows: (...).
    """
    mean_N = probs_N.double() / rows.double().unsqueeze(-1)
    return (entropy(mean_N) - entropy_sum.double() / rows.double()).clamp(min=0.0)


def experts_per_row(active: Tensor) -> tuple[Tensor, Tensor]:
    """Mean number of selected experts, and the share of rows with 0 to N of them: (), (N + 1,)."""
    share = load(active)
    return (share * torch.arange(len(active), device=active.device)).sum(), share


# -- tasks ---------------------------------------------------------------------------------------------------------


def task_table(selections_LN: Tensor) -> Tensor:
    """P(expert | task) of selections: (L, N), a task without rows is NaN."""
    return load(selections_LN)


def task_information(selections_LN: Tensor, weighting: Weighting = "tasks") -> tuple[Tensor, Tensor]:
    """I(task; expert) of selections, and the same over min(H(task), H(expert)): 0 to 1.

    The second is 1 where the expert tells the task or the task the expert, and 0 where one of both does not vary.

    Args:
        selections_LN: (..., L, N).
        weighting: every task that has rows the same, or by its selections.
    """
    joint = selections_LN.double()
    if weighting == "tasks":
        joint = joint / joint.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return mutual_information(joint)


def mutual_information(table: Tensor) -> tuple[Tensor, Tensor]:
    """Mutual information of the rows and columns of counts (..., A, B), and the same over the smaller entropy."""
    joint = table.double() / table.double().sum((-1, -2), keepdim=True)
    first, second = entropy(joint.sum(-1)), entropy(joint.sum(-2))
    information = (first + second - entropy(joint.flatten(-2))).clamp(min=0.0)
    smaller = torch.minimum(first, second)
    # What is left of entropies that are zero but for rounding must not be divided.
    normalised = torch.where(smaller > 1e-12, information / smaller, torch.where(smaller.isnan(), smaller, 0.0))
    return information, normalised.clamp(max=1.0)


def task_distance(selections_LN: Tensor) -> Tensor:
    """Jensen-Shannon distance between the experts of tasks: square root of the divergence in bits: (L, L), 0 to 1."""
    share_LN = load(selections_LN)
    middle_LLN = (share_LN.unsqueeze(0) + share_LN.unsqueeze(1)) / 2
    own_L = entropy(share_LN)
    divergence_LL = (entropy(middle_LLN) - (own_L.unsqueeze(0) + own_L.unsqueeze(1)) / 2) / math.log(2)
    distance_LL = divergence_LL.clamp(min=0.0, max=1.0).sqrt()
    return distance_LL - distance_LL.diag().diag()


# -- pairs of experts, layers and checkpoints ----------------------------------------------------------------------


def coactivation(pairs_NN: Tensor) -> Tensor:
    """P(j selected | i selected) = n_ij / n_i, over all pairs: (N, N), row i; the diagonal is 1."""
    pairs_NN = pairs_NN.double()
    return pairs_NN / pairs_NN.diag().unsqueeze(-1)


def coactivation_lift(pairs_NN: Tensor, rows: Tensor | int) -> Tensor:
    """n_ij T / (n_i n_j): above 1 where two experts are selected together more often than by chance: (N, N)."""
    selected_N = pairs_NN.diag().double()
    return pairs_NN.double() * torch.as_tensor(rows).double() / selected_N.outer(selected_N)


def flow_shares(flow: Tensor) -> Tensor:
    """P(e' in the next router | e in this one), from counts of rows: (N, N')."""
    return load(flow)


def flow_information(flow: Tensor) -> Tensor:
    """Mutual information of two routers' top experts over the smaller entropy: 0 independent, 1 one tells the other."""
    return mutual_information(flow)[1]


def count_shared(selected_TN: Tensor, final_TN: Tensor) -> Tensor:
    """What `saturation` needs of two selections for the same rows: int64 (2,), to be added up over passes."""
    return torch.stack([(selected_TN & final_TN).sum(), final_TN.sum()])


def saturation(shared: Tensor) -> Tensor:
    """sum |A and B| / sum |B|: the part of the final selections that the earlier checkpoint had made (2409.02060).

    Where every row selects k experts this is mean |A and B| / k.
    """
    return shared[0].double() / shared[1].double()


def chance_saturation(first_N: Tensor, final_N: Tensor, rows: Tensor | int) -> Tensor:
    """What `saturation` would be for independent selections of the same loads, from both selections' counts."""
    overlap = (first_N.double() * final_N.double()).sum() / torch.as_tensor(rows).double()
    return overlap / final_N.double().sum()


# -- vocabulary ----------------------------------------------------------------------------------------------------


def token_specialisation(vocabulary_VN: Tensor, min_occurrences: int = MIN_OCCURRENCES) -> Tensor:
    """Share of each token's most frequent top expert: (V,), 1 / N to 1; NaN for tokens that are rarer (2409.02060)."""
    occurrences_V = vocabulary_VN.sum(-1)
    share_V = vocabulary_VN.amax(-1).double() / occurrences_V.double()
    return torch.where(occurrences_V >= max(min_occurrences, 1), share_V, math.nan)


def vocabulary_specialisation(vocabulary_VN: Tensor, min_occurrences: int = MIN_OCCURRENCES) -> Tensor:
    """Mean of `token_specialisation` over the tokens that are frequent enough."""
    return token_specialisation(vocabulary_VN, min_occurrences).nanmean()


def top_tokens(
    vocabulary_VN: Tensor, limit: int = 20, min_occurrences: int = MIN_OCCURRENCES
) -> list[list[tuple[int, float, int]]]:
    """For each expert the tokens that it takes most of: (token id, share of its occurrences, occurrences).

    Sorted by share, then occurrences, then id. Of the tokens that are frequent enough, those that the expert got at
    least once.
    """
    occurrences_V = vocabulary_VN.sum(-1)
    known_K = (occurrences_V >= max(min_occurrences, 1)).nonzero().squeeze(-1)
    counts_KN, occurrences_K = vocabulary_VN[known_K], occurrences_V[known_K]
    by_count_K = occurrences_K.argsort(descending=True, stable=True)
    lists = []
    for expert in range(vocabulary_VN.shape[-1]):
        share_K = counts_KN[:, expert].double() / occurrences_K.double()
        order = by_count_K[share_K[by_count_K].argsort(descending=True, stable=True)][:limit]
        rows = zip(known_K[order].tolist(), share_K[order].tolist(), occurrences_K[order].tolist(), strict=True)
        lists.append([row for row in rows if row[1] > 0])
    return lists
