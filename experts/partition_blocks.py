"""Blocks: sets of (token, expert) pairs whose products run together, and the four ways to cut a routing into them.

    dense    one block: all tokens, all experts
    union    a block for each expert that some token selects: all tokens, no gathering
    sorted   a block for each expert that some token selects: its tokens, gathered
    grouped  one block: all selected pairs, ordered by expert, for `F.grouped_mm`

Whatever the body, a block is asked for the same five products, so the mixture's forward and backward are written once.

Shapes: T tokens, D hidden size, N experts, M neurons of an expert, P = 2 M rows of gated experts (M of plain), C rows of
a block, E experts side by side in a row (N in `dense`, else 1), L pairs of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Body = Literal["dense", "union", "sorted", "grouped"]
BODIES: tuple[Body, ...] = get_args(Body)


@dataclass(frozen=True)
class DenseBlock:
    """All tokens, all experts: one product over the flat weights."""

    @property
    def whole(self) -> bool:
        """Whether the rows are all tokens in their order."""
        return True

    def take(self, x_TD: Tensor) -> Tensor:
        """The rows of this block: (C, D)."""
        return x_TD

    def add(self, sum_TD: Tensor, y_CD: Tensor) -> None:
        """Add a result to the rows that this block took; overwrites `sum_TD` only."""
        sum_TD.add_(y_CD)

    def gates(self, weights_TN: Tensor) -> Tensor:
        """The gates of this block: (C, E)."""
        return weights_TN

    def put_gates(self, grad_TN: Tensor, grad_CE: Tensor) -> None:
        """Inverse of `gates`."""
        grad_TN.copy_(grad_CE)

    def rows_in(self, x_CD: Tensor, in_NPD: Tensor, bias_NP: Tensor | None) -> Tensor:
        """`x in^T + bias`: (C, E, P)."""
        bias_P = None if bias_NP is None else bias_NP.flatten()
        inner = torch.nn.functional.linear(x_CD, in_NPD.flatten(0, 1), bias_P)
        return inner.view(x_CD.shape[0], in_NPD.shape[0], -1)

    def rows_out(self, h_CEM: Tensor, weight_NMD: Tensor) -> Tensor:
        """`h weight`, summed over the experts: (C, D). Serves `out` in the forward pass and `in` in the backward pass."""
        return h_CEM.flatten(1) @ weight_NMD.flatten(0, 1)

    def put_outer(self, grad_NMD: Tensor, h_CEM: Tensor, x_CD: Tensor) -> None:
        """The gradient of a weight, `h^T x`, into its place."""
        torch.mm(h_CEM.flatten(1).T, x_CD, out=grad_NMD.flatten(0, 1))

    def put_bias(self, grad_NP: Tensor, grad_CEP: Tensor) -> None:
        """The gradient of a bias, the sum over rows, into its place."""
        torch.sum(grad_CEP, 0, out=grad_NP)


@dataclass(frozen=True)
class ExpertBlock:
    """One expert, for all tokens (`rows_C` None) or for some of them, gathered."""

    expert: int
    rows_C: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether the rows are all tokens in their order."""
        return self.rows_C is None

    def take(self, x_TD: Tensor) -> Tensor:
        """See `DenseBlock.take`."""
        return x_TD if self.rows_C is None else x_TD.index_select(0, self.rows_C)

    def add(self, sum_TD: Tensor, y_CD: Tensor) -> None:
        """See `DenseBlock.add`."""
        if self.rows_C is None:
            sum_TD.add_(y_CD)
        else:
            sum_TD.index_add_(0, self.rows_C, y_CD.to(sum_TD.dtype))

    def gates(self, weights_TN: Tensor) -> Tensor:
        """See `DenseBlock.gates`."""
        gates_T = weights_TN[:, self.expert]
        return (gates_T if self.rows_C is None else gates_T.index_select(0, self.rows_C)).unsqueeze(-1)

    def put_gates(self, grad_TN: Tensor, grad_CE: Tensor) -> None:
        """See `DenseBlock.put_gates`."""
        if self.rows_C is None:
            grad_TN[:, self.expert] = grad_CE[:, 0]
        else:
            grad_TN[:, self.expert].index_copy_(0, self.rows_C, grad_CE[:, 0])

    def rows_in(self, x_CD: Tensor, in_NPD: Tensor, bias_NP: Tensor | None) -> Tensor:
        """See `DenseBlock.rows_in`."""
        bias_P = None if bias_NP is None else bias_NP[self.expert]
        return torch.nn.functional.linear(x_CD, in_NPD[self.expert], bias_P).unsqueeze(1)

    def rows_out(self, h_CEM: Tensor, weight_NMD: Tensor) -> Tensor:
        """See `DenseBlock.rows_out`."""
        return h_CEM[:, 0] @ weight_NMD[self.expert]

    def put_outer(self, grad_NMD: Tensor, h_CEM: Tensor, x_CD: Tensor) -> None:
        """See `DenseBlock.put_outer`."""
        torch.mm(h_CEM[:, 0].T, x_CD, out=grad_NMD[self.expert])

    def put_bias(self, grad_NP: Tensor, grad_CEP: Tensor) -> None:
        """See `DenseBlock.put_bias`."""
        torch.sum(grad_CEP[:, 0], 0, out=grad_NP[self.expert])


