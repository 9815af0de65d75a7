"""What the linear routers share: scores W x + b, and how W starts.

    s = W x + b             W (N, D), b (N,) or none, in fp32

`init: mean_gate` sets a row to the mean of its expert's gate rows (up rows in a plain block), so that the score is the
expert's mean pre-activation: the training-free router of EMoE (2310.10908) and ExpertWeaver (2602.15521). It is exactly
linear. Where the block has biases on these rows, `bias: true` carries their mean over as well; without it the score
leaves them out.

Shapes: T rows to route, D hidden size, N experts, M neurons of one expert, P = 2 M rows of gated experts (M of plain).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from moadapt.ffn import StackedExperts
from moadapt.routers.base import Router, RouterConfig, RouterSample, linear_logits

Init = Literal["normal", "zeros", "mean_gate"]


class LinearRouterConfig(RouterConfig):
    """Options of the linear routers.

    Attributes:
        init: how the weights start: `normal` (N(0, init_std²)), `zeros`, or `mean_gate`, the mean of each expert's gate
            rows, which needs experts cut from a feed-forward block.
        bias: whether the scores have a bias; it starts at zero (`mean_gate`: at the mean of the gate biases).
    """

    init: Init = "normal"
    bias: bool = False

    @model_validator(mode="after")
    def _mean_gate_is_for_tokens(self) -> Self:
        if self.init == "mean_gate":
            self.refuse_prompts("init: mean_gate")
        return self


class LinearRouter(Router):
    """Scores of the experts by one linear layer."""

    config: LinearRouterConfig

    def create_parameters(self, device: torch.device | None) -> None:
        """`weight` (N, D), and `bias` (N,) if there is one."""
        super().create_parameters(device)
        if self.config.bias:
            self.bias = nn.Parameter(torch.zeros(self.num_experts, dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, init_std²), or set them to zero."""
        if self.config.init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            super().reset_parameters()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, N) in router precision."""
        logits_TN = linear_logits(hidden_states, self.weight)
        return logits_TN + self.bias.to(logits_TN.dtype) if self.config.bias else logits_TN

    @classmethod
    def needs_fit(cls, config: RouterConfig) -> bool:
        """With `init: mean_gate`."""
        assert isinstance(config, LinearRouterConfig)
        return config.init == "mean_gate"

    def fit(self, sample: RouterSample) -> None:
        """`init: mean_gate`; otherwise nothing."""
        if self.config.init != "mean_gate":
            return
        rows_ND, bias_N = mean_gate(sample.experts)
        self.weight.data.copy_(rows_ND)
        if self.config.bias and bias_N is not None:
            self.bias.data.copy_(bias_N)


def mean_gate(experts: StackedExperts) -> tuple[Tensor, Tensor | None]:
    """Means over each expert's neurons of the rows that feed its activation function, padding neurons left out.

    Returns:
        fp32 (N, D), and fp32 (N,) for their biases where the block has any.
    """
    width = experts.width
    real_NM = real_neurons(experts).float()
    count_N = real_NM.sum(-1).clamp(min=1.0)
    rows_ND = torch.einsum("nm,nmd->nd", real_NM, experts.in_NPD[:, :width].float()) / count_N.unsqueeze(-1)
    if experts.in_bias_NP is None:
        return rows_ND, None
    return rows_ND, (experts.in_bias_NP[:, :width].float() * real_NM).sum(-1) / count_N


def real_neurons(experts: StackedExperts) -> Tensor:
    """(N, M) bool: False at padding, neurons whose rows are zero throughout."""
    inner_NM = (experts.in_NPD != 0).any(-1)
    if experts.in_bias_NP is not None:
        inner_NM = inner_NM | (experts.in_bias_NP != 0)
    if experts.gated:
        inner_NM = inner_NM.view(experts.num_experts, 2, experts.width).any(1)
    return inner_NM | (experts.out_NMD != 0).any(-1)
