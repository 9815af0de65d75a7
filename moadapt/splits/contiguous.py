"""Consecutive slices of the neurons, in the order of the checkpoint.

DSMoE (2502.12455, eq. 6) and FactorLLM as released (2408.11855). With S shared experts, the first S slices are shared.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moadapt.ffn import FeedForward
from moadapt.registry import SPLITS
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig, index_lists, slices


class ContiguousSplitConfig(SplitConfig):
    """The `contiguous` split has no options."""

    kind: Literal["contiguous"] = "contiguous"


@SPLITS.register("contiguous", ContiguousSplitConfig)
class ContiguousSplit(Split):
    """Expert i is the i-th slice of F / (S + N) neurons."""

    config: ContiguousSplitConfig

    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """int64 (S + N, M); see `Split.assign`."""
        return index_lists(slices(torch.arange(sizes.num_neurons), sizes.counts), sizes.width)
