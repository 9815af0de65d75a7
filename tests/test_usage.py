"""Expert usage against a naive count over tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import base_model

from moadapt import get_mixture_model
from moadapt.cli.report import RunReport, markdown, print_reports, short_names, usage_rows
from moadapt.passes import PassRequest, requesting
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


def _prompt_record(name: str, batch: int, turns: int, experts: int, k: int, seed: int) -> RoutingRecord:
    """What a router of prompts records: `turns` rows for each sequence, some of which have fewer."""
    record = _record(name, batch * turns, experts, k, batch, None, seed)
    exists = torch.arange(turns) < torch.tensor([[1 + index % turns] for index in range(batch)])
    return replace(record, routing=replace(record.routing, granularity="prompt"), mask_T=exists.reshape(-1))


def test_turns_that_a_sequence_does_not_have_are_not_counted() -> None:
    record = _prompt_record("r", 5, 3, 4, 2, 8)
    tasks = [0, 1, 1, 2, 1]
    usage = ExpertUsage(TASKS)
    usage.add([record], torch.tensor(tasks))
    assert usage.counts["r"].tolist() == _naive([(record, tasks)], 4)
    assert usage.tokens["r"].tolist() == [1, 2 + 3 + 2, 1]  # sequences of 1, 2, 3, 1 and 2 turns
    entry = usage.to_dict()
    assert entry["counted"] == "prompts"
    assert entry["routers"]["r"]["prompts"] == {"a": 1, "b": 7, "c": 1}
    assert "tokens" not in entry["routers"]["r"]


def test_experts_have_their_names() -> None:
    usage = ExpertUsage(TASKS, lambda router: [f"{router}.{letter}" for letter in "qkv"])
    usage.add([_record("r", 3, 3, 1, 3, None, 5)], torch.tensor([0, 1, 1]))
    assert usage.to_dict()["routers"]["r"]["experts"] == ["r.q", "r.k", "r.v"]
    assert usage.to_dict()["counted"] == "tokens"
    numbered = ExpertUsage(TASKS)
    numbered.add([_record("r", 3, 3, 1, 3, None, 5)], torch.tensor([0, 1, 1]))
    assert numbered.expert_names("r") == ["0", "1", "2"]


def test_modules_that_prompts_choose_in_a_conversation() -> None:
    """One sequence has two turns, the other one: each turn is counted once, under the names of the modules."""
    mixture = {"preset": "milora", "expert": {"r": 2}, "router": {"num_experts_per_tok": 3}}
    model = get_mixture_model(base_model("llama"), mixture).eval()
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad(), requesting(PassRequest(prompt, record=True)) as request:
        model.base_model(input_ids=ids)
    assert request.context is not None
    usage = ExpertUsage(TASKS, model.expert_names)
    usage.add(request.context.records, torch.tensor([0, 2]))
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    names = [f"{block}.{linear}" for block, linears in parts.items() for linear in linears]
    assert len(usage.counts) == 2
    for router, counts in usage.counts.items():
        assert usage.tokens[router].tolist() == [2, 0, 1]
        assert counts.sum(-1).tolist() == [3 * 2, 0, 3]
        assert usage.expert_names(router) == names
        # The second sequence alone, and the first one's first turn alone, choose what they choose here.
        for row, cut, task in ((1, 9, 2), (0, 5, 0)):
            with torch.no_grad(), requesting(PassRequest(prompt[row : row + 1, :cut], record=True)) as alone:
                model.base_model(input_ids=ids[row : row + 1, :cut])
            assert alone.context is not None
            record = next(each for each in alone.context.records if each.name == router)
            chosen = record.routing.selected_TN[0].long()
            assert bool((counts[task] >= chosen).all())
            assert counts[task].tolist() == chosen.tolist() or task == 0


def _report(usage: dict[str, Any]) -> RunReport:
    return RunReport("milora", "out", 1, None, 10, None, None, None, {}, usage)


def test_tables_name_modules_and_say_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    usage = ExpertUsage(TASKS[:2], lambda router: ["self_attn.q_proj", "mlp.up_proj"])
    record = _chosen("model.layers.0", [0, 1], 2)
    usage.add([replace(record, routing=replace(record.routing, granularity="prompt"))], torch.tensor([0, 1]))
    report = _report(usage.to_dict())
    assert usage_rows(usage.to_dict()) == (["task", "q_proj", "up_proj"], [["a", "100", "0"], ["b", "0", "100"]])
    assert "Where each task's prompts went" in markdown([report], report)
    print_reports([report])
    assert "where each task's prompts went" in capsys.readouterr().out


def test_names_that_would_be_alike_stay_whole() -> None:
    names = ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"]
    assert short_names(names) == names
    assert short_names(["self_attn.q_proj", "mlp.up_proj"]) == ["q_proj", "up_proj"]


def test_many_modules_are_listed_by_name() -> None:
    names = [f"block.linear_{number}" for number in range(12)]
    usage = ExpertUsage(TASKS[:2], lambda router: names)
    usage.add([_chosen("r", [3, 11], 12)], torch.tensor([0, 1]))
    _, rows = usage_rows(usage.to_dict())
    assert [row[0] for row in rows] == ["a", "b"]
    assert rows[0][1].startswith("linear_3: 100  ")
    assert rows[1][1].startswith("linear_11: 100  ")
