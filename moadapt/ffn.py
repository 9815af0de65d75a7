"""A dense feed-forward block, and the experts cut from it, as plain tensors with one row per neuron.

    y = act(x W_gate^T + b_gate) * (x W_up^T + b_up) W_down + b_down        gated (SwiGLU, GeGLU)
    y = act(x W_up^T + b_up) W_down + b_down                                plain

Splits, routers and the partition experts work on these, whatever the model calls its layers. A neuron is one row of
each matrix; the block is the sum over its neurons, so any partition of them into experts sums to the block.

Shapes: T tokens, D hidden size, F neurons, N experts, M neurons of one expert, P = 2 M rows of gated experts (M of
plain).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
PADDING = -1
"""In an index list: a neuron that does not exist. Its rows are zero, so it contributes nothing."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block.

    Attributes:
        up_FD: (F, D).
        down_FD: (F, D), the down-projection transposed.
        gate_FD: (F, D), or None in a plain block.
        up_bias_F, gate_bias_F, down_bias_D: biases, or None.
        act: the activation function.
        dropout: probability of dropping a neuron's activation in training (T5).
    """

    up_FD: Tensor
    down_FD: Tensor
    gate_FD: Tensor | None
    act: Activation
    up_bias_F: Tensor | None = None
    gate_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    dropout: float = 0.0

    @property
    def num_neurons(self) -> int:
        """F."""
        return self.up_FD.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.up_FD.shape[1]

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.gate_FD is not None

    def pre_activation(self, x_TD: Tensor) -> Tensor:
        """What goes into the activation function: (T, F)."""
        if self.gate_FD is None:
            return torch.nn.functional.linear(x_TD, self.up_FD, self.up_bias_F)
        return torch.nn.functional.linear(x_TD, self.gate_FD, self.gate_bias_F)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """The neurons' activations, which the down-projection reads: (T, F)."""
        hidden_TF = self.act(self.pre_activation(x_TD))
        if self.gate_FD is None:
            return hidden_TF
        return hidden_TF * torch.nn.functional.linear(x_TD, self.up_FD, self.up_bias_F)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The block's output without dropout: (T, D)."""
        y_TD = self.hidden(x_TD) @ self.down_FD
        return y_TD if self.down_bias_D is None else y_TD + self.down_bias_D

    def take(self, indices_M: Tensor) -> FeedForward:
        """The block of these neurons alone, without the down-projection's bias; a padding index gives a zero neuron."""
        padding_M = indices_M == PADDING
        rows_M = indices_M.clamp(min=0)

        def rows(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            taken = tensor[rows_M.to(tensor.device)]
            return taken.masked_fill(padding_M.to(tensor.device).view(-1, *[1] * (taken.dim() - 1)), 0)

        up, down = rows(self.up_FD), rows(self.down_FD)
        assert up is not None
        assert down is not None
        return replace(
            self,
            up_FD=up,
            down_FD=down,
            gate_FD=rows(self.gate_FD),
            up_bias_F=rows(self.up_bias_F),
            gate_bias_F=rows(self.gate_bias_F),
            down_bias_D=None,
        )


@dataclass(frozen=True)
class StackedExperts:
    """Experts of equal width, stacked.

    Attributes:
        in_NPD: (N, P, D); of a gated expert the M gate rows come first, then the M up rows.
        out_NMD: (N, M, D), the down-projections transposed.
        in_bias_NP: (N, P), or None.
        act: the activation function.
        gated: whether P is 2 M.
        dropout: probability of dropping a neuron's activation in training.
    """

    in_NPD: Tensor
    out_NMD: Tensor
    in_bias_NP: Tensor | None
    act: Activation
    gated: bool
    dropout: float = 0.0

    @property
    def num_experts(self) -> int:
        """N."""
        return self.out_NMD.shape[0]

    @property
    def width(self) -> int:
        """M."""
        return self.out_NMD.shape[1]

    @classmethod
    def cut(cls, ffn: FeedForward, indices_NM: Tensor) -> StackedExperts:
        """The experts that the index lists name, copied out of the block (which keeps the down-projection's bias)."""
        num_experts, width = indices_NM.shape
        parts = ffn.take(indices_NM.flatten())
        up_NMD = parts.up_FD.view(num_experts, width, -1)
        in_NPD, bias_NP = up_NMD, None
        if parts.gate_FD is not None:
            in_NPD = torch.cat([parts.gate_FD.view(num_experts, width, -1), up_NMD], dim=1)
        biases = [parts.gate_bias_F, parts.up_bias_F] if ffn.gated else [parts.up_bias_F]
        if any(bias is not None for bias in biases):
            zero_F = up_NMD.new_zeros(num_experts * width)
            rows = [(zero_F if bias is None else bias).view(num_experts, width) for bias in biases]
            bias_NP = torch.cat(rows, dim=1)
        out_NMD = parts.down_FD.view(num_experts, width, -1)
        return cls(in_NPD, out_NMD, bias_NP, ffn.act, ffn.gated, ffn.dropout)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """All experts' activations: (T, N, M)."""
        bias_P = None if self.in_bias_NP is None else self.in_bias_NP.flatten()
        inner = torch.nn.functional.linear(x_TD, self.in_NPD.flatten(0, 1), bias_P)
        inner_TNP = inner.view(x_TD.shape[0], self.num_experts, -1)
        if not self.gated:
            return self.act(inner_TNP)
        gate_TNM, up_TNM = inner_TNP.chunk(2, dim=-1)
        return self.act(gate_TNM) * up_TNM

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The ungated sum of all experts without dropout: (T, D)."""
        return self.hidden(x_TD).flatten(1) @ self.out_NMD.flatten(0, 1)

    def expert(self, index: int, x_TD: Tensor) -> Tensor:
        """One expert's output with gate 1: (T, D)."""
        bias_P = None if self.in_bias_NP is None else self.in_bias_NP[index]
        inner_TP = torch.nn.functional.linear(x_TD, self.in_NPD[index], bias_P)
        if not self.gated:
            return self.act(inner_TP) @ self.out_NMD[index]
        gate_TM, up_TM = inner_TP.chunk(2, dim=-1)
        return (self.act(gate_TM) * up_TM) @ self.out_NMD[index]


def join(experts: StackedExperts, indices_NM: Tensor, num_neurons: int, down_bias_D: Tensor | None) -> FeedForward:
    """Inverse of `StackedExperts.cut`: the block in its original order of neurons, padding left out."""
    flat = indices_NM.flatten().to(experts.out_NMD.device)
    real = flat != PADDING

    def rows(stacked: Tensor) -> Tensor:
        tensor = stacked.flatten(0, 1)
        out = tensor.new_empty(num_neurons, *tensor.shape[1:])
        out[flat[real]] = tensor[real]
        return out

    def parts(stacked: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(gate, up)."""
        if stacked is None:
            return None, None
        if not experts.gated:
            return None, rows(stacked)
        gate, up = stacked.chunk(2, dim=1)
        return rows(gate), rows(up)

    gate_FD, up_FD = parts(experts.in_NPD)
    gate_bias_F, up_bias_F = parts(experts.in_bias_NP)
    assert up_FD is not None
    return FeedForward(
        up_FD, rows(experts.out_NMD), gate_FD, experts.act, up_bias_F, gate_bias_F, down_bias_D, experts.dropout
    )
