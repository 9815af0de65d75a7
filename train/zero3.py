"""What a mixture needs under ZeRO-3, where a module has its weights only while it runs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.routers.base import Router
from moadapt.routing import Routing


def check_partitionable(model: nn.Module) -> None:
    """ZeRO-3 lends a module its weights only while it runs.

    Raises:
        ConfigError: an expert kind reads its weights at another time.
    """
    injection = getattr(model, "injection", None)
    for name, layer in getattr(injection, "layers", {}).items():
        if layer.experts.regularization() is not None:
            raise ConfigError(
                f"deepspeed: ZeRO-3 takes weights apart between forward passes, but the experts of {name} have a "
                "regularization loss on them; use zero1 or zero2"
            )


@contextmanager
def visible_routings(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Let ZeRO-3's hooks, which `initialize` installs inside the block, see the tensors that routers return.

    ZeRO-3 fetches a module's weights for the backward pass when a gradient reaches one of its output tensors, and
    it finds those in tuples and mappings only. So a router's `Routing` is a mapping while these hooks run: hooks
    registered before them take it apart, and hooks registered after them put it together again.
    """
    logging.getLogger("DeepSpeed").addFilter(_is_not_about_routings)
    routers = [module for module in model.modules() if isinstance(module, Router)] if enabled else []

    def open_routing(module: nn.Module, args: Any, output: Routing) -> dict[str, Any]:
        fields = {item.name: getattr(output, item.name) for item in dataclasses.fields(output) if item.init}
        tracked = {name: item for name, item in fields.items() if isinstance(item, Tensor) and item.requires_grad}
        module._hidden_fields = {name: item for name, item in fields.items() if name not in tracked}  # type: ignore[assignment]
        return tracked

    def close_routing(module: nn.Module, args: Any, output: dict[str, Any]) -> Routing:
        fields: Any = module.__dict__.pop("_hidden_fields")
        return Routing(**fields, **output)

    for router in routers:
        router.register_forward_hook(open_routing)
    yield
    for router in routers:
        router.register_forward_hook(close_routing)


def _is_not_about_routings(record: logging.LogRecord) -> bool:
    """DeepSpeed warns once that it cannot look into a `Routing`; where that matters it can, see above."""
    return "moadapt.routing.Routing" not in record.getMessage()
