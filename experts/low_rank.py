"""A mixture of low-rank experts as two matrix products with a gate in between.

    y = base + sum_e g_e s B_e A_e x = base + ((x A^T) * g s) B,   A = [A_1; ...; A_N] (N*R, I), B (N*R, O)

Nothing of size T*I or T*O is made for it, forward or backward: gates act in rank space, on the K*R numbers of a token
that its experts own; the second product accumulates into the base output, and the gradient to x into the one that the
base layer made. Every expert takes part in every call, shapes never depend on the routing, and nothing waits for the
device. For the backward pass only x, the selected (T*K, R) activations, the (T, K) gates and indices are kept. A
straight-through routing keeps the activations of all experts, since each of its gates has a gradient.

Shapes: T tokens, I in, O out, N experts, K per token, R rank, M = N*R (or the shared rank of a kind).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from moadapt.routing import Routing

Base = Tensor | Callable[[Tensor], Tensor]
"""The base layer's output, or the base layer itself."""
FEW_TOKENS = 8
"""Up to so many tokens products run in the dtype of the factors."""


def mix_low_rank(
    base: Base,
    x_TI: Tensor,
    routing: Routing,
    a_NRI: Tensor,
    b_NRO: Tensor,
    scaling: float,
    experts_x_TI: Tensor | None = None,
) -> Tensor:
    """`base + scaling * sum_e gate_e * (x A_e^T) B_e`.

    Args:
        base: the base layer, or what it made of `x_TI`: (T, O), overwritten where autograd allows it.
        x_TI: the experts' input. Products run in its dtype (in the autocast dtype under autocast).
        routing: gate weights, (T, N), and the selected indices if their number is fixed.
        a_NRI: down-projections, any floating dtype.
        b_NRO: up-projections, stored transposed.
        scaling: s.
        experts_x_TI: the experts' input, if dropout made it another than the base layer's.

    Returns:
        (T, O) in the dtype of the base output. Differentiable once in all tensors.
    """
    base_TO, h_TM = project_down(base, x_TI, a_NRI.flatten(0, 1), experts_x_TI)
    return mix_up(base_TO, h_TM, routing, b_NRO, scaling)


