"""The statistics of all routers of a model: read, added up over processes, written out.

Shapes: N experts, L tasks, M sequences of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.statistics import measures
from moadapt.statistics.counts import ALL, PARTS, PHASES, RouterCounts
from moadapt.statistics.plots import Plots

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,import-not-found]

UNKNOWN = "unknown"
"""The task of rows without a task id, where others have one."""
Flow = dict[tuple[str, str], Tensor]
_SAMPLE = ("sequence_tasks", "sequence_counts", "sequence_keys")


class RoutingStatistics(Plots):
    """What `record_routing` yields.

    Args:
        routers: counts by router.
        flow: see below.
        source: gives the present counts and flow while something is being recorded; None when nothing is.
    """

    def __init__(
        self,
        routers: Mapping[str, RouterCounts] | None = None,
        flow: Flow | None = None,
        source: Callable[[], tuple[dict[str, RouterCounts], Flow]] | None = None,
    ) -> None:
        self._routers = dict(routers or {})
        self._flow = dict(flow or {})
        self._source = source

    @property
    def routers(self) -> dict[str, RouterCounts]:
        """Counts by router. While recording goes on, a copy of what was counted so far."""
        self._read()
        return self._routers

    @property
    def flow(self) -> Flow:
        """How many rows had this top expert at one router and that at another: int64 (N, N').

        For routers of the same module, rows and granularity in layers that follow each other.
        """
        self._read()
        return self._flow

    def _read(self) -> None:
        if self._source is not None:
            self._routers, self._flow = self._source()

    def finish(self) -> None:
        """Nothing more is recorded: keep the counts as they are now."""
        self._read()
        self._source = None

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, the same for all routers."""
        return next((list(counts.tasks) for counts in self.routers.values()), [ALL])

    def merge(self, other: RoutingStatistics) -> None:
        """Add the counts of another recording of the same model.

        Raises:
            ConfigError: other routers, or something is still being recorded into these.
        """
        self._must_be_finished("merge")
        if set(self.routers) != set(other.routers):
            odd = sorted(set(self.routers) ^ set(other.routers))[0]
            raise ConfigError(f"statistics: only one of the two has the router {odd}; merge recordings of one model")
        for name, counts in other.routers.items():
            self._routers[name].merge(counts)
        for pair, value in other.flow.items():
            self._flow[pair] = self._flow[pair] + value

    def reduce(
        self, all_sum: Callable[[Tensor], Tensor], all_gather: Callable[[Tensor], list[Tensor]] | None = None
    ) -> None:
        """Add up the processes' counts, before any ratio is taken of them.

        Every process must have recorded the same model, with `tasks` given where there are task ids.

        Args:
            all_sum: gives the sum of a tensor (int64 or float64) over the processes, on the CPU.
            all_gather: gives the tensors of all processes, of equal shapes, in the order of their ranks, on the CPU.
                Without it each process keeps its own sample of sequences.

        Raises:
            ConfigError: something is still being recorded.
        """
        self._must_be_finished("reduce")
        holders: list[tuple[Any, str]] = [
            (counts, name) for counts in self._routers.values() for name in counts.tensors() if name not in _SAMPLE
        ]
        for dtype in (torch.int64, torch.float64):
            values = [
                (counts, name)
                for counts, name in holders
                if getattr(counts, name).is_floating_point() == (dtype == torch.float64)
            ]
            tensors = [getattr(counts, name) for counts, name in values]
            flows = list(self._flow) if dtype == torch.int64 else []
            tensors += [self._flow[pair] for pair in flows]
            if not tensors:
                continue
            sizes = [tensor.numel() for tensor in tensors]
            total = all_sum(torch.cat([tensor.flatten().to(dtype) for tensor in tensors]))
            summed = [
                part.view(tensor.shape).to(tensor.dtype)
                for part, tensor in zip(torch.split(total, sizes), tensors, strict=True)
            ]
            for (counts, name), value in zip(values, summed, strict=False):
                setattr(counts, name, value)
            self._flow |= dict(zip(flows, summed[len(values) :], strict=True))
        if all_gather is not None:
            for counts in self._routers.values():
                _gather_sequences(counts, all_gather)

    def _must_be_finished(self, what: str) -> None:
        if self._source is not None:
            raise ConfigError(f"statistics.{what}: recording still goes on; call it after the `with` block")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without loss; see `RouterCounts.to_dict`."""
        return {
            "routers": [counts.to_dict() for counts in self.routers.values()],
            "flow": [
                {"from": first, "to": second, "rows": value.tolist()} for (first, second), value in self.flow.items()
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingStatistics:
        """What `to_dict` returned."""
        routers = [RouterCounts.from_dict(item) for item in values["routers"]]
        flow = {(item["from"], item["to"]): torch.tensor(item["rows"], dtype=torch.int64) for item in values["flow"]}
        return cls({counts.name: counts for counts in routers}, flow)

    def summary(self) -> dict[str, dict[str, float]]:
        """The main measures of each router that has counted rows, by router; docs/statistics.md defines them.

        `rows`; `max_share`, the largest load; `max_violation`; `effective_experts`; `dead`, how many experts are;
        `experts_per_row`; `entropy` and `normalised_entropy`; `task_information`, normalised (0 with one task).
        """
        return {name: _summary(counts) for name, counts in self.routers.items() if counts.rows.any()}

    def columns(self) -> dict[str, list[Any]]:
        """A long table by columns: a line for each router, task, part, phase and expert.

        Columns `router`, `layer` (None outside of any), `module`, `granularity`, `task`, `part`, `phase`, `expert`;
        `selections` and `weight` of the expert; `rows`, among which it was chosen or not: the same for all experts.
        """
        names = ["router", "layer", "module", "granularity", "task", "part", "phase", "expert"]
        table: dict[str, list[Any]] = {name: [] for name in (*names, "selections", "weight", "rows")}
        for counts in self.routers.values():
            router = counts.name, counts.layer, counts.module, counts.granularity
            keys = [(*router, *key) for key in product(counts.tasks, PARTS, PHASES, counts.experts)]
            for name, column in zip(names, zip(*keys, strict=True), strict=True):
                table[name] += column
            table["selections"] += counts.selections.flatten().tolist()
            table["weight"] += counts.weights.flatten().tolist()
            table["rows"] += counts.rows.unsqueeze(-1).expand_as(counts.selections).flatten().tolist()
        return table

    def to_pandas(self) -> pd.DataFrame:
        """The table of `columns` as a data frame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ConfigError("statistics.to_pandas: needs pandas; pip install 'moadapt[report]'") from None
        return pd.DataFrame(self.columns()).astype({"layer": "Int64"})


def _summary(counts: RouterCounts) -> dict[str, float]:
    rows, selections_N = counts.rows.sum(), counts.selections.sum((0, 1, 2))
    used_N = measures.usage(selections_N, counts.weights.sum((0, 1, 2)), rows)
    selects_all = bool((selections_N == rows).all())
    used_LN = measures.usage(counts.selections.sum((1, 2)), counts.weights.sum((1, 2)), counts.rows.sum((1, 2)))
    mean, _ = measures.token_entropy(counts.entropy.sum(0), rows)
    values = {
        "rows": rows,
        "max_share": measures.load(used_N).max(),
        "max_violation": measures.max_violation(used_N),
        "effective_experts": measures.effective_experts(used_N),
        "dead": measures.dead_experts(used_N, used_N.sum() if selects_all else rows).sum(),
        "experts_per_row": measures.experts_per_row(counts.active)[0],
        "entropy": mean,
        "normalised_entropy": measures.normalised_entropy(mean, counts.num_experts),
        "task_information": measures.task_information(used_LN)[1],
    }
    return {name: value.item() for name, value in values.items()}


def _gather_sequences(counts: RouterCounts, all_gather: Callable[[Tensor], list[Tensor]]) -> None:
    """The sample of all processes' sequences; what is gathered has one shape in all of them."""
    size, have = counts.max_sequences, counts.sequence_keys.shape[0]
    packed = torch.full((size, 2 + counts.num_experts), -1.0, dtype=torch.float64)
    packed[:have, 0] = counts.sequence_keys
    packed[:have, 1] = counts.sequence_tasks.double()
    packed[:have, 2:] = counts.sequence_counts.double()
    gathered = torch.cat(all_gather(packed))
    gathered = gathered[gathered[:, 0] >= 0]
    for name in _SAMPLE:
        value: Tensor = getattr(counts, name)
        setattr(counts, name, value[:0])
    counts.add_sequences(gathered[:, 0], gathered[:, 1].long(), gathered[:, 2:].int())
