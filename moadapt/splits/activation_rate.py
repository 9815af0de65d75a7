"""Shared experts from always-active neurons, routed experts from neurons that are active on the same tokens.

CMoE (2502.04416). On calibration text every token marks its K_a neurons with the largest |h|. The neurons with the
highest rate of marks are shared. Of the others, the N with the highest rate are the seeds of the routed experts, and
every neuron is a binary column over the tokens:

    min sum_f |a_f - c_n(f)|²   over assignments with equal sizes; first c_n = the column of seed n

With one iteration this is the released code: between binary columns the L1 distance is the squared L2 distance. More
iterations go on with the means of the clusters, as balanced k-means. Columns are kept as lists of marks, so memory
grows with the marks and not with neurons times tokens.

Shapes: T tokens, F neurons, K marks per token, G the neurons that are not shared, N routed experts, P a few neurons.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moadapt.ffn import FeedForward
from moadapt.registry import SPLITS
from moadapt.splits.activity import markers, rates, take_shared
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig, index_lists, required
from moadapt.splits.clustering import balanced_k_means

_PIECE = 512


class ActivationRateSplitConfig(SplitConfig):
    """Options of the `activation_rate` split.

    Attributes:
        markers_per_token: K_a, how many neurons of every token count as active.
        iterations: assignments that are made; 1 assigns to the seeds and stops, as CMoE's code.
    """

    kind: Literal["activation_rate"] = "activation_rate"
    markers_per_token: int = Field(default=10, ge=1)
    iterations: int = Field(default=1, ge=1)


@SPLITS.register("activation_rate", ActivationRateSplitConfig)
class ActivationRateSplit(Split):
    """Routed expert n grows around the neuron with the n-th highest activation rate that is not shared."""

    config: ActivationRateSplitConfig

    def needs_inputs(self, num_shared: int) -> bool:
        """Always."""
        return True

    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """int64 (S + N, M); see `Split.assign`."""
        inputs_TD = required(sample.inputs_TD, "the inputs", self.config.kind, layer)
        markers_TK = markers(ffn, inputs_TD, self.config.markers_per_token)
        rate_F = rates(markers_TK, sizes.num_neurons)
        shared, routed_G = take_shared(rate_F, sizes)
        seeds_N = rate_F[routed_G].argsort(descending=True, stable=True)[: sizes.num_experts]
        labels_G = balanced_k_means(
            MarkerPoints(markers_TK, routed_G, sizes.num_neurons),
            sizes.routed_counts,
            iterations=self.config.iterations,
            first_N=seeds_N,
        )
        routed = [routed_G[labels_G == expert] for expert in range(sizes.num_experts)]
        return index_lists(shared + routed, sizes.width)


class MarkerPoints:
    """Binary columns over tokens as points to be clustered (`moadapt.splits.clustering.Points`), D = T.

    Args:
        markers_TK: the neurons that each token marks.
        chosen_G: the neurons that take part.
        num_neurons: F.
    """

    def __init__(self, markers_TK: Tensor, chosen_G: Tensor, num_neurons: int) -> None:
        self._markers_TK, self._chosen_G, self._num_neurons = markers_TK, chosen_G, num_neurons
        self._squares_G = torch.bincount(markers_TK.flatten(), minlength=num_neurons)[chosen_G].float()

    def __len__(self) -> int:
        """G."""
        return self._chosen_G.numel()

    def rows(self, points_P: Tensor) -> Tensor:
        """See `Points`."""
        rows = [(self._markers_TK == neuron).any(dim=-1) for neuron in self._chosen_G[points_P].tolist()]
        return torch.stack(rows).float()

    def distances(self, centroids_ND: Tensor) -> Tensor:
        """See `Points`."""
        products_FN = torch.zeros(self._num_neurons, len(centroids_ND))
        per_token = self._markers_TK.shape[1]
        for start in range(0, len(self._markers_TK), _PIECE):
            marks = self._markers_TK[start : start + _PIECE].flatten()
            values_TN = centroids_ND[:, start : start + _PIECE].T
            products_FN.index_add_(0, marks, values_TN.repeat_interleave(per_token, dim=0))
        products_GN = products_FN[self._chosen_G]
        return (self._squares_G[:, None] + centroids_ND.square().sum(-1) - 2.0 * products_GN).clamp_(min=0.0)

    def means(self, labels_G: Tensor, num_clusters: int) -> Tensor:
        """See `Points`."""
        cluster_F = torch.full((self._num_neurons,), num_clusters)  # one more cluster, for the neurons that are not in
        cluster_F[self._chosen_G] = labels_G
        marks_TN = torch.zeros(len(self._markers_TK), num_clusters + 1)
        marks_TN.scatter_add_(1, cluster_F[self._markers_TK], torch.ones(self._markers_TK.shape))
        size_N = torch.bincount(labels_G, minlength=num_clusters).clamp(min=1)
        return (marks_TN[:, :num_clusters] / size_N).T
