"""What `moadapt inspect` prints: a table of routers and the verdicts, from a routing document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

MOST_ROUTERS = 24
"""Up to so many routers have a line each; more are put together by module."""
_MOST_VERDICTS = 12
_SIGNS = {"warning": ("▲", "bold yellow"), "note": ("●", ""), "ok": ("✔", "green")}
_KINDS = {"token": "tokens", "prompt": "decisions about prompts", "task": "decisions about sequences"}
Row = Mapping[str, Any]


def routing_tables(document: Row) -> list[RenderableType]:
    """The routers, one by one or by module, and below it what the table leaves out."""
    routers: list[Row] = document["routers"]
    about = _about(document)
    if len(routers) <= MOST_ROUTERS:
        return [about, _router_table(routers)]
    shown = _warned(document)
    parts: list[RenderableType] = [about, _module_table(routers)]
    if shown:
        parts.append(_router_table(shown[:MOST_ROUTERS], title="routers with warnings"))
    left = f" (the first {MOST_ROUTERS})" if len(shown) > MOST_ROUTERS else ""
    warned = f"only the {len(shown)} with warnings{left} have a line of their own" if shown else "none has a warning"
    parts.append(Text(f"{len(routers)} routers are put together by module; {warned}. All are in --output.", "dim"))
    return parts


def verdict_lines(document: Row) -> Text:
    """About all routers, then the warnings about single ones."""
    verdicts: list[Row] = document["verdicts"]
    of_all = [verdict for verdict in verdicts if verdict["router"] is None]
    single = [verdict for verdict in verdicts if verdict["router"] is not None]
    few = len(of_all) + len(single) <= _MOST_VERDICTS
    chosen = single if few else [verdict for verdict in single if verdict["level"] == "warning"][:_MOST_VERDICTS]
    text = Text()
    for verdict in (*of_all, *chosen):
        sign, style = _SIGNS[verdict["level"]]
        text.append(f"{sign} ", style).append(f"{verdict['text']}\n")
    if len(chosen) < len(single):
        text.append(f"and {len(single) - len(chosen)} more about single routers, in --output\n", "dim")
    return text


def comparison_tables(document: Row) -> list[RenderableType]:
    """Two models side by side: every router that both have, or its module's mean."""
    compare = document["compare"]
    routers: list[Row] = compare["routers"]
    sides = [model["adapter"] or model["base"] for model in (document["model"], compare["other"])]
    header = ("load distance", "MaxVio", "entropy %", "dead", "task info %", "saturation % (chance)")
    together = len(routers) > MOST_ROUTERS
    named = (("module",), ("routers", *header)) if together else (("layer", "module"), header)
    table = _table(f"A → B: {sides[0]} → {sides[1]}", *named)
    if together:
        for module in dict.fromkeys(router["module"] for router in routers):
            group = [router for router in routers if router["module"] == module]
            table.add_row(_module(module), str(len(group)), *_sides(group))
    else:
        for router in routers:
            table.add_row(_layer(router), _module(router["module"]), *_sides([router]))
    parts: list[RenderableType] = [table]
    for side, missing in (("A", compare["only_first"]), ("B", compare["only_second"])):
        if missing:
            parts.append(Text(f"only {side} has {len(missing)} routers: {', '.join(missing[:3])} …", "dim"))
    return parts


def _about(document: Row) -> Text:
    model, data = document["model"], document["data"]
    kinds = {router["granularity"] for router in document["routers"]}
    parts = [f"{data['sequences']:,} sequences", f"{data['tokens']:,} tokens"]
    if data["generated_tokens"] is not None:
        parts.append(f"{data['generated_tokens']:,} generated tokens")
    if data["tasks"]:
        parts.append(f"{len(data['tasks'])} tasks")
    rows = " and ".join(text for kind, text in _KINDS.items() if kind in kinds)
    name = f"{model['adapter']} on {model['base']}" if model["adapter"] else str(model["base"])
    return Text(f"{name}: {', '.join(parts)}; rows are {rows}")


