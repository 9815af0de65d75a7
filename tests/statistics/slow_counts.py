"""The counts of a recording once more, as loops over passes, routers, sequences, rows and experts in float64.

Nothing of moadapt is used to count. What the routers decided is read by hooks of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moadapt import MixtureModel
from moadapt.statistics import RouterCounts, RoutingStatistics

EXACT = ("rows", "selections", "entropy_histogram", "pairs", "active", "top")
REAL = ("weights", "probs", "entropy", "violation")


@dataclass
class Decision:
    """One call of one router: lists by row and expert."""

    router: str
    weights: list[list[float]]
    selected: list[list[bool]]
    probs: list[list[float]]


@dataclass
class Pass:
    """What a test knows of a pass, by sequence and row: real or not, of an answer or not, token; and what was decided.

    For routers that decide by prompt a row is a turn.
    """

    real: list[list[bool]]
    answer: list[list[bool]]
    tasks: list[int]
    decode: bool = False
    ids: list[list[int]] | None = None
    decisions: list[Decision] = field(default_factory=list)


@contextmanager
def decisions_of(model: MixtureModel) -> Iterator[list[Decision]]:
    """Every call of every router inside the block."""
    seen: list[Decision] = []

    def look(name: str, routing: Any) -> None:
        tensors = (routing.weights_TN.double(), routing.selected_TN, routing.probs_TN.double())
        seen.append(Decision(name, *(tensor.detach().clone().tolist() for tensor in tensors)))

    handles = [
        site.router.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, site in model.injection.routers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _top(weights: list[float], selected: list[bool]) -> int:
    best = -1
    for n, chosen in enumerate(selected):
        if chosen and (best < 0 or weights[n] > weights[best]):
            best = n
    return best


def _shares(probs: list[float]) -> list[float]:
    positive = [max(p, 0.0) for p in probs]
    total = sum(positive)
    if not (total > 0 and math.isfinite(total)):
        return [1.0 / len(probs)] * len(probs)
    return [p / total for p in positive]


def slow_counts(passes: list[Pass], router: str, num_experts: int, num_tasks: int, vocabulary: int = 0) -> Any:
    """The fields of `RouterCounts` as lists, and `sequences`: (task, counts) of every sequence of a prefill."""
    N, L = num_experts, num_tasks
    made: dict[str, Any] = {
        "rows": [[[0, 0], [0, 0]] for _ in range(L)],
        "selections": [[[[0] * N for _ in range(2)] for _ in range(2)] for _ in range(L)],
        "weights": [[[[0.0] * N for _ in range(2)] for _ in range(2)] for _ in range(L)],
        "probs": [[0.0] * N for _ in range(L)],
        "entropy": [[0.0, 0.0] for _ in range(L)],
        "entropy_histogram": [0] * 32,
        "pairs": [[0] * N for _ in range(N)],
        "active": [0] * (N + 1),
        "top": [[0] * N for _ in range(L)],
        "violation": [0.0, 0.0],
        "vocabulary": [[0] * N for _ in range(vocabulary)],
        "sequences": [],
    }
    for one in passes:
        for decision in one.decisions:
            if decision.router != router:
                continue
            in_pass = [0] * N
            length = len(one.real[0])
            for b, task in enumerate(one.tasks):
                in_sequence = [0] * N
                for s in range(length):
                    if not one.real[b][s]:
                        continue
                    row = b * length + s
                    weights, selected = decision.weights[row], decision.selected[row]
                    part, phase = int(one.answer[b][s]), int(one.decode)
                    made["rows"][task][part][phase] += 1
                    shares = _shares(decision.probs[row])
                    entropy = sum(-p * math.log(p) for p in shares if p > 0)
                    made["entropy"][task][0] += entropy
                    made["entropy"][task][1] += entropy**2
                    made["entropy_histogram"][min(31, int(entropy * (32 / math.log(N))))] += 1
                    made["active"][sum(selected)] += 1
                    top = _top(weights, selected)
                    if top >= 0:
                        made["top"][task][top] += 1
                        if vocabulary:
                            assert one.ids is not None
                            made["vocabulary"][one.ids[b][s]][top] += 1
                    for n in range(N):
                        made["weights"][task][part][phase][n] += weights[n]
                        made["probs"][task][n] += shares[n]
                        if selected[n]:
                            made["selections"][task][part][phase][n] += 1
                            in_sequence[n] += 1
                            in_pass[n] += 1
                            for m in range(N):
                                made["pairs"][n][m] += int(selected[m])
                if not one.decode and any(in_sequence):
                    made["sequences"].append((task, in_sequence))
            if not one.decode and any(in_pass):
                made["violation"][0] += max(in_pass) / (sum(in_pass) / N) - 1
                made["violation"][1] += 1
    return made


def slow_flow(passes: list[Pass], first: str, second: str, sizes: tuple[int, int]) -> list[list[int]]:
    """Rows by the top experts of two routers."""
    counted = [[0] * sizes[1] for _ in range(sizes[0])]
    for one in passes:
        by_name = {decision.router: decision for decision in one.decisions}
        length = len(one.real[0])
        for b in range(len(one.tasks)):
            for s in range(length):
                if one.real[b][s] and first in by_name and second in by_name:
                    row = b * length + s
                    tops = [_top(by_name[name].weights[row], by_name[name].selected[row]) for name in (first, second)]
                    if min(tops) >= 0:
                        counted[tops[0]][tops[1]] += 1
    return counted


def assert_counts(counts: RouterCounts, passes: list[Pass], tolerance: float = 1e-12) -> None:
    """A router's counts are those of the loops."""
    size = 0 if counts.vocabulary is None else counts.vocabulary.shape[0]
    want = slow_counts(passes, counts.name, counts.num_experts, len(counts.tasks), size)
    assert sum(map(sum, (part for task in want["rows"] for part in task))) > 0
    for name in EXACT:
        assert getattr(counts, name).dtype == torch.int64
        assert getattr(counts, name).tolist() == want[name], name
    for name in REAL:
        have, expected = getattr(counts, name), torch.tensor(want[name], dtype=torch.float64)
        assert have.dtype == torch.float64
        torch.testing.assert_close(have, expected, rtol=tolerance, atol=tolerance)
    if counts.vocabulary is not None:
        assert counts.vocabulary.tolist() == want["vocabulary"]
    have = sorted(zip(counts.sequence_tasks.tolist(), counts.sequence_counts.tolist(), strict=True))
    assert have == sorted(want["sequences"])


