"""Top-k routing: the k experts with the highest scores are kept.

    p = softmax(W x / temperature)              over all N experts, in fp32
    g_e = p_e  for the k largest p_e, else 0    (norm_topk_prob: divided by their sum)

MoLoRA as MALoRA's baseline writes it (2410.22782, eqs. 3-5) and the MoE layers of transformers. `combine` and `rescale`
give the other forms: `sigmoid` puts p = sigmoid(W x / temperature) in place of the softmax (DSMoE with a fixed k, GLM4
and DeepSeek-V3 without renormalisation), `unit` weighs every kept expert by 1 (EMoE, FactorLLM), and the factor of
`routers/gates.py` multiplies all of them. Noisy top-k adds N(0, 1) * (softplus(W_noise x) + 0.01) to the logits in
training (Shazeer et al. 1701.06538, eqs. 4-5; the 0.01 and the zero initialisation of W_noise as in LLaMA-MoE).

With K = 1 and `norm_topk_prob` the gate is always 1 and the task loss would give the router no gradient, so that
combination is refused (for N > 1). `unit` gives it none either: it is for routers that are fitted or set, as by `init:
mean_gate` or `fit: prior_approximate`, and the auxiliary losses still train them.

    straight_through:  S = sg(g) + p - sg(p)        the value of g, the gradient of p to every expert; sg stops it

With it both learn from the task: a hard choice whose router gets the gradient of its probabilities (MiLoRA, 2410.18035,
leaves open how the gate enters; DSMoE, 2502.12455, eqs. 10-11, has this form). An expert that is not kept adds nothing
to y but its gate gets <dL/dy, E_i(x)> p', so training computes every expert; without gradients only K are computed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.per_layer import PerLayerInt
from moadapt.registry import ROUTERS
from moadapt.routers.base import RouterConfig, RouterSample, jitter, linear_logits
from moadapt.routers.gates import Combine, Rescale, rescaled
from moadapt.routers.linear import LinearRouter, LinearRouterConfig
from moadapt.routers.prior_approximate import PriorApproximateConfig, fit_prior_approximate
from moadapt.routing import Routing, RoutingContext

_ALWAYS_ONE = (
    "num_experts_per_tok: 1 with norm_topk_prob: true makes every gate 1, so the router gets no gradient from the "
    "task; set norm_topk_prob: false, or straight_through: true"
)


class TopKRouterConfig(LinearRouterConfig):
    """Options of the `top_k` router.

    Attributes:
        num_experts_per_tok: K; one value, a list per layer, or a map of patterns.
        norm_topk_prob: divide the kept probabilities by their sum; the same as `combine: softmax_renorm`.
        combine: the weight of a kept expert: its `softmax` probability over all experts, over the kept ones
            (`softmax_renorm`), its own `sigmoid`, or `unit`, 1.
        rescale: factor for all kept experts: `none`, `n_over_k` (here the same as `n_over_active`) or a number.
        temperature: divides the logits before the softmax or the sigmoid.
        straight_through: the gates keep their values but pass the gradient of all N probabilities to the router, also
            where they are constant.
        router_jitter_noise: in training, the router reads x * U(1 - noise, 1 + noise); x itself is not changed.
        noisy_gating: in training, add learned Gaussian noise to the logits.
        fit: `prior_approximate` (or a mapping with its options) trains the router on calibration inputs when a block is
            split (FactorLLM's first stage); nothing when not given.
    """

    kind: Literal["top_k"] = "top_k"
    num_experts_per_tok: PerLayerInt = 2
    norm_topk_prob: bool = False
    combine: Combine = "softmax"
    rescale: Rescale = "none"
    temperature: float = Field(default=1.0, gt=0.0)
    straight_through: bool = False
    router_jitter_noise: float = Field(default=0.0, ge=0.0, lt=1.0)
    noisy_gating: bool = False
    fit: PriorApproximateConfig | None = None

    @field_validator("fit", mode="before")
    @classmethod
    def _fit_by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way_to_combine(self) -> Self:
        """Each of `norm_topk_prob` and `combine` follows the other where only one is given."""
        given = self.model_fields_set
        # Assigned through __dict__: an ordinary assignment would validate, and so run this again.
        if "combine" not in given:
            self.__dict__["combine"] = "softmax_renorm" if self.norm_topk_prob else "softmax"
        elif "norm_topk_prob" not in given:
            self.__dict__["norm_topk_prob"] = self.combine == "softmax_renorm"
        elif self.norm_topk_prob != (self.combine == "softmax_renorm"):
            given_as, fitting = ("true", "false") if self.norm_topk_prob else ("false", "true")
            raise ValueError(
                f"norm_topk_prob: {given_as} contradicts combine: {self.combine} (norm_topk_prob: true is combine: "
                f"softmax_renorm); set norm_topk_prob: {fitting}"
            )
        return self

    @model_validator(mode="after")
    def _router_must_learn(self) -> Self:
        if self.fit is not None:
            self.refuse_prompts("fit")
        if self.straight_through:
            return self
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise ValueError(_ALWAYS_ONE)
        if self.init == "zeros" and self.combine in ("unit", "sigmoid"):
            raise ValueError(
                f"init: zeros with combine: {self.combine} ties all experts, and experts that are not kept get no "
                "gradient that could break the tie; use init: normal, a softmax, or straight_through: true"
            )
        return self


@ROUTERS.register("top_k", TopKRouterConfig)
class TopKRouter(LinearRouter):
    """Keeps the K experts with the highest scores of every token. See the module's docstring for the equations."""

    config: TopKRouterConfig

    def __init__(
        self, config: TopKRouterConfig, in_features: int, num_experts: int, device: torch.device | None = None
    ) -> None:
        super().__init__(config, in_features, num_experts, device)
        assert isinstance(config.num_experts_per_tok, int)
        self.num_experts_per_tok = config.num_experts_per_tok
        always_one = self.num_experts_per_tok == 1 and config.norm_topk_prob and not config.straight_through
        if always_one and num_experts > 1:  # from a per-layer value
            raise ConfigError(f"router.{_ALWAYS_ONE}")
        if config.noisy_gating:
            self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with exactly K experts selected per token; in gradient mode, straight-through if asked."""
        if self.training and self.config.router_jitter_noise > 0.0:
            hidden_states = jitter(hidden_states, self.config.router_jitter_noise)
        logits_TN = self.logits(hidden_states)
        if self.training and self.config.noisy_gating:
            scale_TN = nn.functional.softplus(linear_logits(hidden_states, self.noise_weight)) + 0.01
            logits_TN = logits_TN + torch.randn_like(logits_TN) * scale_TN
        scaled_TN = logits_TN / self.config.temperature
        probs_TN = scaled_TN.sigmoid() if self.config.combine == "sigmoid" else scaled_TN.softmax(dim=-1)
        indices_TK = context.decide(lambda: probs_TN.topk(self.num_experts_per_tok, dim=-1).indices)
        selected_TN = torch.zeros_like(probs_TN, dtype=torch.bool).scatter_(-1, indices_TK, True)
        kept_TK = probs_TN.gather(-1, indices_TK)
        if self.config.combine == "softmax_renorm":
            kept_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True)
        elif self.config.combine == "unit":
            kept_TK = torch.ones_like(kept_TK)
        weights_TN = torch.zeros_like(probs_TN).scatter(-1, indices_TK, kept_TK)
        straight_through = self.config.straight_through and probs_TN.requires_grad
        if straight_through:
            # The bracket is exactly zero, so the value stays that of the kept experts.
            weights_TN = weights_TN.detach() + (probs_TN - probs_TN.detach())
        return Routing(
            weights_TN=rescaled(weights_TN, selected_TN, self.config.rescale, self.num_experts_per_tok),
            selected_TN=selected_TN,
            logits_TN=logits_TN,
            probs_TN=probs_TN,
            indices_TK=None if straight_through else indices_TK,
            straight_through=straight_through,
        )

    @classmethod
    def needs_fit(cls, config: RouterConfig) -> bool:
        """With `fit` or `init: mean_gate`."""
        assert isinstance(config, TopKRouterConfig)
        return config.fit is not None or super().needs_fit(config)

    @classmethod
    def needs_inputs(cls, config: RouterConfig) -> bool:
        """With `fit`."""
        assert isinstance(config, TopKRouterConfig)
        return config.fit is not None

    def fit(self, sample: RouterSample) -> None:
        """`init`, then `fit`.

        Raises:
            ConfigError: `fit` without calibration inputs.
        """
        super().fit(sample)
        if self.config.fit is not None:
            parameters = [self.weight, self.bias] if self.config.bias else [self.weight]
            temperature, kept = self.config.temperature, self.num_experts_per_tok
            fit_prior_approximate(parameters, lambda x: self.logits(x) / temperature, sample, kept, self.config.fit)

    @property
    def learns_from_task(self) -> bool:
        """Not with gates that are always 1, unless they are straight-through."""
        return self.config.combine != "unit" or self.config.straight_through

    def constant_weights(self) -> Tensor | None:
        """With one expert whose softmax is always 1, or `unit` weights for all experts, these; None otherwise."""
        unit = self.config.combine == "unit" and self.num_experts_per_tok == self.num_experts
        if not unit and (self.num_experts > 1 or self.config.combine == "sigmoid"):
            return None
        ones_TN = torch.ones_like(self.weight[:, :1]).T
        return rescaled(ones_TN, ones_TN.bool(), self.config.rescale, self.num_experts)[0].detach()
