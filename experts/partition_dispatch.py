"""Which body computes a mixture of partitioned experts fastest: a small cost model instead of a table.

In units of the dense block, for a share f of active pairs (f = 1/3 + 2/3 share with a straight-through gradient, whose
other pairs need 3 of 9 products), computing selected pairs only costs about

    rate * f + (per_row + per_call / (M D)) / T

and is done up to a cost of `break_even`. `rate` is what gathering adds to a product of many rows; `per_row` says from
how many tokens on products are bound by arithmetic and no longer by reading weights; `per_call` is what a call costs.
With t threads on a CPU the last term counts sqrt(t) times: small products share out worse than large ones.

The figures for CPUs were fitted to timings as in `benchmarks/ffn_speed.py`, over 1 to 1024 tokens, 64 to 1024 features,
4 to 16 experts and shares of 1/4 to 3/4, on a server CPU with AVX-512 (bf16 instructions, no AMX). With AMX, which is
far faster at bf16 products and at nothing else, break-even is put at about 400 tokens of 1024 features and half of 8
experts of 352 neurons. The figures for CUDA come from a roofline and were not measured.

Shapes: T tokens, D hidden size, N experts, M neurons of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moadapt.experts.partition_blocks import Body
from moadapt.ffn import StackedExperts
from moadapt.routing import Routing


@dataclass(frozen=True)
class Costs:
    """What the cost model knows about a device and a dtype. See the module's docstring."""

    rate: float
    per_row: float
    per_call: float
    break_even: float = 0.98


FULL_CPU = Costs(rate=1.0, per_row=8.0, per_call=1e6)
HALF_CPU = Costs(rate=1.2, per_row=4.0, per_call=4e6, break_even=1.08)  # where the dense body costs as much
HALF_CPU_AMX = Costs(rate=1.2, per_row=40.0, per_call=4e7)
CUDA = Costs(rate=1.0, per_row=200.0, per_call=5e8)

FEW_TOKENS_COST = 0.45
"""Full precision on a CPU, large experts: few tokens cost at most so much more than their share, as no body reads a
weight twice."""
LARGE_EXPERT = 2**17
"""M D from which an expert is large in this sense: reading it takes longer than calling for it."""
LARGE_BLOCK = 2**18
"""N M D from which one token goes through its experts only, instead of all at once."""
BUFFER_ELEMENTS = 2**21
"""Size of the (pairs, D) buffer up to which `grouped` runs on a CPU; beyond, `sorted` is as fast in less memory."""


def choose_body(x_TD: Tensor, routing: Routing, experts: StackedExperts, gradients: bool) -> Body:
    """The fastest body for these sizes. It does not wait for the device unless there is work to save.

    Args:
        x_TD: the input, in the dtype that products run in.
        routing: how many pairs are selected, and whether all gates need a gradient.
        experts: their sizes.
        gradients: whether a backward pass follows.

    Returns:
        The name of a body. The same for the same arguments, as recomputation under activation checkpointing needs.
    """
    (tokens, features), (num_experts, width) = x_TD.shape, experts.out_NMD.shape[:2]
    straight_through = gradients and routing.straight_through
    if tokens == 1 and not gradients and not x_TD.is_cuda:
        return "union" if num_experts * width * features >= LARGE_BLOCK else "dense"
    full = x_TD.dtype in (torch.float32, torch.float64)
    costs = CUDA if x_TD.is_cuda else FULL_CPU if full else HALF_CPU_AMX if _has_amx() else HALF_CPU
    fixed = (costs.per_row + costs.per_call / (width * features)) / max(tokens, 1)
    if full and not x_TD.is_cuda and not straight_through and width * features >= LARGE_EXPERT:
        fixed = min(fixed, FEW_TOKENS_COST)
    if not x_TD.is_cuda:
        fixed *= torch.get_num_threads() ** 0.5
    break_even = min(costs.break_even, 0.98) if straight_through else costs.break_even
    if fixed >= break_even:
        return "dense"
    if routing.indices_TK is not None:
        share = routing.indices_TK.shape[-1] / num_experts
    else:
        share = routing.selected_TN.sum().item() / max(tokens * num_experts, 1)
    computed = (1 + 2 * share) / 3 if straight_through else share
    if costs.rate * computed + fixed > break_even:
        return "dense"
    if x_TD.is_cuda or share * tokens * num_experts * features <= BUFFER_ELEMENTS:
        return "grouped"
    return "sorted"


@cache
def _has_amx() -> bool:
    """Whether this CPU has matrix units for bf16, as far as torch tells."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
