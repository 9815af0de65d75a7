"""Parameter counts of a mixture by kind of module; works on the meta device, so no weights are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from moadapt.layer import MixtureLayer, PartitionLayer, RouterSite, TrainableCopy

if TYPE_CHECKING:
    from moadapt.model import MixtureModel

ROUTERS_ROW = "routers"
OTHERS_ROW = "not adapted"


@dataclass
class ParameterRow:
    """Numbers of parameters of one kind of module.

    Attributes:
        kind: the last part of the modules' names, as `q_proj`; or `routers`, or `not adapted`.
        modules: how many modules.
        frozen: parameters of the base model, and of routers with nothing to choose.
        trainable: parameters that are trained.
        active: parameters, frozen ones included, that one token uses: of the experts the K that are selected, or all
            where the router keeps as many as it likes.
        total: frozen and trainable.
    """

    kind: str
    modules: int = 0
    frozen: int = 0
    trainable: int = 0
    active: int = 0
    total: int = 0

    def add(self, frozen: int, trainable: int, active_trainable: int) -> None:
        """Count one more module."""
        self.modules += 1
        self.frozen += frozen
        self.trainable += trainable
        self.active += frozen + active_trainable
        self.total += frozen + trainable


@dataclass
class ParameterCounts:
    """All rows, and their sum.

    Attributes:
        rows: adapted kinds in the order of the model, then `modules_to_save`, routers, and what is not adapted.
        total: the sum of the rows; `trainable` and `total` are those of `get_nb_trainable_parameters`, without the
            zero rows that fill up the width of experts cut from a block.
        active_is_bound: a router keeps as many experts as it likes, so `active` is the most that a token can use.
    """

    rows: list[ParameterRow]
    total: ParameterRow
    active_is_bound: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [asdict(row) for row in self.rows]
        return {"modules": rows, "total": asdict(self.total), "active_is_bound": self.active_is_bound}


def count_parameters(model: MixtureModel) -> ParameterCounts:
    """Count a mixture model's parameters. A tensor that two modules share counts once, where it comes first.

    Args:
        model: on any device, the meta device included. Its numbers are those of unquantised weights.
    """
    counted: set[int] = set()
    rows: dict[str, ParameterRow] = {}
    for name, layer in model.injection.layers.items():
        kind = name.rsplit(".", 1)[-1]
        row = rows.setdefault(kind, ParameterRow(kind))
        selected = _num_selected(model, layer)
        if isinstance(layer, PartitionLayer):
            frozen, trainable, active = _partition(layer, selected)
            counted.update(id(parameter) for parameter in layer.experts.parameters())
            row.add(frozen, trainable, active - frozen)
        else:
            frozen = _size(layer.base_layer.parameters(), counted)
            trainable = _size(layer.experts.parameters(), counted)
            row.add(frozen, trainable, layer.experts.num_active_params(selected))
    others = ParameterRow(OTHERS_ROW)
    for module in _other_modules(model):
        size = _size(module.parameters(recurse=False), counted)
        if size:
            others.add(size, 0, 0)
    for name, wrapper in model.injection.copies.items():
        kind = name.rsplit(".", 1)[-1]
        row = rows.setdefault(kind, ParameterRow(kind))
        trainable = _size(wrapper.copy.parameters(), counted)
        unused = _size(wrapper.original_module.parameters(), counted)
        row.add(unused, trainable, trainable)
        row.active -= unused  # the original works only while the adapter is off
    routers = rows[ROUTERS_ROW] = ParameterRow(ROUTERS_ROW)
    for site in model.injection.routers.values():
        trainable = _size((weight for weight in site.parameters() if weight.requires_grad), counted)
        routers.add(_size(site.parameters(), counted), trainable, trainable)
    rows[OTHERS_ROW] = others
    total = ParameterRow("total")
    for row in rows.values():
        for field in ("modules", "frozen", "trainable", "active", "total"):
            setattr(total, field, getattr(total, field) + getattr(row, field))
    bound = any(not _is_fixed(site) for site in model.injection.routers.values())
    return ParameterCounts([row for row in rows.values() if row.modules], total, bound)


def _size(parameters: Iterable[nn.Parameter], counted: set[int]) -> int:
    """Elements of the tensors that were not counted before."""
    size = 0
    for parameter in parameters:
        if id(parameter) not in counted:
            counted.add(id(parameter))
            size += parameter.numel()
    return size


def _partition(layer: PartitionLayer, num_selected: int) -> tuple[int, int, int]:
    """(frozen, trainable, active) parameters of the experts of a block."""
    experts = layer.experts
    total = experts.num_params()
    if experts.config.trainable:
        trainable = total
    else:
        trainable = sum(parameter.numel() for parameter in experts.parameters() if parameter.requires_grad)
    return total - trainable, trainable, experts.num_active_params(num_selected)


def _num_selected(model: MixtureModel, layer: MixtureLayer | PartitionLayer) -> int:
    """K at this layer: what its router selects for each token, at most."""
    site: RouterSite = model.injection.routers[layer.ruled_by]
    if site.router.selects_all:
        return layer.experts.num_experts
    return int(getattr(site.router, "num_experts_per_tok", None) or layer.experts.num_experts)


def _is_fixed(site: RouterSite) -> bool:
    """Whether the router selects the same number of experts for every token."""
    router = site.router
    return router.selects_all or (hasattr(router, "num_experts_per_tok") and not hasattr(router, "threshold"))


def _other_modules(model: MixtureModel) -> Iterator[nn.Module]:
    """The modules of the base model outside of mixture layers, routers and `modules_to_save`."""
    inside: set[int] = set()
    for module in model.base_model.modules():
        if id(module) in inside or isinstance(module, (MixtureLayer, PartitionLayer, RouterSite, TrainableCopy)):
            inside.update(id(part) for part in module.modules())
        else:
            yield module
