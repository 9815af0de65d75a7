"""The weighted sum of experts that are parts of a feed-forward block, computed for the selected pairs only.

    y_t = sum_i w_ti E_i(x_t),   E_i(x) = h_i(x) out_i,   h_i(x) = act(x gate_i^T) * (x up_i^T)   (plain: act(x up_i^T))

The gate multiplies the hidden activation h_i, the narrowest place, and nothing of size (T, N, D) is ever made. For the
backward pass x, the gates and what goes into the activation functions of the computed pairs are kept; h is made again.
The gradient of a gate is

    dL/dw_ti = <dL/dy_t, E_i(x_t)> = <h_i(x_t), dL/dy_t out_i^T>

for selected pairs, and for all pairs where the routing is straight-through: there the pairs that are off need x in^T
and dL/dy out^T, 3 of the 9 products of a pair, and no gradient to weights or x, because their gate is 0.

Shapes: T tokens, D hidden size, N experts, M neurons of an expert, P = 2 M rows of gated experts (M of plain), C rows
of a block, E experts side by side in a row of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moadapt.experts.partition_blocks import BODIES, Block, Body, Pairs, blocks_of
from moadapt.experts.partition_dispatch import choose_body
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
        training: whether `experts.dropout` is applied to the hidden activations (then all experts are computed).
        body: how it is computed, for tests and benchmarks; None picks the fastest by size.

    Returns:
        (T, D) in the dtype that the products ran in; zero for a token without experts. Differentiable once in x, the
        weights (`routing.straight_through`: also those of experts that are off) and the experts' tensors.

    Raises:
        ValueError: `body` is not one of `BODIES`.
    """
    if body is not None and body not in BODIES:
        raise ValueError(f"body {body!r}: choose one of {', '.join(BODIES)}, or None for the fastest")
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = x_TD.dtype if x_TD.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _mix(x_TD.to(dtype), routing, experts, training, body)
    return _mix(x_TD, routing, experts, training, body)


def _mix(x_TD: Tensor, routing: Routing, experts: StackedExperts, training: bool, body: Body | None) -> Tensor:
    in_NPD, out_NMD, bias_NP = experts.in_NPD, experts.out_NMD, experts.in_bias_NP
    if in_NPD.dtype != x_TD.dtype or out_NMD.dtype != x_TD.dtype:
        in_NPD, out_NMD = in_NPD.to(x_TD.dtype), out_NMD.to(x_TD.dtype)
        bias_NP = None if bias_NP is None else bias_NP.to(x_TD.dtype)
        experts = replace(experts, in_NPD=in_NPD, out_NMD=out_NMD, in_bias_NP=bias_NP)
    dropout = experts.dropout if training else 0.0
    if dropout > 0 or _trains(experts.act):
        return _by_autograd(x_TD, routing, experts, dropout)
    weights_TN, selected_TN = routing.weights_TN, routing.selected_TN
    gradients = torch.is_grad_enabled() and (
        x_TD.requires_grad
        or weights_TN.requires_grad
        or in_NPD.requires_grad
        or out_NMD.requires_grad
        or (bias_NP is not None and bias_NP.requires_grad)
    )
    if body is None:
        body = choose_body(x_TD, routing, experts, gradients)
    if not gradients:
        if body == "union" and x_TD.shape[0] == 1:
            return _one_token(x_TD, weights_TN, selected_TN, experts)
        return _forward(x_TD, weights_TN, experts, blocks_of(body, Pairs.of(body, selected_TN), x_TD.shape[0]), None)
    mixed: Tensor = _MixExperts.apply(  # type: ignore[no-untyped-call]
        x_TD,
        weights_TN,
        in_NPD,
        out_NMD,
        bias_NP,
        selected_TN,
        experts.act,
        experts.gated,
        routing.straight_through,
        body,
    )
    return mixed


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
    """What the down-projection reads, before its gate, in a buffer of its own: (C, E, M)."""
    if not experts.gated:
        h_CEM = experts.act(inner_CEP)
        return h_CEM.clone() if h_CEM is inner_CEP else h_CEM
    gate_CEM, up_CEM = inner_CEP.chunk(2, dim=-1)
    return experts.act(gate_CEM) * up_CEM


def _elementwise(inner_CEP: Tensor) -> Tensor:
    """In the dtype for elementwise work: fp32 for half precision on a CPU, where mixing dtypes costs more copies."""
    return inner_CEP if inner_CEP.is_cuda or inner_CEP.dtype == torch.float64 else inner_CEP.float()