def assert_statistics(statistics: RoutingStatistics, passes: list[Pass], tolerance: float = 1e-12) -> None:
    """All routers' counts, and the flow between them, are those of the loops."""
    routers = statistics.routers
    for counts in routers.values():
        assert_counts(counts, passes, tolerance)
    for (first, second), value in statistics.flow.items():
        sizes = routers[first].num_experts, routers[second].num_experts
        assert value.tolist() == slow_flow(passes, first, second, sizes)


def same_counts(one: RoutingStatistics, other: RoutingStatistics, leave_out: tuple[str, ...] = ()) -> None:
    """Two recordings agree: integers exactly, sums up to rounding. Samples are compared as sets of sequences."""
    assert one.routers.keys() == other.routers.keys()
    for name, counts in one.routers.items():
        theirs = other.routers[name]
        assert counts.tasks == theirs.tasks
        for part in EXACT:
            assert torch.equal(getattr(counts, part), getattr(theirs, part)), (name, part)
        for part in REAL:
            if part not in leave_out:
                torch.testing.assert_close(getattr(counts, part), getattr(theirs, part), rtol=1e-5, atol=1e-7)
        assert sequences(counts) == sequences(theirs)
    assert one.flow.keys() == other.flow.keys()
    assert all(torch.equal(value, other.flow[pair]) for pair, value in one.flow.items())


def sequences(counts: RouterCounts) -> list[tuple[int, list[int]]]:
    """The sample, in an order of its own."""
    return sorted(zip(counts.sequence_tasks.tolist(), counts.sequence_counts.tolist(), strict=True))


def letters(rows: list[str]) -> tuple[list[list[bool]], list[list[bool]]]:
    """(real, answer) of rows of letters: `u` prompt, `a` answer, `p` padding."""
    return [[token != "p" for token in row] for row in rows], [[token == "a" for token in row] for row in rows]


def turns(rows: list[str]) -> list[list[bool]]:
    """Which turns of each row there are: a turn opens where a `u` follows an `a`, or is the first."""
    numbers = []
    for row in rows:
        text = row.replace("p", "")
        numbers.append(sum(1 for i, token in enumerate(text) if token == "u" and (i == 0 or text[i - 1] == "a")))
    return [[turn < number for turn in range(max(numbers))] for number in numbers]


def without_padding(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch one by one, cut to their real tokens."""
    rows = []
    for index, mask in enumerate(batch["attention_mask"].bool()):
        rows.append({name: value[index, mask].unsqueeze(0) for name, value in batch.items()})
    return rows
