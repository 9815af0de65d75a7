"""The two products of a low-rank mixture with a LoRA of its own for each sequence, and their gradients.

The factors come as a stack of all experts (N, R, I) with the K indices of each sequence, and are gathered forward and
again backward; or as one factor for each sequence (G, M, I); the up-projection also as one for all, flat (M, O). What
is accumulated, and into which buffers, is as in low_rank.py.

Shapes: T tokens, G sequences, S tokens of a sequence (T = G*S), I in, O out, N experts, K per sequence, R rank,
M the rank of a sequence's LoRA (K*R where the experts are stacked).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moadapt.experts.low_rank import Base, may_overwrite, owns_gradient, product_dtype


def project_sequences(
    base: Base, x_TI: Tensor, a: Tensor, indices_GK: Tensor | None, groups: int, experts_x_TI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the base layer and each sequence's down-projection, so that their gradients to x meet in one buffer.

    Args:
        base: the base layer, or its output.
        x_TI: input of both, `groups` runs of S tokens.
        a: (N, R, I) with `indices_GK`, or (G, M, I) without.
        indices_GK: which experts' rows to stack for each sequence.
        groups: G.
        experts_x_TI: the down-projection's input, if dropout made it another than the base layer's.

    Returns:
        The base output (T, O), and the activations (T, M) in the dtype of x (the autocast dtype under autocast).
    """
    own_input = isinstance(base, Tensor) or experts_x_TI is not None
    inner_TI = x_TI if experts_x_TI is None else experts_x_TI
    dtype, owned = product_dtype(inner_TI), not own_input and owns_gradient(base)  # type: ignore[arg-type]
    with torch.autocast(inner_TI.device.type, enabled=False):
        passed_TI, h_TM = _ProjectSequences.apply(inner_TI, a, indices_GK, groups, dtype, owned)  # type: ignore[no-untyped-call]
    if isinstance(base, Tensor):
        return base, h_TM
    return base(x_TI if own_input else passed_TI), h_TM


def mix_up_sequences(
    base_TO: Tensor,
    h_TM: Tensor,
    gates_GK: Tensor | None,
    b: Tensor,
    indices_GK: Tensor | None,
    groups: int,
) -> Tensor:
    """`base + (h * gates) B` with gates, and mostly factors, of each sequence.

    Args:
        base_TO: output of the base layer; overwritten where autograd allows it, so do not use it afterwards.
        h_TM: activations of M ranks.
        gates_GK: one gate for each run of M / K ranks, with the scaling in it; None: all are one.
        b: (N, R, O) with `indices_GK`; without, (G, M, O), or (M, O) for all sequences.
        indices_GK: which experts' rows to stack for each sequence.
        groups: G.

    Returns:
        (T, O) in the dtype of `base_TO`.
    """
    with torch.autocast(h_TM.device.type, enabled=False):
        mixed: Tensor = _MixUpSequences.apply(  # type: ignore[no-untyped-call]
            base_TO, h_TM, gates_GK, b, indices_GK, groups, may_overwrite(base_TO, h_TM.dtype)
        )
    return mixed


