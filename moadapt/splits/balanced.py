"""Assignment of F points to N clusters of fixed sizes at the least total cost, without an (F, F) matrix.

    min sum_f cost[f, a(f)]   over assignments a with exactly capacity[n] points in cluster n

A square assignment solver (Jonker-Volgenant in CMoE, 2502.04416) copies every cluster capacity[n] times and needs F²
numbers. As a transportation problem the matrix is (F, N), and its dual has one price per cluster:

1. Prices. Entropic (Sinkhorn) iterations with a falling temperature find prices p under which the free choice
   a(f) = argmin_n cost[f, n] + p[n] nearly fills the clusters as wanted. Whatever the prices are, this choice is the
   best one *for the counts that it happens to have* (complementary slackness).
2. Repair. The excess moves along shortest paths in a graph of N nodes whose edge n -> m costs
   min over points f of n of cost[f, m] - cost[f, n] (successive shortest paths). Every step keeps the assignment the
   best one for its counts, so the result is a true optimum, up to rounding of the sums.

Points that tie move together, so that binary profiles with thousands of equal columns cost no more steps than others.
Memory: a few (F, N) matrices of doubles.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moadapt.errors import DataError

Array: TypeAlias = npt.NDArray[Any]

_TEMPERATURES = 8
_SWEEPS = 10


def balanced_assignment(cost_FN: Tensor, capacities: Sequence[int]) -> Tensor:
    """The cheapest assignment with given cluster sizes.

    Args:
        cost_FN: (F, N), finite.
        capacities: N sizes with sum F.

    Returns:
        int64 (F) on the CPU, the cluster of every point. Deterministic.

    Raises:
        ValueError: the sizes do not sum to F.
        DataError: a cost is not finite.
    """
    cost = cost_FN.detach().to(device="cpu", dtype=torch.float64).numpy()
    capacity = np.asarray(capacities, dtype=np.int64)
    if cost.ndim != 2 or capacity.shape != cost.shape[1:] or (capacity < 0).any() or capacity.sum() != len(cost):
        raise ValueError(f"{len(capacity)} clusters of {capacity.sum()} points for costs of shape {cost.shape}")
    if not np.isfinite(cost).all():
        raise DataError("split: the weights, or what calibration measured, hold NaN or infinity; look at the model")
    cost = cost - cost.min(axis=1, keepdims=True)
    labels = np.argmin(cost + _prices(cost, capacity), axis=1)
    _repair(cost, labels, capacity, tolerance=1e-12 * float(cost.max()))
    return torch.from_numpy(labels)


def _prices(cost: Array, capacity: Array) -> Array:
    """Prices (N) under which the cheapest choices nearly have the wanted sizes; they need no precision."""
    spread = float(cost.std())
    prices = np.zeros(cost.shape[1])
    if spread == 0.0:
        return prices
    scaled = (cost / spread).astype(np.float32)
    wanted = np.log(np.maximum(capacity, 1e-3))
    for step in range(_TEMPERATURES):
        temperature = 0.5 ** (step + 1)
        for _ in range(_SWEEPS):
            logits = scaled + prices.astype(np.float32)
            logits *= -1.0 / temperature
            logits -= logits.max(axis=1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(axis=1, keepdims=True)
            change = np.log(np.maximum(logits.sum(axis=0, dtype=np.float64), 1e-3)) - wanted
            prices += temperature * change
            if np.abs(change).max() < 1e-2:
                break
    return prices * spread


def _repair(cost: Array, labels: Array, capacity: Array, tolerance: float) -> None:
    """Move points, in place, until every cluster has its size. `labels` must be optimal for its own counts."""
    num_clusters = len(capacity)
    excess = np.bincount(labels, minlength=num_clusters) - capacity
    edges = np.full((num_clusters, num_clusters), np.inf)
    for cluster in range(num_clusters):
        edges[cluster] = _edge_costs(cost, labels, cluster)
    while excess.any():
        path = _shortest_path(edges, excess, tolerance)
        hops = list(itertools.pairwise(path))
        movers = []
        for source, target in hops:
            members = np.flatnonzero(labels == source)
            price = cost[members, target] - cost[members, source]
            movers.append(members[price <= edges[source, target]])
        amount = min(excess[path[0]], -excess[path[-1]], *(len(points) for points in movers))
        for points, (_, target) in zip(movers, hops, strict=True):
            labels[points[:amount]] = target
        excess[path[0]] -= amount
        excess[path[-1]] += amount
        for cluster in path:
            edges[cluster] = _edge_costs(cost, labels, cluster)


def _edge_costs(cost: Array, labels: Array, cluster: int) -> Array:
    """(N): what it costs to move the cheapest point of the cluster to each other cluster."""
    members = np.flatnonzero(labels == cluster)
    if len(members) == 0:
        return np.full(cost.shape[1], np.inf)
    rows = cost[members]
    costs: Array = (rows - rows[:, cluster, None]).min(axis=0)
    costs[cluster] = np.inf
    return costs


def _shortest_path(edges: Array, excess: Array, tolerance: float) -> list[int]:
    """The cheapest path (Bellman-Ford) from any cluster with too many points to any with too few."""
    distance = np.where(excess > 0, 0.0, np.inf)
    before = np.full(len(excess), -1)
    for _ in range(len(excess)):
        through = distance[:, None] + edges
        best = through.argmin(axis=0)
        shorter = through[best, np.arange(len(excess))]
        better = shorter < distance - tolerance
        if not better.any():
            break
        distance[better] = shorter[better]
        before[better] = best[better]
    node = int(np.where(excess < 0, distance, np.inf).argmin())
    path = [node]
    while before[node] >= 0:
        node = int(before[node])
        path.append(node)
    return path[::-1]
