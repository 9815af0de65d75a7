"""Balanced k-means on the rows of the gate or up projection.

MoEfication (2110.01786) clusters the L2-normalised rows of W1; EMoE (2310.10908) and D2DMoE (2310.04361) those of
gate_proj. Neurons with similar rows fire on similar inputs. With S shared experts, the neurons with the highest
activation rate on calibration text are shared, as in CMoE (2502.04416), and the others are clustered.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moadapt.ffn import FeedForward
from moadapt.registry import SPLITS
from moadapt.splits.activity import markers, rates, take_shared
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig, clusters, index_lists, required
from moadapt.splits.clustering import RowPoints, balanced_k_means


class KMeansSplitConfig(SplitConfig):
    """Options of the `kmeans` split.

    Attributes:
        rows: what is clustered: rows of the `gate` projection (of a plain block, which has none, the `up` projection)
            or of the `up` projection.
        normalize: scale every row to length 1 first.
        iterations: the most assignments that are made from one start; it stops early when next to nothing is gained.
        restarts: random starts, of which the best result is kept.
        seed: seed of the starts.
        markers_per_token: how many neurons of every token count as active, for the choice of the shared experts.
    """

    kind: Literal["kmeans"] = "kmeans"
    rows: Literal["gate", "up"] = "gate"
    normalize: bool = True
    iterations: int = Field(default=30, ge=1)
    restarts: int = Field(default=1, ge=1)
    seed: int = 0
    markers_per_token: int = Field(default=10, ge=1)


@SPLITS.register("kmeans", KMeansSplitConfig)
class KMeansSplit(Split):
    """Experts are balanced clusters of weight rows."""

    config: KMeansSplitConfig

    def needs_inputs(self, num_shared: int) -> bool:
        """For shared experts only."""
        return num_shared > 0

    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """int64 (S + N, M); see `Split.assign`."""
        config = self.config
        shared: list[Tensor] = []
        routed_G = torch.arange(sizes.num_neurons)
        if sizes.num_shared:
            inputs_TD = required(sample.inputs_TD, "the inputs", "kmeans with shared experts", layer)
            rate_F = rates(markers(ffn, inputs_TD, config.markers_per_token), sizes.num_neurons)
            shared, routed_G = take_shared(rate_F, sizes)
        rows_FD = ffn.gate_FD if config.rows == "gate" and ffn.gate_FD is not None else ffn.up_FD
        labels_G = balanced_k_means(
            RowPoints(rows_FD, routed_G, config.normalize),
            sizes.routed_counts,
            iterations=config.iterations,
            restarts=config.restarts,
            seed=config.seed,
        )
        return index_lists(shared + clusters(routed_G, labels_G, sizes.num_experts), sizes.width)
