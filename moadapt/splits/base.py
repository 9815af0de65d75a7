"""What every way of cutting a feed-forward block into experts shares: its options and its interface.

Shapes: T tokens, D hidden size, F neurons of the block, S shared experts, N routed experts, M neurons of one expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moadapt.ffn import FeedForward
from moadapt.registry import KindConfig


class SplitConfig(KindConfig):
    """Options of every split: none but its name."""


@dataclass(frozen=True)
class BlockSample:
    """What calibration saw at one feed-forward block.

    Attributes:
        inputs_TD: fp32 inputs of the block, real tokens only; None unless the split (or the router) asked for them.
        importance_CF: fp32 mean over the tokens of text cluster c of |h_f * dL/dh_f|, h the input of the
            down-projection; None unless the split asked for gradients.
    """

    inputs_TD: Tensor | None = None
    importance_CF: Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """How many experts, and how wide.

    Attributes:
        num_shared: S, experts that are always on.
        num_experts: N, routed experts.
        num_neurons: F.
    """

    num_shared: int
    num_experts: int
    num_neurons: int

    @property
    def width(self) -> int:
        """M, neurons of one expert: F / (S + N), rounded up."""
        return -(-self.num_neurons // (self.num_shared + self.num_experts))


class Split(ABC):
    """Says which neurons form which expert.

    Args:
        config: the options of this kind.
    """

    needs_inputs: ClassVar[bool] = False
    """Whether `assign` reads `BlockSample.inputs_TD`."""
    needs_gradients: ClassVar[bool] = False
    """Whether `assign` reads `BlockSample.importance_CF`."""

    def __init__(self, config: SplitConfig) -> None:
        self.config = config

    @abstractmethod
    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """Index lists of the experts.

        Args:
            ffn: the dense block.
            sizes: how many experts, and how wide.
            sample: what calibration saw, if this split asked for it.
            layer: the block's name in the model, for messages and for index lists from a file.

        Returns:
            int64 (S + N, M) on the CPU, the shared experts first: every neuron exactly once, and
            `moadapt.ffn.PADDING` at the end of the rows that have one neuron less. Sizes differ by at most one.
        """
