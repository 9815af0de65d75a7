"""The sampler: coverage, shares, determinism and random access."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moadapt.errors import ConfigError, DataError
from moadapt.train.data_config import SamplingConfig
from moadapt.train.sampling import MixtureSampler, largest_remainder, task_probabilities

sizes_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def config(strategy="proportional", batching="mixed", **options):
    return SamplingConfig(strategy=strategy, batching=batching, **options)


def stream(sampler, batches):
    return [pair for index in range(batches) for pair in sampler.batch(index)]


def every_strategy(tasks):
    yield config(), None
    yield config("uniform"), None
    yield config("temperature", temperature=2.0), None
    yield config("weights"), [float(i + 1) for i in range(tasks)]


@settings(max_examples=40, deadline=None)
@given(sizes_strategy, st.integers(1, 9), seeds, st.integers(1, 3))
def test_a_proportional_epoch_visits_every_row_once(sizes, batch_size, seed, epochs):
    sampler = MixtureSampler(sizes, batch_size, config(), seed)
    total = sum(sizes)
    pairs = stream(sampler, math.ceil(epochs * total / batch_size))
    everything = {(task, row) for task, size in enumerate(sizes) for row in range(size)}
    for epoch in range(epochs):
        part = pairs[epoch * total : (epoch + 1) * total]
        assert len(part) == total
        assert set(part) == everything
    assert sampler.batches_per_epoch == math.ceil(total / batch_size)


@settings(max_examples=40, deadline=None)
@given(sizes_strategy, st.integers(1, 9), seeds)
def test_every_strategy_cycles_through_each_tasks_rows_without_skipping(sizes, batch_size, seed):
    for batching in ("mixed", "per_task"):
        for options, weights in every_strategy(len(sizes)):
            options = options.model_copy(update={"batching": batching})
            sampler = MixtureSampler(sizes, batch_size, options, seed, weights=weights)
            seen = {task: [] for task in range(len(sizes))}
            for task, row in stream(sampler, 3 * sampler.batches_per_epoch):
                seen[task].append(row)
            for task, size in enumerate(sizes):
                for start in range(0, len(seen[task]) - size + 1, size):
                    assert sorted(seen[task][start : start + size]) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(sizes_strategy, st.integers(1, 9), seeds, st.randoms())
def test_a_batch_depends_on_the_seed_and_its_index_alone(sizes, batch_size, seed, random):
    for batching in ("mixed", "per_task"):
        options = config("temperature", batching, temperature=3.0)
        once = MixtureSampler(sizes, batch_size, options, seed)
        order = list(range(2 * once.batches_per_epoch + 3))
        in_order = [once.batch(index) for index in order]
        again = MixtureSampler(sizes, batch_size, options, seed)
        random.shuffle(order)
        assert {index: again.batch(index) for index in order} == dict(enumerate(in_order))
        assert all(len(batch) == batch_size for batch in in_order)


@settings(max_examples=40, deadline=None)
@given(sizes_strategy, st.integers(1, 9), seeds)
def test_per_task_batches_hold_one_task_and_an_epoch_reaches_every_row(sizes, batch_size, seed):
    sampler = MixtureSampler(sizes, batch_size, config(batching="per_task"), seed)
    assert sampler.batches_per_epoch == sum(math.ceil(size / batch_size) for size in sizes)
    batches = [sampler.batch(index) for index in range(sampler.batches_per_epoch)]
    assert all(len({task for task, _ in batch}) == 1 for batch in batches)
    counts = Counter(batch[0][0] for batch in batches)
    assert counts == {task: math.ceil(size / batch_size) for task, size in enumerate(sizes)}
    assert len({pair for batch in batches for pair in batch}) == sum(sizes)


@pytest.mark.parametrize(
    ("options", "weights", "expected"),
    [
        (config(), None, [0.1, 0.4, 0.5]),
        (config("uniform"), None, [1 / 3, 1 / 3, 1 / 3]),
        (config("temperature", temperature=1.0), None, [0.1, 0.4, 0.5]),
        # square roots of 100, 400, 500: 10, 20, 22.360680; their sum is 52.360680
        (config("temperature", temperature=2.0), None, [10 / 52.36068, 20 / 52.36068, 22.36068 / 52.36068]),
        (config("weights"), [1.0, 0.0, 3.0], [0.25, 0.0, 0.75]),
    ],
)
def test_shares_of_an_epoch(options, weights, expected):
    sampler = MixtureSampler([100, 400, 500], 10, options, seed=1, weights=weights)
    assert sampler.probabilities == pytest.approx(expected, abs=2e-6)
    counts = Counter(task for task, _ in stream(sampler, sampler.batches_per_epoch))
    assert sum(counts.values()) == 1000
    for task, share in enumerate(expected):
        assert abs(counts[task] - 1000 * share) < 1


def test_temperature_goes_from_the_largest_task_alone_to_uniform():
    cold = task_probabilities([10, 1000], config("temperature", temperature=0.001), None)
    hot = task_probabilities([10, 1000], config("temperature", temperature=1e6), None)
    assert cold == pytest.approx([0.0, 1.0], abs=1e-12)
    assert hot == pytest.approx([0.5, 0.5], abs=1e-5)


def test_per_task_shares_count_batches():
    sampler = MixtureSampler([90, 10], 5, config("weights", "per_task"), 0, weights=[3.0, 1.0])
    assert sampler.batches_per_epoch == 20
    counts = Counter(sampler.batch(index)[0][0] for index in range(20))
    assert counts == {0: 15, 1: 5}


@given(st.integers(0, 200), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_largest_remainder_meets_total_and_quota(total, parts):
    shares = [Fraction(part, sum(parts)) for part in parts]
    counts = largest_remainder(total + len(parts), [float(share) for share in shares])
    assert sum(counts) == total + len(parts)
    assert min(counts) >= 1
    if all(share * (total + len(parts)) >= 1 for share in shares):
        assert all(abs(count - share * (total + len(parts))) < 1 for count, share in zip(counts, shares, strict=True))


def test_largest_remainder_by_hand():
    assert largest_remainder(10, [0.45, 0.35, 0.20]) == [5, 3, 2]  # remainders .5, .5, 0: the first wins the tie
    assert largest_remainder(7, [0.5, 0.3, 0.2]) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert largest_remainder(3, [0.98, 0.01, 0.01]) == [1, 1, 1]


def test_the_order_changes_with_the_seed_and_with_the_epoch():
    one, other = MixtureSampler([50, 50], 10, config(), 1), MixtureSampler([50, 50], 10, config(), 2)
    assert stream(one, 10) != stream(other, 10)
    assert stream(one, 20)[:100] != stream(one, 20)[100:]


def test_two_processes_share_the_batches_of_one():
    """Index = step * accumulation * world + micro * world + rank walks through the same stream for any world size."""
    sampler = MixtureSampler([30, 20], 4, config(), 7)
    alone = [pair for step in range(3) for micro in range(4) for pair in sampler.batch(step * 4 + micro)]
    shared = [
        pair
        for step in range(3)
        for micro in range(2)
        for rank in range(2)
        for pair in sampler.batch(step * 2 * 2 + micro * 2 + rank)
    ]
    assert shared == alone


def test_a_batch_may_be_longer_than_an_epoch():
    sampler = MixtureSampler([2, 1], 10, config(), 0)
    assert sampler.batches_per_epoch == 1
    assert Counter(sampler.batch(0) + sampler.batch(1) + sampler.batch(2)) == {(0, 0): 10, (0, 1): 10, (1, 0): 10}


def test_a_task_far_larger_than_a_page_of_permutations():
    size = 70_000
    sampler = MixtureSampler([size, 3], 1000, config(), 3)
    rows = [row for task, row in stream(sampler, 71) if task == 0]
    assert sorted(rows[:size]) == list(range(size))


def test_tasks_without_training_rows_are_left_out():
    for options in (config(), config("uniform"), config("temperature", temperature=2.0)):
        sampler = MixtureSampler([5, 0, 5], 2, options, 0)
        assert sampler.probabilities == [0.5, 0.0, 0.5]
        assert {task for task, _ in stream(sampler, 10)} == {0, 2}


def test_refusals():
    with pytest.raises(DataError, match="no training row"):
        MixtureSampler([0, 0], 2, config(), 0)
    with pytest.raises(DataError, match="no training row"):
        MixtureSampler([5, 0], 2, config("weights"), 0, weights=[1.0, 1.0])
    with pytest.raises(ConfigError, match=r"sampling\.weights"):
        MixtureSampler([5, 5], 2, config("weights"), 0)
    with pytest.raises(ConfigError, match="above 0"):
        MixtureSampler([5, 5], 2, config("weights"), 0, weights=[0.0, 0.0])
    with pytest.raises(ConfigError, match="batch size"):
        MixtureSampler([5], 0, config(), 0)
    with pytest.raises(ConfigError, match="seed"):
        MixtureSampler([5], 1, config(), -1)
    with pytest.raises(ValueError, match="index"):
        MixtureSampler([5], 1, config(), 0).batch(-1)
