"""Plotly figures of recorded statistics, for notebooks. They are methods of `RoutingStatistics`.

Shapes: R routers, N experts, L tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.registry import closest
from moadapt.statistics import measures
from moadapt.statistics.counts import RouterCounts

if TYPE_CHECKING:
    import plotly.graph_objects as go  # type: ignore[import-untyped,import-not-found,unused-ignore]

_SCALE = "Cividis"


class _Recorded(Protocol):
    """What the figures read."""

    @property
    def routers(self) -> Mapping[str, RouterCounts]:
        """Counts by router."""
        ...

    @property
    def flow(self) -> Mapping[tuple[str, str], Tensor]:
        """Rows by the top experts of two routers."""
        ...


class Plots:
    """The figures of `RoutingStatistics`; each needs plotly."""

    def plot_load(self: _Recorded) -> go.Figure:
        """A heat map, routers by experts: the share of a router's selections that an expert gets.

        Raises:
            ConfigError: plotly is not installed, or nothing was recorded.
        """
        go = _plotly("plot_load")
        load = {name: measures.load(_used(counts).sum(0)).tolist() for name, counts in self.routers.items()}
        return _heat(go, "Load of the experts", load, _expert_names(self.routers), "expert", "router")

    def plot_tasks(self: _Recorded, router: str) -> go.Figure:
        """A heat map, tasks by experts: the share of a task's selections that an expert gets.

        Args:
            router: its name.

        Raises:
            ConfigError: plotly is not installed, or there is no such router.
        """
        go = _plotly("plot_tasks")
        counts = _found(self, router)
        seen = [task for task in range(len(counts.tasks)) if int(counts.rows[task].sum()) > 0]
        share_LN = measures.task_table(_used(counts)[seen]).tolist()
        table = {counts.tasks[task]: row for task, row in zip(seen, share_LN, strict=True)}
        return _heat(go, f"Tasks of {router}", table, counts.experts, "expert", "task")

    def plot_entropy(self: _Recorded) -> go.Figure:
        """Lines over layers, one for each module: mean entropy of a row over ln N.

        Raises:
            ConfigError: plotly is not installed, or nothing was recorded.
        """
        go = _plotly("plot_entropy")
        lines: dict[str, list[tuple[int | str, float]]] = {}
        for name, counts in self.routers.items():
            mean, _ = measures.token_entropy(counts.entropy.sum(0), counts.rows.sum())
            value = float(measures.normalised_entropy(mean, counts.num_experts))
            place: int | str = name if counts.layer is None else counts.layer
            lines.setdefault(counts.module or "whole block", []).append((place, value))
        figure = go.Figure(layout={"title": {"text": "Entropy of a row over its maximum"}})
        for module, points in lines.items():
            places, values = zip(*points, strict=True)
            figure.add_scatter(x=places, y=values, name=module, mode="lines+markers")
        figure.update_xaxes(title="layer").update_yaxes(title="H / ln N", range=[0, 1])
        return figure

    def plot_coactivation(self: _Recorded, router: str) -> go.Figure:
        """A heat map, experts by experts: P(column selected | row selected).

        Args:
            router: its name.

        Raises:
            ConfigError: plotly is not installed, or there is no such router.
        """
        go = _plotly("plot_coactivation")
        counts = _found(self, router)
        together_NN = measures.coactivation(counts.pairs).fill_diagonal_(math.nan).tolist()
        table = dict(zip(counts.experts, together_NN, strict=True))
        return _heat(go, f"Experts of {router} that work together", table, counts.experts, "with", "expert")

    def plot_flow(self: _Recorded, first: str, second: str) -> go.Figure:
        """A Sankey diagram: how many rows go from a top expert of one router to one of the next.

        Args:
            first: name of a router.
            second: of the router of the same module in the next layer.

        Raises:
            ConfigError: plotly is not installed, or there is no flow between the two.
        """
        go = _plotly("plot_flow")
        rows_NN = self.flow.get((first, second))
        if rows_NN is None:
            pairs = ", ".join(f"({a}, {b})" for a, b in self.flow) or "none"
            raise ConfigError(f"statistics.plot_flow: no flow from {first} to {second} was recorded; there is: {pairs}")
        experts = [self.routers[name].experts for name in (first, second)]
        source, target = rows_NN.nonzero(as_tuple=True)
        figure = go.Figure(layout={"title": {"text": f"From {first} to {second}"}})
        figure.add_sankey(
            node={"label": [*experts[0], *experts[1]]},
            link={
                "source": source.tolist(),
                "target": (target + len(experts[0])).tolist(),
                "value": rows_NN[source, target].tolist(),
            },
        )
        return figure


def _plotly(method: str) -> ModuleType:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ConfigError(f"statistics.{method}: needs plotly; pip install 'moadapt[report]'") from None
    module: ModuleType = go
    return module


def _found(statistics: _Recorded, router: str) -> RouterCounts:
    routers = statistics.routers
    if router not in routers:
        names = list(routers)
        raise ConfigError(f"statistics: no router {router!r}{closest(router, names)} Routers: {', '.join(names)}")
    return routers[router]


def _used(counts: RouterCounts) -> Tensor:
    """(L, N), by task: selections, or gate weights where every row selects every expert."""
    selections_LN, weights_LN = counts.selections.sum((1, 2)), counts.weights.sum((1, 2))
    return measures.usage(selections_LN, weights_LN, counts.rows.sum((1, 2)))


def _expert_names(routers: Mapping[str, RouterCounts]) -> list[str]:
    """Of all routers where they are the same, else numbers."""
    names = [counts.experts for counts in routers.values()]
    if all(name == names[0] for name in names[1:]):
        return names[0] if names else []
    return [str(number) for number in range(max(map(len, names)))]


def _heat(go: Any, title: str, rows: Mapping[str, list[float]], columns: list[str], x: str, y: str) -> go.Figure:
    """Per cent, printed in the cells. Rows may be shorter than the columns."""
    width = len(columns)
    cells = torch.full((len(rows), width), math.nan, dtype=torch.float64)
    for index, row in enumerate(rows.values()):
        cells[index, : len(row)] = torch.tensor(row, dtype=torch.float64)
    figure = go.Figure(layout={"title": {"text": title}})
    figure.add_heatmap(
        z=(100 * cells).tolist(),
        x=[f"{name}" for name in columns],
        y=list(rows),
        colorscale=_SCALE,
        texttemplate="%{z:.1f}",
        colorbar={"title": {"text": "%"}},
    )
    figure.update_xaxes(title=x, type="category").update_yaxes(title=y, type="category", autorange="reversed")
    return figure
