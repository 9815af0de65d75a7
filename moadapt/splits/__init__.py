"""Ways of cutting a block into experts, one file each. Importing this package fills `moadapt.registry.SPLITS`."""

from moadapt.splits.activation_rate import ActivationRateSplit, ActivationRateSplitConfig
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig
from moadapt.splits.coactivation import CoactivationSplit, CoactivationSplitConfig
from moadapt.splits.contiguous import ContiguousSplit, ContiguousSplitConfig
from moadapt.splits.file import FileSplit, FileSplitConfig
from moadapt.splits.gradient import GradientSplit, GradientSplitConfig
from moadapt.splits.kmeans import KMeansSplit, KMeansSplitConfig
from moadapt.splits.random import RandomSplit, RandomSplitConfig

__all__ = [
    "ActivationRateSplit",
    "ActivationRateSplitConfig",
    "BlockSample",
    "CoactivationSplit",
    "CoactivationSplitConfig",
    "ContiguousSplit",
    "ContiguousSplitConfig",
    "FileSplit",
    "FileSplitConfig",
    "GradientSplit",
    "GradientSplitConfig",
    "KMeansSplit",
    "KMeansSplitConfig",
    "RandomSplit",
    "RandomSplitConfig",
    "Sizes",
    "Split",
    "SplitConfig",
]
