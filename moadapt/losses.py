"""Auxiliary losses: what is added to the language-model loss so that a router behaves.

A loss reads the routings of one forward pass (`RoutingRecord`) and returns a scalar. It looks at real tokens only.
`MixtureModel` multiplies it by `coef` and adds it to the loss in training.

Symbols: T real tokens of one router, N experts, K experts per token, p probabilities before selection, c_i tokens
that selected expert i, f_i share of expert i in all selections, P_i mean of p_ti over tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from einops import reduce, repeat
from pydantic import Field
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.registry import LOSSES, KindConfig
from moadapt.routing import RoutingRecord

Reduce = Literal["mean", "sum"]
Probs = Literal["full", "selected"]


class LossConfig(KindConfig):
    """Options of every auxiliary loss.

    Attributes:
        coef: factor of the loss in the sum that is trained.
    """

    coef: float = Field(default=0.01, ge=0.0)


class AuxiliaryLoss(ABC):
    """A scalar computed from the routings of one forward pass."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """The loss over all routers of the pass, before `coef`.

        Args:
            records: one per router; at least one.

        Returns:
            A scalar in the routers' dtype.
        """

    @classmethod
    def check(cls, config: KindConfig, router_selects_all: bool) -> None:
        """Refuse options that do nothing with this sort of router; here, none.

        Raises:
            ValueError: names the option and the way out.
        """
        return


class _Group:
    """Routers with equal shapes and mask, stacked along a first dimension M so that one operation serves all."""

    def __init__(self, records: Sequence[RoutingRecord]) -> None:
        first = records[0]
        self.batch_size = first.batch_size
        self.logits_MTN = torch.stack([record.routing.logits_TN for record in records])
        self.probs_MTN = torch.stack([record.routing.probs_TN for record in records])
        self.selected_MTN = torch.stack([record.routing.selected_TN for record in records])
        tokens = self.probs_MTN.shape[1]
        mask = first.mask_T if first.mask_T is not None else torch.ones(tokens, device=self.probs_MTN.device)
        self.mask_T = mask.to(device=self.probs_MTN.device, dtype=self.probs_MTN.dtype)

    def probabilities(self, which: Probs) -> Tensor:
        """(M, T, N): all probabilities, or those of the selected experts with zeros elsewhere."""
        return self.probs_MTN if which == "full" else self.probs_MTN * self.selected_MTN


def _groups(records: Sequence[RoutingRecord]) -> Iterator[_Group]:
    grouped: dict[tuple[object, ...], list[RoutingRecord]] = {}
    for record in records:
        logits = record.routing.logits_TN
        mask = record.mask_T
        key = (logits.shape, logits.device, record.batch_size, None if mask is None else mask.data_ptr())
        grouped.setdefault(key, []).append(record)
    for members in grouped.values():
        yield _Group(members)


def _reduce(per_router: list[Tensor], how: Reduce) -> Tensor:
    values = torch.cat([values.flatten().to(per_router[0].device) for values in per_router])
    return values.mean() if how == "mean" else values.sum()


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
        sums = [self._sums(group) for group in _groups(records)]
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
        return _reduce(values, "sum" if self.config.reduce == "sum" else "mean")

    @staticmethod
    def _pool(sums: list[Tensor]) -> Tensor:
        """Sum over all routers, kept as a first dimension of one."""
        return torch.cat([values.to(sums[0].device) for values in sums]).sum(0, keepdim=True)

    def _sums(self, group: _Group) -> tuple[Tensor, Tensor, Tensor]:
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
        for group in _groups(records):
            z_MT = torch.logsumexp(group.logits_MTN, dim=-1).square()
            values.append((z_MT * group.mask_T).sum(-1) / group.mask_T.sum().clamp(min=1.0))
        return _reduce(values, self.config.reduce)


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
        for group in _groups(records):
            importance_MN = (group.probabilities(self.config.probs) * group.mask_T.unsqueeze(-1)).sum(1)
            mean_M = importance_MN.mean(-1)
            variance_M = importance_MN.var(-1, correction=0)
            # No real token at all: importance is 0 everywhere, which is balance.
            values.append(variance_M / mean_M.square().clamp(min=torch.finfo(mean_M.dtype).tiny))
        return _reduce(values, self.config.reduce)