@dataclass(frozen=True)
class GroupedBlock:
    """All pairs of a plan, ordered by expert: token `rows_C` and expert `experts_C` of each, and where experts end."""

    experts_C: Tensor
    rows_C: Tensor
    ends_N: Tensor

    @property
    def whole(self) -> bool:
        """Whether the rows are all tokens in their order."""
        return False

    def take(self, x_TD: Tensor) -> Tensor:
        """See `DenseBlock.take`."""
        return x_TD.index_select(0, self.rows_C)

    def add(self, sum_TD: Tensor, y_CD: Tensor) -> None:
        """See `DenseBlock.add`."""
        sum_TD.index_add_(0, self.rows_C, y_CD.to(sum_TD.dtype))

    def gates(self, weights_TN: Tensor) -> Tensor:
        """See `DenseBlock.gates`."""
        return weights_TN[self.rows_C, self.experts_C].unsqueeze(-1)

    def put_gates(self, grad_TN: Tensor, grad_CE: Tensor) -> None:
        """See `DenseBlock.put_gates`."""
        grad_TN[self.rows_C, self.experts_C] = grad_CE[:, 0]

    def rows_in(self, x_CD: Tensor, in_NPD: Tensor, bias_NP: Tensor | None) -> Tensor:
        """See `DenseBlock.rows_in`."""
        inner_CP = torch.nn.functional.grouped_mm(x_CD, in_NPD.transpose(1, 2), offs=self.ends_N)
        if bias_NP is not None:
            inner_CP += bias_NP.index_select(0, self.experts_C)
        return inner_CP.unsqueeze(1)

    def rows_out(self, h_CEM: Tensor, weight_NMD: Tensor) -> Tensor:
        """See `DenseBlock.rows_out`."""
        return torch.nn.functional.grouped_mm(h_CEM[:, 0], weight_NMD, offs=self.ends_N)

    def put_outer(self, grad_NMD: Tensor, h_CEM: Tensor, x_CD: Tensor) -> None:
        """See `DenseBlock.put_outer`."""
        grad_NMD.copy_(torch.nn.functional.grouped_mm(h_CEM[:, 0].T, x_CD, offs=self.ends_N))

    def put_bias(self, grad_NP: Tensor, grad_CEP: Tensor) -> None:
        """See `DenseBlock.put_bias`."""
        sums_NP = torch.zeros(grad_NP.shape, dtype=torch.float32, device=grad_NP.device)
        grad_NP.copy_(sums_NP.index_add_(0, self.experts_C, grad_CEP[:, 0].float()))


Block = DenseBlock | ExpertBlock | GroupedBlock


@dataclass(frozen=True)
class Pairs:
    """(token, expert) pairs in the order of experts.

    Attributes:
        table_L2: int64, (expert, token) of each pair.
        counts: pairs of each expert.
    """

    table_L2: Tensor
    counts: list[int]

    @classmethod
    def of(cls, selected_TN: Tensor) -> Pairs:
        """The pairs that a mask names."""
        mask_NT = selected_TN.T.contiguous()
        return cls(mask_NT.nonzero(), mask_NT.sum(1).tolist())

    def blocks(self, body: Body, num_tokens: int) -> list[Block]:
        """These pairs as the blocks of a body; in `dense` and `union` the blocks hold other pairs as well.

        Args:
            body: which one.
            num_tokens: T.

        Returns:
            Blocks that have at least one row. Experts without pairs are in none, except in `dense`.
        """
        if body == "dense":
            return [DenseBlock()]
        if body == "grouped":
            if not self.table_L2.shape[0]:
                return []
            experts_L, rows_L = self.table_L2.unbind(1)
            ends_N = torch.tensor(self.counts, device=rows_L.device).cumsum(0).to(torch.int32)
            return [GroupedBlock(experts_L.contiguous(), rows_L.contiguous(), ends_N)]
        blocks: list[Block] = []
        slices = self.table_L2[:, 1].contiguous().split(self.counts)
        for expert, rows_C in enumerate(slices):
            if rows_C.shape[0]:
                everyone = body == "union" or rows_C.shape[0] == num_tokens
                blocks.append(ExpertBlock(expert, None if everyone else rows_C))
        return blocks
