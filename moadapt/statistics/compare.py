"""Two routing documents side by side, and how far one model makes the other's selections.

Expert number i of two adapters is the same expert only where one run goes on from the other, as two checkpoints of it;
distances of loads and saturation mean something there. Entropy, balance and information can always be compared.

Shapes: T rows of a pass, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moadapt.model import MixtureModel
from moadapt.passes import observing_passes
from moadapt.routing import RoutingContext
from moadapt.statistics import measures

MOST_BYTES = 2**28
"""Of selections that are kept, a bit for each row and expert; later passes are not compared."""


@dataclass
class SharedSelections:
    """What two models selected for the same rows.

    Attributes:
        shared: int64 (2,), selections of both, and of the second.
        first_N: int64, selections of the first.
        second_N: int64, of the second.
        rows: real rows.
    """

    shared: Tensor
    first_N: Tensor
    second_N: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, num_experts: int) -> SharedSelections:
        """Nothing yet."""

        def whole(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64)

        return cls(whole(2), whole(num_experts), whole(num_experts))

    def add(self, first_TN: Tensor, second_TN: Tensor, real_T: Tensor) -> None:
        """One pass: what each selected, bool, and which rows count."""
        first_TN, second_TN = first_TN & real_T.unsqueeze(-1), second_TN & real_T.unsqueeze(-1)
        self.shared += measures.count_shared(first_TN, second_TN)
        self.first_N += first_TN.sum(0)
        self.second_N += second_TN.sum(0)
        self.rows += int(real_T.sum())

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Add up the processes' counts."""
        self.shared, self.first_N, self.second_N = (
            all_sum(value) for value in (self.shared, self.first_N, self.second_N)
        )
        self.rows = int(all_sum(torch.tensor([self.rows]))[0])


@dataclass
class Selections:
    """What one model selected, pass by pass, and how much of it another one selects in the same passes.

    Attributes:
        passes: by router the selections of each pass, packed, and their shape.
        shared: by router what both selected, once the second model has run.
        num_bytes: of the packed selections.
    """

    passes: list[dict[str, tuple[Any, tuple[int, int]]]] = field(default_factory=list)
    shared: dict[str, SharedSelections] = field(default_factory=dict)
    num_bytes: int = 0

    @contextmanager
    def keeping(self, model: nn.Module) -> Iterator[None]:
        """Keep what the routers select inside the `with` block, within that of `record_routing`."""
        with observing_passes(_base(model), self._keep):
            yield

    @contextmanager
    def comparing(self, model: nn.Module) -> Iterator[None]:
        """Compare, pass by pass: the second model must be given the same batches in the same order."""
        number = -1

        def compare(context: RoutingContext) -> None:
            nonlocal number
            number += 1
            if number < len(self.passes):
                self._compare(context, self.passes[number])

        with observing_passes(_base(model), compare):
            yield

    def reduce(self, all_sum: Callable[[Tensor], Tensor], num_experts: Mapping[str, int]) -> None:
        """Add up the processes' counts. Collective: a process that compared nothing takes part with zeros.

        Args:
            all_sum: gives the sum of an int64 tensor over the processes, on the CPU.
            num_experts: of the routers of the second model, in the same order in every process.
        """
        for name, number in num_experts.items():
            self.shared.setdefault(name, SharedSelections.zeros(number)).reduce(all_sum)

    def _keep(self, context: RoutingContext) -> None:
        if self.num_bytes >= MOST_BYTES:
            return
        kept = {}
        for record in context.records:
            selected_TN = record.routing.selected_TN.cpu()
            packed = np.packbits(selected_TN.numpy())
            kept[record.name] = (packed, (selected_TN.shape[0], selected_TN.shape[1]))
            self.num_bytes += packed.nbytes
        self.passes.append(kept)

    def _compare(self, context: RoutingContext, before: Mapping[str, tuple[Any, tuple[int, int]]]) -> None:
        for record in context.records:
            packed, shape = before.get(record.name, (None, None))
            second_TN = record.routing.selected_TN.cpu()
            if packed is None or shape != tuple(second_TN.shape):
                continue
            first_TN = torch.from_numpy(np.unpackbits(packed, count=shape[0] * shape[1]).astype(bool)).view(shape)
            everything_T = torch.ones(shape[0], dtype=torch.bool)
            real_T = everything_T if record.mask_T is None else record.mask_T.cpu()
            self.shared.setdefault(record.name, SharedSelections.zeros(shape[1])).add(first_TN, second_TN, real_T)


def _base(model: nn.Module) -> Any:
    return model.base_model if isinstance(model, MixtureModel) else model


def compare_documents(
    first: Mapping[str, Any], second: Mapping[str, Any], shared: Mapping[str, SharedSelections] | None = None
) -> dict[str, Any]:
    """The part `compare` of the first document.

    Args:
        first: a routing document.
        second: another, over the same data.
        shared: by router what both selected for the same rows, where both were recorded together.

    Returns:
        Plain JSON values in the shape of `routing_schema()`.
    """
    mine = {router["name"]: router for router in first["routers"]}
    theirs = {router["name"]: router for router in second["routers"]}
    return {
        "other": second["model"],
        "other_title": second["title"],
        "other_summary": second["summary"],
        "routers": [
            _router(router, theirs[name], (shared or {}).get(name)) for name, router in mine.items() if name in theirs
        ],
        "only_first": [name for name in mine if name not in theirs],
        "only_second": [name for name in theirs if name not in mine],
    }


def _router(first: Mapping[str, Any], second: Mapping[str, Any], shared: SharedSelections | None) -> dict[str, Any]:
    saturation, chance = None, None
    if shared is not None and int(shared.shared[1]) > 0:
        saturation = float(measures.saturation(shared.shared))
        chance = float(measures.chance_saturation(shared.first_N, shared.second_N, shared.rows))
    return {
        "name": first["name"],
        "layer": first["layer"],
        "module": first["module"],
        "load_distance": load_distance(first["load"]["share"], second["load"]["share"]),
        "first": _side(first),
        "second": _side(second),
        "saturation": saturation,
        "chance_saturation": chance,
        "saturation_rows": None if saturation is None or shared is None else shared.rows,
    }


def load_distance(first_N: list[float | None], second_N: list[float | None]) -> float | None:
    """Jensen-Shannon distance of two loads; None for other numbers of experts, or where one has no rows."""
    if len(first_N) != len(second_N) or None in first_N or None in second_N:
        return None
    return float(measures.task_distance(torch.tensor([first_N, second_N], dtype=torch.float64))[0, 1])


def _side(router: Mapping[str, Any]) -> dict[str, Any]:
    found, table = router["measures"], router["by_task"] or {}
    return {
        "max_violation": found["max_violation"],
        "normalised_entropy": found["normalised_entropy"],
        "dead": len(found["dead"]),
        "task_information": table.get("information"),
        "p": table.get("p"),
    }
