"""Metrics against values worked out by hand and against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moadapt.train.metrics import (
    METRICS,
    accuracy,
    common_subsequence_length,
    compute_metric,
    exact_match,
    find_choice,
    rouge_l,
    token_f1,
)

words = st.lists(st.sampled_from("abcd"), max_size=8)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        (" yes\n", "yes", 1.0),
        ("a  b\tc", "a b c", 1.0),
        ("Yes", "yes", 0.0),
        ("yes.", "yes", 0.0),
        ("ab", "a b", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match_ignores_white_space_only(prediction, reference, score):
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        ("true", ["false", "true"], 1),
        (" TRUE.", ["false", "true"], 1),
        ("not true but false", ["false", "true"], 1),  # the first that occurs
        ("untrue", ["false", "true"], None),  # whole words only
        ("answer10", ["answer1", "answer10"], 1),
        ("answer10 it is", ["answer1", "answer10"], 1),
        ("new york city", ["new", "new york"], 1),  # the longer one at the same place
        ("new", ["new york", "new"], 1),
        ("so (b) is it", ["(a)", "(b)"], 1),
        ("", ["a", "b"], None),
        ("card  payment\nfee", ["card payment fee", "card"], 0),
    ],
)
def test_find_choice(text, choices, index):
    assert find_choice(text, choices) == index


def test_accuracy_compares_choices_not_texts():
    choices = ["true", "false"]
    assert accuracy("True, I think", "the correct answer is true", choices) == 1.0
    assert accuracy("false, not true", "true", choices) == 0.0
    assert accuracy("no idea", "true", choices) == 0.0
    assert accuracy("no idea", "neither", choices) == 0.0  # a reference outside the choices is never right
    assert accuracy("it is true", "true") == 1.0
    assert accuracy("it is false", "true") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("the cat", "the cat sat down", 2 * 1.0 * 0.5 / 1.5),  # precision 2/2, recall 2/4
        ("sat cat the", "the cat sat", 1 / 3),  # one word in order: precision = recall = 1/3
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("x-y z2", "x y z2", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score)


def brute_force_lcs(a: list[str], b: list[str]) -> int:
    subsequences = {tuple(c) for n in range(len(b) + 1) for c in combinations(b, n)}
    return max(n for n in range(len(a) + 1) for c in combinations(a, n) if tuple(c) in subsequences)


@given(words, words)
def test_common_subsequence_equals_brute_force(a, b):
    assert common_subsequence_length(a, b) == brute_force_lcs(a, b)


def test_common_subsequence_of_more_words_than_a_machine_word_has_bits():
    a = [str(i) for i in range(300)]
    assert common_subsequence_length(a, a[::3]) == 100
    assert common_subsequence_length(a, a[::-1]) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("in paris france", "Paris", 0.5),  # precision 1/3, recall 1
        ("paris paris", "paris", 2 / 3),  # a repeated word counts once
        ("london", "paris", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("the", "paris", 0.0),
        ("theatre", "atre", 0.0),  # articles are whole words
    ],
)
def test_token_f1(prediction, reference, score):
    assert token_f1(prediction, reference) == pytest.approx(score)


@given(st.text(max_size=20), st.text(max_size=20))
def test_every_metric_stays_between_0_and_1(prediction, reference):
    for metric in METRICS.values():
        assert 0.0 <= metric(prediction, reference, None) <= 1.0


def test_compute_metric_is_the_mean_over_rows():
    assert compute_metric("exact_match", ["a", "b", "c", "d"], ["a", "x", "c", "x"]) == 0.5
    assert compute_metric("accuracy", ["is a", "is b"], ["a", "a"], [["a", "b"], ["a", "b"]]) == 0.5
    assert compute_metric("token_f1", ["in paris france", "london"], ["Paris", "London"]) == pytest.approx(0.75)


def test_compute_metric_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="rouge_l"):
        compute_metric("rouge", ["a"], ["a"])
    with pytest.raises(ValueError, match="at least one row"):
        compute_metric("rouge_l", [], [])
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        compute_metric("rouge_l", ["a", "b"], ["a"])
