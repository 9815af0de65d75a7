"""What every way of cutting a feed-forward block into experts shares: its options and its interface.

Shapes: T tokens, D hidden size, F neurons of the block, S shared experts, N routed experts, M neurons of one expert,
C text clusters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.ffn import PADDING, FeedForward
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

    @property
    def counts(self) -> list[int]:
        """Neurons of each of the S + N experts, the shared ones first: the first F mod (S + N) hold one more."""
        least, larger = divmod(self.num_neurons, self.num_shared + self.num_experts)
        return [least + (expert < larger) for expert in range(self.num_shared + self.num_experts)]

    @property
    def shared_counts(self) -> list[int]:
        """Neurons of each of the S shared experts."""
        return self.counts[: self.num_shared]

    @property
    def routed_counts(self) -> list[int]:
        """Neurons of each of the N routed experts."""
        return self.counts[self.num_shared :]


class Split(ABC):
    """Says which neurons form which expert.

    Args:
        config: the options of this kind.
    """

    def __init__(self, config: SplitConfig) -> None:
        self.config = config

    def needs_inputs(self, num_shared: int) -> bool:
        """Whether `assign` reads `BlockSample.inputs_TD` when there are S shared experts."""
        return False

    def needs_gradients(self) -> bool:
        """Whether `assign` reads `BlockSample.importance_CF`."""
        return False

    @abstractmethod
    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """Index lists of the experts.

        Args:
            ffn: the dense block.
            sizes: how many experts, and how wide.
            sample: what calibration saw, if this split asked for it.
            layer: the block's name in the model, for messages and for index lists from a file.

        Returns:
            int64 (S + N, M) on the CPU, the shared experts first: every neuron exactly once, ascending within an
            expert, and `moadapt.ffn.PADDING` at the end of the rows that have one neuron less. Sizes differ by at
            most one.

        Raises:
            ConfigError: the sample lacks what this split needs.
        """


def index_lists(groups: Sequence[Tensor], width: int) -> Tensor:
    """One row per group of neuron indices, ascending, padded to `width`: int64 (S + N, M) on the CPU."""
    rows = torch.full((len(groups), width), PADDING, dtype=torch.int64)
    for row_M, group in zip(rows, groups, strict=True):
        row_M[: group.numel()] = group.to(device="cpu", dtype=torch.int64).sort().values
    return rows


def slices(neurons_F: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Consecutive pieces of the list, one per count."""
    return list(torch.split(neurons_F, list(counts)))


def clusters(neurons_G: Tensor, labels_G: Tensor, num_clusters: int) -> list[Tensor]:
    """The neurons of every cluster, the clusters ordered by their smallest neuron.

    Args:
        neurons_G: int64 indices of the G neurons that were clustered.
        labels_G: int64 cluster of each.
        num_clusters: number of clusters, none of them empty.
    """
    groups = [neurons_G[labels_G == cluster] for cluster in range(num_clusters)]
    return sorted(groups, key=lambda group: int(group.min()))


def required(tensor: Tensor | None, what: str, kind: str, layer: str) -> Tensor:
    """The tensor of a sample.

    Raises:
        ConfigError: calibration did not give it.
    """
    if tensor is None or tensor.numel() == 0:
        raise ConfigError(
            f"expert.split: {kind} needs {what} of {layer} on calibration text, and there is none; give "
            "`calibration.path`, or choose a split that needs no data: contiguous, random, kmeans (without shared "
            "experts)"
        )
    return tensor
