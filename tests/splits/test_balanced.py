"""Balanced assignment against exhaustive search and a square solver; balanced k-means on planted clusters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from moadapt.errors import DataError
from moadapt.splits.balanced import balanced_assignment
from moadapt.splits.clustering import RowPoints, balanced_k_means, spread_out


def capacities(points: int, clusters: int) -> list[int]:
    return [points // clusters + (cluster < points % clusters) for cluster in range(clusters)]


def costs(kind: str, points: int, clusters: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(points, clusters, generator=generator, dtype=torch.float64)
    if kind == "ties":
        return (3 * cost).round()
    if kind == "one_cheap":  # every point wants cluster 0
        cost[:, 0] -= 2.0
    if kind == "equal_rows":
        cost[: points // 2] = cost[0]
    if kind == "constant":
        return torch.ones_like(cost)
    return cost


KINDS = ["uniform", "ties", "one_cheap", "equal_rows", "constant"]


def total(cost: Tensor, labels: Tensor) -> float:
    return sum(cost[point, label].item() for point, label in enumerate(labels.tolist()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("points", "clusters"), [(1, 1), (3, 2), (6, 3), (7, 3), (8, 2), (5, 4)])
def test_equals_exhaustive_search(kind: str, points: int, clusters: int) -> None:
    for seed in range(3):
        cost, wanted = costs(kind, points, clusters, seed), capacities(points, clusters)
        labels = balanced_assignment(cost, wanted)
        assert torch.bincount(labels, minlength=clusters).tolist() == wanted
        candidates = itertools.product(range(clusters), repeat=points)
        fitting = (c for c in candidates if [c.count(cluster) for cluster in range(clusters)] == wanted)
        least = min(sum(cost[point, label].item() for point, label in enumerate(c)) for c in fitting)
        assert total(cost, labels) == pytest.approx(least, abs=1e-9)


def hungarian(cost: list[list[float]]) -> float:
    """The least total of a square assignment (Kuhn-Munkres with potentials, one row after the other)."""
    size = len(cost)
    row_price, column_price, owner = [0.0] * (size + 1), [0.0] * (size + 1), [0] * (size + 1)
    for row in range(1, size + 1):
        owner[0], column = row, 0
        slack, back, done = [math.inf] * (size + 1), [0] * (size + 1), [False] * (size + 1)
        while owner[column]:
            done[column] = True
            step, following = math.inf, 0
            for other in range(1, size + 1):
                if done[other]:
                    continue
                reduced = cost[owner[column] - 1][other - 1] - row_price[owner[column]] - column_price[other]
                if reduced < slack[other]:
                    slack[other], back[other] = reduced, column
                if slack[other] < step:
                    step, following = slack[other], other
            for other in range(size + 1):
                if done[other]:
                    row_price[owner[other]] += step
                    column_price[other] -= step
                else:
                    slack[other] -= step
            column = following
        while column:
            owner[column] = owner[back[column]]
            column = back[column]
    return sum(cost[owner[column] - 1][column - 1] for column in range(1, size + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_square_assignment_problem(kind: str) -> None:
    """CMoE's form: every cluster copied as often as it has places, one column a place."""
    cost, wanted = costs(kind, 50, 4, 0), capacities(50, 4)
    square = [[row[cluster].item() for cluster in range(4) for _ in range(wanted[cluster])] for row in cost]
    assert total(cost, balanced_assignment(cost, wanted)) == pytest.approx(hungarian(square), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_cyclic_exchange_is_cheaper_at_size(kind: str) -> None:
    """An assignment is the best for its sizes exactly if no cycle of moves between clusters has a negative cost."""
    cost, wanted = costs(kind, 4001, 12, 1), capacities(4001, 12)
    labels = balanced_assignment(cost, wanted)
    assert torch.bincount(labels, minlength=12).tolist() == wanted
    cycle = torch.full((12, 12), math.inf, dtype=torch.float64)
    for cluster in range(12):
        members = cost[labels == cluster]
        cycle[cluster] = (members - members[:, cluster, None]).min(0).values
    for middle in range(12):  # Floyd-Warshall
        cycle = torch.minimum(cycle, cycle[:, middle, None] + cycle[None, middle])
    assert cycle.diagonal().min() > -1e-9


def test_unequal_and_empty_clusters_and_the_same_result_twice() -> None:
    cost = costs("uniform", 20, 4, 2)
    labels = balanced_assignment(cost, [0, 13, 1, 6])
    assert torch.bincount(labels, minlength=4).tolist() == [0, 13, 1, 6]
    assert torch.equal(labels, balanced_assignment(cost.clone(), [0, 13, 1, 6]))
    low = balanced_assignment(cost.to(torch.bfloat16), [0, 13, 1, 6])
    assert torch.bincount(low, minlength=4).tolist() == [0, 13, 1, 6]


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match="3 clusters of 5 points"):
        balanced_assignment(torch.rand(6, 3), [2, 2, 1])
    with pytest.raises(DataError, match="NaN or infinity"):
        balanced_assignment(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), [1, 1])


