"""Confidence intervals and the permutation test: against loops, all permutations, and simulated unrelated tasks."""

from __future__ import annotations

import math
import time
from itertools import combinations, permutations

import pytest
import torch
from measure_traces import clustered
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.statistics.measures import task_information
from moadapt.statistics.significance import (
    benjamini_hochberg,
    load_interval,
    student_quantile,
    task_permutation_test,
    wilson_interval,
)

SKEWED = torch.tensor([0.7, 0.1, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01])
EVEN = torch.full((8,), 1 / 8)


# -- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 40), (500, 1000)])
def test_wilson_ends_are_where_the_score_test_turns(successes: int, trials: int) -> None:
    low, high = (float(end) for end in wilson_interval(torch.tensor(successes), torch.tensor(trials)))
    share = successes / trials
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / trials), rel=1e-6)
    assert low <= share <= high
    assert (low == 0) == (successes == 0)
    assert high == pytest.approx(1.0) if successes == trials else high < 1


def test_wilson_without_trials_is_nan() -> None:
    assert all(bool(end.isnan()) for end in wilson_interval(torch.tensor(0), torch.tensor(0)))


@pytest.mark.parametrize(("df", "slack"), [(2, 0.05), (4, 0.01), (5, 0.005), (9, 0.002), (30, 0.0002)])
def test_student_quantile_holds_its_share_of_the_density(df: int, slack: float) -> None:
    """The probability inside, by the midpoint rule, is 95 % or a little more."""
    t, steps = student_quantile(0.95, df), 20_000
    width = t / steps
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    inside = 2 * width * constant * sum((1 + ((s + 0.5) * width) ** 2 / df) ** (-(df + 1) / 2) for s in range(steps))
    assert 0.95 - 1e-4 <= inside <= 0.95 + slack


def test_load_interval_is_wilsons_at_the_effective_number_of_selections() -> None:
    """The variance of a load is the jackknife's, each sequence left out once."""
    _, counts = clustered([9], [(3, 60)], EVEN, 3.0, torch.Generator().manual_seed(0))
    total, size = float(counts.sum()), len(counts)
    low, high = load_interval(counts.sum(0), counts)
    t = student_quantile(0.95, size - 1)
    for expert in range(8):
        share = float(counts[:, expert].sum()) / total
        without = [(float(counts[:, expert].sum()) - float(row[expert])) / (total - float(row.sum())) for row in counts]
        variance = (size - 1) / size * sum((value - share) ** 2 for value in without)
        effective = share * (1 - share) / variance
        assert effective < total
        for end in (float(low[expert]), float(high[expert])):
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(t * math.sqrt(end * (1 - end) / effective), rel=1e-6)


def test_load_interval_of_a_sample_narrows_with_all_selections() -> None:
    _, counts = clustered([40], [(5, 60)], EVEN, 3.0, torch.Generator().manual_seed(0))
    widths = [float((high - low).mean()) for low, high in (load_interval(n * counts.sum(0), counts) for n in (1, 100))]
    assert widths[1] == pytest.approx(widths[0] / 10, rel=0.1)


