"""Blocks: sets of (token, expert) pairs whose products run together, and the ways to cut a routing into them.

    dense    one block: all tokens, all experts
    union    a block for each run of neighbouring experts that some token selects: all tokens
    grouped  one block: the selected pairs, ordered by expert, in one buffer
    sorted   a block for each expert that some token selects: its tokens, gathered

Whatever the body, a block is asked for the same products, so the mixture's forward and backward pass are written once.

Shapes: T tokens, D hidden size, N experts, M neurons of an expert, P = 2 M rows of gated experts (M of plain), C rows
of a block, E experts side by side in a row (1 in `grouped` and `sorted`), L selected pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

Body = Literal["dense", "union", "grouped", "sorted"]
BODIES: tuple[Body, ...] = get_args(Body)
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)  # not in every torch that is supported


@dataclass(frozen=True)
class RangeBlock:
    """All tokens, the experts from `first` to before `end`: flat weights, no copies."""

    first: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether the rows are all tokens in their order."""
        return True

    def _part(self, stacked: Tensor) -> Tensor:
        return stacked if self.end - self.first == stacked.shape[0] else stacked[self.first : self.end]

    def take(self, x_TD: Tensor) -> Tensor:
        """The rows of this block: (C, D)."""
        return x_TD

    def add(self, sum_TD: Tensor, y_CD: Tensor) -> None:
        """Add a result to the rows that this block took."""
        sum_TD.add_(y_CD)

    def gates(self, weights_TN: Tensor) -> Tensor:
        """The gates of this block: (C, E)."""
        return weights_TN if self.end - self.first == weights_TN.shape[1] else weights_TN[:, self.first : self.end]

    def put_gates(self, grad_TN: Tensor, grad_CE: Tensor) -> None:
        """The gradient of `gates`, into its place."""
        grad_TN[:, self.first : self.end] = grad_CE

    def rows_in(self, x_CD: Tensor, in_NPD: Tensor, bias_NP: Tensor | None = None) -> Tensor:
        """`x in^T + bias`: (C, E, P)."""
        in_EPD, rows = self._part(in_NPD), x_CD.shape[0]
        if bias_NP is None and rows > 1 and x_CD.dtype == torch.float32 and not x_CD.is_cuda:
            inner_CEP = x_CD.new_empty(rows, *in_EPD.shape[:2])
            for inner_CP, in_PD in zip(inner_CEP.unbind(1), in_EPD.unbind(0), strict=True):
                torch.mm(x_CD, in_PD.T, out=inner_CP)
            return inner_CEP
        bias = None if bias_NP is None else self._part(bias_NP).flatten()
        return linear(x_CD, in_EPD.flatten(0, 1), bias).view(rows, *in_EPD.shape[:2])

    def rows_out(self, h_CEM: Tensor, weight_NMD: Tensor) -> Tensor:
        """`h weight`, summed over E: (C, D). For `out` in the forward pass, for `in` in the backward pass."""
        return torch.mm(h_CEM.flatten(1), self._part(weight_NMD).flatten(0, 1))

    def put_outer(self, grad_NMD: Tensor, h_CEM: Tensor, x_CD: Tensor) -> None:
        """The gradient of a weight, `h^T x`, into its place."""
        torch.mm(h_CEM.flatten(1).T, x_CD, out=self._part(grad_NMD).flatten(0, 1))

    def put_bias(self, grad_NP: Tensor, grad_CEP: Tensor) -> None:
        """The gradient of a bias, the sum over rows, into its place."""
        torch.sum(grad_CEP, 0, out=self._part(grad_NP))


