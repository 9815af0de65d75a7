"""Routing documents for the tests of the report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"


def simulate(**sizes: int) -> dict[str, Any]:
    """The simulated document of benchmarks/report_size.py."""
    spec = importlib.util.spec_from_file_location("report_size", ROOT / "benchmarks/report_size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document: dict[str, Any] = module.simulate(**sizes)
    return document


def small_document() -> dict[str, Any]:
    """Four layers of three modules, with every part, hostile names and tokens, and rows of several experts."""
    document = simulate(layers=4, modules=3, experts=5, tasks=3, tokens=40, steps=6)
    document["title"] = f"Routing {HOSTILE} {{{{data}}}}"
    document["text"][0]["tokens"][2] = HOSTILE
    document["text"][0]["tokens"][5] = "\n\n"
    document["text"][0]["tokens"][6] = "\u2028\ud800 é "  # a line separator and a lone surrogate
    for router in document["routers"]:
        router["measures"]["active_histogram"] = [1, 4, 3, 0, 0, 0]
        significant = router["by_task"]["significant"]
        significant[0][0], significant[1][1] = True, False
        # Of single sequences and of the other tasks, so its sign need not be that of share minus load.
        router["by_task"]["difference"] = [
            [0.1 * (-1) ** (task + e) for e in range(len(row))] for task, row in enumerate(significant)
        ]
    matrix = document["similarity"][document["routers"][0]["name"]]
    matrix[0][1], matrix[1][2] = -0.25, float("nan")
    return document


def minimal_document() -> dict[str, Any]:
    """A prompt-routed block without a layer, and nothing that may be missing."""
    router = {
        "name": "block",
        "layer": None,
        "module": "",
        "experts": ["left", "right"],
        "granularity": "prompt",
        "rows": 12,
        "load": {"share": [0.75, 0.25], "low": [None, None], "high": [None, None]},
        "measures": {"max_violation": 0.5, "dead": []},
    }
    return {
        "schema_version": 1,
        "title": "Smallest",
        "created_by": "moadapt",
        "model": {"router": "linear"},
        "data": {"tasks": [], "tokens": 100, "sequences": 12},
        "summary": {"num_routers": 1, "num_experts": 2, "dead_experts": 0},
        "verdicts": [],
        "routers": [router],
    }


def embedded(page: str) -> dict[str, Any]:
    """The data block of a page."""
    found: dict[str, Any] = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])
    return found
