"""Dense routing: every expert takes part, weighted by a softmax.

    g = softmax(W x / temperature)      in fp32

The soft merging of the original MoLoRA (2309.05444, section 3), and of HydraLoRA (2404.19245) and LoRAMoE
(2312.09979).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.routers.base import Router, RouterConfig, jitter, linear_logits
from moadapt.routing import Routing, RoutingContext


class SoftmaxRouterConfig(RouterConfig):
    """Options of the `softmax` router.

    Attributes:
        temperature: divides the logits before the softmax.
        router_jitter_noise: in training, the router reads x * U(1 - noise, 1 + noise); x itself is not changed.
    """

    kind: Literal["softmax"] = "softmax"
    temperature: float = Field(default=1.0, gt=0.0)
    router_jitter_noise: float = Field(default=0.0, ge=0.0, lt=1.0)


@ROUTERS.register("softmax", SoftmaxRouterConfig)
class SoftmaxRouter(Router):
    """Weights all experts of every token. See the module's docstring for the equation."""

    selects_all = True
    config: SoftmaxRouterConfig

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with all N experts selected."""
        if self.training and self.config.router_jitter_noise > 0.0:
            hidden_states = jitter(hidden_states, self.config.router_jitter_noise)
        logits_TN = linear_logits(hidden_states, self.weight)
        probs_TN = torch.softmax(logits_TN / self.config.temperature, dim=-1)
        selected_TN = torch.ones_like(probs_TN, dtype=torch.bool)
        return Routing(weights_TN=probs_TN, selected_TN=selected_TN, logits_TN=logits_TN, probs_TN=probs_TN)

    def constant_weights(self) -> Tensor | None:
        """One with a single expert, whose softmax is always 1; None otherwise."""
        return torch.ones_like(self.weight[:, 0]) if self.num_experts == 1 else None
