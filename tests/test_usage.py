"""Expert usage against a naive count over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from moadapt.routing import Routing, RoutingRecord
from moadapt.usage import ExpertUsage

TASKS = ["a", "b", "c"]


def _record(
    name: str, rows: int, experts: int, k: int, batch: int, mask: torch.Tensor | None, seed: int
) -> RoutingRecord:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(rows, experts, generator=generator).softmax(-1)
    selected = torch.zeros(rows, experts, dtype=torch.bool).scatter_(-1, probs.topk(k).indices, True)
    routing = Routing(probs * selected, selected, probs.log(), probs)
    return RoutingRecord(name, routing, mask, batch)


def _naive(records: list[tuple[RoutingRecord, list[int]]], experts: int) -> list[list[int]]:
    counts = [[0] * experts for _ in TASKS]
    for record, tasks in records:
        rows = record.routing.selected_TN.shape[0]
        length = rows // record.batch_size
        for t in range(rows):
            if record.mask_T is not None and not bool(record.mask_T[t]):
                continue
            for e in range(experts):
                counts[tasks[t // length]][e] += int(record.routing.selected_TN[t, e])
    return counts


def test_counts_are_those_of_a_loop_over_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool).reshape(-1)
    batches = [(_record("r", 15, 4, 2, 3, mask, 0), [0, 2, 0]), (_record("r", 8, 4, 2, 2, None, 1), [2, 2])]
    usage = ExpertUsage(TASKS)
    for record, tasks in batches:
        usage.add([record], torch.tensor(tasks))
    assert usage.counts["r"].tolist() == _naive(batches, 4)
    assert usage.counts["r"].dtype == torch.int64
    assert usage.tokens["r"].tolist() == [6, 0, 9]  # 3 + 3 real tokens of a; 1 + 2 * 4 of c
    assert list(usage.shares("r")) == ["a", "c"]


def test_shares_of_a_router_add_up_to_one() -> None:
    record = _record("r", 6, 4, 1, 2, None, 2)
    usage = ExpertUsage(TASKS)
    usage.add([record], torch.tensor([0, 1]))
    counts = _naive([(record, [0, 1])], 4)
    for index, task in enumerate(("a", "b")):
        assert usage.shares("r")[task] == pytest.approx([count / 3 for count in counts[index]], abs=1e-12)
        assert sum(usage.shares("r")[task]) == pytest.approx(1.0)
    assert usage.to_dict()["share_of"] == "selections"


def _chosen(name: str, experts: list[int], num_experts: int = 4) -> RoutingRecord:
    """One sequence per task, one expert per token."""
    selected = torch.nn.functional.one_hot(torch.tensor(experts), num_experts).bool()
    probs = selected.double()
    return RoutingRecord(name, Routing(probs, selected, probs, probs), None, 2)


def test_task_information_is_zero_for_equal_tasks_and_one_for_separate_ones() -> None:
    usage = ExpertUsage(TASKS[:2])
    records = [_chosen("same", [0, 1, 0, 1]), _chosen("apart", [0, 1, 2, 3]), _chosen("dead", [3, 3, 3, 3])]
    usage.add(records, torch.tensor([0, 1]))
    assert usage.task_information("same") == pytest.approx(0.0, abs=1e-12)
    assert usage.task_information("apart") == pytest.approx(1.0)
    assert usage.task_information("dead") == 0.0
    assert usage.to_dict()["router"] == "apart"
    assert usage.to_dict()["shares"] == {"a": [0.5, 0.5, 0, 0], "b": [0, 0, 0.5, 0.5]}


def test_task_information_is_the_definition_summed_by_hand() -> None:
    record = _record("r", 40, 5, 2, 2, None, 9)
    usage = ExpertUsage(TASKS)
    usage.add([record], torch.tensor([0, 2]))
    shares = list(usage.shares("r").values())
    joint = [[value / 2 for value in row] for row in shares]
    expert = [sum(column) for column in zip(*joint, strict=True)]
    information = sum(p * math.log(p / (0.5 * expert[e])) for row in joint for e, p in enumerate(row) if p > 0)
    smaller = min(math.log(2), -sum(p * math.log(p) for p in expert if p > 0))
    assert usage.task_information("r") == pytest.approx(information / smaller, abs=1e-12)


def test_dense_routers_are_told_apart_by_gate_weight() -> None:
    record = _record("r", 6, 3, 3, 2, None, 4)
    usage = ExpertUsage(TASKS)
    usage.add([record], torch.tensor([1, 1]))
    assert usage.selects_all
    assert usage.shares("r")["b"] == pytest.approx(record.routing.weights_TN.double().mean(0).tolist(), abs=1e-6)
    assert usage.to_dict()["share_of"] == "gate weight"


def test_prompt_granularity_counts_rows() -> None:
    record = _record("r", 3, 4, 1, 3, None, 5)
    usage = ExpertUsage(TASKS)
    usage.add([record], torch.tensor([0, 1, 1]))
    assert usage.tokens["r"].tolist() == [1, 2, 0]
    assert usage.counts["r"].tolist() == _naive([(record, [0, 1, 1])], 4)


def test_processes_add_up_and_surplus_passes_do_not_count() -> None:
    first, second = _record("r", 6, 4, 2, 2, None, 6), _record("r", 6, 4, 2, 2, None, 7)
    whole, here, there = ExpertUsage(TASKS), ExpertUsage(TASKS), ExpertUsage(TASKS)
    whole.add([first], torch.tensor([0, 1]))
    whole.add([second], torch.tensor([1, 2]))
    here.add([first], torch.tensor([0, 1]))
    there.add([first], torch.tensor([0, 1]), counts=False)
    there.add([second], torch.tensor([1, 2]))
    other = {id(here.counts["r"]): there.counts["r"], id(here.weights["r"]): there.weights["r"]}
    other[id(here.tokens["r"])] = there.tokens["r"]
    here.reduce(lambda value: value + other[id(value)])
    assert here.to_dict() == whole.to_dict()
