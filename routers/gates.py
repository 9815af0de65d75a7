"""From the scores of the kept experts to the multipliers of their outputs: `combine` times `rescale`.

    y = sum over kept i of  c_i * r * E_i(x)        c from `combine`, r from `rescale`

Two schools that do not agree (reconstruction: the plain sum, unit and none; trained: multiplied up, then trained), so
both factors are options of their own: DSMoE (2502.12455, eqs. 7-8) is sigmoid and n_over_active, LLaMA-MoE
(2406.16554) softmax_renorm and n_over_k, FactorLLM (2408.11855) unit and n // k, which is n_over_k where k divides n
and the number n // k elsewhere. N counts the routed experts; those that are always on keep the weight 1.

Shapes: T rows, N experts, K experts per row.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

Combine = Literal["unit", "softmax", "softmax_renorm", "sigmoid"]
"""The weight of a kept expert: 1; its probability among all N; among the kept ones; its own sigmoid."""

Constant = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
RescaleActive = Literal["none", "n_over_active"] | Constant
"""A factor for all experts of a row: 1, N / (number of its kept experts), or a number."""
Rescale = Literal["none", "n_over_k", "n_over_active"] | Constant
"""The same, with N / K for routers that keep a fixed number."""


def rescaled(weights_TN: Tensor, selected_TN: Tensor, rescale: Rescale, num_kept: int | None = None) -> Tensor:
    """The weights times their factor.

    Args:
        weights_TN: what `combine` gave.
        selected_TN: bool, the kept experts. Their number is a constant: no gradient flows through it. A row without
            any has the factor N, not infinity.
        rescale: which factor.
        num_kept: K of a router that keeps a fixed number.

    Returns:
        (T, N), dtype of the weights.
    """
    if rescale == "none":
        return weights_TN
    num_experts = weights_TN.shape[-1]
    if rescale == "n_over_active":
        active_T1 = selected_TN.sum(dim=-1, keepdim=True).clamp(min=1).to(weights_TN.dtype)
        return weights_TN * (num_experts / active_T1)
    if rescale == "n_over_k":
        assert num_kept is not None
        return weights_TN * (num_experts / num_kept)
    return weights_TN * rescale
