"""Every measure of streamed counts against loops over all tokens."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from measure_traces import Trace, entropy_of, make_trace, stream
from torch import Tensor

from moadapt.statistics import measures

KINDS = ["random", "uniform", "collapsed", "ties", "threshold", "one_token_task"]
N = 4


def same(value: Tensor | float, expected: object) -> None:
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-9,
        equal_nan=True,
    )


@pytest.fixture(params=KINDS)
def trace(request: pytest.FixtureRequest) -> Trace:
    return make_trace(request.param)


def loads(trace: Trace) -> list[float]:
    total = sum(len(chosen) for chosen in trace.chosen)
    return [trace.count(expert) / total for expert in range(N)]


def information_of(pairs: list[tuple[int, int]], weights: list[float]) -> float:
    """sum p(a, b) ln p(a, b) / (p(a) p(b)), by its definition."""
    joint: Counter[tuple[int, int]] = Counter()
    for pair, weight in zip(pairs, weights, strict=True):
        joint[pair] += weight  # type: ignore[assignment]
    total = sum(joint.values())
    first = {a: sum(value for (x, _), value in joint.items() if x == a) / total for a, _ in joint}
    second = {b: sum(value for (_, y), value in joint.items() if y == b) / total for _, b in joint}
    return sum(v / total * math.log(v / total / (first[a] * second[b])) for (a, b), v in joint.items() if v)


# -- balance -------------------------------------------------------------------------------------------------------


def test_load_and_balance(trace: Trace) -> None:
    counts = stream(trace).selections.sum((0, 1, 2))
    load = loads(trace)
    same(measures.load(counts), load)
    same(measures.max_violation(counts), max(load) * N - 1)
    same(measures.coefficient_of_variation(counts), math.sqrt(sum((N * share - 1) ** 2 for share in load) / N))
    differences = sum(abs(a - b) for a in load for b in load) / N**2
    same(measures.gini(counts), differences / (2 / N))
    same(measures.effective_experts(counts), math.exp(entropy_of(load)))


@pytest.mark.parametrize(
    ("counts", "violation", "variation", "gini", "effective"),
    [([5, 5, 5, 5], 0, 0, 0, 4), ([0, 9, 0, 0], 3, math.sqrt(3), 0.75, 1), ([7, 0, 7, 0], 1, 1, 0.5, 2)],
)
def test_balance_at_its_ends(
    counts: list[int], violation: float, variation: float, gini: float, effective: float
) -> None:
    counts_N = torch.tensor(counts)
    same(measures.max_violation(counts_N), violation)
    same(measures.coefficient_of_variation(counts_N), variation)
    same(measures.gini(counts_N), gini)
    same(measures.effective_experts(counts_N), effective)


def test_layers_that_collapse_on_different_experts_are_each_collapsed() -> None:
    """Pooled they would look balanced; every leading dimension is a table of its own."""
    layers = 30 * torch.eye(N, dtype=torch.int64)
    same(measures.max_violation(layers), [N - 1.0] * N)
    same(measures.gini(layers), [1 - 1 / N] * N)
    same(measures.effective_experts(layers), [1.0] * N)
    same(measures.max_violation(layers.sum(0)), 0.0)


def test_nothing_counted_is_nan() -> None:
    zeros = torch.zeros(N, dtype=torch.int64)
    for measure in (measures.load, measures.max_violation, measures.coefficient_of_variation, measures.gini):
        assert bool(measure(zeros).isnan().all())
    assert bool(measures.effective_experts(zeros).isnan())
    assert bool(measures.mean_violation(torch.zeros(2)).isnan())
    assert not bool(measures.dead_experts(zeros, 0).any())
    assert bool(measures.mutual_information(torch.zeros(2, N))[1].isnan())


def test_mean_violation_is_of_passes() -> None:
    passes = [[3, 1], [0, 8], [2, 2]]
    violations = [2 * max(counts) / sum(counts) - 1 for counts in passes]
    same(measures.mean_violation(torch.tensor([sum(violations), 3.0])), sum(violations) / 3)


def test_dead_experts_are_counted_in_rows() -> None:
    """With two experts per row, the fair share of rows is 2 / N, but dead is measured on 1 / N."""
    selections = torch.tensor([24, 25, 0, 10_000])
    assert measures.dead_experts(selections, 10_000).tolist() == [True, False, True, False]
    assert measures.dead_experts(selections, 10_000, threshold=0.001).tolist() == [False, False, True, False]


def test_usage_is_gate_weight_only_where_every_row_selects_all() -> None:
    rows, weights = torch.tensor([3, 2]), torch.tensor([[0.5, 2.5], [1.5, 0.5]])
    dense = rows.unsqueeze(-1).expand(2, 2)
    same(measures.usage(dense, weights, rows), weights.tolist())
    sparse = torch.tensor([[3, 3], [2, 1]])
    same(measures.usage(sparse, weights, rows), sparse.tolist())


def test_drop_rate() -> None:
    passes, capacity = [[6, 0, 2], [3, 3, 2]], 3
    dropped = [sum(max(counts[e] - capacity, 0) for counts in passes) for e in range(3)]
    rate, by_expert = measures.drop_rate(torch.tensor(passes), capacity)
    same(rate, sum(dropped) / 16)
    same(by_expert, [dropped[0] / 9, dropped[1] / 3, 0.0])
    rate, _ = measures.drop_rate(torch.tensor(passes), torch.tensor([[6], [2]]))
    same(rate, 2 / 16)


# -- single decisions ----------------------------------------------------------------------------------------------


def test_token_entropy(trace: Trace) -> None:
    counts = stream(trace)
    entropies = [entropy_of(row) for row in trace.probs]
    mean, deviation = measures.token_entropy(counts.entropy.sum(0), counts.rows.sum())
    expected = sum(entropies) / len(trace)
    same(mean, expected)
    # From two sums, a deviation of zero is known to the square root of the rounding.
    slow = math.sqrt(sum((value - expected) ** 2 for value in entropies) / len(trace))
    assert float(deviation) == pytest.approx(slow, abs=1e-7)
    same(measures.normalised_entropy(mean, N), expected / math.log(N))
    information = measures.token_information(counts.probs.sum(0), counts.entropy[:, 0].sum(), counts.rows.sum())
    average = [sum(row[expert] for row in trace.probs) / len(trace) for expert in range(N)]
    same(information, max(0.0, entropy_of(average) - expected))


def test_token_information_at_its_ends() -> None:
    sure = torch.full((N,), 5.0, dtype=torch.float64)
    same(measures.token_information(sure, torch.tensor(0.0), torch.tensor(20)), math.log(N))
    same(measures.token_information(sure, torch.tensor(20 * math.log(N)), torch.tensor(20)), 0.0)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 1.0])
def test_entropy_quantile_is_within_a_bin(quantile: float) -> None:
    trace = make_trace("random")
    entropies = sorted(entropy_of(row) for row in trace.probs)
    exact = entropies[math.ceil(quantile * len(trace)) - 1]
    value = measures.entropy_quantile(stream(trace).entropy_histogram, N, quantile)
    assert value == pytest.approx(exact, abs=math.log(N) / 32)
    assert math.isnan(measures.entropy_quantile(torch.zeros(32, dtype=torch.int64), N, quantile))


def test_experts_per_row(trace: Trace) -> None:
    mean, share = measures.experts_per_row(stream(trace).active)
    same(mean, sum(len(chosen) for chosen in trace.chosen) / len(trace))
    same(share, [sum(len(chosen) == n for chosen in trace.chosen) / len(trace) for n in range(N + 1)])


# -- tasks ---------------------------------------------------------------------------------------------------------


def test_task_table_and_information(trace: Trace) -> None:
    selections = stream(trace).selections.sum((1, 2))
    totals = [sum(trace.count(expert, task) for expert in range(N)) for task in range(3)]
    table = [[trace.count(expert, task) / totals[task] for expert in range(N)] for task in range(3)]
    same(measures.task_table(selections), table)
    pairs = [(task, expert) for task, chosen in zip(trace.task, trace.chosen, strict=True) for expert in chosen]
    for weighting, weights in (
        ("rows", [1.0] * len(pairs)),
        ("tasks", [1 / totals[task] for task, _ in pairs]),
    ):
        information, normalised = measures.task_information(selections, weighting)  # type: ignore[arg-type]
        expected = information_of(pairs, weights)
        same(information, expected)
        task_share = [sum(w for (t, _), w in zip(pairs, weights, strict=True) if t == task) for task in range(3)]
        expert_share = [sum(w for (_, e), w in zip(pairs, weights, strict=True) if e == expert) for expert in range(N)]
        smaller = min(entropy_of([share / sum(part) for share in part]) for part in (task_share, expert_share))
        same(normalised, expected / smaller if smaller > 1e-9 else 0.0)


def test_task_information_at_its_ends() -> None:
    own = torch.tensor([[900, 0, 0], [0, 2, 0], [0, 0, 30]])
    same(measures.task_information(own, "tasks"), (math.log(3), 1.0))
    assert float(measures.task_information(own, "rows")[1]) == pytest.approx(1.0)
    same(measures.task_information(torch.tensor([[6, 3], [2, 1]])), (0.0, 0.0))
    same(measures.task_information(torch.tensor([[6, 0], [2, 0]])), (0.0, 0.0))
    same(measures.task_information(torch.tensor([[6, 1], [0, 0]])), (0.0, 0.0))
    # Two tasks on four experts: the expert tells the task, though the task does not tell the expert.
    same(measures.task_information(torch.tensor([[5, 5, 0, 0], [0, 0, 5, 5]])), (math.log(2), 1.0))


def test_a_table_of_tables_is_as_single_ones() -> None:
    tables = torch.randint(0, 9, (5, 3, N), generator=torch.Generator().manual_seed(1))
    stacked = torch.stack(measures.task_information(tables))
    single = torch.stack([torch.stack(measures.task_information(table)) for table in tables], -1)
    torch.testing.assert_close(stacked, single)


def test_task_distance(trace: Trace) -> None:
    selections = stream(trace).selections.sum((1, 2))
    table = measures.task_table(selections).tolist()
    expected = [[0.0] * 3 for _ in range(3)]
    for a in range(3):
        for b in range(3):
            middle = [(p + q) / 2 for p, q in zip(table[a], table[b], strict=True)]
            divergence = sum(
                p * math.log2(p / m) / 2 for row in (table[a], table[b]) for p, m in zip(row, middle, strict=True) if p
            )
            expected[a][b] = math.sqrt(max(divergence, 0.0))
    distance = measures.task_distance(selections)
    torch.testing.assert_close(distance, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert bool((distance == distance.T).all())


def test_task_distance_at_its_ends() -> None:
    distance = measures.task_distance(torch.tensor([[9, 0], [0, 1], [0, 700], [0, 0]]))
    same(distance[:3, :3], [[0, 1, 1], [1, 0, 0], [1, 0, 0]])
    assert bool(distance[3].isnan().all())


# -- pairs, layers, checkpoints ------------------------------------------------------------------------------------


def test_coactivation_is_of_all_pairs(trace: Trace) -> None:
    counts = stream(trace)
    share, lift = measures.coactivation(counts.pairs), measures.coactivation_lift(counts.pairs, counts.rows.sum())
    for i in range(N):
        for j in range(N):
            both = sum(i in chosen and j in chosen for chosen in trace.chosen)
            first, second = trace.count(i), trace.count(j)
            same(share[i, j], both / first if first else math.nan)
            same(lift[i, j], both * len(trace) / (first * second) if first and second else math.nan)


def test_flow() -> None:
    first, second = make_trace("random", seed=1), make_trace("threshold", seed=2)
    flow = torch.zeros(N, N, dtype=torch.int64)
    pairs = [(a[0], b[0]) for a, b in zip(first.chosen, second.chosen, strict=True) if a and b]
    for a, b in pairs:
        flow[a, b] += 1
    share = measures.flow_shares(flow)
    for a in range(N):
        out = [y for x, y in pairs if x == a]
        same(share[a], [out.count(b) / len(out) for b in range(N)])
    smaller = min(entropy_of([side.count(e) / len(side) for e in range(N)]) for side in zip(*pairs, strict=True))
    same(measures.flow_information(flow), information_of(pairs, [1.0] * len(pairs)) / smaller)
    same(measures.flow_information(torch.eye(N, dtype=torch.int64).flip(0)), 1.0)


@pytest.mark.parametrize("kind", ["random", "threshold"])
def test_saturation(kind: str) -> None:
    first, final = make_trace(kind, seed=1), make_trace(kind, seed=2)
    masks = [torch.tensor([[e in chosen for e in range(N)] for chosen in t.chosen]) for t in (first, final)]
    halves = [measures.count_shared(masks[0][part], masks[1][part]) for part in (slice(0, 90), slice(90, None))]
    overlap = [len(set(a) & set(b)) for a, b in zip(first.chosen, final.chosen, strict=True)]
    value = measures.saturation(halves[0] + halves[1])
    same(value, sum(overlap) / sum(len(chosen) for chosen in final.chosen))
    if kind == "random":
        same(value, sum(shared / 2 for shared in overlap) / len(overlap))
    same(measures.saturation(measures.count_shared(masks[1], masks[1])), 1.0)


def test_chance_saturation_is_the_mean_over_all_ways_to_pair_rows() -> None:
    first, final = make_trace("random", seed=1, tokens=60), make_trace("random", seed=2, tokens=60)
    shared = [
        len(set(first.chosen[place]) & set(final.chosen[(place + shift) % 60])) / 2
        for shift in range(60)
        for place in range(60)
    ]
    loads_N = [torch.tensor([trace.count(e) for e in range(N)]) for trace in (first, final)]
    same(measures.chance_saturation(*loads_N, 60), sum(shared) / len(shared))


# -- vocabulary ----------------------------------------------------------------------------------------------------


def test_vocabulary() -> None:
    trace = make_trace("threshold", seed=4)
    vocabulary = stream(trace).vocabulary
    assert vocabulary is not None
    least = 23
    tops: dict[int, list[int]] = {token: [] for token in range(10)}
    for token, chosen in zip(trace.token, trace.chosen, strict=True):
        tops[token] += chosen[:1]
    assert any(0 < len(top) < least for top in tops.values())
    share = {t: max(Counter(top).values()) / len(top) for t, top in tops.items() if len(top) >= least}
    assert len(share) >= 3
    same(measures.token_specialisation(vocabulary, least), [share.get(token, math.nan) for token in range(10)])
    same(measures.vocabulary_specialisation(vocabulary, least), sum(share.values()) / len(share))
    for expert, found in enumerate(measures.top_tokens(vocabulary, 3, least)):
        rows = [(token, tops[token].count(expert) / len(tops[token]), len(tops[token])) for token in share]
        rows = sorted((row for row in rows if row[1] > 0), key=lambda row: (-row[1], -row[2], row[0]))
        assert found == rows[:3]
    assert all(a[1] >= b[1] for found in measures.top_tokens(vocabulary) for a, b in pairwise(found))


def test_vocabulary_without_frequent_tokens() -> None:
    vocabulary = torch.tensor([[0, 0], [9, 0]], dtype=torch.int32)
    assert bool(measures.token_specialisation(vocabulary).isnan().all())
    assert bool(measures.token_specialisation(vocabulary, 0).isnan().tolist() == [True, False])
    assert bool(measures.vocabulary_specialisation(vocabulary).isnan())
    assert measures.top_tokens(vocabulary) == [[], []]
