"""FactorLLM's first stage: a linear router learns which experts come closest to the block, before anything else trains.

    e_i = mean over D of (E_i(x) - T(x) / (N // K))²            T the sum of all routed experts: the dense block
    q = softmax(1[i among the K smallest e])                    the pseudo-label
    p = softmax(W x + b)                                        the router
    L = route_coef * sum_i p_i log(p_i / q_i) + balance_coef * mean_i (1[i among the K largest p] * p_i)

FactorLLM (2408.11855), as its code has it; both terms are means over tokens. The label is a softmax over zeros and
ones, and so a soft one. Stage two then trains the experts with the language-model loss.

Shapes: T calibration tokens, C of them at a time, D hidden size, N experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.routers.base import RouterSample
from moadapt.routers.fitting import FitConfig, chunks, descend, in_fp32, required_inputs


class PriorApproximateConfig(FitConfig):
    """Options of the fit `prior_approximate`.

    Attributes:
        route_coef: factor of the divergence from the pseudo-labels.
        balance_coef: factor of the balance term.
    """

    kind: Literal["prior_approximate"] = "prior_approximate"
    route_coef: float = Field(default=0.05, gt=0.0)
    balance_coef: float = Field(default=0.01, ge=0.0)


@torch.no_grad()
def prior_errors(sample: RouterSample, num_kept: int) -> Tensor:
    """How far each expert alone is from its share of the block: fp32 (T, N), e of the module's docstring.

    One expert at a time, so that the outputs of all of them are never in memory together.

    Raises:
        ConfigError: no calibration inputs.
    """
    inputs_TD = required_inputs(sample, "fit: prior_approximate")
    experts = in_fp32(sample.experts)
    share = experts.num_experts // num_kept
    rows = []
    for x_CD in chunks(inputs_TD, experts):
        target_CD = experts(x_CD) / share
        errors = [(experts.expert(i, x_CD) - target_CD).square().mean(-1) for i in range(experts.num_experts)]
        rows.append(torch.stack(errors, dim=-1))
    return torch.cat(rows)


def prior_labels(error_TN: Tensor, num_kept: int) -> Tensor:
    """The pseudo-labels q: (T, N), each row adds up to 1."""
    return _top(-error_TN, num_kept).softmax(dim=-1)


def prior_loss(logits_CN: Tensor, label_CN: Tensor, num_kept: int, config: PriorApproximateConfig) -> Tensor:
    """L of the module's docstring: a scalar."""
    log_p_CN = logits_CN.log_softmax(dim=-1)
    p_CN = log_p_CN.exp()
    route = (p_CN * (log_p_CN - label_CN.log())).sum(-1).mean()
    balance = (_top(p_CN.detach(), num_kept) * p_CN).mean()
    return config.route_coef * route + config.balance_coef * balance


def fit_prior_approximate(
    parameters: Sequence[nn.Parameter],
    logits: Callable[[Tensor], Tensor],
    sample: RouterSample,
    num_kept: int,
    config: PriorApproximateConfig,
) -> None:
    """Train a router's parameters in place.

    Args:
        parameters: of the router.
        logits: from inputs (C, D) to router scores (C, N).
        sample: experts and calibration inputs.
        num_kept: K.
        config: the options.
    """
    label_TN = prior_labels(prior_errors(sample, num_kept), num_kept).to(parameters[0])
    inputs_TD = required_inputs(sample, "fit: prior_approximate").to(parameters[0])

    def loss(index_C: Tensor) -> Tensor:
        index_C = index_C.to(inputs_TD.device)
        return prior_loss(logits(inputs_TD[index_C]), label_TN[index_C], num_kept, config)

    descend(parameters, loss, inputs_TD.shape[0], config, betas=(0.9, 0.95))


def _top(score_TN: Tensor, num_kept: int) -> Tensor:
    """1 at the K largest of each row, 0 elsewhere."""
    return torch.zeros_like(score_TN).scatter_(-1, score_TN.topk(num_kept, dim=-1).indices, 1.0)
