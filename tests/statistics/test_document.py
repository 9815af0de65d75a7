"""Routing documents, their comparison, texts and figures, from counts that were made by hand."""

from __future__ import annotations

import builtins
import json
import math
from typing import Any

import pytest
import torch
from schema_check import mistakes

from moadapt.errors import ConfigError
from moadapt.report import render_report
from moadapt.statistics import RouterCounts, RoutingStatistics
from moadapt.statistics.compare import Selections, SharedSelections, compare_documents, load_distance
from moadapt.statistics.document import build_document, for_report, routing_schema
from moadapt.statistics.texts import pieces, text_budget
from moadapt.statistics.verdicts import verdicts

A, B = "model.layers.0.mlp", "model.layers.1.mlp"


def router(
    name: str, layer: int, counts_TN: list[list[int]], sequences: list[tuple[int, list[int]]] = ()
) -> RouterCounts:
    """Each row selects one expert, with the weight 0.5: counts by task, all of prompts."""
    found = RouterCounts.zeros(name, ["x", "y", "z"], ["odd", "even", "unseen"], layer=layer, module="mlp")
    counts = torch.tensor(counts_TN)
    found.selections[:2, 0, 0] = counts
    found.weights[:2, 0, 0] = 0.5 * counts
    found.rows[:2, 0, 0] = counts.sum(-1)
    found.top[:2] = counts
    found.pairs.copy_(counts.sum(0).diag())
    found.active[1] = counts.sum()
    found.probs[:2] = counts.double()
    found.entropy[:2, 0] = 0.25 * counts.sum(-1)
    found.entropy[:2, 1] = 0.125 * counts.sum(-1)
    found.entropy_histogram[7] = counts.sum()
    found.violation.copy_(torch.tensor([1.5, 2.0]))
    if sequences:
        found.sequence_tasks = torch.tensor([task for task, _ in sequences])
        found.sequence_counts = torch.tensor([row for _, row in sequences], dtype=torch.int32)
        found.sequence_keys = torch.arange(len(sequences)).double()
    return found


@pytest.fixture
def statistics() -> RoutingStatistics:
    apart = [(0, [4, 0, 0])] * 5 + [(1, [0, 4, 0])] * 5
    first, second = router(A, 0, [[20, 0, 0], [0, 20, 0]], apart), router(B, 1, [[6, 8, 6], [6, 8, 6]])
    return RoutingStatistics({A: first, B: second}, {(A, B): torch.tensor([[20, 0, 0], [5, 5, 10], [0, 0, 0]])})


def test_the_numbers_of_a_document(statistics: RoutingStatistics) -> None:
    document = build_document(statistics, title="by hand", model={"adapter": "runs/x"})
    assert mistakes(document, routing_schema()) == []
    json.dumps(document, allow_nan=False)
    first, second = document["routers"]
    assert first["load"]["share"] == [0.5, 0.5, 0.0]
    assert first["load"]["of"] == "selections"
    assert (first["load"]["low"][2], second["load"]["low"]) == (0.0, [0.0] * 3)  # without sequences: nothing is known
    assert first["measures"]["max_violation"] == pytest.approx(0.5)
    assert first["measures"]["mean_violation"] == 0.75
    assert first["measures"]["dead"] == [2]
    assert first["measures"]["effective_experts"] == pytest.approx(2.0)
    assert first["measures"]["entropy"] == 0.25
    assert first["measures"]["entropy_deviation"] == pytest.approx(0.25)
    assert first["measures"]["normalised_entropy"] == pytest.approx(0.25 / math.log(3))
    assert first["measures"]["mi_token_expert"] == pytest.approx(math.log(2) - 0.25)
    assert first["measures"]["active_histogram"] == [0, 40, 0, 0]
    assert first["by_task"]["tasks"] == ["odd", "even"]  # not the task without rows
    assert first["by_task"]["share"] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert first["by_task"]["information"] == pytest.approx(1.0)
    assert first["by_task"]["p"] < 0.05
    assert first["by_task"]["significant"] == [[True, True, False], [True, True, False]]
    assert first["by_task"]["difference"] == [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]
    assert first["task_distance"] == [[0.0, pytest.approx(1.0)], [pytest.approx(1.0), 0.0]]
    assert second["by_task"]["information"] == pytest.approx(0.0)
    assert second["by_task"]["p"] is None
    assert first["by_part"] == {"prompt": [0.5, 0.5, 0.0], "answer": None}
    assert first["coactivation"] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [None] * 3]
    assert first["counts"]["tasks"] == ["odd", "even", "unseen"]
    assert first["counts"]["selections"][1][0] == [[0, 20, 0], [0, 0, 0]]
    assert document["flow"][0]["share"] == [[1.0, 0.0, 0.0], [0.25, 0.25, 0.5], [None] * 3]
    assert document["flow"][0]["rows"] == [[20, 0, 0], [5, 5, 10], [0, 0, 0]]
    assert document["model"] == {"adapter": "runs/x"} | dict.fromkeys(
        ("base", "preset", "expert", "router", "granularity", "scope", "expert_unit")
    )
    assert document["data"] == {"tasks": [], "tokens": 40, "sequences": None, "generated_tokens": None}
    expected = [{**vars(verdict), "router": verdict.router or None} for verdict in verdicts(statistics)]
    assert document["verdicts"] == expected
    assert {A, None} <= {verdict["router"] for verdict in expected}