def project_down(base: Base, x_TI: Tensor, a_MI: Tensor, experts_x_TI: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the base layer and the down-projection, so that their gradients to x meet in one buffer.

    Args:
        base: the base layer, or its output.
        x_TI: input of both.
        a_MI: down-projection.
        experts_x_TI: the down-projection's input, if dropout made it another than the base layer's.

    Returns:
        The base output (T, O), and `x A^T` (T, M) in the dtype of x (the autocast dtype under autocast; see also
        `factor_dtype`).
    """
    if isinstance(base, Tensor) or experts_x_TI is not None:
        h_TM = _project(x_TI if experts_x_TI is None else experts_x_TI, a_MI, False)[1]
        return base if isinstance(base, Tensor) else base(x_TI), h_TM
    x_TI, h_TM = _project(x_TI, a_MI, owns_gradient(base))
    return base(x_TI), h_TM


def mix_up(base_TO: Tensor, h_TM: Tensor, routing: Routing, b_NRO: Tensor, scaling: float) -> Tensor:
    """`base + (h * gates * scaling) B`: gate in rank space, project up, accumulate.

    Args:
        base_TO: output of the base layer; overwritten where autograd allows it, so do not use it afterwards.
        h_TM: all experts' activations, M = N*R.
        routing: gate weights and selected indices.
        b_NRO: up-projections, stored transposed.
        scaling: s.

    Returns:
        (T, O) in the dtype of `base_TO`.
    """
    indices_TK = None if routing.straight_through and torch.is_grad_enabled() else routing.indices_TK
    with torch.autocast(h_TM.device.type, enabled=False):
        mixed: Tensor = _MixUp.apply(  # type: ignore[no-untyped-call]
            base_TO, h_TM, routing.weights_TN, indices_TK, b_NRO, scaling, may_overwrite(base_TO, h_TM.dtype)
        )
    return mixed


def owns_gradient(base: Callable[[Tensor], Tensor]) -> bool:
    """Whether the base layer is known to hand out a gradient buffer of its own, which may be written to."""
    return type(base) in (nn.Linear, Conv1D) and not base._backward_hooks and not base._backward_pre_hooks  # type: ignore[attr-defined]


def may_overwrite(base_TO: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of this dtype may be accumulated into the base output.

    A view (of Conv1D's flat product, or of a ZeRO-3 wrapper) is left alone, and so is a leaf that is trained.
    """
    is_trained_leaf = base_TO.requires_grad and base_TO.is_leaf
    return base_TO.dtype == dtype and not base_TO._is_view() and not is_trained_leaf


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products with x run in: its own, or the autocast dtype under autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def factor_dtype(x_TI: Tensor, factors: Tensor) -> torch.dtype:
    """`product_dtype`, or where nothing is trained and the tokens are few, that of wider factors.

    A cast reads and writes all of the factors; beside a half-precision base it would take longer than the products.
    """
    dtype = product_dtype(x_TI)
    is_wider = factors.dtype.itemsize > dtype.itemsize
    return factors.dtype if is_wider and x_TI.shape[0] <= FEW_TOKENS and not torch.is_grad_enabled() else dtype


def _project(x_TI: Tensor, a_MI: Tensor, owned: bool) -> tuple[Tensor, Tensor]:
    dtype = factor_dtype(x_TI, a_MI)
    with torch.autocast(x_TI.device.type, enabled=False):
        projected: tuple[Tensor, Tensor] = _ProjectDown.apply(x_TI, a_MI, dtype, owned)  # type: ignore[no-untyped-call]
    return projected


class _ProjectDown(torch.autograd.Function):
    """x -> (x, x A^T). The first output goes to the base layer; its gradient is the buffer for the whole."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, a_MI: Tensor, dtype: torch.dtype, owned: bool) -> tuple[Tensor, Tensor]:
        cast_TI = x_TI.to(dtype)
        ctx.save_for_backward(cast_TI, a_MI)
        ctx.x_dtype, ctx.owned = x_TI.dtype, owned
        ctx.set_materialize_grads(False)
        passed_TI = x_TI.view_as(x_TI)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed_TI)
        return passed_TI, cast_TI @ a_MI.to(dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor | None, grad_TM: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_TM is None:
            return grad_TI, None, None, None
        x_TI, a_MI = ctx.saved_tensors
        grad_a = (grad_TM.T @ x_TI).to(a_MI.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_a, None, None
        a_MI = a_MI.to(grad_TM.dtype)
        if grad_TI is None:
            return (grad_TM @ a_MI).to(ctx.x_dtype), grad_a, None, None
        if grad_TI.dtype != grad_TM.dtype:
            return grad_TI + (grad_TM @ a_MI).to(ctx.x_dtype), grad_a, None, None
        if ctx.owned:
            return grad_TI.addmm_(grad_TM, a_MI), grad_a, None, None
        return torch.addmm(grad_TI, grad_TM, a_MI), grad_a, None, None


class _MixUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor,
        h_TM: Tensor,
        weights_TN: Tensor,
        indices_TK: Tensor | None,
        b_NRO: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        num_experts, rank, _ = b_NRO.shape
        gates = weights_TN if indices_TK is None else weights_TN.gather(-1, indices_TK)
        h = _pick(h_TM.view(-1, num_experts, rank), indices_TK)
        gated_TM = _spread(_scale(h, gates, scaling), indices_TK, num_experts)
        ctx.save_for_backward(h, gates, indices_TK, b_NRO)
        ctx.scaling = scaling
        b_MO = b_NRO.flatten(0, 1).to(h.dtype)
        if in_place:
            ctx.mark_dirty(base_TO)
            return base_TO.addmm_(gated_TM, b_MO)
        if base_TO.dtype == h.dtype:
            return torch.addmm(base_TO, gated_TM, b_MO)
        return base_TO + (gated_TM @ b_MO).to(base_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        h, gates, indices_TK, b_NRO = ctx.saved_tensors
        need_base, need_h, need_weights, _, need_b = ctx.needs_input_grad[:5]
        num_experts, rank, _ = b_NRO.shape
        grad_base = grad_TO if need_base else None
        grad_h = grad_weights = grad_b = None
        grad_TO = grad_TO.to(h.dtype)
        if need_b:
            gated_TM = _spread(_scale(h, gates, ctx.scaling), indices_TK, num_experts)
            grad_b = (gated_TM.T @ grad_TO).view(b_NRO.shape).to(b_NRO.dtype)
        if need_h or need_weights:
            grad_gated_TM = grad_TO @ b_NRO.flatten(0, 1).to(h.dtype).T
            grad_gated = _pick(grad_gated_TM.view(-1, num_experts, rank), indices_TK)
            if need_weights:
                grad_weights = (grad_gated.to(gates.dtype) * h).sum(-1) * ctx.scaling
                if indices_TK is not None:
                    dense_TN = grad_weights.new_zeros(grad_weights.shape[0], num_experts)
                    grad_weights = dense_TN.scatter_(-1, indices_TK, grad_weights)
            if need_h:
                grad_h = _spread(_scale(grad_gated, gates, ctx.scaling), indices_TK, num_experts)
        return grad_base, grad_h, grad_weights, None, grad_b, None, None


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
    return spread.index_copy_(0, _rows(indices_TK, num_experts), h.flatten(0, 1)).view(tokens, num_experts * rank)