def test_load_interval_never_claims_more_than_was_seen() -> None:
    never = torch.tensor([[30, 0], [30, 0], [30, 0]])
    low, high = load_interval(never.sum(0), never)
    z = student_quantile(0.95, 2)
    assert (float(low[1]), float(high[0])) == (0.0, 1.0)
    assert float(high[1]) == pytest.approx(z**2 / (3 + z**2))  # Wilson's for none of three
    alike = torch.full((50, 2), 5)  # less varied than independent selections would be
    narrow, wide = load_interval(alike.sum(0)), load_interval(alike.sum(0), alike)
    assert bool(((wide[1] - wide[0]) >= (narrow[1] - narrow[0])).all())
    one = load_interval(never.sum(0), never[:1])
    assert (one[0].tolist(), one[1].tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert all(bool(end.isnan().all()) for end in load_interval(torch.zeros(2), torch.zeros(0, 2)))


@pytest.mark.parametrize(
    ("sizes", "length", "base", "concentration", "least"),
    [(50, (5, 60), EVEN, 4.0, 0.92), (8, (50, 60), EVEN, 4.0, 0.92), (40, (5, 200), SKEWED, 8.0, 0.87),
     (40, (5, 60), EVEN, 0.0, 0.92)],
    ids=["correlated", "few", "skewed", "independent"],
)  # fmt: skip
def test_load_interval_covers(
    sizes: int, length: tuple[int, int], base: Tensor, concentration: float, least: float
) -> None:
    generator, runs = torch.Generator().manual_seed(5), 400
    covered, naive = torch.zeros(8), torch.zeros(8)
    for _ in range(runs):
        _, counts = clustered([sizes], [length], base, concentration, generator)
        low, high = load_interval(counts.sum(0), counts)
        covered += (low <= base) & (base <= high)
        low, high = load_interval(counts.sum(0))
        naive += (low <= base) & (base <= high)
    assert least <= float(covered.mean()) / runs <= 0.99
    if concentration:
        assert float(naive.mean()) / runs < 0.6


# -- the permutation test ------------------------------------------------------------------------------------------


def naive_statistics(groups: list[list[list[float]]]) -> tuple[float, list[list[float]]]:
    """The overall statistic, and each cell's, of sequences' counts by task."""
    experts = len(groups[0][0])
    shares = [[[count / sum(row) for count in row] for row in group] for group in groups]
    pooled = [row for group in shares for row in group]
    middle = [sum(row[e] for row in pooled) / len(pooled) for e in range(experts)]
    means, variances, floors = [], [], []
    for group, counts in zip(shares, groups, strict=True):
        size = len(group)
        mean = [sum(row[e] for row in group) / size for e in range(experts)]
        means.append(mean)
        variances.append([sum((r[e] - mean[e]) ** 2 for r in group) / (size - 1) / size for e in range(experts)])
        inverse = sum(1 / sum(row) for row in counts) / size**2
        floors.append([middle[e] * (1 - middle[e]) * inverse for e in range(experts)])
    totals = [max(sum(own), sum(floor)) for own, floor in zip(variances, floors, strict=True)]
    weight = sum(1 / total for total in totals)
    centre = [sum(m[e] / t for m, t in zip(means, totals, strict=True)) / weight for e in range(experts)]
    overall = sum(sum((m[e] - centre[e]) ** 2 for e in range(experts)) / t for m, t in zip(means, totals, strict=True))
    cells = []
    for task, mean in enumerate(means):
        row = []
        for e in range(experts):
            others = [other for other in range(len(groups)) if other != task]
            rest = sum(means[other][e] for other in others) / len(others)
            error = max(variances[task][e], floors[task][e])
            error += sum(max(variances[o][e], floors[o][e]) for o in others) / len(others) ** 2
            row.append(abs(mean[e] - rest) / math.sqrt(error))
        cells.append(row)
    return overall, cells


def test_p_values_are_those_of_all_permutations() -> None:
    _, counts = clustered([4, 4], [(3, 9), (20, 40)], torch.full((3,), 1 / 3), 2.0, torch.Generator().manual_seed(9))
    rows = counts.tolist()
    found = task_permutation_test(torch.tensor([0] * 4 + [1] * 4), counts, 2, permutations=20_000)
    overall, cells = naive_statistics([rows[:4], rows[4:]])
    reached, reached_cells = 0, [[0] * 3 for _ in range(2)]
    splits = list(combinations(range(8), 4))
    for first in splits:
        groups = [[rows[m] for m in first], [rows[m] for m in range(8) if m not in first]]
        permuted, permuted_cells = naive_statistics(groups)
        reached += permuted >= overall - 1e-9
        for task in range(2):
            for e in range(3):
                reached_cells[task][e] += permuted_cells[task][e] >= cells[task][e] - 1e-9
    assert found.p_value == pytest.approx(reached / len(splits), abs=0.012)
    expected = torch.tensor(reached_cells) / len(splits)
    torch.testing.assert_close(found.p_LN, expected.double(), atol=0.015, rtol=0)


def test_information_and_its_baseline() -> None:
    tasks = torch.tensor([0, 1, 0, 1, 2, 2])
    counts = torch.randint(0, 9, (6, 3), generator=torch.Generator().manual_seed(2)) + 1

    def table(labels: tuple[int, ...]) -> Tensor:
        return torch.stack([counts[torch.tensor(labels) == task].sum(0) for task in range(3)])

    for weighting in ("tasks", "rows"):
        found = task_permutation_test(tasks, counts, 3, weighting=weighting, permutations=20_000)  # type: ignore[arg-type]
        expected = [float(value) for value in task_information(table(tuple(tasks.tolist())), weighting)]  # type: ignore[arg-type]
        assert (found.information, found.normalised) == pytest.approx(tuple(expected))
        every = torch.stack([table(labels) for labels in set(permutations(tasks.tolist()))])
        baseline = [float(value.mean()) for value in task_information(every, weighting)]  # type: ignore[arg-type]
        assert (found.baseline, found.normalised_baseline) == pytest.approx(tuple(baseline), rel=0.03)
        assert found.excess == found.information - found.baseline


def test_tasks_with_experts_of_their_own() -> None:
    counts = torch.tensor([[7, 0, 0, 1], [70, 0, 0, 10], [0, 7, 0, 1], [0, 35, 0, 5], [0, 0, 7, 1], [0, 0, 70, 10]])
    tasks = torch.tensor([0, 0, 1, 1, 2, 2]).repeat(5)
    found = task_permutation_test(tasks, counts.repeat(5, 1), 3, permutations=199)
    assert found.p_value == 1 / 200
    assert found.normalised > 0.7 > 0.2 > found.normalised_baseline
    assert found.significant().tolist() == [[True, True, True, False]] * 3
    assert [int(row.argmax()) for row in found.difference_LN] == [0, 1, 2]
    shares = counts.double() / counts.sum(-1, keepdim=True)
    mean = torch.stack([shares[:2].mean(0), shares[2:4].mean(0), shares[4:].mean(0)])
    torch.testing.assert_close(found.difference_LN[1], mean[1] - (mean[0] + mean[2]) / 2)


def test_the_order_of_sequences_and_the_seed_change_little() -> None:
    tasks, counts = clustered([9, 9], [(5, 20)] * 2, EVEN, 4.0, torch.Generator().manual_seed(1))
    order = torch.randperm(18)
    first, second = task_permutation_test(tasks, counts, 2), task_permutation_test(tasks[order], counts[order], 2)
    assert first.p_value == pytest.approx(second.p_value, abs=0.08)
    again = task_permutation_test(tasks, counts, 2)
    assert (again.p_value, again.baseline) == (first.p_value, first.baseline)


def test_where_nothing_can_be_tested() -> None:
    counts = torch.tensor([[3, 1], [2, 2], [1, 3]])
    for tasks in ([0, 0, 0], [0, 0, 1]):  # one task; a task with one sequence
        found = task_permutation_test(torch.tensor(tasks), counts, 2)
        assert math.isnan(found.p_value)
        assert bool(found.p_LN.isnan().all())
        assert not bool(found.significant().any())
    empty = torch.tensor([[3, 1], [2, 2], [0, 0], [0, 0]])  # a task whose sequences select nothing
    assert math.isnan(task_permutation_test(torch.tensor([0, 0, 1, 1]), empty, 2).p_value)
    assert math.isnan(task_permutation_test(torch.zeros(0), torch.zeros(0, 2), 2).p_value)


def test_a_task_with_one_sequence_is_left_out() -> None:
    tasks, counts = clustered([6, 6], [(5, 20)] * 2, EVEN, 4.0, torch.Generator().manual_seed(1))
    more = torch.cat([torch.tensor([1]), tasks * 2]), torch.cat([torch.tensor([[99, *[0] * 7]]), counts])
    without, found = task_permutation_test(tasks, counts, 2), task_permutation_test(*more, 3)
    assert (found.p_value, found.information) == (without.p_value, without.information)
    assert bool(found.p_LN[1].isnan().all())
    torch.testing.assert_close(found.q_LN[::2], without.q_LN)


def test_collapsed_routing_does_not_depend_on_the_task() -> None:
    counts = torch.tensor([[0, 5, 0]] * 12)
    found = task_permutation_test(torch.arange(12) % 3, counts, 3, permutations=99)
    assert (found.p_value, found.information, found.normalised) == (1.0, 0.0, 0.0)
    assert bool(found.p_LN.isnan().all())


def test_wrong_input_is_refused() -> None:
    counts = torch.ones(3, 2)
    with pytest.raises(ConfigError, match="one task id for each sequence"):
        task_permutation_test(torch.tensor([0, 1]), counts, 2)
    with pytest.raises(ConfigError, match="give ids from 0 to 1"):
        task_permutation_test(torch.tensor([0, 1, 2]), counts, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        task_permutation_test(torch.tensor([0, 1, 1]), counts, 2, permutations=0)


UNRELATED = {
    "alike": ([20] * 4, [(5, 60)] * 4, EVEN, 4.0),
    "correlated, other lengths": ([20] * 4, [(5, 10), (50, 100), (200, 400), (5, 400)], EVEN, 4.0),
    "independent, other lengths": ([30, 30], [(2, 4), (200, 400)], EVEN, 0.0),
    "other sizes and lengths": ([60, 12], [(2, 4), (200, 400)], EVEN, 2.0),
    "skewed": ([20] * 4, [(3, 6), (50, 100), (200, 400), (5, 400)], SKEWED, 4.0),
    "few": ([4] * 3, [(5, 300)] * 3, EVEN, 2.0),
    "prompts": ([25] * 4, [(1, 1)] * 4, EVEN, 0.0),
}


@pytest.mark.parametrize(
    "name", [*list(UNRELATED)[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in list(UNRELATED)[3:])]
)
def test_unrelated_tasks_are_called_related_in_five_percent(name: str) -> None:
    generator, runs = torch.Generator().manual_seed(11), 1200
    sizes, lengths, base, concentration = UNRELATED[name]
    related, marked = 0, 0
    for seed in range(runs):
        tasks, counts = clustered(sizes, lengths, base, concentration, generator)
        found = task_permutation_test(tasks, counts, len(sizes), permutations=99, seed=seed)
        related += found.p_value <= 0.05
        marked += bool(found.significant().any())
    assert 0.03 <= related / runs <= 0.07
    assert marked <= related


def test_related_tasks_are_found() -> None:
    generator, runs, found = torch.Generator().manual_seed(11), 60, 0
    for seed in range(runs):
        _, first = clustered([20], [(5, 60)], EVEN, 4.0, generator)
        _, second = clustered([20], [(5, 60)], torch.tensor([0.3, *[0.1] * 7]), 4.0, generator)
        tasks = torch.tensor([0] * 20 + [1] * 20)
        found += (
            task_permutation_test(tasks, torch.cat([first, second]), 2, permutations=199, seed=seed).p_value <= 0.05
        )
    assert found / runs > 0.6


def test_a_thousand_permutations_of_many_sequences_take_under_a_second() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = torch.randint(0, 20, (4096,), generator=generator)
    counts = torch.randint(0, 50, (4096, 8), generator=generator)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        task_permutation_test(tasks, counts, 20)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0


# -- many tests ----------------------------------------------------------------------------------------------------


def test_benjamini_hochberg_is_the_step_up_procedure() -> None:
    """q <= level exactly for those that the procedure rejects at that level."""
    p = torch.tensor([[0.001, 0.04, math.nan, 0.03], [0.02, 0.9, 0.03, 0.011]], dtype=torch.float64)
    q = benjamini_hochberg(p)
    assert bool((q.isnan() == p.isnan()).all())
    known = sorted(float(value) for value in p.flatten() if not math.isnan(value))
    for level in [step / 500 for step in range(1, 500)]:
        passing = [value for rank, value in enumerate(known, 1) if value <= level * rank / len(known) + 1e-12]
        rejected = {value for value in known if passing and value <= max(passing)}
        assert {float(value) for value in p[q <= level + 1e-12]} == rejected
    assert benjamini_hochberg(torch.zeros(0)).numel() == 0