@dataclass(frozen=True)
class ExpertBlock:
    """One expert and the tokens `rows_C` that select it; None if all do. Methods as in `RangeBlock`."""

    expert: int
    rows_C: Tensor | None

    @property
    def whole(self) -> bool:  # noqa: D102
        return self.rows_C is None

    def take(self, x_TD: Tensor) -> Tensor:  # noqa: D102
        return x_TD if self.rows_C is None else x_TD.index_select(0, self.rows_C)

    def add(self, sum_TD: Tensor, y_CD: Tensor) -> None:  # noqa: D102
        if self.rows_C is None:
            sum_TD.add_(y_CD)
        else:
            sum_TD.index_add_(0, self.rows_C, y_CD.to(sum_TD.dtype))

    def gates(self, weights_TN: Tensor) -> Tensor:  # noqa: D102
        gates_T = weights_TN[:, self.expert]
        return (gates_T if self.rows_C is None else gates_T.index_select(0, self.rows_C)).unsqueeze(-1)

    def put_gates(self, grad_TN: Tensor, grad_CE: Tensor) -> None:  # noqa: D102
        if self.rows_C is None:
            grad_TN[:, self.expert] = grad_CE[:, 0]
        else:
            grad_TN[:, self.expert].index_copy_(0, self.rows_C, grad_CE[:, 0])

    def rows_in(self, x_CD: Tensor, in_NPD: Tensor, bias_NP: Tensor | None = None) -> Tensor:  # noqa: D102
        bias_P = None if bias_NP is None else bias_NP[self.expert]
        return linear(x_CD, in_NPD[self.expert], bias_P).unsqueeze(1)

    def rows_out(self, h_CEM: Tensor, weight_NMD: Tensor) -> Tensor:  # noqa: D102
        return h_CEM[:, 0] @ weight_NMD[self.expert]

    def put_outer(self, grad_NMD: Tensor, h_CEM: Tensor, x_CD: Tensor) -> None:  # noqa: D102
        torch.mm(h_CEM[:, 0].T, x_CD, out=grad_NMD[self.expert])

    def put_bias(self, grad_NP: Tensor, grad_CEP: Tensor) -> None:  # noqa: D102
        torch.sum(grad_CEP[:, 0], 0, out=grad_NP[self.expert])


@dataclass(frozen=True)
class GroupedBlock:
    """Pairs ordered by expert: expert `experts_C` and token `rows_C` of each, `counts` pairs of every expert.

    Products run expert by expert on slices of one buffer, or on CUDA in one `F.grouped_mm` where it takes the sizes.
    Methods as in `RangeBlock`.
    """

    experts_C: Tensor
    rows_C: Tensor
    counts: list[int]

    @property
    def whole(self) -> bool:  # noqa: D102
        return False

    def take(self, x_TD: Tensor) -> Tensor:  # noqa: D102
        return x_TD.index_select(0, self.rows_C)

    def add(self, sum_TD: Tensor, y_CD: Tensor) -> None:  # noqa: D102
        sum_TD.index_add_(0, self.rows_C, y_CD.to(sum_TD.dtype))

    def gates(self, weights_TN: Tensor) -> Tensor:  # noqa: D102
        return weights_TN[self.rows_C, self.experts_C].unsqueeze(-1)

    def put_gates(self, grad_TN: Tensor, grad_CE: Tensor) -> None:  # noqa: D102
        grad_TN[self.rows_C, self.experts_C] = grad_CE[:, 0]

    def rows_in(self, x_CD: Tensor, in_NPD: Tensor, bias_NP: Tensor | None = None) -> Tensor:  # noqa: D102
        inner_CP = self._rows(x_CD, in_NPD.transpose(1, 2))
        if bias_NP is not None:
            inner_CP += bias_NP.index_select(0, self.experts_C)
        return inner_CP.unsqueeze(1)

    def rows_out(self, h_CEM: Tensor, weight_NMD: Tensor) -> Tensor:  # noqa: D102
        return self._rows(h_CEM.squeeze(1), weight_NMD)

    def put_outer(self, grad_NMD: Tensor, h_CEM: Tensor, x_CD: Tensor) -> None:  # noqa: D102
        h_CM = h_CEM.squeeze(1)
        if self._one_call(h_CM, x_CD):
            grad_NMD.copy_(_grouped_mm(h_CM.T, x_CD, offs=self._ends()))
            return
        slices = zip(_split(h_CM, self.counts), _split(x_CD, self.counts), grad_NMD.unbind(0), self.counts, strict=True)
        for h_cM, x_cD, grad_MD, count in slices:
            if count:
                torch.mm(h_cM.T, x_cD, out=grad_MD)

    def put_bias(self, grad_NP: Tensor, grad_CEP: Tensor) -> None:  # noqa: D102
        for grad_P, grad_cP in zip(grad_NP.unbind(0), _split(grad_CEP.squeeze(1), self.counts), strict=True):
            torch.sum(grad_cP, 0, out=grad_P)

    def _rows(self, x_CI: Tensor, weight_NIO: Tensor) -> Tensor:
        """Every row times its expert's matrix: (C, O)."""
        if self._one_call(x_CI, weight_NIO[0]):
            rows_CO: Tensor = _grouped_mm(x_CI, weight_NIO, offs=self._ends())
            return rows_CO
        y_CO = x_CI.new_empty(x_CI.shape[0], weight_NIO.shape[-1])
        slices = zip(
            _split(x_CI, self.counts), _split(y_CO, self.counts), weight_NIO.unbind(0), self.counts, strict=True
        )
        for x_cI, y_cO, weight_IO, count in slices:
            if count:
                torch.mm(x_cI, weight_IO, out=y_cO)
        return y_CO

    def _ends(self) -> Tensor:
        """Where each expert's rows end: int32 (N)."""
        return torch.tensor(self.counts, device=self.rows_C.device).cumsum(0).to(torch.int32)

    @staticmethod
    def _one_call(a: Tensor, b: Tensor) -> bool:
        """Whether `F.grouped_mm` takes these matrices: on CUDA, in bf16, rows of a multiple of 16 bytes."""
        strides_fit = all(size % 8 == 0 for size in (*a.shape[1:], *b.shape))
        return _grouped_mm is not None and a.is_cuda and a.dtype == torch.bfloat16 and strides_fit