def _forward(
    x_TD: Tensor, weights_TN: Tensor, experts: StackedExperts, blocks: Sequence[Block], kept: list[Tensor] | None
) -> Tensor:
    """The sum over blocks; appends what goes into the activation functions of each block to `kept`."""
    sum_TD: Tensor | None = None
    alone = len(blocks) == 1
    for block in blocks:
        inner_CEP = block.rows_in(block.take(x_TD), experts.in_NPD, experts.in_bias_NP)
        if kept is not None:
            kept.append(inner_CEP)
        h_CEM = _hidden(_elementwise(inner_CEP), experts)
        h_CEM = h_CEM.mul_(block.gates(weights_TN).unsqueeze(-1)).to(x_TD.dtype)  # in the gates' fp32, rounded once
        sum_TD = _accumulate(sum_TD, block, block.rows_out(h_CEM, experts.out_NMD), x_TD.shape[0], alone)
    return torch.zeros_like(x_TD) if sum_TD is None else sum_TD.to(x_TD.dtype)


def _one_token(x_1D: Tensor, weights_1N: Tensor, selected_1N: Tensor, experts: StackedExperts) -> Tensor:
    """The forward pass of `union` for one token, in as few steps as can be: at this size each of them is felt."""
    runs, active = _runs(selected_1N[0].tolist())
    if active == 0:
        return torch.zeros_like(x_1D)
    inner_EP = x_1D.new_empty(active, experts.in_NPD.shape[1])
    for first, end, start in runs:
        in_FD = experts.in_NPD[first:end].flatten(0, 1)
        torch.mm(x_1D, in_FD.T, out=inner_EP[start : start + end - first].view(1, -1))
    if experts.in_bias_NP is not None:
        inner_EP += experts.in_bias_NP[selected_1N[0]]
    h_EM = _hidden(inner_EP, experts).mul_(weights_1N[selected_1N].unsqueeze(-1))
    sum_1D: Tensor | None = None
    for first, end, start in runs:
        h_1F, out_FD = h_EM[start : start + end - first].view(1, -1), experts.out_NMD[first:end].flatten(0, 1)
        if sum_1D is None:
            sum_1D = torch.mm(h_1F, out_FD)
        elif sum_1D.dtype == out_FD.dtype and out_FD.dtype in (torch.float32, torch.float64):
            sum_1D.addmm_(h_1F, out_FD)
        else:  # half precision is added up in fp32
            sum_1D = sum_1D.float() + torch.mm(h_1F, out_FD)
    assert sum_1D is not None
    return sum_1D.to(x_1D.dtype)


def _runs(selected: list[bool]) -> tuple[list[tuple[int, int, int]], int]:
    """Runs of neighbouring experts that are on, (first, end, experts on before it), and how many are on."""
    runs, active, first = [], 0, -1
    for expert, on in enumerate([*selected, False]):
        if on and first < 0:
            first = expert
        elif not on and first >= 0:
            runs.append((first, expert, active))
            active, first = active + expert - first, -1
    return runs, active


def _accumulate(sum_TD: Tensor | None, block: Block, y_CD: Tensor, num_tokens: int, alone: bool) -> Tensor:
    """Add a block's result to the sum over blocks, which is kept in fp32 or better."""
    if sum_TD is None:
        dtype = torch.promote_types(y_CD.dtype, torch.float32)
        if block.whole:
            return y_CD if alone else y_CD.to(dtype)
        sum_TD = torch.zeros(num_tokens, y_CD.shape[1], dtype=dtype, device=y_CD.device)
    block.add(sum_TD, y_CD)
    return sum_TD


