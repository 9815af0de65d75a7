"""Dense routing: every expert takes part, weighted by a softmax.

    g = softmax(W x / temperature)      in fp32

The soft merging of the original MoLoRA (2309.05444, section 3), and of HydraLoRA (2404.19245) and LoRAMoE
(2312.09979). `normalize` is the router of SMEAR's released code (r-three/smear), whose scores start small whatever the
size of x:

    g = softmax((LN(x) LN(W)^T + b) / temperature)      LN(v) = (v - mean v) / sqrt(var v + 1e-5) * scale

with one learned scale (D,) for x, from 1, and one for the rows of W, from 0.01; b starts at zero. The code also shifts
both; the shift of W moves all scores of a row alike and that of x acts as a second b, so both are left out.

Shapes: T rows to route, D hidden size, N experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.registry import ROUTERS
from moadapt.routers.base import Router, RouterConfig, jitter, linear_logits
from moadapt.routing import Routing, RoutingContext, router_dtype

_WEIGHT_SCALE = 0.01


class SoftmaxRouterConfig(RouterConfig):
    """Options of the `softmax` router.

    Attributes:
        temperature: divides the logits before the softmax.
        router_jitter_noise: in training, the router reads x * U(1 - noise, 1 + noise); x itself is not changed.
        normalize: put layer norms over the input and over the rows of W, and a bias after them.
    """

    kind: Literal["softmax"] = "softmax"
    temperature: float = Field(default=1.0, gt=0.0)
    router_jitter_noise: float = Field(default=0.0, ge=0.0, lt=1.0)
    normalize: bool = False


@ROUTERS.register("softmax", SoftmaxRouterConfig)
class SoftmaxRouter(Router):
    """Weights all experts of every token. See the module's docstring for the equation."""

    selects_all = True
    config: SoftmaxRouterConfig

    def create_parameters(self, device: torch.device | None) -> None:
        """`weight` (N, D), and with `normalize` also `bias` (N,), `input_scale` and `weight_scale` (D,)."""
        super().create_parameters(device)
        if self.config.normalize:
            self.bias = nn.Parameter(torch.zeros(self.num_experts, dtype=torch.float32, device=device))
            ones_D = torch.ones(self.in_features, dtype=torch.float32, device=device)
            self.input_scale = nn.Parameter(ones_D)
            self.weight_scale = nn.Parameter(ones_D * _WEIGHT_SCALE)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, N) in router precision."""
        if not self.config.normalize:
            return linear_logits(hidden_states, self.weight)
        dtype = router_dtype(hidden_states)
        rows_TD = _layer_norm(hidden_states.to(dtype), self.input_scale)
        return linear_logits(rows_TD, _layer_norm(self.weight.to(dtype), self.weight_scale)) + self.bias.to(dtype)

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with all N experts selected."""
        if self.training and self.config.router_jitter_noise > 0.0:
            hidden_states = jitter(hidden_states, self.config.router_jitter_noise)
        logits_TN = self.logits(hidden_states)
        probs_TN = torch.softmax(logits_TN / self.config.temperature, dim=-1)
        selected_TN = torch.ones_like(probs_TN, dtype=torch.bool)
        return Routing(weights_TN=probs_TN, selected_TN=selected_TN, logits_TN=logits_TN, probs_TN=probs_TN)

    def constant_weights(self) -> Tensor | None:
        """One with a single expert, whose softmax is always 1; None otherwise."""
        return torch.ones_like(self.weight[:, 0]) if self.num_experts == 1 else None


def _layer_norm(rows: Tensor, scale_D: Tensor) -> Tensor:
    """Every row to mean 0 and variance 1, times the scale: (..., D), (D,) -> (..., D), dtype of the rows."""
    return nn.functional.layer_norm(rows, (rows.shape[-1],), scale_D.to(rows.dtype), eps=1e-5)
