"""`routing.parquet`: exact counts as a long table, as `RoutingStatistics.to_pandas` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moadapt.statistics.counts import PARTS, PHASES, RouterCounts
from moadapt.statistics.statistics import RoutingStatistics


def write_parquet(statistics: RoutingStatistics, path: str | Path, generated: RoutingStatistics | None = None) -> None:
    """Write a line for each router, task, part, phase and expert.

    Args:
        statistics: recorded in passes over data.
        path: the file.
        generated: recorded in generation on the same data; its decoded tokens become the lines of phase `decode`.
    """
    import pyarrow as pa  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {name: [] for name in _schema(pa).names}
    for name, counts in statistics.routers.items():
        for phase in range(len(PHASES)):
            decoded = generated is not None and PHASES[phase] == "decode"
            _add(columns, generated.routers[name] if decoded and generated is not None else counts, phase)
    table = pa.table(columns, schema=_schema(pa))
    parquet.write_table(table, str(path))


def _schema(pa: Any) -> Any:
    texts = {name: pa.string() for name in ("granularity", "task", "part", "phase", "expert")}
    numbers = {"selections": pa.int64(), "weight": pa.float64(), "rows": pa.int64()}
    return pa.schema({"router": pa.string(), "layer": pa.int64(), "module": pa.string(), **texts, **numbers})


def _add(columns: dict[str, list[Any]], counts: RouterCounts, phase: int) -> None:
    for task, task_name in enumerate(counts.tasks):
        for part, part_name in enumerate(PARTS):
            lines = {
                "router": counts.name,
                "layer": counts.layer,
                "module": counts.module,
                "granularity": counts.granularity,
                "task": task_name,
                "part": part_name,
                "phase": PHASES[phase],
                "rows": int(counts.rows[task, part, phase]),
            }
            for name, value in lines.items():
                columns[name] += [value] * counts.num_experts
            columns["expert"] += counts.experts
            columns["selections"] += counts.selections[task, part, phase].tolist()
            columns["weight"] += counts.weights[task, part, phase].tolist()
