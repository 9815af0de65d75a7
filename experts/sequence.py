"""A mixture of low-rank experts where all tokens of a sequence share their gates (granularity `prompt` and `task`).

    y = base + sum_e g_e s B_e A_e x,    one row of gates for each sequence

With K of N experts selected, their factors are stacked into one LoRA of rank K*R for each sequence, and two batched
products over the sequences compute the mixture: the cost does not depend on N. What low_rank.py promises holds here
too: gates act in rank space, both products accumulate into buffers that are there already, shapes never depend on the
routing, and beyond x only the (T, K*R) activations, gates and indices are kept for the backward pass.

Several bodies give the same result, and sizes known on the host choose the cheapest of them:

    stacked  the selected experts of each sequence, gathered: few sequences, K < N
    all      every expert for every token, without a gather: soft mixtures, straight-through, one expert, short runs
    active   a loop over the experts that any row selected, on views: inference, when these are known on the host
    mixed    the up-projections summed for each sequence, so that its rank is R: where all share the down-projection

Shapes: T tokens, G sequences, S tokens of a sequence (T = G*S), I in, O out, N experts, K per sequence, R rank,
M the stacked rank (K*R, N*R or R).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.experts.low_rank import (
    FEW_TOKENS,
    Base,
    factor_dtype,
    may_overwrite,
    mix_low_rank,
    mix_up,
    product_dtype,
    project_down,
)
from moadapt.experts.sequence_products import mix_up_sequences, project_sequences
from moadapt.routing import Routing

# In elements read in the same time: the overhead of one expert in the loop; and how many tokens an expert's products
# take that long for as reading its weights. For 32 bits and more on a CPU, 16 bits on a CPU, and any dtype on a GPU.
_WIDE, _NARROW, _GPU = (64e3, 30.0), (250e3, 60.0), (15e6, 180.0)
_FEW_EXPERTS = 3
"""Up to so many experts a step of decoding loops over them without asking what another body would cost."""
# The overhead of a body with autograd functions, in those of one expert in the loop.
_ALL, _STACKED = 2, 3


def by_sequence(routing: Routing) -> bool:
    """Whether each row of the routing rules one run of tokens, so that the functions below can be used."""
    return routing.granularity != "token" and routing.rows_T is None


def skips_all(routing: Routing) -> bool:
    """Whether it is known, in inference, that no row selected any expert."""
    return routing.active == () and not torch.is_grad_enabled()


def base_output(base: Base, x_TI: Tensor) -> Tensor:
    """What the base layer makes of x, or has made of it already."""
    return base if isinstance(base, Tensor) else base(x_TI)


def mix_sequences(
    base: Base,
    x_TI: Tensor,
    routing: Routing,
    a_NRI: Tensor,
    b_NRO: Tensor,
    scaling: float,
    experts_x_TI: Tensor | None = None,
) -> Tensor:
    """`base + scaling * sum_e gate_e * (x A_e^T) B_e` with one row of gates for each sequence.

    Args:
        base: the base layer, or what it made of `x_TI`: (T, O), overwritten where autograd allows it.
        x_TI: the input, G runs of S tokens.
        routing: gate weights, (G, N).
        a_NRI: down-projections, any floating dtype.
        b_NRO: up-projections, stored transposed.
        scaling: s.
        experts_x_TI: the experts' input, if dropout made it another than the base layer's.

    Returns:
        (T, O) in the dtype of the base output. Differentiable once in all tensors.
    """
    if skips_all(routing):
        return base_output(base, x_TI)
    if experts_x_TI is None and _is_one_step(x_TI, routing):
        return _mix_one_step(base, x_TI, routing, a_NRI, b_NRO, scaling)
    num_experts, rank, _ = b_NRO.shape
    indices_GK, active = _selection(routing)
    num_kept = num_experts if indices_GK is None else indices_GK.shape[1]
    sizes = _Sizes(x_TI, routing.weights_TN.shape[0], rank * (a_NRI.shape[2] + b_NRO.shape[2]))
    costs = {"all": sizes.cost(_ALL, num_experts, num_experts)}
    if indices_GK is not None:  # each is read, written and read again
        costs["stacked"] = sizes.cost(_STACKED, 3 * sizes.groups * num_kept, num_kept)
    if active is not None:
        costs["active"] = sizes.cost(len(active), len(active), len(active))
    body = _cheapest(costs)
    if body == "active":
        assert active is not None
        return _mix_active(base, x_TI, experts_x_TI, routing.weights_TN * scaling, active, a_NRI, b_NRO)
    if body == "stacked":
        assert indices_GK is not None
        gates_GK = routing.weights_TN.gather(-1, indices_GK) * scaling
        base_TO, h_TM = project_sequences(base, x_TI, a_NRI, indices_GK, len(gates_GK), experts_x_TI)
        return mix_up_sequences(base_TO, h_TM, gates_GK, b_NRO, indices_GK, len(gates_GK))
    base_TO, h_TM = project_down(base, x_TI, a_NRI.flatten(0, 1), experts_x_TI)
    if indices_GK is not None and torch.is_grad_enabled() and len(x_TI) > 0:  # keeps K of N activations for backward
        return mix_up(base_TO, h_TM, routing.per_token(x_TI.shape[0]), b_NRO, scaling)
    gates_GN = routing.weights_TN * scaling
    return mix_up_sequences(base_TO, h_TM, gates_GN, b_NRO.flatten(0, 1), None, len(gates_GN))


def mix_shared_up(base_TO: Tensor, h_TR: Tensor, routing: Routing, b_NRO: Tensor, scaling: float) -> Tensor:
    """`base + h (scaling * sum_e gate_e B_e)`: all experts share their activations, at any granularity.

    Args:
        base_TO: output of the base layer; overwritten where autograd allows it, so do not use it afterwards.
        h_TR: the shared down-projection's output.
        routing: gate weights of each token, or of each sequence; then the up-projections are mixed first.
        b_NRO: up-projections, stored transposed.
        scaling: s.

    Returns:
        (T, O) in the dtype of `base_TO`. Differentiable once in all tensors.
    """
    num_experts, rank, _ = b_NRO.shape
    if not by_sequence(routing):
        return mix_up(base_TO, h_TR.repeat(1, num_experts), routing.per_token(h_TR.shape[0]), b_NRO, scaling)
    if skips_all(routing):
        return base_TO
    indices_GK, active = _selection(routing)
    sizes = _Sizes(h_TR, routing.weights_TN.shape[0], rank * b_NRO.shape[2])
    gates_GN = _gates(routing, indices_GK) * scaling
    costs = {
        "all": sizes.cost(_ALL, num_experts, num_experts),
        "mixed": sizes.cost(_STACKED, num_experts + 3 * sizes.groups, 1),
    }
    if active is not None:
        costs["active"] = sizes.cost(len(active), len(active), len(active))
    body = _cheapest(costs)
    if body == "active":
        assert active is not None
        return _add_active(base_TO, [h_TR] * len(active), gates_GN, active, b_NRO)
    if body == "all":
        h_TM = h_TR.repeat(1, num_experts)
        return mix_up_sequences(base_TO, h_TM, gates_GN, b_NRO.flatten(0, 1), None, len(gates_GN))
    return mix_up_sequences(base_TO, h_TR, None, _mix_factors(gates_GN, b_NRO), None, len(gates_GN))


def mix_by_factors(
    base: Base,
    x_TI: Tensor,
    routing: Routing,
    a_NRI: Tensor,
    b_NRO: Tensor,
    scaling: float,
    experts_x_TI: Tensor | None = None,
) -> Tensor:
    """`base + scaling * (x (sum_e gate_e A_e)^T) (sum_e gate_e B_e)`: one LoRA of rank R for each sequence.

    Arguments and result as in `mix_sequences`. Where sequences have several turns, each with its gates, the sums are
    taken over the experts' activations, token by token.
    """
    if skips_all(routing):
        return base_output(base, x_TI)
    if not by_sequence(routing):
        base_TO, h_TM = project_down(base, x_TI, a_NRI.flatten(0, 1), experts_x_TI)
        routing = routing.per_token(x_TI.shape[0])
        gates_TN = _gates(routing, _selection(routing)[0])
        h_TR = (h_TM.view(len(h_TM), *a_NRI.shape[:2]) * gates_TN.unsqueeze(-1)).sum(1).to(h_TM.dtype)
        return mix_shared_up(base_TO, h_TR, routing, b_NRO, scaling)
    gates_GN = _gates(routing, _selection(routing)[0])
    a_GRI = _mix_factors(gates_GN, a_NRI)
    base_TO, h_TR = project_sequences(base, x_TI, a_GRI, None, len(gates_GN), experts_x_TI)
    return mix_up_sequences(base_TO, h_TR, None, _mix_factors(gates_GN * scaling, b_NRO), None, len(gates_GN))


def mix_tokens(
    base: Base,
    x_TI: Tensor,
    routing: Routing,
    a_NRI: Tensor,
    b_NRO: Tensor,
    scaling: float,
    experts_x_TI: Tensor | None = None,
) -> Tensor:
    """The mixture at any granularity: `mix_sequences` where it can be used, else `mix_low_rank` token by token."""
    if by_sequence(routing):
        return mix_sequences(base, x_TI, routing, a_NRI, b_NRO, scaling, experts_x_TI)
    return mix_low_rank(base, x_TI, routing.per_token(x_TI.shape[0]), a_NRI, b_NRO, scaling, experts_x_TI)


def _cheapest(costs: dict[str, float]) -> str:
    return min(costs, key=lambda body: costs[body])


@dataclass(frozen=True)
class _Sizes:
    """What the bodies cost, in elements of memory read.

    Attributes:
        x_TI: the input.
        groups: G.
        elements: numbers in the factors of one expert.
    """

    x_TI: Tensor
    groups: int
    elements: int

    def cost(self, calls: int, num_read: int, num_multiplied: int) -> float:
        """So many overheads, reading that many experts' factors, and multiplying every token by so many."""
        overhead, balance = self._machine()
        return overhead * calls + self.elements * (num_read + num_multiplied * self.x_TI.shape[0] / balance)

    def _machine(self) -> tuple[float, float]:
        if self.x_TI.is_cuda:
            return _GPU
        return _WIDE if product_dtype(self.x_TI).itemsize >= 4 else _NARROW


