"""Small feed-forward blocks in float64, and naive loops over their neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from moadapt.ffn import FeedForward, StackedExperts

D, N, M = 6, 4, 3


def block(gated: bool = True, bias: bool = False, neurons: int = N * M, seed: int = 1) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FeedForward(
        up_FD=draw(neurons, D),
        down_FD=draw(neurons, D),
        gate_FD=draw(neurons, D) if gated else None,
        act=torch.nn.functional.silu if gated else torch.relu,
        up_bias_F=draw(neurons) if bias else None,
        gate_bias_F=draw(neurons) if bias and gated else None,
    )


def lists(*rows: list[int]) -> Tensor:
    """Index lists of experts."""
    return torch.tensor(rows)


def cut(ffn: FeedForward, indices_NM: Tensor | None = None) -> StackedExperts:
    """Experts of consecutive neurons, unless index lists are given."""
    return StackedExperts.cut(ffn, torch.arange(N * M).view(N, M) if indices_NM is None else indices_NM)


def activation(ffn: FeedForward, neuron: int, x_D: Tensor) -> Tensor:
    """The activation of one neuron for one token."""
    up = (ffn.up_FD[neuron] * x_D).sum() + (0.0 if ffn.up_bias_F is None else ffn.up_bias_F[neuron])
    if ffn.gate_FD is None:
        return up.clamp(min=0.0)
    gate = (ffn.gate_FD[neuron] * x_D).sum() + (0.0 if ffn.gate_bias_F is None else ffn.gate_bias_F[neuron])
    return gate / (1.0 + torch.exp(-gate)) * up


def expert_output(ffn: FeedForward, neurons: list[int], x_D: Tensor) -> Tensor:
    """The sum of these neurons' contributions for one token: (D,)."""
    total = torch.zeros_like(x_D)
    for neuron in neurons:
        total = total + activation(ffn, neuron, x_D) * ffn.down_FD[neuron]
    return total