def _warned(document: Row) -> list[Row]:
    names = {verdict["router"] for verdict in document["verdicts"] if verdict["level"] == "warning"}
    return [router for router in document["routers"] if router["name"] in names]


# -- one line a router ---------------------------------------------------------------------------------------------


def _router_table(routers: Sequence[Row], title: str | None = None) -> Table:
    numbers = ("experts", "rows", "load %", "MaxVio", "entropy %", "dead", "task info %", "p")
    table = _table(title, ("layer", "module"), numbers)
    for router in routers:
        share, found, task = router["load"]["share"], router["measures"], router["by_task"] or {}
        cells = [
            str(len(share)),
            f"{router['rows']:,}",
            _range(share),
            _number(found["max_violation"]),
            _percent(found["normalised_entropy"]),
            str(len(found["dead"])),
            _percent(task.get("information")),
            _p(task.get("p")),
        ]
        table.add_row(_layer(router), _module(router["module"]), *cells)
    return table


def _module_table(routers: Sequence[Row]) -> Table:
    numbers = ("routers", "experts", "load %", "MaxVio", "entropy %", "dead", "task info %", "p ≤ 0.05")
    table = _table("means over the routers of a module (ranges over all of them)", ("module",), numbers)
    for module in dict.fromkeys(router["module"] for router in routers):
        group = [router for router in routers if router["module"] == module]
        tables = [router["by_task"] for router in group if router["by_task"] is not None]
        tested = [item["p"] for item in tables if item["p"] is not None]
        experts = [len(router["experts"]) for router in group]
        table.add_row(
            _module(module),
            str(len(group)),
            str(experts[0]) if len(set(experts)) == 1 else f"{min(experts)}–{max(experts)}",
            _range([share for router in group for share in router["load"]["share"]]),
            _number(_mean(group, lambda router: router["measures"]["max_violation"])),
            _percent(_mean(group, lambda router: router["measures"]["normalised_entropy"])),
            str(sum(len(router["measures"]["dead"]) for router in group)),
            _percent(_mean(tables, lambda item: item["information"])),
            f"{sum(p <= 0.05 for p in tested)} of {len(tested)}" if tested else "–",
        )
    return table


def _sides(group: Sequence[Row]) -> list[str]:
    """The cells of a comparison: means over routers, the sum of dead experts."""

    def both(name: str, show: Callable[[float | None], str]) -> str:
        first = _mean(group, lambda router: router["first"][name])
        second = _mean(group, lambda router: router["second"][name])
        return f"{show(first)} → {show(second)}"

    dead = [sum(router[side]["dead"] for router in group) for side in ("first", "second")]
    saturation = _mean(group, lambda router: router["saturation"])
    chance = _mean(group, lambda router: router["chance_saturation"])
    return [
        _number(_mean(group, lambda router: router["load_distance"])),
        both("max_violation", _number),
        both("normalised_entropy", _percent),
        f"{dead[0]} → {dead[1]}",
        both("task_information", _percent),
        "–" if saturation is None else f"{_percent(saturation)} ({_percent(chance)})",
    ]


# -- cells ---------------------------------------------------------------------------------------------------------


def _mean(items: Sequence[Row], of: Callable[[Row], float | None]) -> float | None:
    known = [value for item in items if (value := of(item)) is not None]
    return sum(known) / len(known) if known else None


def _table(title: str | None, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """Narrow enough for ten columns in a terminal of eighty."""
    table = Table(title=title and Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _module(name: str) -> str:
    return name.rpartition(".")[2] or "block"


def _layer(router: Row) -> str:
    return str(router["name"]) if router["layer"] is None else str(router["layer"])


def _range(shares: Sequence[float | None]) -> str:
    known = [100 * share for share in shares if share is not None]
    return "–".join(f"{end:.1f}" if end < 10 else f"{end:.0f}" for end in (min(known), max(known))) if known else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