def _selection(routing: Routing) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """The selected indices where fewer than all experts take part in every row, and the active ones if known."""
    indices_GK, training = routing.indices_TK, torch.is_grad_enabled()
    if indices_GK is not None and (
        indices_GK.shape[1] == routing.num_experts or (routing.straight_through and training)
    ):
        indices_GK = None
    return indices_GK, None if training else routing.active


def _gates(routing: Routing, indices_GK: Tensor | None) -> Tensor:
    """The gates of all experts, without a gradient for those that were not selected."""
    if indices_GK is None:
        return routing.weights_TN
    return torch.zeros_like(routing.weights_TN).scatter(-1, indices_GK, routing.weights_TN.gather(-1, indices_GK))


def _mix_factors(gates_GN: Tensor, factors_NRO: Tensor) -> Tensor:
    """sum_e gate_e * factor_e for each sequence, in the gates' fp32 (or fp64): (G, R, O)."""
    dtype = torch.promote_types(gates_GN.dtype, factors_NRO.dtype)
    with torch.autocast(gates_GN.device.type, enabled=False):
        mixed = gates_GN.to(dtype) @ factors_NRO.flatten(1).to(dtype)
    return mixed.view(len(gates_GN), *factors_NRO.shape[1:])


def _is_one_step(x_TI: Tensor, routing: Routing) -> bool:
    """Whether these are the newest tokens of a few sequences that use few experts, where every call counts."""
    return (
        routing.active is not None
        and len(routing.active) <= _FEW_EXPERTS
        and x_TI.shape[0] == routing.weights_TN.shape[0] <= FEW_TOKENS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x_TI.device.type)
    )


