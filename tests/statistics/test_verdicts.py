"""Verdicts on routings whose faults are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from measure_traces import Trace, make_trace, stream

from moadapt.statistics.counts import RouterCounts
from moadapt.statistics.verdicts import Thresholds, Verdict, router_labels, task_tests, verdicts


@dataclass
class Recorded:
    routers: dict[str, RouterCounts]


def judge(*counts: RouterCounts, thresholds: Thresholds | None = None) -> list[Verdict]:
    return verdicts(Recorded({one.name: one for one in counts}), thresholds)


def texts(found: list[Verdict], router: str | None = None) -> list[str]:
    return [verdict.text for verdict in found if router is None or verdict.router == router]


def chosen_by(choose: list[list[int]], probs: list[float], tokens: int = 240) -> Trace:
    """Tokens that take turns at these selections, with the same probabilities."""
    trace = make_trace("random", num_experts=len(probs), tokens=tokens)
    return replace(trace, probs=[probs] * tokens, chosen=[choose[place % len(choose)] for place in range(tokens)])


def sharp(expert: int, experts: int = 4) -> list[float]:
    return [0.97 if e == expert else 0.03 / (experts - 1) for e in range(experts)]


def turns(trace: Trace, experts: list[int]) -> Trace:
    """Each sequence is sure of one expert, in turn."""
    own = [experts[number % len(experts)] for number in trace.sequence]
    return replace(trace, chosen=[[expert] for expert in own], probs=[sharp(expert) for expert in own])


def test_a_router_that_is_in_order_has_no_complaints() -> None:
    trace = make_trace("random", tokens=2400)
    found = judge(stream(trace, module="mlp.up_proj"))
    assert [verdict for verdict in found if verdict.level == "warning"] == []
    assert texts(found, "")[:2] == ["no dead experts, of 4 in 1 router", "no router collapsed"]
    assert texts(found, "")[2] == "routing ignores the task in the only router"
    assert len(texts(found, "router")) == 1
    assert texts(found, "router")[0].startswith("layer 0 up_proj: routing ignores the task (p = 0.")


def test_dead_experts_are_named() -> None:
    choose = [[e, f] for e in (0, 1, 2, 3, 5, 6) for f in (0, 1, 2, 3, 5, 6) if e < f]
    counts = stream(chosen_by(choose, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0]), layer=3, module="mlp.up_proj")
    found = judge(counts)
    assert "layer 3 up_proj: 2 of 8 experts dead (4, 7)" in texts(found, "router")
    assert texts(found)[0] == "2 of 8 experts dead: layer 3 up_proj"
    dead = next(verdict for verdict in found if verdict.router and verdict.measure == "dead_experts")
    assert (dead.level, dead.value) == ("warning", 2.0)


def test_a_collapsed_router() -> None:
    choose = [[3]] * 28 + [[0], [1]]
    counts = stream(chosen_by(choose, sharp(3)))
    assert "layer 0 mlp: collapsed: expert 3 takes 93 % of tokens" in texts(judge(counts))
    assert not any("unbalanced" in text or "the same choice" in text for text in texts(judge(counts)))
    prompts = replace(counts, granularity="prompt")
    assert "layer 0 mlp: collapsed: expert 3 takes 93 % of prompts" in texts(judge(prompts))
    lax = judge(counts, thresholds=Thresholds(collapsed_share=0.95))
    assert "layer 0 mlp: unbalanced: expert 3 gets 3.7 times its fair share" in texts(lax)


def test_a_router_that_collapsed_on_a_pair() -> None:
    trace = chosen_by([[2, 1]] * 19 + [[0, 3]], [0.1, 0.35, 0.45, 0.1])
    assert "layer 0 mlp: collapsed: experts 1, 2 take 95 % of all selections" in texts(judge(stream(trace)))


def test_two_of_two_experts_are_no_collapse() -> None:
    """All experts in all rows is what the router is made for; its gate weights are judged."""
    even = stream(chosen_by([[0, 1]], [0.55, 0.45]))
    assert not any("collapsed:" in text or "unbalanced" in text for text in texts(judge(even)))
    assert task_tests(Recorded({"router": even})) == {}
    uneven = stream(chosen_by([[0, 1]], [0.96, 0.04]))
    assert "layer 0 mlp: collapsed: expert 0 takes 96 % of the gate weight" in texts(judge(uneven))
    empty = stream(chosen_by([[0, 1]], [1.0, 0.0]))
    assert "layer 0 mlp: 1 of 2 experts dead (1)" in texts(judge(empty))


def test_layers_collapsed_on_different_experts_are_both_reported() -> None:
    first, second = (stream(chosen_by([[e]], sharp(e)), f"router.{e}", layer=e, module="mlp.up_proj") for e in (0, 1))
    found = judge(first, second)
    assert "2 of 2 routers collapsed: layer 0 up_proj, layer 1 up_proj" in texts(found, "")
    assert "6 of 8 experts dead: layer 0 up_proj, layer 1 up_proj" in texts(found, "")
    assert "layer 1 up_proj: collapsed: expert 1 takes 100 % of tokens" in texts(found, "router.1")


def test_uniform_and_blind_routers() -> None:
    uniform = stream(make_trace("uniform"))
    assert "layer 0 mlp: nearly uniform: entropy 100 % of the maximum" in texts(judge(uniform))
    assert "layer 0 mlp: routing ignores the task (p = 1)" in texts(judge(uniform))
    blind = stream(chosen_by([[0], [1], [2], [3]], [0.4, 0.3, 0.2, 0.1]))
    assert "layer 0 mlp: the same choice for all tokens: they explain 0 % of the maximum" in texts(judge(blind))
    almost = stream(chosen_by([[0], [1], [2], [3]], [0.26, 0.25, 0.25, 0.24]))
    assert "layer 0 mlp: nearly uniform: entropy 99.9 % of the maximum" in texts(judge(almost))


def test_rows_without_an_expert() -> None:
    found = texts(judge(stream(make_trace("threshold"))))
    none = sum(not chosen for chosen in make_trace("threshold").chosen) / 240
    assert f"layer 0 mlp: {round(100 * none)} % of tokens select no expert" in found
    nothing = stream(chosen_by([[]], [0.4, 0.3, 0.2, 0.1]))
    assert "layer 0 mlp: 100 % of tokens select no expert" in texts(judge(nothing))


def test_tasks_with_experts_of_their_own_and_without() -> None:
    trace = make_trace("random", tokens=720)
    own = stream(turns(trace, [0, 1, 2]), "own", layer=1, module="mlp.up_proj")  # as the tasks take turns
    blind = stream(turns(trace, [0, 1, 2, 3]), "blind", layer=2, module="mlp.up_proj")
    found = judge(own, blind)
    assert "layer 1 up_proj: tasks get their own experts: 100 % of the possible information (p ≤ 0.001)" in texts(
        found, "own"
    )
    assert any(text.startswith("layer 2 up_proj: routing ignores the task (p = ") for text in texts(found, "blind"))
    summary = (
        "tasks get their own experts in 1 of 2 routers, most in layer 1 up_proj, 100 % of the possible information"
    )
    assert summary in texts(found, "")
    p_value = next(verdict for verdict in found if verdict.router == "blind" and verdict.measure == "task_p_value")
    assert p_value.value > 0.05


def test_sequences_of_unknown_tasks_are_not_a_task() -> None:
    counts = stream(turns(make_trace("random"), [0, 1, 2]))
    counts.tasks[1:] = ["unknown", "t2"]
    test = task_tests(Recorded({"router": counts}))["router"]
    assert test.information == pytest.approx(math.log(2))
    assert test.p_LN.isnan().all(-1).tolist() == [False, True, False]
    counts.sequence_tasks[:] = counts.sequence_tasks.clamp(max=1)
    assert task_tests(Recorded({"router": counts})) == {}


def test_a_significant_difference_can_be_small() -> None:
    trace = make_trace("random", tokens=2400)
    # Each expert gets 3 of 12 tokens of a sequence, but one token of task 0 moves from expert 1 to expert 0.
    chosen = [[0 if place % 12 == 1 and task == 0 else place % 4] for place, task in enumerate(trace.task)]
    found = judge(stream(replace(trace, chosen=chosen)))
    assert any(text.startswith("layer 0 mlp: tasks differ little: ") for text in texts(found))
    assert any(text.startswith("tasks differ little: in 1 of 1 router, most in layer 0 mlp") for text in texts(found))


def test_many_routers_are_not_found_by_chance() -> None:
    """Of twenty unrelated routers one has p <= 0.05 by chance; the false discovery rate of that one is high."""
    routers = [
        stream(turns(make_trace("random"), [seed % 4, 0, 1, 2, 3]), f"r{seed}", layer=seed) for seed in range(20)
    ]
    tests = task_tests(Recorded({one.name: one for one in routers}))
    chance = {name: replace(test, p_value=0.04 if name == "r7" else 0.5) for name, test in tests.items()}
    recorded = Recorded({one.name: one for one in routers})
    assert "routing ignores the task in all 20 routers" in texts(verdicts(recorded, tests=chance))
    only = Recorded({"r7": routers[7]})
    assert any("tasks" in text for text in texts(verdicts(only, tests={"r7": chance["r7"]}), "r7"))


def test_too_little_is_not_judged() -> None:
    few = stream(make_trace("random", tokens=60))
    assert texts(judge(few)) == [
        "no router was judged: there are too few rows, or single experts only",
        "layer 0 mlp: not judged, 60 tokens are too few for 4 experts",
    ]
    short = stream(make_trace("random", tokens=96))
    assert any(text.startswith("only 8 sequences were recorded") for text in texts(judge(short), ""))
    assert texts(judge(RouterCounts.zeros("router", ["0"]))) == texts(judge(few), "")


def test_the_worst_comes_first_after_the_summary() -> None:
    traces = [make_trace("uniform"), chosen_by([[1]], sharp(1)), make_trace("random", tokens=960)]
    found = judge(*(stream(trace, f"r{layer}", layer=layer) for layer, trace in enumerate(traces)))
    places = [verdict.router == "" for verdict in found]
    assert places == sorted(places, reverse=True)
    order = {"warning": 0, "note": 1, "ok": 2}
    single = [order[verdict.level] for verdict in found if verdict.router]
    assert all(a <= b for a, b in pairwise(single))
    assert {0, 1} <= set(single)


def test_labels_tell_routers_apart() -> None:
    names = [
        ("a", 0, "mlp.up_proj"), ("b", 1, "mlp.up_proj"), ("c", 1, ""), ("d", None, "head"),
        ("e", 2, "self_attn.q_proj"), ("f", 2, "cross_attn.q_proj"), ("encoder.g", 3, "mlp"), ("decoder.g", 3, "mlp"),
    ]  # fmt: skip
    routers = {name: RouterCounts.zeros(name, ["0", "1"], layer=layer, module=module) for name, layer, module in names}
    assert list(router_labels(routers).values()) == [
        "layer 0 up_proj", "layer 1 up_proj", "layer 1", "d",
        "layer 2 self_attn.q_proj", "layer 2 cross_attn.q_proj", "encoder.g", "decoder.g",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "uniform", "collapsed", "ties", "threshold", "one_token_task"])
def test_values_are_finite_and_texts_have_no_line_breaks(kind: str) -> None:
    found = judge(stream(make_trace(kind)))
    assert all(torch.isfinite(torch.tensor(verdict.value)) for verdict in found)
    assert all(verdict.text and "\n" not in verdict.text and "nan" not in verdict.text for verdict in found)
