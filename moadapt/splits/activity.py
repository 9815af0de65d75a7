"""How active each neuron is on calibration text.

Marker: a_tf = 1 if |h_tf| is among the K_a largest of token t, else 0 (CMoE, 2502.04416); rate: mu_f = mean_t a_tf.

Shapes: T tokens, F neurons, K markers per token, G the neurons that are not shared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moadapt.ffn import FeedForward
from moadapt.splits.base import Sizes, slices

_PIECE = 256


def hidden_pieces(ffn: FeedForward, inputs_TD: Tensor) -> Iterator[Tensor]:
    """Activations of some tokens at a time: fp32 (P, F) on the block's device."""
    for start in range(0, len(inputs_TD), _PIECE):
        piece_PD = inputs_TD[start : start + _PIECE]
        with torch.no_grad():
            yield ffn.hidden(piece_PD.to(device=ffn.up_FD.device, dtype=ffn.up_FD.dtype)).float()


def markers(ffn: FeedForward, inputs_TD: Tensor, per_token: int) -> Tensor:
    """The neurons with the largest |h| of every token: int64 (T, K) on the CPU, K at most F."""
    markers_TK = torch.empty(len(inputs_TD), min(per_token, ffn.num_neurons), dtype=torch.int64)
    start = 0
    for hidden_PF in hidden_pieces(ffn, inputs_TD):
        stop = start + len(hidden_PF)
        markers_TK[start:stop] = hidden_PF.abs().topk(markers_TK.shape[1], dim=-1).indices
        start = stop
    return markers_TK


def rates(markers_TK: Tensor, num_neurons: int) -> Tensor:
    """Share of the tokens that a neuron marks: float64 (F)."""
    return torch.bincount(markers_TK.flatten(), minlength=num_neurons).double() / len(markers_TK)


def take_shared(score_F: Tensor, sizes: Sizes) -> tuple[list[Tensor], Tensor]:
    """The neurons with the highest score form the shared experts.

    Args:
        score_F: activation rate, or another measure of what is always needed; ties go to the lower index.
        sizes: how many experts, and how wide.

    Returns:
        The neurons of each shared expert (in the order of the checkpoint), and int64 (G), ascending, all the others.
    """
    count = sum(sizes.shared_counts)
    order_F = score_F.argsort(descending=True, stable=True)
    shared = slices(order_F[:count].sort().values, sizes.shared_counts) if count else []
    return shared, order_F[count:].sort().values