def _split(rows: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """The rows of each expert."""
    return torch.split(rows, counts)


Block = RangeBlock | ExpertBlock | GroupedBlock


def blocks_of(body: Body, pairs: Pairs, num_tokens: int) -> list[Block]:
    """The pairs as the blocks of a body; those of `dense` and `union` hold other pairs as well.

    Args:
        body: which one.
        pairs: the selected pairs.
        num_tokens: T.

    Returns:
        Blocks that have at least one row. Experts without pairs are in none, except in `dense`.
    """
    if body == "dense":
        return [RangeBlock(0, len(pairs.counts))]
    blocks: list[Block] = []
    if body == "union":
        first = 0
        for expert, count in enumerate([*pairs.counts, 0]):
            if count == 0:
                if first < expert:
                    blocks.append(RangeBlock(first, expert))
                first = expert + 1
        return blocks
    assert pairs.table_2L is not None
    experts_L, rows_L = pairs.table_2L.unbind(0)
    if body == "grouped":
        return [GroupedBlock(experts_L, rows_L, pairs.counts)] if rows_L.shape[0] else []
    for expert, rows_C in enumerate(_split(rows_L, pairs.counts)):
        if rows_C.shape[0]:
            blocks.append(ExpertBlock(expert, None if rows_C.shape[0] == num_tokens else rows_C))
    return blocks


@dataclass(frozen=True)
class Pairs:
    """(token, expert) pairs in the order of experts.

    Attributes:
        table_2L: int64, the expert and the token of each pair; None where a body does not ask.
        counts: pairs of each expert; in `dense` as if all were selected.
    """

    table_2L: Tensor | None
    counts: list[int]

    @classmethod
    def of(cls, body: Body, selected_TN: Tensor) -> Pairs:
        """What a body must know about a mask."""
        tokens, experts = selected_TN.shape
        if body in ("grouped", "sorted"):
            mask_NT = selected_TN.T.contiguous()
            return cls(mask_NT.nonzero().T.contiguous(), mask_NT.sum(1).tolist())
        if body == "dense":
            return cls(None, [tokens] * experts)
        rows_N = selected_TN[0] if tokens == 1 else selected_TN.sum(0)
        return cls(None, [int(count) for count in rows_N.tolist()])
