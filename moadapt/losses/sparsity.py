"""Losses for routers that choose how many experts a token gets.

Symbols: T real tokens of one router, N experts, L routers, p scores before selection (sigmoids, ReLUs), G_ti = p_ti
where expert i is kept for token t and 0 elsewhere, c_i tokens that keep expert i, sg stops the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moadapt.losses.base import AuxiliaryLoss, Group, LossConfig, groups, reduce_routers
from moadapt.registry import LOSSES, KindConfig
from moadapt.routing import RoutingRecord

_STRENGTH = "strength"
_SHARE = "active_share"
_BOUNDS = 1e-12, 1e6


class SparsityConfig(LossConfig):
    """Options of `sparsity`.

    Attributes:
        penalise: `G`, the thresholded gates, which pushes active experts down only; or `S`, the straight-through gates:
            the same value, and a gradient to every expert.
    """

    kind: Literal["sparsity"] = "sparsity"
    coef: float = Field(default=1.0, ge=0.0)
    penalise: Literal["G", "S"] = "G"


@LOSSES.register("sparsity", SparsityConfig)
class SparsityLoss(AuxiliaryLoss):
    """L = 1/L sum over routers of 1/N sum_i mean_t G_ti, an L1 penalty on the gates.

    DSMoE (2502.12455, eqs. 17-19), with the mean over tokens that the paper leaves open, and its implicit coefficient
    of 1.
    """

    config: SparsityConfig

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """Scalar; see the class."""
        values = []
        for group in groups(records):
            gates_MTN = group.probabilities("selected")
            if self.config.penalise == "S":
                gates_MTN = gates_MTN.detach() + (group.probs_MTN - group.probs_MTN.detach())
            values.append(_token_mean(group, gates_MTN).mean(-1))
        return reduce_routers(values, "mean")


class TargetSparsityConfig(LossConfig):
    """Options of `target_sparsity`.

    Attributes:
        target: share of the routed experts that a token shall keep on average, over all routers: k / N.
        form: `adaptive` as ReMoE, or `absolute`; see the class.
        initial_strength: lambda in the first step (`adaptive`).
        multiplier: what changes lambda from step to step (`adaptive`). A smaller one overshoots less where the router
            learns slowly: gates that were pushed to zero for every token do not come back.
    """

    kind: Literal["target_sparsity"] = "target_sparsity"
    coef: float = Field(default=1.0, ge=0.0)
    target: float = Field(default=0.5, gt=0.0, lt=1.0)
    form: Literal["adaptive", "absolute"] = "adaptive"
    initial_strength: float = Field(default=1e-8, ge=_BOUNDS[0], le=_BOUNDS[1])
    multiplier: float = Field(default=1.2, gt=1.0)


@LOSSES.register("target_sparsity", TargetSparsityConfig)
class TargetSparsityLoss(AuxiliaryLoss):
    """Drives the share of active experts to a target.

    `adaptive`, ReMoE (2412.14711): L = lambda / L sum over routers of 1 / (target T²) sum_i c_i sum_t G_ti. After each
    optimizer step lambda is multiplied by 1.2 if more experts were active than the target, over all routers,
    micro-batches and processes of the step, and divided by it otherwise. It stays within 1e-12 and 1e6.

    `absolute`: L = |1/L sum over routers of mean_ti m_ti - target|, with m_ti = 1[i kept for t] + p_ti - sg(p_ti), a
    straight-through indicator. No state.

    `measured["active_share"]` is the share in either form, `state["strength"]` lambda.
    """

    steers_share = True
    config: TargetSparsityConfig

    def __init__(self, config: TargetSparsityConfig) -> None:
        super().__init__(config)
        if config.form == "adaptive":
            self.state[_STRENGTH] = config.initial_strength

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """Scalar; see the class."""
        shares, penalties = [], []
        for group in groups(records):
            kept_MTN = group.selected_MTN.to(group.probs_MTN.dtype)
            if self.config.form == "absolute":
                kept_MTN = kept_MTN + (group.probs_MTN - group.probs_MTN.detach())
            share_MN = _token_mean(group, kept_MTN)
            shares.append(share_MN.mean(-1))
            if self.config.form == "adaptive":
                gates_MN = _token_mean(group, group.probabilities("selected"))
                penalties.append((share_MN * gates_MN).sum(-1) / self.config.target)
        share = reduce_routers(shares, "mean")
        self.measured = {_SHARE: share.detach()}
        if self.config.form == "absolute":
            return (share - self.config.target).abs()
        return self.state[_STRENGTH] * reduce_routers(penalties, "mean")

    def end_step(self, parts: Mapping[str, float]) -> None:
        """Change lambda by the step's share of active experts."""
        if self.config.form != "adaptive" or _SHARE not in parts:
            return
        factor = self.config.multiplier if parts[_SHARE] > self.config.target else 1.0 / self.config.multiplier
        self.state[_STRENGTH] = min(max(self.state[_STRENGTH] * factor, _BOUNDS[0]), _BOUNDS[1])

    @classmethod
    def check(cls, config: KindConfig, router_selects_all: bool) -> None:
        """A router that keeps every expert has no share to change."""
        if router_selects_all:
            raise ValueError(
                "target_sparsity does nothing with a router that selects every expert; use router.kind: relu or "
                "sigmoid_ste"
            )


def _token_mean(group: Group, values_MTN: Tensor) -> Tensor:
    """Mean over real tokens: (M, N); zero when there are none."""
    mask_T1 = group.mask_T.unsqueeze(-1)
    return torch.where(mask_T1 > 0, values_MTN, 0.0).sum(1) / group.mask_T.sum().clamp(min=1.0)
