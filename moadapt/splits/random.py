"""Random equal groups of neurons (the split of LLaMA-MoE v1's launched runs, 2406.16554).

With S shared experts, S of the random groups are shared. All blocks are cut by the same permutation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moadapt.ffn import FeedForward
from moadapt.registry import SPLITS
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig, index_lists, slices


class RandomSplitConfig(SplitConfig):
    """Options of the `random` split.

    Attributes:
        seed: seed of the permutation.
    """

    kind: Literal["random"] = "random"
    seed: int = 0


@SPLITS.register("random", RandomSplitConfig)
class RandomSplit(Split):
    """Expert i is the i-th slice of a random permutation."""

    config: RandomSplitConfig

    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """int64 (S + N, M); see `Split.assign`."""
        generator = torch.Generator().manual_seed(self.config.seed)
        order_F = torch.randperm(sizes.num_neurons, generator=generator)
        return index_lists(slices(order_F, sizes.counts), sizes.width)