def test_the_summary_is_of_all_routers(statistics: RoutingStatistics) -> None:
    alone = RouterCounts.zeros("model.layers.2.mlp", ["only"], ["odd", "even", "unseen"], layer=2, module="mlp")
    statistics.routers[alone.name] = alone
    document = build_document(statistics)
    summary, (first, second, last) = document["summary"], document["routers"]
    assert (summary["num_routers"], summary["num_experts"], summary["dead_experts"]) == (3, 7, 1)
    violations = [first["measures"]["max_violation"], second["measures"]["max_violation"]]
    assert summary["mean_max_violation"] == pytest.approx(sum(violations) / 2)
    assert summary["task_information"] == pytest.approx(0.5)
    assert summary["task_information_p"] == first["by_task"]["p"]  # the only router that was tested
    assert last["load"]["share"] == [None]
    assert last["by_task"] is None
    assert mistakes(document, routing_schema()) == []
    render_report(for_report(document))


def test_where_every_row_selects_every_expert_weights_count(statistics: RoutingStatistics) -> None:
    counts = statistics.routers[A]
    counts.selections[:2, 0, 0] = 20
    counts.weights[0, 0, 0] = torch.tensor([10.0, 5.0, 5.0])
    counts.weights[1, 0, 0] = torch.tensor([12.0, 0.0, 8.0])
    counts.sequence_counts[:] = 4
    found = build_document(statistics)["routers"][0]
    assert found["load"]["of"] == "weights"
    assert found["load"]["share"] == pytest.approx([22 / 40, 5 / 40, 13 / 40])
    assert found["load"]["low"] == [None] * 3
    assert found["by_task"]["share"][1] == pytest.approx([0.6, 0.0, 0.4])
    assert found["by_task"]["information"] > 0
    assert (found["by_task"]["baseline"], found["by_task"]["p"]) == (None, None)


def test_of_a_generation_only_what_was_decoded(statistics: RoutingStatistics) -> None:
    decoded = RoutingStatistics({name: counts.copy() for name, counts in statistics.routers.items()})
    for counts in decoded.routers.values():
        counts.selections[0, 1, 1] = torch.tensor([1, 0, 3])
        counts.rows[0, 1, 1] = 4
    alone, both = build_document(statistics), build_document(statistics, generated=decoded)
    for before, after in zip(alone["routers"], both["routers"], strict=True):
        assert before["by_phase"]["decode"] is None
        assert after["by_phase"].pop("decode") == [0.25, 0.0, 0.75]
        assert before["by_phase"].pop("decode") is None
        assert before == after


def test_what_the_report_has_no_place_for(statistics: RoutingStatistics) -> None:
    document = build_document(statistics)
    short = for_report(document)
    assert "counts" in document["routers"][0]
    assert not {"counts", "vocabulary"} & set(short["routers"][0])
    assert "rows" not in short["flow"][0]
    assert "Load of the experts" in render_report(short)


# -- comparing -----------------------------------------------------------------------------------------------------


def test_load_distance() -> None:
    assert load_distance([1.0, 0.0], [0.0, 1.0]) == pytest.approx(1.0)
    assert load_distance([0.5, 0.5], [0.5, 0.5]) == 0.0
    p, q = (0.75, 0.25), (0.25, 0.75)
    divergence = sum(a * math.log2(2 * a / (a + b)) for a, b in zip(p, q, strict=True))
    assert load_distance(list(p), list(q)) == pytest.approx(math.sqrt(divergence))
    assert load_distance([0.5, 0.5], [1.0]) is None
    assert load_distance([None, None], [0.5, 0.5]) is None


