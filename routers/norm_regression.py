"""Routing by predicted size: a small network regresses the norm of every expert's output, and the large ones are kept.

    n = W2 tanh(W1 x + b1) + b2                         predicted norms, in fp32
    max_ratio:   keep i where n_i >= threshold * max_j n_j
    cumulative:  keep the largest until what is left out is at most `threshold` of the sum
    g_i = 1 for the kept (times `rescale`)

D2DMoE (2310.04361), whose tau is 1 - threshold in `max_ratio`: a higher threshold keeps fewer experts under both rules.
The number of experts follows the token. The network is fitted when a block is split: mean squared error to the norms
|E_i(x)| on calibration inputs. Fitting scales inputs and norms to one and folds both scales into the weights.

Weights of 1 give the router no gradient from the task: train it through the losses that read `probs`, or not at all.
`probs_TN` are the shares of the predicted norms; negative predictions count as zero.

Shapes: T rows, D hidden size, N experts, H width of the network.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.per_layer import OptionalPerLayerInt
from moadapt.registry import ROUTERS
from moadapt.routers.base import FittedRouter, RouterConfig, RouterSample, linear_logits
from moadapt.routers.fitting import FitConfig, chunks, descend, in_fp32, required_inputs
from moadapt.routers.gates import RescaleActive, rescaled
from moadapt.routers.threshold import Thresholded
from moadapt.routing import Routing, RoutingContext


class NormRegressionRouterConfig(RouterConfig):
    """Options of the `norm_regression` router.

    Attributes:
        threshold: `max_ratio`: share of the largest predicted norm that an expert needs to be kept; `cumulative`: share
            of all predicted norms that may be left out.
        rule: how the threshold is read.
        num_experts_per_tok: the most experts that a token keeps; no limit when not given. With `threshold: 0` exactly
            that many.
        rescale: factor for all kept experts: `none` (as the paper), `n_over_active` or a number.
        router_width: H, hidden units of the network.
        norm_order: which norm of an expert's output is regressed.
        fit: how the network is fitted at conversion.
    """

    granularities = ("token",)  # fitted to tokens

    kind: Literal["norm_regression"] = "norm_regression"
    threshold: float = Field(default=0.5, ge=0.0, lt=1.0)
    rule: Literal["max_ratio", "cumulative"] = "max_ratio"
    num_experts_per_tok: OptionalPerLayerInt = None
    rescale: RescaleActive = "none"
    router_width: int = Field(default=128, ge=1)
    norm_order: Literal[1, 2] = 2
    fit: FitConfig = Field(default_factory=FitConfig)


@ROUTERS.register("norm_regression", NormRegressionRouterConfig)
class NormRegressionRouter(Thresholded, FittedRouter):
    """Keeps the experts whose output is predicted to be large. See the module's docstring for the equations."""

    config: NormRegressionRouterConfig

    def __init__(
        self,
        config: NormRegressionRouterConfig,
        in_features: int,
        num_experts: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(config, in_features, num_experts, device)
        assert config.num_experts_per_tok is None or isinstance(config.num_experts_per_tok, int)
        self.num_experts_per_tok = config.num_experts_per_tok
        self._threshold = config.threshold

    def create_parameters(self, device: torch.device | None) -> None:
        """`hidden_weight` (H, D), `hidden_bias` (H,), `weight` (N, H), `bias` (N,)."""
        width = self.config.router_width
        self.hidden_weight = nn.Parameter(torch.empty(width, self.in_features, dtype=torch.float32, device=device))
        self.hidden_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))
        self.weight = nn.Parameter(torch.empty(self.num_experts, width, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(self.num_experts, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both matrices from N(0, init_std²). `fit` starts from other weights."""
        nn.init.normal_(self.hidden_weight, std=self.config.init_std)
        nn.init.normal_(self.weight, std=self.config.init_std)

    def predict(self, hidden_states: Tensor) -> Tensor:
        """Predicted norms, (T, D) -> (T, N)."""
        hidden_TH = linear_logits(hidden_states, self.hidden_weight)
        hidden_TH = torch.tanh(hidden_TH + self.hidden_bias.to(hidden_TH.dtype))
        return linear_logits(hidden_TH, self.weight) + self.bias.to(hidden_TH.dtype)

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with the experts selected whose predicted norm is large enough, the largest always."""
        logits_TN = self.predict(hidden_states)
        norms_TN = logits_TN.clamp(min=0.0)
        selected_TN = context.decide(lambda: self._select(norms_TN))
        total_T1 = norms_TN.sum(dim=-1, keepdim=True)
        return Routing(
            weights_TN=rescaled(selected_TN.to(norms_TN.dtype), selected_TN, self.config.rescale),
            selected_TN=selected_TN,
            logits_TN=logits_TN,
            probs_TN=norms_TN / total_T1.clamp(min=torch.finfo(norms_TN.dtype).tiny),
        )

    def _select(self, norms_TN: Tensor) -> Tensor:
        sorted_TN, order_TN = norms_TN.sort(dim=-1, descending=True, stable=True)
        if self.config.rule == "max_ratio":
            kept_TN = sorted_TN >= self.threshold * sorted_TN[:, :1]
        else:
            # What would be left out without this expert and all smaller ones.
            left_out_TN = sorted_TN.flip(-1).cumsum(-1).flip(-1)
            kept_TN = left_out_TN > self.threshold * sorted_TN.sum(-1, keepdim=True)
            kept_TN[:, 0] = True
        if self.num_experts_per_tok is not None:
            kept_TN[:, self.num_experts_per_tok :] = False
        return torch.zeros_like(kept_TN).scatter_(-1, order_TN, kept_TN)

    @property
    def learns_from_task(self) -> bool:
        """Never: the weights are 1."""
        return False

    def fit(self, sample: RouterSample) -> None:
        """Regress the norms of the experts' outputs on the calibration inputs.

        Raises:
            ConfigError: no calibration inputs.
        """
        inputs_TD = required_inputs(sample, "router norm_regression").to(self.weight)
        norms_TN = output_norms(sample, self.config.norm_order).to(self.weight)
        tiny = torch.finfo(self.weight.dtype).tiny
        input_scale = inputs_TD.square().mean().sqrt().clamp(min=tiny)
        norm_scale = norms_TN.mean().clamp(min=tiny)
        generator = torch.Generator().manual_seed(self.config.fit.seed)
        for parameter in (self.hidden_weight, self.weight):
            draw = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(draw)
        self.hidden_bias.data.zero_()
        self.bias.data.copy_(norms_TN.mean(0) / norm_scale)

        def loss(index_C: Tensor) -> Tensor:
            index_C = index_C.to(inputs_TD.device)
            predicted_CN = self.predict(inputs_TD[index_C] / input_scale)
            return (predicted_CN - norms_TN[index_C] / norm_scale).square().mean()

        descend(self.parameters(), loss, inputs_TD.shape[0], self.config.fit)
        self.hidden_weight.data /= input_scale
        self.weight.data *= norm_scale
        self.bias.data *= norm_scale


@torch.no_grad()
def output_norms(sample: RouterSample, order: int = 2) -> Tensor:
    """Norms of every expert's output for every calibration token: fp32 (T, N), on the experts' device."""
    experts = in_fp32(sample.experts)
    inputs_TD = required_inputs(sample, "the norm of an expert's output")
    rows = []
    for x_CD in chunks(inputs_TD, experts):
        norms = [torch.linalg.vector_norm(experts.expert(i, x_CD), order, dim=-1) for i in range(experts.num_experts)]
        rows.append(torch.stack(norms, dim=-1))
    return torch.cat(rows)