class _ProjectSequences(torch.autograd.Function):
    """x -> (x, x A_g^T). The first output goes to the base layer; its gradient is the buffer for the whole."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, a: Tensor, indices_GK: Tensor | None, groups: int, dtype: torch.dtype, owned: bool
    ) -> tuple[Tensor, Tensor]:
        cast_TI = x_TI.to(dtype)
        ctx.save_for_backward(cast_TI, a, indices_GK)
        ctx.x_dtype, ctx.owned, ctx.groups = x_TI.dtype, owned, groups
        ctx.set_materialize_grads(False)
        passed_TI = x_TI.view_as(x_TI)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed_TI)
        a_GMI = _stack(a, indices_GK, dtype)
        return passed_TI, torch.bmm(_split(cast_TI, groups), a_GMI.transpose(1, 2)).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor | None, grad_TM: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None, None, None, None)
        if grad_TM is None:
            return grad_TI, None, *rest
        x_TI, a, indices_GK = ctx.saved_tensors
        grad_GSM = _split(grad_TM, ctx.groups)
        grad_a = None
        if ctx.needs_input_grad[1]:
            grad_a = _unstack(torch.bmm(grad_GSM.transpose(1, 2), _split(x_TI, ctx.groups)), a, indices_GK)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, *rest
        a_GMI = _stack(a, indices_GK, grad_TM.dtype)
        if grad_TI is not None and grad_TI.dtype == grad_TM.dtype:
            return _accumulate(grad_TI, grad_GSM, a_GMI, ctx.owned), grad_a, *rest
        own_TI = torch.bmm(grad_GSM, a_GMI).flatten(0, 1).to(ctx.x_dtype)
        return own_TI if grad_TI is None else grad_TI + own_TI, grad_a, *rest


class _MixUpSequences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor,
        h_TM: Tensor,
        gates_GK: Tensor | None,
        b: Tensor,
        indices_GK: Tensor | None,
        groups: int,
        in_place: bool,
    ) -> Tensor:
        ctx.save_for_backward(h_TM, gates_GK, b, indices_GK)
        ctx.groups = groups
        gated_GSM = _scale(_split(h_TM, groups), gates_GK)
        factor = _stack(b, indices_GK, h_TM.dtype)
        if in_place:
            ctx.mark_dirty(base_TO)
        if base_TO.dtype == h_TM.dtype:
            return _accumulate(base_TO, gated_GSM, factor, in_place)
        return base_TO + torch.matmul(gated_GSM, factor).flatten(0, 1).to(base_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        h_TM, gates_GK, b, indices_GK = ctx.saved_tensors
        need_base, need_h, need_gates, need_b = ctx.needs_input_grad[:4]
        grad_base = grad_TO if need_base else None
        grad_h = grad_gates = grad_b = None
        h_GSM, grad_GSO = _split(h_TM, ctx.groups), _split(grad_TO.to(h_TM.dtype), ctx.groups)
        if need_b:
            gated_GSM = _scale(h_GSM, gates_GK)
            if b.dim() == 2:
                grad_b = (gated_GSM.flatten(0, 1).T @ grad_GSO.flatten(0, 1)).to(b.dtype)
            else:
                grad_b = _unstack(torch.bmm(gated_GSM.transpose(1, 2), grad_GSO), b, indices_GK)
        if need_h or need_gates:
            grad_GSM = torch.matmul(grad_GSO, _stack(b, indices_GK, h_TM.dtype).transpose(-2, -1))
            if need_gates:
                products_GM = (grad_GSM.to(gates_GK.dtype) * h_GSM).sum(1)
                grad_gates = products_GM.view(*gates_GK.shape, products_GM.shape[1] // gates_GK.shape[1]).sum(-1)
            if need_h:
                grad_h = _scale(grad_GSM, gates_GK).flatten(0, 1)
        return grad_base, grad_h, grad_gates, grad_b, None, None, None


def _split(rows: Tensor, groups: int) -> Tensor:
    """(T, ...) as (G, S, ...)."""
    return torch.unflatten(rows, 0, (groups, rows.shape[0] // max(1, groups)))


def _scale(h_GSM: Tensor, gates_GK: Tensor | None) -> Tensor:
    """Every rank times its expert's gate, multiplied in the gates' fp32 and rounded once."""
    if gates_GK is None:
        return h_GSM
    gates_GM = gates_GK.repeat_interleave(h_GSM.shape[2] // gates_GK.shape[1], dim=1)
    return (h_GSM * gates_GM.unsqueeze(1)).to(h_GSM.dtype)


def _stack(weight: Tensor, indices_GK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The factor that each sequence is multiplied by: (G, M, O), or (M, O) as it came."""
    if indices_GK is None:
        return weight.to(dtype)
    groups, kept = indices_GK.shape
    picked = weight.index_select(0, indices_GK.flatten()).to(dtype)
    return picked.view(groups, kept * weight.shape[1], weight.shape[2])


def _unstack(grad_GMO: Tensor, weight: Tensor, indices_GK: Tensor | None) -> Tensor:
    """The gradient of `_stack`: the sum over the sequences that selected an expert, in at least fp32."""
    if indices_GK is None:
        return grad_GMO.to(weight.dtype)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, experts = grad_GMO.reshape(-1, *weight.shape[1:]).to(dtype), indices_GK.flatten()
    if rows.is_cuda:  # index_add_ sums in no fixed order there
        return _add_by_product(rows, experts, len(weight)).to(weight.dtype)
    return torch.zeros(weight.shape, dtype=dtype, device=rows.device).index_add_(0, experts, rows).to(weight.dtype)


def _add_by_product(rows: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Row j added to expert `experts[j]`, as one product with a matrix of zeros and ones."""
    chosen = torch.zeros(num_experts, len(rows), dtype=rows.dtype, device=rows.device)
    chosen.scatter_(0, experts.unsqueeze(0), 1.0)
    return (chosen @ rows.flatten(1)).view(num_experts, *rows.shape[1:])


def _accumulate(buffer_TO: Tensor, left_GSM: Tensor, right: Tensor, in_place: bool) -> Tensor:
    """`buffer + left right`, written into the buffer where that is allowed."""
    if right.dim() == 2:
        left_TM = left_GSM.flatten(0, 1)
        return buffer_TO.addmm_(left_TM, right) if in_place else torch.addmm(buffer_TO, left_TM, right)
    buffer_GSO = _split(buffer_TO, left_GSM.shape[0])
    if in_place:
        buffer_GSO.baddbmm_(left_GSM, right)
        return buffer_TO
    return torch.baddbmm(buffer_GSO, left_GSM, right).flatten(0, 1)