def test_a_process_that_compared_nothing_takes_part_in_the_sum() -> None:
    """As with fewer batches than processes: every process must ask for as many sums as the others."""
    first_TN = torch.tensor([[True, False], [True, False]])
    busy, idle = Selections(), Selections()
    busy.shared["b"] = SharedSelections.zeros(2)
    busy.shared["b"].add(first_TN, first_TN, torch.tensor([True, True]))
    asked: list[list[list[int]]] = []
    for selections in (busy, idle):
        asked.append([])

        def all_sum(value: torch.Tensor, mine: list[list[int]] = asked[-1]) -> torch.Tensor:
            mine.append(list(value.shape))
            return value * 2

        selections.reduce(all_sum, {"a": 3, "b": 2})
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2 * 4
    assert (busy.shared["b"].shared.tolist(), busy.shared["b"].rows) == ([4, 4], 4)
    assert (idle.shared["b"].shared.tolist(), idle.shared["b"].rows) == ([0, 0], 0)


def test_two_documents(statistics: RoutingStatistics) -> None:
    first = build_document(statistics, title="first")
    other = RoutingStatistics({A: router(A, 0, [[0, 0, 20], [0, 20, 0]]), "new": router("new", 0, [[1, 1, 1]] * 2)})
    second = build_document(other, title="second")
    shared = SharedSelections.zeros(3)
    select = torch.eye(3, dtype=torch.bool)
    shared.add(select[[0, 0, 1, 2]], select[[0, 1, 1, 2]], torch.tensor([True, True, True, False]))
    compare = compare_documents(first, second, {A: shared})
    assert mistakes({**first, "compare": compare}, routing_schema()) == []
    assert (compare["only_first"], compare["only_second"]) == ([B], ["new"])
    (found,) = compare["routers"]
    assert found["saturation"] == pytest.approx(2 / 3)
    assert found["chance_saturation"] == pytest.approx((2 * 1 + 1 * 2) / 3 / 3)
    assert found["saturation_rows"] == 3
    assert found["load_distance"] == pytest.approx(math.sqrt(0.5))
    assert (found["first"]["dead"], found["second"]["dead"]) == (1, 1)
    assert found["first"]["task_information"] == pytest.approx(1.0)


# -- texts and figures ---------------------------------------------------------------------------------------------


def test_pieces_are_what_a_token_adds() -> None:
    words = {1: "The", 2: "end", 3: "é"}

    def decode(tokens: Any) -> str:
        """Joined by spaces; the token 4 is half of an é, and 5 its other half."""
        text = " ".join(words.get(token, "�") for token in tokens)
        return text.replace("� �", "é")

    assert pieces([1, 2, 1], decode) == ["The", " end", " The"]
    assert pieces([1, 4, 5, 2], decode) == ["The", " �", "é", " end"]


def test_the_budget_of_texts_bounds_a_document() -> None:
    assert text_budget(1, 1) == 256
    assert text_budget(224, 40) * 224 * 40 <= 400_000
    assert text_budget(10**6, 100) == 16


def test_figures(statistics: RoutingStatistics) -> None:
    pytest.importorskip("plotly")
    load = statistics.plot_load().data[0]
    assert list(load.y) == [A, B]
    assert list(load.x) == ["x", "y", "z"]
    assert [list(row) for row in load.z] == [[50.0, 50.0, 0.0], pytest.approx([30.0, 40.0, 30.0])]
    tasks = statistics.plot_tasks(A).data[0]
    assert (list(tasks.y), list(tasks.z[1])) == (["odd", "even"], [0.0, 100.0, 0.0])
    (line,) = statistics.plot_entropy().data
    assert (line.name, list(line.x)) == ("mlp", [0, 1])
    assert list(line.y) == pytest.approx([0.25 / math.log(3)] * 2)
    together = statistics.plot_coactivation(B).data[0]
    assert together.z[0][1] == 0.0
    assert math.isnan(together.z[1][1])
    link = statistics.plot_flow(A, B).data[0].link
    assert list(zip(link.source, link.target, link.value, strict=True)) == [
        (0, 3, 20),
        (1, 3, 5),
        (1, 4, 5),
        (1, 5, 10),
    ]
    with pytest.raises(ConfigError, match=r"no router 'model\.layers\.1\.ml'; did you mean 'model\.layers\.1\.mlp'"):
        statistics.plot_tasks("model.layers.1.ml")
    with pytest.raises(ConfigError, match="no flow from"):
        statistics.plot_flow(B, A)


@pytest.mark.parametrize("name", ["plot_load", "plot_tasks", "plot_entropy", "plot_coactivation", "plot_flow"])
def test_figures_need_plotly(name: str, statistics: RoutingStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_plotly(module: str, *rest: Any) -> Any:
        if module.split(".")[0] == "plotly":
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    arguments = {"plot_tasks": [A], "plot_coactivation": [A], "plot_flow": [A, B]}.get(name, [])
    with pytest.raises(ConfigError, match=rf"statistics\.{name}: needs plotly; pip install 'moadapt\[report\]'"):
        getattr(statistics, name)(*arguments)
