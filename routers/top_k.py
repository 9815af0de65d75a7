"""Top-k routing: softmax over all experts, then the k largest are kept.

    p = softmax(W x / temperature)              over all N experts, in fp32
    g_e = p_e  for the k largest p_e, else 0    (norm_topk_prob: divided by their sum)

MoLoRA as MALoRA's baseline writes it (2410.22782, eqs. 3-5) and the MoE layers of transformers. Noisy top-k adds
N(0, 1) * (softplus(W_noise x) + 0.01) to the logits in training (Shazeer et al. 1701.06538, eqs. 4-5; the 0.01 and
the zero initialisation of W_noise as in LLaMA-MoE).

With K = 1 and `norm_topk_prob` the gate is always 1 and the task loss would give the router no gradient, so that
combination is refused (for N > 1).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.per_layer import PerLayerInt
from moadapt.registry import ROUTERS
from moadapt.routers.base import Router, RouterConfig, jitter, linear_logits
from moadapt.routing import Routing, RoutingContext

_ALWAYS_ONE = (
    "num_experts_per_tok: 1 with norm_topk_prob: true makes every gate 1, so the router gets no gradient from the "
    "task; set norm_topk_prob: false"
)


class TopKRouterConfig(RouterConfig):
    """Options of the `top_k` router.

    Attributes:
        num_experts_per_tok: K; one value, a list per layer, or a map of patterns.
        norm_topk_prob: divide the kept probabilities by their sum.
        temperature: divides the logits before the softmax.
        router_jitter_noise: in training, the router reads x * U(1 - noise, 1 + noise); x itself is not changed.
        noisy_gating: in training, add learned Gaussian noise to the logits.
    """

    kind: Literal["top_k"] = "top_k"
    num_experts_per_tok: PerLayerInt = 2
    norm_topk_prob: bool = False
    temperature: float = Field(default=1.0, gt=0.0)
    router_jitter_noise: float = Field(default=0.0, ge=0.0, lt=1.0)
    noisy_gating: bool = False

    @model_validator(mode="after")
    def _router_must_learn(self) -> Self:
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise ValueError(_ALWAYS_ONE)
        return self


@ROUTERS.register("top_k", TopKRouterConfig)
class TopKRouter(Router):
    """Keeps the K most probable experts of every token. See the module's docstring for the equations."""

    config: TopKRouterConfig

    def __init__(
        self, config: TopKRouterConfig, in_features: int, num_experts: int, device: torch.device | None = None
    ) -> None:
        super().__init__(config, in_features, num_experts, device)
        assert isinstance(config.num_experts_per_tok, int)
        self.num_experts_per_tok = config.num_experts_per_tok
        if self.num_experts_per_tok == 1 and config.norm_topk_prob and num_experts > 1:  # from a per-layer value
            raise ConfigError(f"router.{_ALWAYS_ONE}")
        if config.noisy_gating:
            self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with exactly K experts selected per token."""
        if self.training and self.config.router_jitter_noise > 0.0:
            hidden_states = jitter(hidden_states, self.config.router_jitter_noise)
        logits_TN = linear_logits(hidden_states, self.weight)
        if self.training and self.config.noisy_gating:
            scale_TN = nn.functional.softplus(linear_logits(hidden_states, self.noise_weight)) + 0.01
            logits_TN = logits_TN + torch.randn_like(logits_TN) * scale_TN
        probs_TN = torch.softmax(logits_TN / self.config.temperature, dim=-1)
        indices_TK = context.decide(lambda: probs_TN.topk(self.num_experts_per_tok, dim=-1).indices)
        kept_TK = probs_TN.gather(-1, indices_TK)
        if self.config.norm_topk_prob:
            kept_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True)
        return Routing(
            weights_TN=torch.zeros_like(probs_TN).scatter(-1, indices_TK, kept_TK),
            selected_TN=torch.zeros_like(probs_TN, dtype=torch.bool).scatter_(-1, indices_TK, True),
            logits_TN=logits_TN,
            probs_TN=probs_TN,
            indices_TK=indices_TK,
        )

    def constant_weights(self) -> Tensor | None:
        """One with a single expert, whose softmax is always 1; None otherwise."""
        return torch.ones_like(self.weight[:, 0]) if self.num_experts == 1 else None
