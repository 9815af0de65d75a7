"""Every expert takes the neurons that matter most to its cluster of calibration texts.

LLaMA-MoE v1 (2406.16554): the importance of neuron f for text cluster n is |h_f * dL/dh_f|, averaged over its tokens,
where h is the input of the down-projection; there is one text cluster per routed expert. With s_nf the importance as a
share of the cluster's sum, so that a cluster with large gradients has no larger say:

    max sum_f s_{n(f), f}   over assignments of neurons to experts with equal sizes (exact; v1 takes turns greedily)

With S shared experts, the neurons that matter to many clusters are shared, which v1 calls the residual block: those
with the largest importance to all the clusters but one, sum_n s_nf - max_n s_nf, which no routed expert could serve.

Shapes: F neurons, N routed experts (and text clusters), G the neurons that are not shared.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.ffn import FeedForward
from moadapt.registry import SPLITS
from moadapt.splits.activity import take_shared
from moadapt.splits.balanced import balanced_assignment
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig, index_lists, required


class GradientSplitConfig(SplitConfig):
    """The `gradient` split has no options."""

    kind: Literal["gradient"] = "gradient"


@SPLITS.register("gradient", GradientSplitConfig)
class GradientSplit(Split):
    """Expert n holds the neurons that are important to text cluster n."""

    config: GradientSplitConfig

    def needs_gradients(self) -> bool:
        """Always."""
        return True

    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """int64 (S + N, M); see `Split.assign`."""
        importance_NF = required(sample.importance_CF, "the importance of the neurons", self.config.kind, layer)
        if importance_NF.shape != (sizes.num_experts, sizes.num_neurons):
            raise ConfigError(
                f"expert.split: gradient needs one text cluster per routed expert of {layer}, {sizes.num_experts} with "
                f"{sizes.num_neurons} neurons each, but the importance has the shape {tuple(importance_NF.shape)}"
            )
        importance_NF = importance_NF.double().cpu()
        share_NF = importance_NF / importance_NF.sum(dim=1, keepdim=True).clamp(min=1e-300)
        common_F = share_NF.sum(0)
        if sizes.num_experts > 1:
            common_F = common_F - share_NF.max(dim=0).values
        shared, routed_G = take_shared(common_F, sizes)
        labels_G = balanced_assignment(-share_NF[:, routed_G].T, sizes.routed_counts)
        routed = [routed_G[labels_G == expert] for expert in range(sizes.num_experts)]
        return index_lists(shared + routed, sizes.width)