# -- k-means ------------------------------------------------------------------------------------------------------


def planted(clusters: int, size: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around `clusters` random directions, in a random order, and the cluster of each."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(clusters, 24, generator=generator)
    labels = torch.arange(clusters).repeat_interleave(size)[torch.randperm(clusters * size, generator=generator)]
    return centers[labels] + noise * torch.randn(clusters * size, 24, generator=generator), labels


def same_groups(one: Tensor, other: Tensor) -> bool:
    return {tuple((one == label).nonzero().flatten().tolist()) for label in one.unique()} == {
        tuple((other == label).nonzero().flatten().tolist()) for label in other.unique()
    }


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("clusters", "size"), [(2, 40), (5, 12), (8, 150)])
def test_k_means_finds_planted_clusters(clusters: int, size: int, normalize: bool) -> None:
    """1200 points of the last case are read in more than one piece."""
    rows, labels = planted(clusters, size, noise=0.4)
    if normalize:
        rows = rows * (0.1 + 5 * torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(1)))
    points = RowPoints(rows, normalize=normalize)
    assert same_groups(balanced_k_means(points, [size] * clusters, iterations=30, seed=3), labels)


def test_k_means_of_some_rows_equals_k_means_of_a_copy() -> None:
    rows, _ = planted(3, 40, noise=1.5)
    chosen = torch.arange(0, 120, 2)
    some = balanced_k_means(RowPoints(rows, chosen), [20] * 3, iterations=9)
    assert torch.equal(some, balanced_k_means(RowPoints(rows[chosen].clone()), [20] * 3, iterations=9))


def objective(rows: Tensor, labels: Tensor) -> float:
    rows = rows.double()
    return sum((rows[labels == c] - rows[labels == c].mean(0)).square().sum().item() for c in labels.unique())


def test_k_means_lowers_its_objective_and_restarts_never_raise_it() -> None:
    rows, _ = planted(6, 30, noise=2.0)
    values = [objective(rows, balanced_k_means(RowPoints(rows), [30] * 6, iterations=n)) for n in (1, 2, 4, 8, 30)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    many = objective(rows, balanced_k_means(RowPoints(rows), [30] * 6, iterations=30, restarts=5))
    assert many <= values[-1]


def test_distances_and_means_against_loops() -> None:
    rows, labels = planted(3, 5, noise=1.0)
    centroids = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    scaled = torch.stack([row / row.square().sum().sqrt() for row in rows.double()])
    points = RowPoints(rows, normalize=True)
    naive = torch.stack([torch.stack([(row - c).square().sum() for c in centroids.double()]) for row in scaled])
    torch.testing.assert_close(points.distances(centroids).double(), naive, rtol=1e-5, atol=1e-5)
    means = torch.stack([scaled[labels == cluster].mean(0) for cluster in range(3)])
    torch.testing.assert_close(points.means(labels, 3).double(), means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(points.rows(torch.tensor([4, 1])).double(), scaled[[4, 1]], rtol=1e-5, atol=1e-6)


def test_first_centroids_are_different_points_even_among_copies() -> None:
    rows = torch.zeros(9, 4)
    rows[0] = 1.0
    taken = spread_out(RowPoints(rows), 5, torch.Generator().manual_seed(0))
    assert len(set(taken.tolist())) == 5
    labels = balanced_k_means(RowPoints(rows, normalize=True), [2, 2, 2, 2, 1], iterations=5)
    assert torch.bincount(labels).tolist() == [2, 2, 2, 2, 1]
