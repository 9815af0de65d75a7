"""The weighted sum of experts that are parts of a feed-forward block, computed for the selected pairs only.

    y_t = sum_i w_ti E_i(x_t),   E_i(x) = h_i(x) out_i,   h_i(x) = act(x gate_i^T) * (x up_i^T)   (plain: act(x up_i^T))

The gate multiplies the hidden activation h_i, the narrowest place, and nothing of size (T, N, D) is ever made. For the
backward pass x, the gates and what goes into the activation functions of the computed pairs are kept; h is made again.
The gradient of a gate is

    dL/dw_ti = <dL/dy_t, E_i(x_t)> = <h_i(x_t), dL/dy_t out_i^T>

for selected pairs, and for all pairs where the routing is straight-through: there the pairs that are off need x in^T
and dL/dy out^T, 3 of the 9 products of a pair, and no gradient to weights or x, because their gate is 0.

Shapes: T tokens, D hidden size, N experts, M neurons of an expert, P = 2 M rows of gated experts (M of plain), C rows of
a block, E experts side by side in a row of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moadapt.experts.partition_blocks import BODIES, Block, Body, Pairs
from moadapt.ffn import Activation, StackedExperts
from moadapt.routing import Routing


def mix_experts(
    x_TD: Tensor, routing: Routing, experts: StackedExperts, *, training: bool = False, body: Body | None = None
) -> Tensor:
    """`sum_i w_ti E_i(x_t)`, without shared experts and without the block's output bias.

    Args:
        x_TD: the block's input. Products run in its dtype (in the autocast dtype under autocast).
        routing: which experts every token selects, and their weights, one row per token.
        experts: the routed experts, any floating dtype.
        training: whether `experts.dropout` is applied to the hidden activations.
        body: how it is computed, for tests and benchmarks; None picks the fastest by size.

    Returns:
        (T, D) in the dtype that the products ran in; zero for a token without experts. Differentiable once in x, the
        weights (`routing.straight_through`: also those of experts that are off) and the experts' tensors.

    Raises:
        ValueError: `body` is not one of `BODIES`.
    """
    if body is not None and body not in BODIES:
        raise ValueError(f"body {body!r}: choose one of {', '.join(BODIES)}, or None for the fastest")
    dtype = _compute_dtype(x_TD)
    weights_TN, selected_TN = routing.weights_TN, routing.selected_TN
    with torch.autocast(x_TD.device.type, enabled=False):
        x_TD = x_TD.to(dtype)
        in_NPD, out_NMD = experts.in_NPD.to(dtype), experts.out_NMD.to(dtype)
        bias_NP = None if experts.in_bias_NP is None else experts.in_bias_NP.to(dtype)
        cast = StackedExperts(in_NPD, out_NMD, bias_NP, experts.act, experts.gated, experts.dropout)
        if (training and experts.dropout > 0) or _trains(experts.act):
            return _by_autograd(x_TD, routing, cast, experts.dropout if training else 0.0)
        inputs = (x_TD, weights_TN, in_NPD, out_NMD, bias_NP)
        gradients = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        if body is None:
            body = choose_body(x_TD, routing, cast, gradients)
        if not gradients:
            return _forward(x_TD, weights_TN, cast, Pairs.of(selected_TN).blocks(body, x_TD.shape[0]), None)
        mixed: Tensor = _MixExperts.apply(  # type: ignore[no-untyped-call]
            *inputs, selected_TN, experts.act, experts.gated, routing.straight_through, body
        )
    return mixed


def choose_body(x_TD: Tensor, routing: Routing, experts: StackedExperts, gradients: bool) -> Body:
    return "sorted"


def _compute_dtype(x_TD: Tensor) -> torch.dtype:
    device = x_TD.device.type
    if torch.is_autocast_enabled(device) and x_TD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x_TD.dtype


def _trains(act: Activation) -> bool:
    """Whether the activation function has parameters that want a gradient."""
    return isinstance(act, nn.Module) and any(parameter.requires_grad for parameter in act.parameters())


def _by_autograd(x_TD: Tensor, routing: Routing, experts: StackedExperts, dropout: float) -> Tensor:
    """All experts, in plain torch: for what the Function below does not do."""
    h_TNM = torch.nn.functional.dropout(experts.hidden(x_TD), dropout)
    weights_TN = routing.weights_TN
    if not routing.straight_through:
        weights_TN = weights_TN.masked_fill(~routing.selected_TN, 0.0)
    gated_TNM = (h_TNM * weights_TN.unsqueeze(-1)).to(h_TNM.dtype)
    return gated_TNM.flatten(1) @ experts.out_NMD.flatten(0, 1)


def _hidden(inner_CEP: Tensor, experts: StackedExperts) -> Tensor:
    """What the down-projection reads: (C, E, M)."""
    if not experts.gated:
        return experts.act(inner_CEP)
    gate_CEM, up_CEM = inner_CEP.chunk(2, dim=-1)
    return experts.act(gate_CEM) * up_CEM


def _forward(
    x_TD: Tensor, weights_TN: Tensor, experts: StackedExperts, blocks: Sequence[Block], kept: list[Tensor] | None
) -> Tensor:
    """The sum over blocks; appends what goes into the activation functions of each block to `kept`."""
    total = _Sum(x_TD, blocks)
    for block in blocks:
        inner_CEP = block.rows_in(block.take(x_TD), experts.in_NPD, experts.in_bias_NP)
        if kept is not None:
            kept.append(inner_CEP)
        h_CEM = _hidden(inner_CEP, experts)
        if h_CEM is inner_CEP:  # an activation function that does nothing
            h_CEM = h_CEM.clone()
        h_CEM.mul_(block.gates(weights_TN).unsqueeze(-1))  # in the gates' fp32, rounded once
        total.add(block, block.rows_out(h_CEM, experts.out_NMD))
    return total.result()


class _Sum:
    """The results of blocks, added up in fp32 or better and rounded once."""

    def __init__(self, like_TD: Tensor, blocks: Sequence[Block]) -> None:
        self._like_TD, self._sum_TD = like_TD, None
        self._alone = len(blocks) == 1 and blocks[0].whole

    def add(self, block: Block, y_CD: Tensor) -> None:
        if self._alone:
            self._sum_TD = y_CD
            return
        if self._sum_TD is None:
            dtype = torch.promote_types(self._like_TD.dtype, torch.float32)
            self._sum_TD = torch.zeros(self._like_TD.shape, dtype=dtype, device=self._like_TD.device)
        block.add(self._sum_TD, y_CD)

    def result(self) -> Tensor:
        return torch.zeros_like(self._like_TD) if self._sum_TD is None else self._sum_TD.to(self._like_TD.dtype)


class _MixExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TN: Tensor,
        in_NPD: Tensor,
        out_NMD: Tensor,
        bias_NP: Tensor | None,
        selected_TN: Tensor,
        act: Activation,
        gated: bool,
        straight_through: bool,
        body: Body,
    ) -> Tensor:
        experts = StackedExperts(in_NPD, out_NMD, bias_NP, act, gated)
        pairs = Pairs.of(selected_TN)
        kept: list[Tensor] = []
        y_TD = _forward(x_TD, weights_TN, experts, pairs.blocks(body, x_TD.shape[0]), kept)
        x_again = ctx.needs_input_grad[2] or (straight_through and ctx.needs_input_grad[1])
        ctx.save_for_backward(
            x_TD if x_again else None, weights_TN, in_NPD, out_NMD, bias_NP, selected_TN, pairs.table_L2, *kept
        )
        ctx.counts, ctx.act, ctx.gated, ctx.straight_through, ctx.body = (
            pairs.counts,
            act,
            gated,
            straight_through,
            body,
        )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_TD.device.type, enabled=False):
            return *_backward(ctx, grad_TD.contiguous()), None, None, None, None, None


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, in, out and bias, those that are wanted."""
    x_TD, weights_TN, in_NPD, out_NMD, bias_NP, selected_TN, table_L2, *kept = ctx.saved_tensors
    need_x, need_gates, need_in, need_out, need_bias = ctx.needs_input_grad[:5]
    experts = StackedExperts(in_NPD, out_NMD, bias_NP, ctx.act, ctx.gated)
    pairs = Pairs(table_L2, ctx.counts)
    blocks = pairs.blocks(ctx.body, grad_TD.shape[0])
    grad_gates = torch.zeros_like(weights_TN) if need_gates else None
    grad_in, grad_out, grad_bias = (
        torch.empty_like(tensor) if needed else None
        for tensor, needed in ((in_NPD, need_in), (out_NMD, need_out), (bias_NP, need_bias))
    )
    total = _Sum(grad_TD, blocks)
    for block, inner_CEP in zip(blocks, kept, strict=True):
        grad_CD = block.take(grad_TD)
        gates_CE1 = block.gates(weights_TN).unsqueeze(-1)
        activation = _Activation(inner_CEP, experts)
        if need_x or need_gates or need_in or need_bias:
            grad_h_CEM = block.rows_in(grad_CD, out_NMD, None)
            if grad_gates is not None:
                block.put_gates(grad_gates, _dot(grad_h_CEM, activation.h_CEM, grad_gates.dtype))
        if grad_out is not None:
            block.put_outer(grad_out, (activation.h_CEM * gates_CE1).to(grad_TD.dtype), grad_CD)
        if need_x or need_in or need_bias:
            grad_inner_CEP = activation.backward(grad_h_CEM.mul_(gates_CE1))
            if grad_in is not None:
                block.put_outer(grad_in, grad_inner_CEP, block.take(x_TD))
            if grad_bias is not None:
                block.put_bias(grad_bias, grad_inner_CEP)
            if need_x:
                total.add(block, block.rows_out(grad_inner_CEP, in_NPD))
    if grad_gates is not None:
        if ctx.straight_through:
            _gates_of_others(grad_gates, x_TD, grad_TD, experts, selected_TN, ctx.body)
        elif ctx.body in ("dense", "union"):
            grad_gates.masked_fill_(~selected_TN, 0.0)
    if ctx.body != "dense":
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                for gradient in (grad_in, grad_out, grad_bias):
                    if gradient is not None:
                        gradient[expert].zero_()
    return total.result() if need_x else None, grad_gates, grad_in, grad_out, grad_bias


