"""Neurons that are active together form an expert.

MoEfication's graph split (2110.01786): neurons i and j are joined with the weight w_ij = sum_t p_ti p_tj of their
activations, and the graph is cut into equal parts of the largest inner weight. For parts of equal size F / N,

    sum over parts of sum_{i,j in part} w_ij  =  F / N (sum_i |p_i|² - sum_i |p_i - mean of i's part|²),

so balanced k-means on the profiles p_i (what neuron i does over the tokens) optimises the same cut without the (F, F)
graph, and without METIS. Profiles over more tokens than `dimensions` are projected at random, which keeps distances up
to about 1 / sqrt(dimensions). Memory is one (F, dimensions) matrix. With S shared experts, the neurons with the highest
activation rate are shared, as in CMoE (2502.04416), and the others are clustered.

Shapes: T tokens, P tokens of one piece, F neurons, R dimensions of the profiles, G the neurons that are not shared.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moadapt.ffn import FeedForward
from moadapt.registry import SPLITS
from moadapt.splits.activity import hidden_pieces, markers, rates, take_shared
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig, clusters, index_lists, required
from moadapt.splits.clustering import RowPoints, balanced_k_means


class CoactivationSplitConfig(SplitConfig):
    """Options of the `coactivation` split.

    Attributes:
        profile: what a neuron's activity at a token is: its `magnitude` |h|, or its `positive` part max(h, 0) as in
            MoEfication; the same thing for ReLU.
        normalize: scale every profile to length 1, so that w_ij is a cosine and strong neurons do not decide alone.
        dimensions: profiles over more tokens are projected to so many dimensions.
        iterations: the most assignments that are made from one start; it stops early when next to nothing is gained.
        restarts: random starts, of which the best result is kept.
        seed: seed of the projection and of the starts.
        markers_per_token: how many neurons of every token count as active, for the choice of the shared experts.
    """

    kind: Literal["coactivation"] = "coactivation"
    profile: Literal["magnitude", "positive"] = "magnitude"
    normalize: bool = True
    dimensions: int = Field(default=1024, ge=1)
    iterations: int = Field(default=30, ge=1)
    restarts: int = Field(default=1, ge=1)
    seed: int = 0
    markers_per_token: int = Field(default=10, ge=1)


@SPLITS.register("coactivation", CoactivationSplitConfig)
class CoactivationSplit(Split):
    """Experts are balanced clusters of activation profiles."""

    config: CoactivationSplitConfig

    def needs_inputs(self, num_shared: int) -> bool:
        """Always."""
        return True

    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """int64 (S + N, M); see `Split.assign`."""
        config = self.config
        inputs_TD = required(sample.inputs_TD, "the inputs", config.kind, layer)
        shared: list[Tensor] = []
        routed_G = torch.arange(sizes.num_neurons)
        if sizes.num_shared:
            rate_F = rates(markers(ffn, inputs_TD, config.markers_per_token), sizes.num_neurons)
            shared, routed_G = take_shared(rate_F, sizes)
        labels_G = balanced_k_means(
            RowPoints(self.profiles(ffn, inputs_TD), routed_G),
            sizes.routed_counts,
            iterations=config.iterations,
            restarts=config.restarts,
            seed=config.seed,
        )
        return index_lists(shared + clusters(routed_G, labels_G, sizes.num_experts), sizes.width)

    def profiles(self, ffn: FeedForward, inputs_TD: Tensor) -> Tensor:
        """Activity of every neuron over the tokens, projected if need be: fp32 (F, R)."""
        num_tokens, num_neurons = len(inputs_TD), ffn.num_neurons
        device = ffn.up_FD.device
        dimensions = min(self.config.dimensions, num_tokens)
        generator = torch.Generator().manual_seed(self.config.seed)
        profiles_FR = torch.zeros(num_neurons, dimensions, device=device)
        squares_F = torch.zeros(num_neurons, device=device)
        start = 0
        for hidden_PF in hidden_pieces(ffn, inputs_TD):
            activity_PF = hidden_PF.abs() if self.config.profile == "magnitude" else hidden_PF.clamp(min=0.0)
            squares_F += activity_PF.square().sum(0)
            stop = start + len(activity_PF)
            if dimensions == num_tokens:
                profiles_FR[:, start:stop] = activity_PF.T
            else:
                project_PR = torch.randn(len(activity_PF), dimensions, generator=generator) / dimensions**0.5
                profiles_FR.addmm_(activity_PF.T, project_PR.to(device))
            start = stop
        if self.config.normalize:
            profiles_FR *= squares_F.sqrt().clamp(min=1e-12).reciprocal().unsqueeze(1)
        return profiles_FR
