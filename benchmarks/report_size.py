"""Size of routing.html and the time to write it, for a large mixture with simulated counts.

    python benchmarks/report_size.py --output routing.html

By default 32 layers x 7 modules x 8 experts x 20 tasks, with every table that a report can hold, 100 logged steps of
training, and one text of 400 tokens per task with the two gates of every token in each of the 224 routers: more text
than the page may hold, so that it is cut. With --browser the page is also opened in a headless Chromium and its time to
the first full drawing, and after a change of a filter, is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moadapt.report import render_report

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WORDS = [
    "The",
    "question",
    "asks",
    "for",
    "the",
    "capital",
    "of",
    "a",
    "country",
    ";",
    "answer",
    "in",
    "one",
    "word",
    ".",
]


def gini(load_N: Tensor) -> float:
    ordered_N = load_N.sort().values
    places_N = torch.arange(1, len(load_N) + 1, dtype=load_N.dtype)
    return float(((2 * places_N - len(load_N) - 1) * ordered_N).sum() / (len(load_N) * ordered_N.sum()))


def simulated_router(layer: int, module: str, experts: int, tasks: list[str], draw: torch.Generator) -> dict[str, Any]:
    """One router whose tasks share a common load, pulled apart more in later layers."""
    common_N = torch.randn(experts, generator=draw, dtype=torch.float64) * 0.5
    own_LN = torch.randn(len(tasks), experts, generator=draw, dtype=torch.float64) * 0.06 * (layer % 32)
    share_LN = torch.softmax(common_N + own_LN, -1)
    dead = [experts - 1] if torch.rand((), generator=draw) < 0.1 else []
    share_LN[:, dead] = 0.0
    share_LN /= share_LN.sum(-1, keepdim=True)
    load_N = share_LN.mean(0)
    mixed_LLN = (share_LN[:, None] + share_LN[None]) / 2
    entropy = lambda p: -(torch.xlogy(p, p)).sum(-1)  # noqa: E731
    divergence_LL = entropy(mixed_LLN) - (entropy(share_LN)[:, None] + entropy(share_LN)[None]) / 2
    distance_LL = (divergence_LL / torch.log(torch.tensor(2.0, dtype=torch.float64))).clamp(0, 1).sqrt()
    together_NN = torch.rand(experts, experts, generator=draw, dtype=torch.float64) / 3
    together_NN.fill_diagonal_(1.0)
    width_N = 1.96 * (load_N * (1 - load_N) / 2000).sqrt()
    certainty = float(torch.rand((), generator=draw)) * 0.5 + 0.3
    return {
        "name": f"layers.{layer}.{module}",
        "layer": layer,
        "module": module,
        "experts": [str(expert) for expert in range(experts)],
        "granularity": "token",
        "rows": 1_000_000 + layer,
        "load": {
            "share": load_N.tolist(),
            "low": (load_N - width_N).clamp(min=0).tolist(),
            "high": (load_N + width_N).tolist(),
        },
        "measures": {
            "max_violation": float(load_N.max() * experts - 1),
            "cv": float(load_N.std(correction=0) * experts),
            "gini": gini(load_N),
            "effective_experts": float(entropy(load_N).exp()),
            "dead": dead,
            "entropy": certainty * float(torch.log(torch.tensor(float(experts)))),
            "normalised_entropy": certainty,
            "mi_token_expert": float(torch.rand((), generator=draw)),
            "experts_per_row": 2.0,
            "active_histogram": [0, 0, 1_000_000 + layer] + [0] * (experts - 2),
            "entropy_histogram": torch.randint(0, 60_000, (32,), generator=draw).tolist(),
        },
        "by_task": {
            "tasks": tasks,
            "share": share_LN.tolist(),
            "significant": ((share_LN - load_N).abs() > 0.04).tolist(),
            "information": float(entropy(load_N) - entropy(share_LN).mean()) / 2.0794,
            "baseline": 0.0021,
            "p": 0.000999 if layer % 32 > 2 else 0.41,
        },
        "task_distance": distance_LL.tolist(),
        "coactivation": together_NN.tolist(),
        "by_part": {"prompt": load_N.tolist(), "answer": share_LN[0].tolist()},
        "by_phase": {"prefill": load_N.tolist(), "decode": share_LN[-1].tolist()},
    }


def simulated_text(task: str, routers: list[dict[str, Any]], tokens: int, draw: torch.Generator) -> dict[str, Any]:
    """One text; every token has two gates in every router."""
    gates = {}
    for router in routers:
        experts = len(router["experts"])
        order_TN = torch.rand(tokens, experts, generator=draw).argsort(-1)
        weight_T = (torch.rand(tokens, generator=draw, dtype=torch.float64) / 2 + 0.5).tolist()
        pairs = [
            [(a, w), (b, 1 - w)] for (a, b), w in zip(order_TN[:, : min(2, experts)].tolist(), weight_T, strict=True)
        ]
        gates[router["name"]] = {
            "expert": [found[0][0] for found in pairs],
            "weight": [found[0][1] for found in pairs],
            "all": pairs,
        }
    words = [f"{'' if at == 0 else ' '}{WORDS[at % len(WORDS)]}" for at in range(tokens)]
    return {
        "task": task,
        "tokens": words,
        "part": [int(at >= tokens * 3 // 4) for at in range(tokens)],
        "routers": gates,
    }


def simulate(
    layers: int = 32, modules: int = 7, experts: int = 8, tasks: int = 20, tokens: int = 400, steps: int = 100
) -> dict[str, Any]:
    """A whole routing document (routing.json, schema version 1), the same on every call."""
    draw = torch.Generator().manual_seed(0)
    names = [f"task {number:02d}" for number in range(tasks)]
    routers = [
        simulated_router(layer, module, experts, names, draw) for layer in range(layers) for module in MODULES[:modules]
    ]
    flow = []
    for module in MODULES[:modules]:
        for layer in range(layers - 1):
            share_NN = torch.softmax(torch.randn(experts, experts, generator=draw, dtype=torch.float64), -1)
            ends = {"from": f"layers.{layer}.{module}", "to": f"layers.{layer + 1}.{module}"}
            flow.append(ends | {"share": share_NN.tolist()})
    dead = [router for router in routers if router["measures"]["dead"]]
    verdicts = [
        {"level": "note", "router": None, "measure": "task_information", "value": 0.06, "text": "tasks differ a little"}
    ]
    verdicts += [
        {
            "level": "warning",
            "router": router["name"],
            "measure": "dead",
            "value": 1,
            "text": f"layer {router['layer']} {router['module']}: 1 of {experts} experts dead ({experts - 1})",
        }
        for router in dead
    ]
    mean = lambda name: sum(router["measures"][name] for router in routers) / len(routers)  # noqa: E731
    return {
        "schema_version": 1,
        "title": f"Routing of {layers} x {modules} routers",
        "created_by": "moadapt 0.1.0",
        "model": {
            "adapter": "runs/simulated",
            "base": "a model of 7 billion parameters",
            "preset": "mixlora",
            "expert": "lora",
            "router": "top_k",
            "granularity": "token",
            "scope": "module",
            "expert_unit": "bank",
        },
        "data": {
            "tasks": [{"name": name, "sequences": 200, "tokens": 50_000} for name in names],
            "tokens": 50_000 * tasks,
            "sequences": 200 * tasks,
        },
        "summary": {
            "num_routers": len(routers),
            "num_experts": len(routers) * experts,
            "dead_experts": len(dead),
            "mean_max_violation": mean("max_violation"),
            "mean_normalised_entropy": mean("normalised_entropy"),
            "task_information": 0.0613,
            "task_information_p": 0.000999,
        },
        "verdicts": verdicts,
        "routers": routers,
        "flow": flow,
        "training": [
            {"step": 10 * step}
            | {
                router["name"]: {
                    "normalised_entropy": router["measures"]["normalised_entropy"] ** (step / steps),
                    "max_violation": router["measures"]["max_violation"] * step / steps,
                }
                for router in routers
            }
            for step in range(1, steps + 1)
        ],
        "similarity": {router["name"]: [row[:] for row in router["coactivation"]] for router in routers},
        "text": [simulated_text(name, routers, tokens, draw) for name in names],
    }


def opened(path: Path) -> tuple[float, float]:
    """Seconds until a headless Chromium has drawn the page, and to draw it anew for another router."""
    from selenium import webdriver  # the browser is an option

    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or binary is None:
        raise SystemExit("--browser needs chromium and chromedriver (Debian: apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        started = time.perf_counter()
        browser.get(path.resolve().as_uri())
        first = time.perf_counter() - started
        again = browser.execute_script(
            "const start = performance.now(); const pick = document.getElementById('f-router');"
            "pick.selectedIndex = 100; pick.dispatchEvent(new Event('change'));"
            "document.body.getBoundingClientRect(); return performance.now() - start;"
        )
    return first, float(again) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 32), ("modules", 7), ("experts", 8), ("tasks", 20), ("tokens", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="keep the page here")
    parser.add_argument("--browser", action="store_true", help="open it in a headless Chromium; needs --output")
    options = parser.parse_args()
    if options.browser and options.output is None:
        parser.error("--browser opens the page from a file: give --output as well")
    document = simulate(options.layers, options.modules, options.experts, options.tasks, options.tokens)
    started = time.perf_counter()
    page = render_report(document)
    seconds = time.perf_counter() - started
    table = Table(
        title=f"{options.layers} layers, {options.modules} modules, {options.experts} experts, {options.tasks} tasks"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    data = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])
    table.add_row("routing.json, MB", f"{len(json.dumps(document)) / 1e6:.1f}")
    table.add_row("routing.html, MB", f"{len(page.encode()) / 1e6:.2f}")
    table.add_row("without texts, MB", f"{len(render_report(document | {'text': []}).encode()) / 1e6:.2f}")
    table.add_row("time to write it, s", f"{seconds:.1f}")
    table.add_row("tokens kept of each text", " to ".join(sorted({str(len(text["tokens"])) for text in data["text"]})))
    table.add_row("left out", ", ".join(data["left_out"]) or "nothing")
    if options.output is not None:
        options.output.write_text(page, encoding="utf-8")
    if options.browser:
        first, again = opened(options.output)
        table.add_row("to open it, s", f"{first:.1f}")
        table.add_row("to show another router, s", f"{again:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