def _mix_one_step(base: Base, x_TI: Tensor, routing: Routing, a_NRI: Tensor, b_NRO: Tensor, scaling: float) -> Tensor:
    """The body `active` without anything that a single step does not need."""
    assert routing.active is not None
    y_TO = base_output(base, x_TI)
    gates_TN = routing.weights_TN * scaling
    inner_TI = x_TI.to(torch.promote_types(x_TI.dtype, a_NRI.dtype))
    for expert in routing.active:
        h_TR = torch.nn.functional.linear(inner_TI, a_NRI[expert].to(inner_TI.dtype))
        gated_TR = h_TR * gates_TN[:, expert : expert + 1].to(h_TR.dtype)
        delta_TO = gated_TR @ b_NRO[expert].to(h_TR.dtype)
        # Rounded once, when it is added.
        y_TO = y_TO.add_(delta_TO) if may_overwrite(y_TO, y_TO.dtype) else y_TO + delta_TO.to(y_TO.dtype)
    return y_TO


def _mix_active(
    base: Base,
    x_TI: Tensor,
    experts_x_TI: Tensor | None,
    gates_GN: Tensor,
    active: tuple[int, ...],
    a_NRI: Tensor,
    b_NRO: Tensor,
) -> Tensor:
    """The active experts one by one, on views of the stacks."""
    inner_TI = x_TI if experts_x_TI is None else experts_x_TI
    dtype = factor_dtype(inner_TI, a_NRI)
    with torch.autocast(x_TI.device.type, enabled=False):
        inner_TI = inner_TI.to(dtype)
        activations = [torch.nn.functional.linear(inner_TI, a_NRI[expert].to(dtype)) for expert in active]
    return _add_active(base_output(base, x_TI), activations, gates_GN, active, b_NRO)


def _add_active(
    base_TO: Tensor, activations: Sequence[Tensor], gates_GN: Tensor, active: tuple[int, ...], b_NRO: Tensor
) -> Tensor:
    """`base + sum_e (h_e * gate_e) B_e` over the active experts; without gradients."""
    tokens = base_TO.shape[0]
    if tokens != len(gates_GN):
        gates_GN = gates_GN.repeat_interleave(tokens // max(1, len(gates_GN)), dim=0)
    with torch.autocast(base_TO.device.type, enabled=False):
        for expert, h_TR in zip(active, activations, strict=True):
            gated_TR = (h_TR * gates_GN[:, expert, None]).to(h_TR.dtype)
            b_RO = b_NRO[expert].to(h_TR.dtype)
            if not may_overwrite(base_TO, base_TO.dtype):
                base_TO = base_TO + (gated_TR @ b_RO).to(base_TO.dtype)
            elif base_TO.dtype == h_TR.dtype:
                base_TO = base_TO.addmm_(gated_TR, b_RO)
            else:
                base_TO = base_TO.add_(gated_TR @ b_RO)  # rounded once, when it is added
    return base_TO
