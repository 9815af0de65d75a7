"""The section about another model: only where there is one, with its numbers, under the same filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_browser import MODULES, assert_quiet, by_module, cells, choose, open_numbers, opened, texts, written
from report_documents import small_document


def side(router: dict[str, Any], dead: int) -> dict[str, Any]:
    found = router["measures"]
    return {
        "max_violation": found["max_violation"],
        "normalised_entropy": found["normalised_entropy"],
        "dead": dead,
        "task_information": None,
        "p": None,
    }


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """Beside a model that lacks the last router."""
    document = small_document()
    routers = [
        {"name": router["name"], "layer": router["layer"], "module": router["module"]}
        | {"load_distance": 0.01 * place, "first": side(router, 0), "second": side(router, 3)}
        | {"saturation": 0.875, "chance_saturation": 0.25, "saturation_rows": 40}
        for place, router in enumerate(document["routers"][:-1])
    ]
    document["compare"] = {
        "other": document["model"],
        "other_title": "Routing of <i>another</i>",
        "other_summary": {**document["summary"], "dead_experts": 33},
        "routers": routers,
        "only_first": [document["routers"][-1]["name"]],
        "only_second": [],
    }
    return document


def test_nothing_is_compared_by_default(page: Any) -> None:
    assert texts(page, "#compare") == []
    assert "Compared with another model" not in texts(page, "#contents a")


def test_the_numbers_of_both(chromium: Any, compared: dict[str, Any], tmp_path: Path) -> None:
    page = opened(chromium, written(compared, tmp_path))
    assert "Compared with another model" in texts(page, "#contents a")
    assert "Routing of <i>another</i>" in page.find_element("css selector", "#compare .body > p").text
    rows = [row.text for row in page.find_elements("css selector", "#compare table.plain tbody tr")]
    assert rows[0] == f"Dead experts {compared['summary']['dead_experts']} 33"
    found = cells(page, "compared")
    assert len(found) == len(compared["compare"]["routers"])
    for column, module in enumerate(MODULES):
        for row, router in enumerate(by_module(compared, module)):
            if (row, column) in found:
                place = compared["routers"].index(router)
                assert found[row, column][2] == pytest.approx(0.01 * place)
                assert f"layer {router['layer']}" in found[row, column][1]
    choose(page, "module", MODULES[1])
    assert set(cells(page, "compared")) == {(row, 0) for row in range(4)}
    lines = [" ".join(row) for row in open_numbers(page, "compare")]
    assert len(lines) == 4
    assert all(" 0 3 " in line and line.endswith("87.5 25.0") for line in lines)
    assert_quiet(chromium)