class _MixExperts(torch.autograd.Function):
    """Keeps, beside its inputs, only what goes into the activation functions of the computed pairs, and the pairs."""

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
        pairs = Pairs.of(body, selected_TN)
        kept: list[Tensor] = []
        y_TD = _forward(x_TD, weights_TN, experts, blocks_of(body, pairs, x_TD.shape[0]), kept)
        x_again = ctx.needs_input_grad[2] or (straight_through and ctx.needs_input_grad[1])
        ctx.save_for_backward(
            x_TD if x_again else None, weights_TN, in_NPD, out_NMD, bias_NP, selected_TN, pairs.table_2L, *kept
        )
        ctx.act, ctx.gated, ctx.straight_through = act, gated, straight_through
        ctx.body, ctx.counts = body, pairs.counts
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_TD.device.type, enabled=False):
            return *_backward(ctx, grad_TD.contiguous()), None, None, None, None, None


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, in, out and bias, those that are wanted."""
    x_TD, weights_TN, in_NPD, out_NMD, bias_NP, selected_TN, table_2L, *kept = ctx.saved_tensors
    need_x, need_gates, need_in, need_out, need_bias = ctx.needs_input_grad[:5]
    experts = StackedExperts(in_NPD, out_NMD, bias_NP, ctx.act, ctx.gated)
    pairs = Pairs(table_2L, ctx.counts)
    blocks = blocks_of(ctx.body, pairs, grad_TD.shape[0])
    grad_gates = torch.zeros_like(weights_TN) if need_gates else None
    grad_in, grad_out, grad_bias = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
        for tensor, needed in ((in_NPD, need_in), (out_NMD, need_out), (bias_NP, need_bias))
    )
    sum_TD: Tensor | None = None
    for block, inner_CEP in zip(blocks, kept, strict=True):
        grad_CD = block.take(grad_TD)
        gates_CE1 = block.gates(weights_TN).unsqueeze(-1)
        activation = _Activation(_elementwise(inner_CEP), experts)
        if need_x or need_gates or need_in or need_bias:
            grad_h_CEM = block.rows_in(grad_CD, out_NMD)
            if grad_gates is not None:
                block.put_gates(grad_gates, _dot(grad_h_CEM, activation.h_CEM, grad_gates.dtype))
        if grad_out is not None:
            block.put_outer(grad_out, (activation.h_CEM * gates_CE1).to(grad_TD.dtype), grad_CD)
        if need_x or need_in or need_bias:
            grad_h_CEM = _elementwise(grad_h_CEM).mul_(gates_CE1)
            grad_inner_CEP = activation.backward(grad_h_CEM, grad_TD.dtype)
            if grad_in is not None:
                block.put_outer(grad_in, grad_inner_CEP, block.take(x_TD))
            if grad_bias is not None:
                block.put_bias(grad_bias, grad_inner_CEP)
            if need_x:
                grad_x_CD = block.rows_out(grad_inner_CEP, in_NPD)
                sum_TD = _accumulate(sum_TD, block, grad_x_CD, grad_TD.shape[0], len(blocks) == 1)
    if grad_gates is not None:
        if ctx.straight_through:
            _gates_of_others(grad_gates, x_TD, grad_TD, experts, selected_TN, ctx.body)
        elif ctx.body in ("dense", "union"):
            grad_gates.masked_fill_(~selected_TN, 0.0)
    for expert in (number for number, count in enumerate(ctx.counts) if count == 0):  # no block wrote these
        for gradient in (grad_in, grad_out, grad_bias):
            if gradient is not None:
                gradient[expert].zero_()
    grad_x = None
    if need_x:
        grad_x = torch.zeros_like(grad_TD) if sum_TD is None else sum_TD.to(grad_TD.dtype)
    return grad_x, grad_gates, grad_in, grad_out, grad_bias


def _gates_of_others(
    grad_TN: Tensor, x_TD: Tensor, grad_TD: Tensor, experts: StackedExperts, selected_TN: Tensor, body: Body
) -> None:
    """The straight-through gradient of the gates of pairs that no block computed, into its place."""
    if body == "dense":
        return
    others_TN = ~(selected_TN.any(0).expand_as(selected_TN) if body == "union" else selected_TN)
    for block in blocks_of(body, Pairs.of(body, others_TN), x_TD.shape[0]):
        inner_CEP = block.rows_in(block.take(x_TD), experts.in_NPD, experts.in_bias_NP)
        h_CEM = _hidden(_elementwise(inner_CEP), experts)
        grad_h_CEM = block.rows_in(block.take(grad_TD), experts.out_NMD)
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

    def backward(self, grad_CEM: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of what went into the activation, in the products' dtype: (C, E, P). Overwrites its argument."""
        if not self._gated:
            return torch.autograd.grad(self._act_CEM, self._in_CEM, grad_CEM)[0].to(dtype)
        width = grad_CEM.shape[-1]
        grad_CEP = grad_CEM.new_empty(*grad_CEM.shape[:-1], 2 * width, dtype=dtype)
        torch.mul(grad_CEM, self._act_CEM.detach(), out=grad_CEP[..., width:])
        grad_CEP[..., :width] = torch.autograd.grad(self._act_CEM, self._in_CEM, grad_CEM.mul_(self._up_CEM))[0]
        return grad_CEP
