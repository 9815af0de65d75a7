"""Losses that spread the tokens over the experts and keep the logits small.

Symbols: T real tokens of one router, N experts, K experts per token, p probabilities before selection, c_i tokens
that selected expert i, f_i share of expert i in all selections, P_i mean of p_ti over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import reduce, repeat
from pydantic import Field
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.losses.base import AuxiliaryLoss, Group, LossConfig, Probs, Reduce, groups, reduce_routers
from moadapt.registry import LOSSES, KindConfig
from moadapt.routing import RoutingRecord


class LoadBalanceConfig(LossConfig):
    """Options of `load_balance`. The defaults give a loss whose optimum is 1 for every K.

    Attributes:
        count: what counts as a token of expert i. `topk`: every selection, divided by their number (f sums to 1);
            `topk_unnormalized`: every selection, divided by T only (optimum K, as Mixtral, Qwen-MoE and OLMoE);
            `argmax`: the most probable expert only (Switch, MiLoRA).
        probs: P from the `full` softmax, or from the `selected` probabilities with zeros elsewhere (MixLoRA's eq. 9).
        reduce: over routers: `mean`, `sum` (MoLA, AdaMoLE), or `pooled`, one statistic over the tokens of all routers
            (transformers; it cannot see layers that collapse onto different experts).
        level: statistics over the `batch`, or per `sequence` and then averaged (Megatron's seq_aux_loss).
    """

    kind: Literal["load_balance"] = "load_balance"
    count: Literal["topk", "topk_unnormalized", "argmax"] = "topk"
    probs: Probs = "full"
    reduce: Literal["mean", "sum", "pooled"] = "mean"
    level: Literal["batch", "sequence"] = "batch"


@LOSSES.register("load_balance", LoadBalanceConfig)
class LoadBalanceLoss(AuxiliaryLoss):
    """L = N sum_i f_i P_i per router, then the mean over routers.

    Switch Transformers (2101.03961, eqs. 4-6), extended to K selections as in Megatron-LM: f_i = c_i / (K T). It is 1
    at perfect balance and N at total collapse with K = 1. The gradient flows through P only.
    """

    config: LoadBalanceConfig

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """Scalar; see the class. Raises ConfigError when `pooled` meets routers with different N."""
        sums = [self._sums(group) for group in groups(records)]
        if self.config.reduce == "pooled":
            if len({probs.shape[-1] for _, probs, _ in sums}) > 1:
                raise ConfigError("losses.load_balance.reduce: pooled needs one num_experts for all layers; use mean")
            counts, probs, tokens = (self._pool([item[part] for item in sums]) for part in range(3))
            sums = [(counts, probs, tokens)]
        values = []
        for counts_MBN, probs_MBN, tokens_MB in sums:
            tokens_MB1 = tokens_MB.unsqueeze(-1)
            denominator = counts_MBN.sum(-1, keepdim=True) if self.config.count == "topk" else tokens_MB1
            f_MBN = counts_MBN / denominator.clamp(min=1.0)
            p_MBN = probs_MBN / tokens_MB1.clamp(min=1.0)
            per_sequence_MB = probs_MBN.shape[-1] * (f_MBN * p_MBN).sum(-1)
            real_MB = (tokens_MB > 0).to(per_sequence_MB.dtype)
            values.append((per_sequence_MB * real_MB).sum(-1) / real_MB.sum(-1).clamp(min=1.0))
        return reduce_routers(values, "sum" if self.config.reduce == "sum" else "mean")

    @staticmethod
    def _pool(sums: list[Tensor]) -> Tensor:
        """Sum over all routers, kept as a first dimension of one."""
        return torch.cat([values.to(sums[0].device) for values in sums]).sum(0, keepdim=True)

    def _sums(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over tokens, with B = 1 for level `batch`: counts (M, B, N), probabilities (M, B, N), tokens (M, B)."""
        rows = group.batch_size if self.config.level == "sequence" else 1
        chosen_MTN = group.selected_MTN
        if self.config.count == "argmax":
            best_MT1 = group.probs_MTN.argmax(-1, keepdim=True)
            chosen_MTN = torch.zeros_like(chosen_MTN).scatter_(-1, best_MT1, True)
        mask_T1 = group.mask_T.unsqueeze(-1)
        counts_MBN = reduce(chosen_MTN * mask_T1, "m (b s) n -> m b n", "sum", b=rows)
        probs_MBN = reduce(group.probabilities(self.config.probs) * mask_T1, "m (b s) n -> m b n", "sum", b=rows)
        tokens_MB = repeat(reduce(group.mask_T, "(b s) -> b", "sum", b=rows), "b -> m b", m=chosen_MTN.shape[0])
        return counts_MBN.detach(), probs_MBN, tokens_MB

    @classmethod
    def check(cls, config: KindConfig, router_selects_all: bool) -> None:
        """Counting selections says nothing about a router that selects every expert."""
        assert isinstance(config, LoadBalanceConfig)
        if router_selects_all and config.count != "argmax":
            raise ValueError(
                f"load_balance with count: {config.count} is constant for a router that selects every expert and so "
                "trains nothing; use count: argmax, or the loss `importance`"
            )


class RouterZConfig(LossConfig):
    """Options of `router_z`.

    Attributes:
        reduce: `mean` or `sum` over routers.
    """

    kind: Literal["router_z"] = "router_z"
    coef: float = Field(default=1e-3, ge=0.0)
    reduce: Reduce = "mean"


@LOSSES.register("router_z", RouterZConfig)
class RouterZLoss(AuxiliaryLoss):
    """L = mean_t (logsumexp_i logits_ti)² per router: keeps the logits small (ST-MoE, 2202.08906, eq. 5)."""

    config: RouterZConfig

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """Scalar; see the class."""
        values = []
        for group in groups(records):
            z_MT = torch.logsumexp(group.logits_MTN, dim=-1).square()
            values.append((z_MT * group.mask_T).sum(-1) / group.mask_T.sum().clamp(min=1.0))
        return reduce_routers(values, self.config.reduce)


class ImportanceConfig(LossConfig):
    """Options of `importance`.

    Attributes:
        probs: importance from the `full` softmax, or from the `selected` probabilities.
        reduce: `mean` or `sum` over routers.
    """

    kind: Literal["importance"] = "importance"
    probs: Probs = "full"
    reduce: Reduce = "mean"


@LOSSES.register("importance", ImportanceConfig)
class ImportanceLoss(AuxiliaryLoss):
    """L = CV²(I) = (std(I) / mean(I))², I_i = sum_t p_ti, population standard deviation; 0 at balance.

    Shazeer et al. (1701.06538, eqs. 6-7), with the population form of V-MoE.
    """

    config: ImportanceConfig

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """Scalar; see the class."""
        values = []
        for group in groups(records):
            importance_MN = (group.probabilities(self.config.probs) * group.mask_T.unsqueeze(-1)).sum(1)
            mean_M = importance_MN.mean(-1)
            variance_M = importance_MN.var(-1, correction=0)
            # No real token at all: importance is 0 everywhere, which is balance.
            values.append(variance_M / mean_M.square().clamp(min=torch.finfo(mean_M.dtype).tiny))
        return reduce_routers(values, self.config.reduce)