def _gates_of_others(
    grad_TN: Tensor, x_TD: Tensor, grad_TD: Tensor, experts: StackedExperts, selected_TN: Tensor, body: Body
) -> None:
    """The straight-through gradient of the gates of pairs that no block computed, into its place."""
    if body == "dense":
        return
    others_TN = ~(selected_TN.any(0).expand_as(selected_TN) if body == "union" else selected_TN)
    for block in Pairs.of(others_TN).blocks(body, x_TD.shape[0]):
        h_CEM = _hidden(block.rows_in(block.take(x_TD), experts.in_NPD, experts.in_bias_NP), experts)
        grad_h_CEM = block.rows_in(block.take(grad_TD), experts.out_NMD, None)
        block.put_gates(grad_TN, _dot(grad_h_CEM, h_CEM, grad_TN.dtype))


def _dot(a_CEM: Tensor, b_CEM: Tensor, dtype: torch.dtype) -> Tensor:
    """Inner products over neurons, in the gates' dtype: (C, E)."""
    return (a_CEM.to(dtype) * b_CEM).sum(-1)


class _Activation:
    """The hidden activation of a block, made again, and its gradient."""

    def __init__(self, inner_CEP: Tensor, experts: StackedExperts) -> None:
        self._gated = experts.gated
        gate_CEM, self._up_CEM = inner_CEP.chunk(2, dim=-1) if experts.gated else (inner_CEP, inner_CEP)
        with torch.enable_grad():
            self._in_CEM = gate_CEM.detach().requires_grad_()
            self._act_CEM = experts.act(self._in_CEM)
        self.h_CEM = self._act_CEM.detach()
        if experts.gated:
            self.h_CEM = self.h_CEM * self._up_CEM

    def backward(self, grad_CEM: Tensor) -> Tensor:
        """The gradient of what went into the activation: (C, E, P)."""
        if not self._gated:
            return torch.autograd.grad(self._act_CEM, self._in_CEM, grad_CEM)[0]
        width = grad_CEM.shape[-1]
        grad_CEP = grad_CEM.new_empty(*grad_CEM.shape[:-1], 2 * width)
        torch.mul(grad_CEM, self._act_CEM.detach(), out=grad_CEP[..., width:])
        grad_CEP[..., :width] = torch.autograd.grad(self._act_CEM, self._in_CEM, grad_CEM.mul_(self._up_CEM))[0]
        return grad_CEP
