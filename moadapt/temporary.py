"""`merge_after_prefill`: while one decision serves the whole batch, its experts sit inside a temporary weight.

    W' = W + sum_e g_e dW_e,    y = W' x

After the prompt, every generated token then costs what it costs the base model. W itself is never written to: W' lives
in the request of one generation and is gone with it, whatever ends the generation, and another thread sees nothing of
it. It takes the memory of the weights of the layers that were selected. The sum is made in fp32 (fp64) and rounded to
the dtype of W once.

Shapes: G rows of a routing, N experts, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moadapt.errors import ConfigError
from moadapt.routing import Routing, RoutingContext

if TYPE_CHECKING:
    from moadapt.inject import Injection
    from moadapt.layer import MixtureLayer

SAME = 1e-5
"""Gates of the rows of a batch that differ by less come from the same decision, computed side by side."""
_ROWS = 256


def check_mergeable(injection: Injection) -> None:
    """Whether `merge_after_prefill` can work on this mixture at all.

    Raises:
        ConfigError: experts in the place of blocks, decisions about single tokens, or a base layer whose weight is
            quantised, partitioned or wrapped.
    """
    for name, site in injection.routers.items():
        if site.granularity == "token" and site.router.constant_weights() is None:
            raise ConfigError(
                f"merge_after_prefill: the router {name} decides anew for each token (router.granularity: token), so "
                "no weight serves the whole answer; leave merge_after_prefill out"
            )
    for name, layer in injection.layers.items():
        base = getattr(layer, "base_layer", None)
        if base is None:
            raise ConfigError(
                f"merge_after_prefill: experts have taken the place of the block {name}, which has no weight to merge "
                "into; leave merge_after_prefill out"
            )
        if type(base) not in (nn.Linear, Conv1D) or not base.weight.dtype.is_floating_point:
            raise ConfigError(
                f"merge_after_prefill: the base layer {name} is a {type(base).__name__} with weights of "
                f"{base.weight.dtype}; only unquantised linear layers can be merged into. Load the base model "
                "unquantised, or leave merge_after_prefill out"
            )
        if hasattr(base.weight, "ds_shape") or base._forward_pre_hooks:
            raise ConfigError(
                f"merge_after_prefill: the weight of {name} is partitioned or offloaded, and not there between two "
                "passes; leave merge_after_prefill out"
            )


@torch.no_grad()
def merged_weight(layer: MixtureLayer, routing: Routing, context: RoutingContext) -> Tensor | None:
    """The temporary weight of a layer, made at its first use; None where the rows of the batch differ.

    Args:
        layer: the mixture layer.
        routing: the decision about it.
        context: the running pass; its `temporary` holds what this generation has made so far.
    """
    weights = context.temporary
    assert weights is not None
    if layer not in weights:
        gates_GN, tasks_B = routing.weights_TN, context.task_ids_B
        same = bool((gates_GN - gates_GN[:1]).abs().max() <= SAME)
        same = same and (tasks_B is None or bool((tasks_B == tasks_B[:1]).all()))
        if routing.active == ():
            weights[layer] = layer.weight
        else:
            with torch.autocast(layer.weight.device.type, enabled=False):
                weights[layer] = _merge(layer, gates_GN[0]) if same else None
    return weights[layer]


def _merge(layer: MixtureLayer, gates_N: Tensor) -> Tensor:
    """W', some rows at a time where the delta has a low rank: the fp32 sum then stays in the processor's cache."""
    weight, is_conv = layer.weight, isinstance(layer.base_layer, Conv1D)
    merged: Tensor = torch.empty_like(weight)
    factors = layer.experts.mixed_factors(gates_N)
    if factors is None:
        delta_OI = layer.delta_weight(gates_N).to(weight.device)
        return merged.copy_(weight.to(delta_OI.dtype) + (delta_OI.T if is_conv else delta_OI))
    left, right = (factor.to(weight.device) for factor in factors)
    if is_conv:
        left, right = right.T, left.T
    step = _ROWS if weight.device.type == "cpu" else weight.shape[0]
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        merged[rows] = torch.addmm(weight[rows].to(left.dtype), left[rows], right)
    return merged


def apply_weight(base_layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    """What the base layer gives with another weight: (..., I) -> (..., O)."""
    if isinstance(base_layer, Conv1D):
        y_TO = torch.addmm(base_layer.bias, x.reshape(-1, x.shape[-1]), weight)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])
    return nn.functional.linear(x, weight, base_layer.bias)


def nothing_merged(weights: Mapping[Any, Tensor | None]) -> bool:
    """Whether every layer was left as it is because the rows of the batch differ."""
    needed = [weight for layer, weight in weights.items() if weight is not layer.weight]  # of layers that are selected
    return bool(needed) and all(weight is None for weight in needed)
