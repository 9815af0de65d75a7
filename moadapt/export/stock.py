"""Writing a converted model as a stock architecture of transformers.

Shapes: D hidden size, S shared and N routed experts, M neurons of an expert, P = 2 M.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moadapt.errors import AdapterError
from moadapt.export.gates import NEAR_EXPONENT, nearly
from moadapt.export.plan import Fit, Plan, fold_of
from moadapt.export.source import SourceBlock
from moadapt.ffn import StackedExperts

_SIGMOID_RANGE = 2.0
"""Scores up to this size keep their order under a sigmoid in fp32 as they do without."""


def write_stock(plan: Plan, folder: Path, largest: Mapping[str, float], max_shard_size: int | str) -> dict[str, Any]:
    """Save the target's model with the converted model's weights.

    Args:
        plan: what to write.
        folder: where to.
        largest: the largest |score| that each block's router was seen to give, by the block's name.
        max_shard_size: of one safetensors file.

    Returns:
        What was folded where, for the report.

    Raises:
        AdapterError: the target does not take these tensors.
    """
    tensors: dict[str, Tensor] = {}
    folds: dict[str, Any] = {}
    for name, meta in plan.shapes.items():
        have = plan.source.tensors.get(name)
        dtype = plan.source.model.base_model.dtype
        tensors[name] = torch.zeros(meta.shape, dtype=dtype) if have is None else have  # a bias that there is not
    for block, fit in zip(plan.source.blocks, plan.fits, strict=True):
        made, notes = _mixture(plan, block, fit, largest.get(block.name, 0.0))
        tensors |= made
        folds[block.name] = notes
    model = plan.empty_model
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise AdapterError(f"{plan.target.name} does not take these tensors: {error}") from None
    model.tie_weights()
    model.generation_config = plan.source.model.base_model.generation_config
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folds


def _mixture(plan: Plan, block: SourceBlock, fit: Fit, largest: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one mixture by their names in the target, and notes for the report."""
    target, sizes, prefix = plan.target, plan.sizes, f"model.layers.{block.layer}"
    gate, notes = fit.gate, {"router_scale": 1.0}
    if fit.near:
        gate, exponent = nearly(gate, largest, NEAR_EXPONENT["sigmoid" if "sigmoid" in target.combines else "softmax"])
        notes["router_scale"] = 2.0**-exponent
    elif target.own_factor and gate.combine == "softmax_renorm" and largest > _SIGMOID_RANGE:
        notes["router_scale"] = 2.0 ** -ceil(log2(largest / _SIGMOID_RANGE))
        gate = replace(gate, weight_ND=gate.weight_ND * notes["router_scale"])
    shared, routed = block.halves
    routed = _widened(routed, sizes.width)
    fold = 1.0 if target.own_factor else fold_of(fit)
    notes |= {"down_projections": fold, "routed_scaling_factor": sizes.factor if target.own_factor else 1.0}
    experts_in, experts_out = routed.in_NPD, routed.out_NMD.transpose(1, 2).contiguous()
    tensors = {
        f"{prefix}.{target.router}": gate.weight_ND,
        f"{prefix}.{target.experts}.gate_up_proj": experts_in,
        f"{prefix}.{target.experts}.down_proj": experts_out * fold if fold != 1.0 else experts_out,
    }
    device = experts_in.device
    extra = {
        name: tensor.to(device) for name, tensor in target.extra(block.num_experts, routed.in_NPD.shape[2]).items()
    }
    if target.shared is not None:
        made = target.shared(*_as_block(shared, routed, sizes.width * sizes.num_shared))
        # Without shared experts some targets have modules of width 0, and some have none.
        extra |= {name: tensor for name, tensor in made.items() if f"{prefix}.{name}" in plan.names}
    return tensors | {f"{prefix}.{name}": tensor for name, tensor in extra.items()}, notes


def _widened(experts: StackedExperts, width: int) -> StackedExperts:
    """The same experts with zero neurons up to a width."""
    missing = width - experts.width
    if missing == 0:
        return experts
    gate, up = experts.in_NPD.chunk(2, dim=1)
    pad = (0, 0, 0, missing)
    in_NPD = torch.cat([nn.functional.pad(gate, pad), nn.functional.pad(up, pad)], dim=1)
    return replace(experts, in_NPD=in_NPD, out_NMD=nn.functional.pad(experts.out_NMD, pad))


def _as_block(shared: StackedExperts | None, like: StackedExperts, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shared experts side by side as (width, D) gate, (width, D) up and (D, width) down; zero where there are less."""
    features = like.in_NPD.shape[2]
    if shared is None:
        zero_WD = like.in_NPD.new_zeros(width, features)
        return zero_WD, zero_WD.clone(), zero_WD.T.contiguous()
    gate, up = shared.in_NPD.chunk(2, dim=1)
    rows = [stacked.reshape(-1, features) for stacked in (gate, up, shared.out_NMD)]
    gate_WD, up_WD, down_WD = (nn.functional.pad(r, (0, 0, 0, width - r.shape[0])) for r in rows)
    return gate_WD, up_WD, down_WD.T.contiguous()
