"""Parameter counts of a mixture by kind of module; works on the meta device, so no weights are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn

from moadapt.layer import MixtureLayer, PartitionLayer, RouterSite, TrainableCopy
from moadapt.routing import Granularity

if TYPE_CHECKING:
    from moadapt.model import MixtureModel

ROUTERS_ROW = "routers"
POOLERS_ROW = "poolers"
ACTIVATIONS_ROW = "activations"
OTHERS_ROW = "not adapted"


@dataclass
class ParameterRow:
    """Numbers of parameters of one kind of module.

    Attributes:
        kind: the last part of the modules' names, as `q_proj`; or `routers`, `poolers` and `activations` (of routers
            that read prompts), or `not adapted`.
        modules: how many modules.
        frozen: parameters of the base model, and of routers with nothing to choose.
        trainable: parameters that are trained.
        active: parameters, frozen ones included, that one token uses: of the experts the K that are selected, or all
            where the router keeps as many as it likes. Where modules are the experts, the mean over all choices of K,
            rounded.
        active_trainable: how many of these are trained.
        total: frozen and trainable.
    """

    kind: str
    modules: int = 0
    frozen: int = 0
    trainable: int = 0
    active: int = 0
    active_trainable: int = 0
    total: int = 0

    def add(self, frozen: int, trainable: int, active_trainable: int, active_frozen: int | None = None) -> None:
        """Count one more module; of frozen parameters all are used unless it says how many."""
        self.modules += 1
        self.frozen += frozen
        self.trainable += trainable
        self.active += (frozen if active_frozen is None else active_frozen) + active_trainable
        self.active_trainable += active_trainable
        self.total += frozen + trainable


@dataclass
class ParameterCounts:
    """All rows, and their sum.

    Attributes:
        rows: adapted kinds in the order of the model, then `modules_to_save`, routers, and what is not adapted.
        total: the sum of the rows; `trainable` and `total` are those of `get_nb_trainable_parameters`, without the
            zero rows that fill up the width of experts cut from a block.
        active_is_bound: a router keeps as many experts as it likes, so `active` is the most that a token can use.
        granularity: what one decision is about: the tokens that follow it use the same parameters.
        active_trainable_range: fewest and most trained parameters that a token can use, where modules of different
            sizes are the experts and K of them are chosen; None otherwise.
    """

    rows: list[ParameterRow]
    total: ParameterRow
    active_is_bound: bool = False
    granularity: Granularity = "token"
    active_trainable_range: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {"modules": [asdict(row) for row in self.rows], "total": asdict(self.total)}
        span = self.active_trainable_range
        return {
            **values,
            "active_is_bound": self.active_is_bound,
            "granularity": self.granularity,
            "active_trainable_range": None if span is None else list(span),
        }


def count_parameters(model: MixtureModel) -> ParameterCounts:
    """Count a mixture model's parameters. A tensor that two modules share counts once, where it comes first.

    Args:
        model: on any device, the meta device included. Its numbers are those of unquantised weights.
    """
    counted: set[int] = set()
    rows: dict[str, ParameterRow] = {}
    choices = _ModuleChoices()
    for name, layer in model.injection.layers.items():
        kind = name.rsplit(".", 1)[-1]
        row = rows.setdefault(kind, ParameterRow(kind))
        site = model.injection.routers[layer.ruled_by]
        if isinstance(layer, PartitionLayer):
            counted.update(id(parameter) for parameter in layer.experts.parameters())
            row.add(*_partition(layer, _num_selected(site)))
            continue
        frozen = _size(layer.base_layer.parameters(), counted)
        trainable = _size(layer.experts.parameters(), counted)
        if layer.member is None:
            row.add(frozen, trainable, layer.experts.num_active_params(_num_selected(site)))
        else:
            row.add(frozen, trainable, 0)
            choices.add(layer.ruled_by, kind, layer.experts.num_active_params(1), _num_selected(site))
    choices.add_means(rows)
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
        row.add(unused, trainable, trainable, active_frozen=0)  # the original works only while the adapter is off
    for kind in (ROUTERS_ROW, POOLERS_ROW, ACTIVATIONS_ROW):
        rows[kind] = ParameterRow(kind)
    for site in model.injection.routers.values():
        _count_site(site, rows, counted)
    rows[OTHERS_ROW] = others
    total = ParameterRow("total")
    for row in rows.values():
        for name in ("modules", "frozen", "trainable", "active", "active_trainable", "total"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    sites = list(model.injection.routers.values())
    return ParameterCounts(
        [row for row in rows.values() if row.modules],
        total,
        active_is_bound=any(not _is_fixed(site) for site in sites),
        granularity=sites[0].granularity,
        active_trainable_range=choices.span(total.active_trainable),
    )


@dataclass
class _ModuleChoices:
    """Where modules are the experts: what a token uses of them, over all choices of K.

    Attributes:
        sizes: parameters of the modules that a router rules.
        selected: how many of them it selects.
        mean: parameters that a token uses of all modules on average, rounded kind by kind.
    """

    sizes: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    selected: dict[str, int] = field(default_factory=dict)
    mean: int = 0

    def add(self, router: str, kind: str, size: int, num_selected: int) -> None:
        """One more module."""
        self.sizes.setdefault(router, []).append((kind, size))
        self.selected[router] = num_selected

    def add_means(self, rows: dict[str, ParameterRow]) -> None:
        """Add to each kind's row what a token uses of it on average: a module is in K / N of the choices."""
        means: dict[str, Fraction] = {}
        for router, modules in self.sizes.items():
            for kind, size in modules:
                means[kind] = means.get(kind, Fraction()) + Fraction(self.selected[router] * size, len(modules))
        for kind, mean in means.items():
            rows[kind].active += round(mean)
            rows[kind].active_trainable += round(mean)
        self.mean = sum(round(mean) for mean in means.values())

    def span(self, active_trainable: int) -> tuple[int, int] | None:
        """Fewest and most trained parameters that a token can use, given the mean; None where there is no choice.

        Args:
            active_trainable: mean over the choices, with what does not depend on them.
        """
        if all(self.selected[router] == len(modules) for router, modules in self.sizes.items()):
            return None
        fewest = most = active_trainable - self.mean
        for router, modules in self.sizes.items():
            sizes = sorted(size for _, size in modules)
            fewest += sum(sizes[: self.selected[router]])
            most += sum(sizes[len(sizes) - self.selected[router] :])
        return fewest, most


