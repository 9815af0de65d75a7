"""Auxiliary losses: what is added to the language-model loss so that a router behaves, or a converted model heals.

A loss reads the routings of one forward pass (`RoutingRecord`) and returns a scalar. It looks at real tokens only.
`MixtureModel` multiplies it by `coef` and adds it to the loss in training. Importing this package fills the table
`moadapt.registry.LOSSES`.
"""

from moadapt.losses.balance import (
    ImportanceConfig,
    ImportanceLoss,
    LoadBalanceConfig,
    LoadBalanceLoss,
    RouterZConfig,
    RouterZLoss,
)
from moadapt.losses.base import AuxiliaryLoss, LossConfig, Probs, Reduce
from moadapt.losses.distillation import (
    BlockDistillationConfig,
    BlockDistillationLoss,
    LogitsDistillationConfig,
    LogitsDistillationLoss,
    distillation_kl,
)
from moadapt.losses.sparsity import SparsityConfig, SparsityLoss, TargetSparsityConfig, TargetSparsityLoss

__all__ = [
    "AuxiliaryLoss",
    "BlockDistillationConfig",
    "BlockDistillationLoss",
    "ImportanceConfig",
    "ImportanceLoss",
    "LoadBalanceConfig",
    "LoadBalanceLoss",
    "LogitsDistillationConfig",
    "LogitsDistillationLoss",
    "LossConfig",
    "Probs",
    "Reduce",
    "RouterZConfig",
    "RouterZLoss",
    "SparsityConfig",
    "SparsityLoss",
    "TargetSparsityConfig",
    "TargetSparsityLoss",
    "distillation_kl",
]
