"""The numbers on the page are those of the document: every one of them, in a real browser.

Expected texts are computed here from the document, never read from the page.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from report_browser import (
    MODULES,
    assert_quiet,
    assert_shows,
    by_module,
    cells,
    choose,
    open_numbers,
    opened,
    texts,
    written,
)
from report_documents import minimal_document


def test_the_summary_gives_the_documents_numbers(page: Any, document: dict[str, Any]) -> None:
    shown = dict(zip(texts(page, ".cards dt"), texts(page, ".cards dd"), strict=True))
    summary = document["summary"]
    assert shown["Routers"] == "12"
    assert shown["Experts"] == "60"
    assert shown["Dead experts"] == str(summary["dead_experts"])
    assert float(shown["Mean MaxVio"]) == pytest.approx(summary["mean_max_violation"], rel=5e-4)
    entropy = shown["Mean entropy, % of maximum"]
    assert float(entropy) == pytest.approx(100 * summary["mean_normalised_entropy"], abs=0.0501)
    assert shown["Task information, % of possible"] == "6.1 p = 0.001"
    assert sorted(texts(page, ".verdict .words")) == sorted(verdict["text"] for verdict in document["verdicts"])
    facts = dict(zip(texts(page, "#facts dt"), texts(page, "#facts dd"), strict=True))
    assert facts["Adapter"] == "runs/simulated"
    assert facts["Tokens"] == "150,000"


@pytest.mark.parametrize(
    ("part", "share"),
    [
        ("All tokens", lambda router: router["load"]["share"]),
        ("Prompt tokens", lambda router: router["by_part"]["prompt"]),
        ("Answer tokens", lambda router: router["by_part"]["answer"]),
        ("Prefill", lambda router: router["by_phase"]["prefill"]),
        ("Decoding", lambda router: router["by_phase"]["decode"]),
    ],
)
def test_the_load_maps_are_the_documents(page: Any, document: dict[str, Any], part: str, share: Any) -> None:
    choose(page, "part", part)
    for place, module in enumerate(MODULES):
        found = cells(page, f"load-{place}")
        routers = by_module(document, module)
        assert set(found) == {(layer, expert) for layer in range(4) for expert in range(5)}
        for (layer, expert), cell in found.items():
            assert_shows(cell, share(routers[layer])[expert])
            dead = expert in routers[layer]["measures"]["dead"]
            assert cell[0].endswith("†") is dead
            assert cell[1].endswith("dead") is dead


@pytest.mark.parametrize(
    ("title", "value", "scale", "digits"),
    [
        ("Entropy of a row, % of the maximum", lambda router: router["measures"]["normalised_entropy"], 100, 0),
        ("MaxVio: load of the busiest expert over the mean, less 1", lambda r: r["measures"]["max_violation"], 1, 2),
        ("Gini of the load", lambda router: router["measures"]["gini"], 1, 2),
        ("Effective number of experts", lambda router: router["measures"]["effective_experts"], 1, 2),
        ("Dead experts", lambda router: len(router["measures"]["dead"]), 1, 0),
        ("Information of the task on the expert, % of the possible", lambda r: r["by_task"]["information"], 100, 1),
    ],
)
def test_measures_by_layer_and_module(
    page: Any, document: dict[str, Any], title: str, value: Any, scale: float, digits: int
) -> None:
    choose(page, "measure", title)
    found = cells(page, "balance")
    assert len(found) == 12
    for (layer, module), cell in found.items():
        router = by_module(document, MODULES[module])[layer]
        assert_shows(cell, value(router), scale, digits)


def test_tasks_and_their_significance(page: Any, document: dict[str, Any]) -> None:
    choose(page, "router", f"layer 3, {MODULES[2]}")
    router = by_module(document, MODULES[2])[3]
    table = router["by_task"]
    found = cells(page, "tasks")
    assert len(found) == 15
    for (task, expert), cell in found.items():
        assert_shows(cell, table["share"][task][expert])
        above = table["difference"][task][expert] > 0
        assert cell[0].endswith(("▲", "▼")) is table["significant"][task][expert]
        if table["significant"][task][expert]:
            assert cell[0][-1] == ("▲" if above else "▼")
            assert f"significantly {'above' if above else 'below'}" in cell[1]
    distance = cells(page, "distance")
    assert len(distance) == 9
    for (a, b), cell in distance.items():
        assert_shows(cell, router["task_distance"][a][b], 1, 2)
    words = " ".join(texts(page, "#tasks p"))
    assert f"{100 * table['information']:.1f} %" in words
    assert "0.2 % (p = 0.001)" in words


def test_experts_together_and_alike(page: Any, document: dict[str, Any]) -> None:
    router = document["routers"][0]
    found = cells(page, "together")
    assert set(found) == {(i, j) for i in range(5) for j in range(5) if i != j}
    for (i, j), cell in found.items():
        assert_shows(cell, router["coactivation"][i][j])
    similar = cells(page, "similar")
    for (i, j), (text, _, carried) in similar.items():
        true = document["similarity"][router["name"]][i][j]
        if math.isnan(true):
            assert (text, carried) == ("–", None)
        else:
            assert float(text) == pytest.approx(true, abs=0.0051)
            assert carried == pytest.approx(abs(true), rel=5e-5)
    assert similar[0, 1][0] == "-0.25"


def test_pictures_have_their_numbers_in_tables(page: Any, document: dict[str, Any]) -> None:
    choose(page, "router", f"layer 1, {MODULES[0]}")
    router = by_module(document, MODULES[0])[1]

    rows = open_numbers(page, "load")
    for expert, row in enumerate(rows):
        assert row[0] == str(expert)
        for text, name in zip(row[1:], ("share", "low", "high"), strict=True):
            assert float(text) == pytest.approx(router["load"][name][expert], rel=6e-4)

    rows = open_numbers(page, "entropy", 0)
    for layer, row in enumerate(rows):
        for text, module in zip(row[1:], MODULES, strict=True):
            true = by_module(document, module)[layer]["measures"]["normalised_entropy"]
            assert float(text) == pytest.approx(true, rel=6e-4)
    counts = router["measures"]["entropy_histogram"]
    rows = open_numbers(page, "entropy", 1)
    assert [float(row[1]) for row in rows] == pytest.approx([n / sum(counts) for n in counts], rel=6e-4)
    rows = open_numbers(page, "entropy", 2)
    assert [float(row[1]) for row in rows] == [0.125, 0.5, 0.375, 0, 0, 0]

    open_numbers(page, "flow", 0)
    open_numbers(page, "flow", 1)
    for place, (start, end) in enumerate([(0, 1), (1, 2)]):
        ends = (f"layers.{start}.{MODULES[0]}", f"layers.{end}.{MODULES[0]}")
        (true,) = [item["share"] for item in document["flow"] if (item["from"], item["to"]) == ends]
        found = cells(page, f"flow-{place}")
        assert len(found) == 25
        for (i, j), cell in found.items():
            assert_shows(cell, true[i][j])
    # A ribbon for every pair of experts that something flows between, and its share in its title.
    loads = [by_module(document, MODULES[0])[layer]["load"]["share"] for layer in (0, 1)]
    assert len(texts(page, "#flow .ribbon")) == sum(5 * sum(share > 0 for share in load) for load in loads)

    rows = open_numbers(page, "training", 1)
    for row, log in zip(rows, document["training"], strict=True):
        values = [log[item["name"]]["max_violation"] for item in document["routers"]]
        own = log[router["name"]]["max_violation"]
        expected = [log["step"], own, sum(values) / 12, min(values), max(values)]
        assert [float(text) for text in row] == pytest.approx(expected, rel=6e-4)


def test_tokens_carry_their_gates(page: Any, document: dict[str, Any]) -> None:
    choose(page, "router", f"layer 2, {MODULES[1]}")
    name = by_module(document, MODULES[1])[2]["name"]
    for place, text in enumerate(document["text"]):
        found = page.execute_script(
            "return [...document.querySelectorAll(`[data-key^='text:${arguments[0]}:']`)].map((node) =>"
            "[node.textContent, node.getAttribute('aria-label'), node.className])",
            place,
        )
        assert len(found) == 40
        for at, (shown, say, style) in enumerate(found):
            pairs = sorted(text["routers"][name]["all"][at], key=lambda pair: -pair[1])
            assert f"x{pairs[0][0]}" in style.split()
            assert ("answer" if text["part"][at] else "prompt") in say
            heard = [item.split(": ") for item in say.split(": ", 1)[1].split(", ")]
            assert [expert for expert, _ in heard] == [f"expert {expert}" for expert, _ in pairs]
            assert [float(gate) for _, gate in heard] == pytest.approx([gate for _, gate in pairs], abs=1e-4)
            if text["tokens"][at].isprintable():
                assert shown == text["tokens"][at]


def test_a_document_with_nothing_optional(chromium: Any, tmp_path: Path) -> None:
    page = opened(chromium, written(minimal_document(), tmp_path))
    found = cells(page, "load-0")
    assert [found[0, expert][0] for expert in (0, 1)] == ["75.0", "25.0"]
    assert found[0, 0][1] == "no layer, expert left: 75.0 %"
    for section in ("tasks", "together", "flow", "training", "text"):
        assert len(texts(page, f"#{section} .absent")) == 1, section
    assert "12 decisions" in " ".join(texts(page, "#load p"))
    assert page.find_element("id", "shown").text == "1 of 1 routers; in detail: no layer, whole block."
    assert_quiet(page)


def test_routers_of_different_sizes(chromium: Any, document: dict[str, Any], tmp_path: Path) -> None:
    document = copy.deepcopy(document)
    router = by_module(document, MODULES[0])[2]
    router["experts"] = ["a", "b"]
    router["load"] = {"share": [0.25, 0.75], "low": [0.2, 0.7], "high": [0.3, 0.8]}
    router["measures"]["dead"] = []
    page = opened(chromium, written(document, tmp_path))
    found = cells(page, "load-0")
    assert {expert for layer, expert in found if layer == 2} == {0, 1}
    assert {expert for layer, expert in found if layer == 1} == set(range(5))
    assert found[2, 1][1] == "layer 2, expert b: 75.0 %"
    assert_quiet(page)