def _count_site(site: RouterSite, rows: dict[str, ParameterRow], counted: set[int]) -> None:
    """A router with its pooler and activation. Of a table by task, a token uses the row of its task."""
    parts = ((ROUTERS_ROW, site.router), (POOLERS_ROW, site.pooler), (ACTIVATIONS_ROW, site.activation))
    for kind, part in parts:
        if part is None or (kind != ROUTERS_ROW and not list(part.parameters())):
            continue
        trainable = _size((weight for weight in part.parameters() if weight.requires_grad), counted)
        num_tasks = getattr(site.router.config, "num_tasks", None) or 1
        rows[kind].add(_size(part.parameters(), counted), trainable, trainable // num_tasks)


def _size(parameters: Iterable[nn.Parameter], counted: set[int]) -> int:
    """Elements of the tensors that were not counted before."""
    size = 0
    for parameter in parameters:
        if id(parameter) not in counted:
            counted.add(id(parameter))
            size += parameter.numel()
    return size


def _partition(layer: PartitionLayer, num_selected: int) -> tuple[int, int, int, int]:
    """(frozen, trainable, trainable that is used, frozen that is used) parameters of the experts of a block."""
    experts = layer.experts
    total, active = experts.num_params(), experts.num_active_params(num_selected)
    if experts.config.trainable:
        return 0, total, active, 0
    trainable = sum(parameter.numel() for parameter in experts.parameters() if parameter.requires_grad)
    used = trainable * (experts.num_shared + num_selected) // (experts.num_shared + experts.num_experts)
    return total - trainable, trainable, used, active - used


def _num_selected(site: RouterSite) -> int:
    """K: how many experts a router selects, at most."""
    if site.router.selects_all:
        return site.router.num_experts
    return int(getattr(site.router, "num_experts_per_tok", None) or site.router.num_experts)


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
