"""Threshold routing with a straight-through gate: every expert above a threshold is kept, as many as there are.

    s = sigmoid(Y x)                                    each expert by itself, in fp32
    G(s) = s if s > threshold else 0                    strict
    S(s) = sg(G(s)) + s - sg(s)                         forward G, gradient 1 everywhere; sg stops the gradient
    g = S(s) * N / max(1, number of s > threshold)      the number is a constant

DSMoE (2502.12455, eqs. 7, 8, 10, 11), with eq. 8's factor also on the straight-through output, which the paper
leaves open. The gate of an expert that is off gets the gradient x^T (<dL/dy, E_i(x)> s') too (eqs. 15-16), so training
computes every expert; the weights of such an expert get none. `straight_through: false` is the paper's ablation:
gradients through G alone.

`combine: unit` keeps the selection and its gradient but weighs every kept expert by 1: in the place of G stands
1[s > threshold].

A row without any expert above the threshold gets weights of zero, never NaN; `min_active: 1` keeps its best expert.
Gates that start at zero are refused: each is then sigmoid(0) = 0.5, which no token's input can change, so that with a
threshold of 0.5 or more all experts are off, and below it all are on.

The threshold is read in every pass; set the attribute `threshold` to trade quality for sparsity after training.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.registry import ROUTERS
from moadapt.routers.gates import RescaleActive, rescaled
from moadapt.routers.linear import LinearRouter, LinearRouterConfig
from moadapt.routers.threshold import Thresholded
from moadapt.routing import Routing, RoutingContext


class SigmoidSTERouterConfig(LinearRouterConfig):
    """Options of the `sigmoid_ste` router.

    Attributes:
        threshold: an expert is kept when its sigmoid is above it.
        straight_through: whether experts below the threshold get a gate gradient.
        combine: the weight of a kept expert: its `sigmoid`, or `unit`, 1.
        rescale: factor for all kept experts: `n_over_active`, `none` or a number.
        min_active: how many of the best experts are kept whatever the threshold.
    """

    kind: Literal["sigmoid_ste"] = "sigmoid_ste"
    threshold: float = Field(default=0.5, ge=0.0, lt=1.0)
    straight_through: bool = True
    combine: Literal["sigmoid", "unit"] = "sigmoid"
    rescale: RescaleActive = "n_over_active"
    min_active: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _router_must_learn(self) -> Self:
        if self.init == "zeros" or (self.init == "normal" and self.init_std == 0.0):
            option = "init: zeros" if self.init == "zeros" else "init_std: 0"
            raise ValueError(
                f"{option} makes every gate exactly 0.5 for every token: with threshold >= 0.5 no expert is active "
                "and the block gives nothing, below that all are; use init: normal with init_std: 0.02"
            )
        if self.combine == "unit" and not self.straight_through:
            raise ValueError(
                "combine: unit with straight_through: false gives the router no gradient at all; set "
                "straight_through: true or combine: sigmoid"
            )
        return self


@ROUTERS.register("sigmoid_ste", SigmoidSTERouterConfig)
class SigmoidSTERouter(Thresholded, LinearRouter):
    """Keeps every expert above the threshold. See the module's docstring for the equations."""

    config: SigmoidSTERouterConfig

    def __init__(
        self, config: SigmoidSTERouterConfig, in_features: int, num_experts: int, device: torch.device | None = None
    ) -> None:
        super().__init__(config, in_features, num_experts, device)
        if config.min_active > num_experts:
            raise ConfigError(f"router.min_active: {config.min_active} exceeds the {num_experts} experts; lower it")
        self._threshold = config.threshold

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with the experts above the threshold selected; in gradient mode, straight-through."""
        logits_TN = self.logits(hidden_states)
        probs_TN = torch.sigmoid(logits_TN)
        selected_TN = context.decide(lambda: self._select(probs_TN))
        kept_TN = probs_TN if self.config.combine == "sigmoid" else torch.ones_like(probs_TN)
        weights_TN = torch.where(selected_TN, kept_TN, 0.0)
        straight_through = self.config.straight_through and probs_TN.requires_grad
        if straight_through:
            # The bracket is exactly zero, so the value stays G.
            weights_TN = weights_TN.detach() + (probs_TN - probs_TN.detach())
        return Routing(
            weights_TN=rescaled(weights_TN, selected_TN, self.config.rescale),
            selected_TN=selected_TN,
            logits_TN=logits_TN,
            probs_TN=probs_TN,
            straight_through=straight_through,
        )

    def _select(self, probs_TN: Tensor) -> Tensor:
        selected_TN = probs_TN > self.threshold
        if self.config.min_active == 0:
            return selected_TN
        best_TK = probs_TN.topk(self.config.min_active, dim=-1).indices
        return selected_TN.scatter(-1, best_TK, True)
