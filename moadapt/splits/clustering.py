"""k-means with clusters of fixed sizes.

    min sum_g |s_g x_g - c_a(g)|²     over assignments a with given cluster sizes, and over centroids c

Lloyd's two steps, each of them exact: centroids are means, and the assignment is the best one for the given sizes
(`balanced_assignment`), so the objective never rises. The scale s_g is 1 / |x_g| or 1. Rows are scaled on the fly and
read in pieces: beside the data, only (G, N) and (N, D) tensors are held.

Shapes: G points, D their dimension, N clusters, P points of one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moadapt.splits.balanced import balanced_assignment

_PIECE = 256
_LEAST_GAIN = 1e-5


class Points(Protocol):
    """What is clustered: G points in a space with squared Euclidean distance."""

    def __len__(self) -> int:
        """G."""

    def rows(self, points_P: Tensor) -> Tensor:
        """A few points: (P, D), fp32."""

    def distances(self, centroids_ND: Tensor) -> Tensor:
        """Squared distances to centroids: (G, N), fp32."""

    def means(self, labels_G: Tensor, num_clusters: int) -> Tensor:
        """The mean of every cluster: (N, D), fp32."""


class RowPoints:
    """Some or all rows of a matrix in any dtype, on any device.

    Args:
        rows_FD: the matrix.
        chosen_G: int64 indices of the rows that take part; None for all.
        normalize: scale every row to length 1; a zero row stays zero.
    """

    def __init__(self, rows_FD: Tensor, chosen_G: Tensor | None = None, normalize: bool = False) -> None:
        self._rows_FD = rows_FD.detach()
        self._count = rows_FD.shape[0] if chosen_G is None else chosen_G.numel()
        all_rows = chosen_G is None or torch.equal(chosen_G.cpu(), torch.arange(rows_FD.shape[0]))
        self._chosen_G = None if all_rows or chosen_G is None else chosen_G.to(rows_FD.device)
        length_G = torch.empty(self._count, device=rows_FD.device)
        for taken, piece_PD in self._pieces():
            length_G[taken] = torch.linalg.vector_norm(piece_PD, dim=-1)
        self._scale_G = length_G.clamp(min=1e-12).reciprocal() if normalize else torch.ones_like(length_G)
        self._squares_G = (length_G * self._scale_G).square()

    def __len__(self) -> int:
        """G."""
        return self._count

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """(which points, their unscaled rows in fp32), piece by piece."""
        for start in range(0, self._count, _PIECE):
            taken = slice(start, min(start + _PIECE, self._count))
            rows = self._rows_FD[taken] if self._chosen_G is None else self._rows_FD[self._chosen_G[taken]]
            yield taken, rows.float()

    def rows(self, points_P: Tensor) -> Tensor:
        """See `Points`."""
        points_P = points_P.to(self._rows_FD.device)
        rows_P = points_P if self._chosen_G is None else self._chosen_G[points_P]
        return self._rows_FD[rows_P].float() * self._scale_G[points_P, None]

    def distances(self, centroids_ND: Tensor) -> Tensor:
        """See `Points`."""
        products_GN = torch.empty(self._count, len(centroids_ND), device=centroids_ND.device)
        for taken, piece_PD in self._pieces():
            products_GN[taken] = piece_PD @ centroids_ND.T
        products_GN.mul_(self._scale_G[:, None])
        return (self._squares_G[:, None] + centroids_ND.square().sum(-1) - 2.0 * products_GN).clamp_(min=0.0)

    def means(self, labels_G: Tensor, num_clusters: int) -> Tensor:
        """See `Points`."""
        labels_G = labels_G.to(self._rows_FD.device)
        count_N = torch.bincount(labels_G, minlength=num_clusters).clamp(min=1)
        share_G = self._scale_G / count_N[labels_G]
        means_ND = share_G.new_zeros(num_clusters, self._rows_FD.shape[1])
        for taken, piece_PD in self._pieces():
            weights_NP = share_G.new_zeros(num_clusters, len(piece_PD))
            weights_NP.scatter_(0, labels_G[None, taken], share_G[None, taken])
            means_ND.addmm_(weights_NP, piece_PD)
        return means_ND


def spread_out(points: Points, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Indices (N) of first centroids: greedy k-means++.

    Every next point is drawn with probability proportional to its squared distance from those already taken
    (Arthur & Vassilvitskii 2007), a few times, and the draw that lowers the sum of these distances most is kept.
    """
    tries = 2 + int(math.log(num_clusters))
    taken = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest_G1 = points.distances(points.rows(torch.tensor(taken)))
    for _ in range(1, num_clusters):
        chances_G = nearest_G1[:, 0].cpu().double()
        chances_G[taken] = 0.0
        if chances_G.sum() <= 0.0:  # fewer different points than clusters
            chances_G = torch.ones_like(chances_G)
            chances_G[taken] = 0.0
        tries = min(tries, int((chances_G > 0).sum()))
        drawn_P = torch.multinomial(chances_G, tries, generator=generator)
        nearest_GP = torch.minimum(nearest_G1, points.distances(points.rows(drawn_P)))
        best = int(nearest_GP.sum(0).argmin())
        taken.append(int(drawn_P[best]))
        nearest_G1 = nearest_GP[:, best, None]
    return torch.tensor(taken)


def balanced_k_means(
    points: Points,
    counts: Sequence[int],
    *,
    iterations: int,
    restarts: int = 1,
    seed: int = 0,
    first_N: Tensor | None = None,
) -> Tensor:
    """Clusters of the given sizes.

    Args:
        points: G points.
        counts: N sizes with sum G.
        iterations: the most assignments that are made from one start; it stops early when
            the objective falls by less than 0.001 %.
        restarts: starts from new random points, of which the best result is kept.
        seed: seed of the random points.
        first_N: indices (N) of points that are the first centroids, instead of random ones.

    Returns:
        int64 (G) on the CPU, the cluster of every point.
    """
    num_clusters = len(counts)
    if num_clusters == 1:
        return torch.zeros(len(points), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    best_G, lowest = torch.zeros(0), math.inf
    for _ in range(restarts):
        start_N = spread_out(points, num_clusters, generator) if first_N is None else first_N
        centroids_ND, objective = points.rows(start_N), math.inf
        for _ in range(iterations):
            distances_GN = points.distances(centroids_ND).cpu()
            labels_G = balanced_assignment(distances_GN, counts)
            before, objective = objective, float(distances_GN.gather(1, labels_G[:, None]).double().sum())
            if objective < lowest:
                best_G, lowest = labels_G, objective
            if objective >= before * (1.0 - _LEAST_GAIN):
                break
            centroids_ND = points.means(labels_G, num_clusters)
    return best_G
