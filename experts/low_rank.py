"""A mixture of low-rank experts as two matrix products with a gate in between.

    y = base + sum_e g_e s B_e A_e x = base + ((x A^T) * g s) B,   A = [A_1; ...; A_N] (N*R, I), B (N*R, O)

Nothing of size T*I or T*O is made for it: gates act in rank space, on the K*R numbers of a token that its experts
own, and the second product accumulates into the base output. Every expert takes part in every call, shapes never
depend on the routing, and nothing waits for the device. For the backward pass only x, the selected (T*K, R)
activations, the (T, K) gates and indices are kept.

Shapes: T tokens, I in, O out, N experts, K per token, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moadapt.routing import Routing


def mix_low_rank(
    base_TO: Tensor, x_TI: Tensor, routing: Routing, a_NRI: Tensor, b_NRO: Tensor, scaling: float
) -> Tensor:
    """`base + scaling * sum_e gate_e * (x A_e^T) B_e`.

    Args:
        base_TO: output of the base layer; overwritten where autograd allows it, so do not use it afterwards.
        x_TI: the experts' input. Products run in its dtype (in the autocast dtype under autocast).
        routing: gate weights, (T, N), and the selected indices if their number is fixed.
        a_NRI: down-projections, any floating dtype.
        b_NRO: up-projections, stored transposed.
        scaling: s.

    Returns:
        (T, O) in the dtype of `base_TO`. Differentiable once in all tensors.
    """
    device = x_TI.device.type
    if torch.is_autocast_enabled(device):
        x_TI = x_TI.to(torch.get_autocast_dtype(device))
    # A base output that is a view (of Conv1D's flat product, or of a ZeRO-3 wrapper) is left alone.
    is_trained_leaf = base_TO.requires_grad and base_TO.is_leaf
    in_place = base_TO.dtype == x_TI.dtype and not base_TO._is_view() and not is_trained_leaf
    with torch.autocast(device, enabled=False):
        mixed: Tensor = _MixLowRank.apply(  # type: ignore[no-untyped-call]
            base_TO, x_TI, routing.weights_TN, routing.indices_TK, a_NRI, b_NRO, scaling, in_place
        )
    return mixed


class _MixLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor,
        x_TI: Tensor,
        weights_TN: Tensor,
        indices_TK: Tensor | None,
        a_NRI: Tensor,
        b_NRO: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        h_TNR = (x_TI @ _flat(a_NRI, x_TI).T).view(x_TI.shape[0], *a_NRI.shape[:2])
        gates = weights_TN if indices_TK is None else weights_TN.gather(-1, indices_TK)
        h = _pick(h_TNR, indices_TK)
        gated_TM = _spread(_scale(h, gates, scaling), indices_TK, a_NRI.shape[0])
        ctx.save_for_backward(x_TI, h, gates, indices_TK, a_NRI, b_NRO)
        ctx.scaling = scaling
        if in_place:
            ctx.mark_dirty(base_TO)
            return base_TO.addmm_(gated_TM, _flat(b_NRO, x_TI))
        if base_TO.dtype == x_TI.dtype:
            return torch.addmm(base_TO, gated_TM, _flat(b_NRO, x_TI))
        return base_TO + (gated_TM @ _flat(b_NRO, x_TI)).to(base_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h, gates, indices_TK, a_NRI, b_NRO = ctx.saved_tensors
        need_base, need_x, need_weights, _, need_a, need_b = ctx.needs_input_grad[:6]
        num_experts, rank, _ = a_NRI.shape
        grad_base = grad_TO if need_base else None
        grad_x = grad_weights = grad_a = grad_b = None
        grad_TO = grad_TO.to(x_TI.dtype)
        if need_b:
            gated_TM = _spread(_scale(h, gates, ctx.scaling), indices_TK, num_experts)
            grad_b = (gated_TM.T @ grad_TO).view(b_NRO.shape).to(b_NRO.dtype)
        if need_x or need_weights or need_a:
            grad_gated_TNR = (grad_TO @ _flat(b_NRO, x_TI).T).view(-1, num_experts, rank)
            grad_gated = _pick(grad_gated_TNR, indices_TK)
            if need_weights:
                grad_weights = (grad_gated.to(gates.dtype) * h).sum(-1) * ctx.scaling
                if indices_TK is not None:
                    dense_TN = grad_weights.new_zeros(grad_weights.shape[0], num_experts)
                    grad_weights = dense_TN.scatter_(-1, indices_TK, grad_weights)
            if need_x or need_a:
                grad_h_TM = _spread(_scale(grad_gated, gates, ctx.scaling), indices_TK, num_experts)
                if need_a:
                    grad_a = (grad_h_TM.T @ x_TI).view(a_NRI.shape).to(a_NRI.dtype)
                if need_x:
                    grad_x = grad_h_TM @ _flat(a_NRI, x_TI)
        return grad_base, grad_x, grad_weights, None, grad_a, grad_b, None, None


def _flat(stacked: Tensor, like: Tensor) -> Tensor:
    """(N, R, F) -> (N*R, F) in the dtype of `like`; a view when the dtype is the same."""
    return stacked.flatten(0, 1).to(like.dtype)


def _scale(h: Tensor, gates: Tensor, scaling: float) -> Tensor:
    """(T, K, R) times its gates (T, K), multiplied in the gates' fp32 and rounded once."""
    return (h * (gates * scaling).unsqueeze(-1)).to(h.dtype)


def _rows(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Row numbers (T*K) of the selected experts in the (T*N, R) view."""
    offsets_T1 = torch.arange(indices_TK.shape[0], device=indices_TK.device).unsqueeze(-1) * num_experts
    return (indices_TK + offsets_T1).flatten()


def _pick(h_TNR: Tensor, indices_TK: Tensor | None) -> Tensor:
    """The selected experts' activations: (T, K, R), or (T, N, R) when all are selected."""
    if indices_TK is None:
        return h_TNR
    rows = _rows(indices_TK, h_TNR.shape[1])
    return h_TNR.flatten(0, 1).index_select(0, rows).view(*indices_TK.shape, h_TNR.shape[2])


def _spread(h: Tensor, indices_TK: Tensor | None, num_experts: int) -> Tensor:
    """Inverse of `_pick`, flat: (T, N*R), zero at the experts that were not selected."""
    if indices_TK is None:
        return h.flatten(1)
    tokens, _, rank = h.shape
    spread = h.new_zeros(tokens * num_experts, rank)
    return spread.index_copy_(0, _rows(indices_TK, num_experts), h.flatten(0, 1)).view(tokens, -1)
