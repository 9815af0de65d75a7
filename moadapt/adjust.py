"""Trading quality for speed after training: another threshold, or another number of experts per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moadapt.config import parse_mixture_config
from moadapt.errors import ConfigError

if TYPE_CHECKING:
    from moadapt.model import MixtureModel

ADJUSTABLE = ("threshold", "num_experts_per_tok")


def adjustable(model: MixtureModel) -> list[str]:
    """The options of `ADJUSTABLE` that the model's routers have, those with a threshold first."""
    routers = [site.router for site in model.injection.routers.values()]
    return [name for name in ADJUSTABLE if routers and all(hasattr(router, name) for router in routers)]


def set_router_threshold(model: MixtureModel, threshold: float) -> None:
    """Give every router another threshold; it is saved with the model.

    Raises:
        ConfigError: the routers have none, or the value is outside of its range.
    """
    _set(model, "threshold", threshold)


def set_num_experts_per_tok(model: MixtureModel, number: int) -> None:
    """Let every router keep another number of experts; it is saved with the model.

    Raises:
        ConfigError: the routers keep no fixed number, or there are fewer experts.
    """
    for name, site in model.injection.routers.items():
        if number > site.router.num_experts:
            raise ConfigError(f"num_experts_per_tok: {number} at {name}, which has {site.router.num_experts} experts")
    _set(model, "num_experts_per_tok", number)


def _set(model: MixtureModel, option: str, value: Any) -> None:
    kind = model.mixture_config.router.kind
    valid = adjustable(model)
    if option not in valid:
        others = f"; it has {' and '.join(valid)}" if valid else ""
        raise ConfigError(f"{option}: the router {kind} has none{others}")
    options = model.mixture_config.model_dump(mode="json")
    changed = parse_mixture_config({**options, "router": {**options["router"], option: value}}, "mixture")
    for site in model.injection.routers.values():
        setattr(site.router, option, value)
        site.router.config = site.router.config.model_copy(update={option: value})
    model.mixture_config = changed
