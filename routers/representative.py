"""Routing by one neuron of each expert, found and not trained.

    s_i = act(x . gate_R(i) + b) * (x . up_R(i) + b')       the activation of expert i's representative neuron R(i)
                                                            (plain block: act(x . up_R(i) + b))
    keep the k experts with the largest s
    g_i = 1, or 1 + softmax(s)_i u_i with learned_scale     u starts at zero

CMoE (2502.04416). A token marks its `num_markers` neurons with the largest |activation|, among all neurons of the
block, shared ones included. A neuron's marks over the calibration tokens are a binary column; R(i) is the neuron whose
column is closest to the mean column of its expert. For binary columns L1 and squared L2 order the neurons of an expert
alike: both distances are  (marks of the neuron) - 2 sum_t column_t mean_t  + the same constant.

The paper scores with the signed activation; the released code with its absolute value (`absolute: true`) and rows of
unit length (`unit_norm: true`). The paper's further bias for selection alone, moved by +-0.001 towards equal load while
fine-tuning, is not part of this router; the loss `load_balance` serves that end.

Shapes: T rows, D hidden size, N experts, M neurons of one expert, E all experts (shared first), K experts per row.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.ffn import Activation, StackedExperts
from moadapt.per_layer import PerLayerInt
from moadapt.registry import ROUTERS
from moadapt.routers.base import FittedRouter, RouterConfig, RouterSample, linear_logits
from moadapt.routers.fitting import chunks, in_fp32, required_inputs
from moadapt.routers.gates import Rescale, rescaled
from moadapt.routers.linear import real_neurons
from moadapt.routing import Routing, RoutingContext


class RepresentativeRouterConfig(RouterConfig):
    """Options of the `representative` router.

    Attributes:
        num_experts_per_tok: K; one value, a list per layer, or a map of patterns.
        num_markers: how many neurons a calibration token marks.
        absolute: select by the absolute value of the score.
        unit_norm: scale the representatives' rows (and biases with them) to length one.
        learned_scale: weights 1 + softmax(s)_i u_i in place of 1, for training after the conversion.
        rescale: factor for all kept experts: `none` (as the paper), `n_over_k` (the same as `n_over_active`) or a
            number.
    """

    granularities = ("token",)  # fitted to tokens

    kind: Literal["representative"] = "representative"
    num_experts_per_tok: PerLayerInt = 2
    num_markers: int = Field(default=10, ge=1)
    absolute: bool = False
    unit_norm: bool = False
    learned_scale: bool = False
    rescale: Rescale = "none"


@ROUTERS.register("representative", RepresentativeRouterConfig)
class RepresentativeRouter(FittedRouter):
    """Keeps the K experts whose representative neuron is most active. See the module's docstring."""

    config: RepresentativeRouterConfig

    def __init__(
        self,
        config: RepresentativeRouterConfig,
        in_features: int,
        num_experts: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(config, in_features, num_experts, device)
        assert isinstance(config.num_experts_per_tok, int)
        self.num_experts_per_tok = config.num_experts_per_tok
        self._act: list[Activation] = []  # in a list, so that a module among them is no part of this one

    def create_parameters(self, device: torch.device | None) -> None:
        """`weight`, `up_weight` (N, D) and `bias`, `up_bias` (N,): the rows of the representatives.

        In a plain block `weight` holds the up rows, `up_weight` is 0 and `up_bias` 1, which makes the second factor 1.
        """
        shape = self.num_experts, self.in_features
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(self.num_experts, dtype=torch.float32, device=device))
        self.up_weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.up_bias = nn.Parameter(torch.ones(self.num_experts, dtype=torch.float32, device=device))
        if self.config.learned_scale:
            self.scale = nn.Parameter(torch.zeros(self.num_experts, dtype=torch.float32, device=device))

    def attach(self, act: Activation) -> None:
        """Take over the block's activation function, which is not among the parameters."""
        self._act = [act]

    def score(self, hidden_states: Tensor) -> Tensor:
        """The representatives' activations, (T, D) -> (T, N).

        Raises:
            ConfigError: the router was never put over the experts of a block.
        """
        if not self._act:
            raise ConfigError("router representative needs experts cut from a feed-forward block; use another router")
        inner_TN = linear_logits(hidden_states, self.weight)
        up_TN = linear_logits(hidden_states, self.up_weight)
        dtype = inner_TN.dtype
        return self._act[0](inner_TN + self.bias.to(dtype)) * (up_TN + self.up_bias.to(dtype))

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with exactly K experts selected per token."""
        score_TN = self.score(hidden_states)
        logits_TN = score_TN.abs() if self.config.absolute else score_TN
        probs_TN = logits_TN.softmax(dim=-1)
        indices_TK = context.decide(lambda: logits_TN.topk(self.num_experts_per_tok, dim=-1).indices)
        selected_TN = torch.zeros_like(probs_TN, dtype=torch.bool).scatter_(-1, indices_TK, True)
        weights_TN = selected_TN.to(probs_TN.dtype)
        if self.config.learned_scale:
            weights_TN = weights_TN * (1.0 + probs_TN * self.scale.to(probs_TN.dtype))
        return Routing(
            weights_TN=rescaled(weights_TN, selected_TN, self.config.rescale, self.num_experts_per_tok),
            selected_TN=selected_TN,
            logits_TN=logits_TN,
            probs_TN=probs_TN,
            indices_TK=indices_TK,
        )

    @property
    def learns_from_task(self) -> bool:
        """With `learned_scale` only: the other weights are 1."""
        return self.config.learned_scale

    def fit(self, sample: RouterSample) -> None:
        """Find the representatives and copy their rows.

        Raises:
            ConfigError: no calibration inputs.
        """
        experts = in_fp32(sample.experts)
        pick_N = representatives(sample, self.config.num_markers)
        rows_N = torch.arange(experts.num_experts, device=pick_N.device)
        parts = [(self.weight, self.bias, pick_N)]
        if experts.gated:
            parts.append((self.up_weight, self.up_bias, pick_N + experts.width))
        for weight, bias, index_N in parts:
            row_ND = experts.in_NPD[rows_N, index_N]
            bias_N = (
                row_ND.new_zeros(len(rows_N)) if experts.in_bias_NP is None else experts.in_bias_NP[rows_N, index_N]
            )
            if self.config.unit_norm:
                length_N = row_ND.norm(dim=-1).clamp(min=torch.finfo(row_ND.dtype).tiny)
                row_ND, bias_N = row_ND / length_N.unsqueeze(-1), bias_N / length_N
            weight.data.copy_(row_ND)
            bias.data.copy_(bias_N)
        self.attach(experts.act)


@torch.no_grad()
def representatives(sample: RouterSample, num_markers: int) -> Tensor:
    """The neuron of each expert whose marks are closest to the expert's mean column: int64 (N,), within its expert.

    Args:
        sample: experts, shared experts and inputs.
        num_markers: neurons that a token marks; those with the largest |activation| of all, the shared ones included.

    Raises:
        ConfigError: no calibration inputs.
    """
    inputs_TD = required_inputs(sample, "router representative")
    banks = [in_fp32(bank) for bank in (sample.shared, sample.experts) if bank is not None]
    experts = banks[-1]
    num_shared = banks[0].num_experts if len(banks) > 1 else 0
    real_EM = torch.cat([real_neurons(bank) for bank in banks])
    real_NM = real_EM[num_shared:]
    count_N = real_NM.sum(-1).clamp(min=1)
    markers = min(num_markers, int(real_EM.sum()))
    distance_NM = torch.zeros(experts.num_experts, experts.width, dtype=torch.float64, device=real_NM.device)
    for x_CD in chunks(inputs_TD, experts):
        size_CEM = torch.cat([_sizes(bank, x_CD) for bank in banks], dim=1)
        size_CEM = size_CEM.masked_fill(~real_EM, -1.0)
        largest = size_CEM.flatten(1).topk(markers, dim=1)
        # A neuron that is silent (ReLU) is not marked, however few are active.
        marked_CF = torch.zeros_like(size_CEM.flatten(1)).scatter_(
            1, largest.indices, (largest.values > 0).to(size_CEM)
        )
        marks_CNM = marked_CF.view_as(size_CEM)[:, num_shared:]
        mean_CN = marks_CNM.sum(-1) / count_N
        distance_NM += (marks_CNM.sum(0) - 2.0 * torch.einsum("cnm,cn->nm", marks_CNM, mean_CN)).double()
    return distance_NM.masked_fill(~real_NM, torch.inf).argmin(dim=-1)


def _sizes(bank: StackedExperts, x_CD: Tensor) -> Tensor:
    """|activation| of all neurons of a bank: (C, E, M)."""
    return bank.hidden(x_CD).abs()
