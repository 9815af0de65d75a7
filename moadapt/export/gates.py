"""What a router computes, in the terms of the mixtures that transformers knows.

    y = sum of shared experts + factor * sum over the K kept experts of c_i E_i(x),     scores s = W x + b

with c_i = 1 (`unit`), the softmax over all N (`softmax`), over the kept ones (`softmax_renorm`) or sigmoid(s_i)
(`sigmoid`). Only routers that keep a fixed number of experts by a linear score have this form.

Shapes: D hidden size, N experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moadapt.routers.base import Router
from moadapt.routers.gates import Combine, Rescale
from moadapt.routers.norm_regression import NormRegressionRouter
from moadapt.routers.relu import ReLURouter
from moadapt.routers.representative import RepresentativeRouter
from moadapt.routers.sigmoid_ste import SigmoidSTERouter
from moadapt.routers.softmax import SoftmaxRouter
from moadapt.routers.top_k import TopKRouter

NEAR_EXPONENT = {"softmax": 12, "sigmoid": 11}
"""Near-exact 0/1 gates: scores of up to `NEAR_RANGE` in size are multiplied by 2^-e, which makes their softmax (or the
shares of their sigmoids, which are half as steep) uniform over the kept experts to 1.8e-3, less than bfloat16 rounds a
weight by. A larger e brings weights nearer to 1, but scores that differ by little become equal in fp32, and other
experts are kept: on real text e = 14 gives six times (under sigmoids, ten times) the mean error of the logits."""
NEAR_RANGE = 6.4


@dataclass(frozen=True)
class Gate:
    """A linear router with a fixed number of experts.

    Attributes:
        combine: c.
        num_kept: K.
        factor: multiplies all kept experts.
        weight_ND: W with the temperature divided out, fp32.
        bias_N: b likewise, or None where it is zero.
    """

    combine: Combine
    num_kept: int
    factor: float
    weight_ND: Tensor
    bias_N: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """N."""
        return self.weight_ND.shape[0]

    @property
    def label(self) -> str:
        """As the options name it."""
        return f"combine: {self.combine}, num_experts_per_tok: {self.num_kept} of {self.num_experts}"


def read_gate(router: Router) -> Gate | str:
    """The linear form of a router, or why it has none."""
    if isinstance(router, TopKRouter):
        kept, config = router.num_experts_per_tok, router.config
        factor = _factor(config.rescale, router.num_experts, kept)
        bias = router.bias if config.bias else None
        return _gate(config.combine, kept, factor, router.weight, bias, config.temperature)
    if isinstance(router, SoftmaxRouter):
        return _gate("softmax", router.num_experts, 1.0, router.weight, None, router.config.temperature)
    if isinstance(router, SigmoidSTERouter):
        return "router sigmoid_ste keeps every expert above a threshold, as many as there are"
    if isinstance(router, ReLURouter):
        return "router relu keeps every expert with a positive score, as many as there are"
    if isinstance(router, NormRegressionRouter):
        return "router norm_regression is a network of two layers, and keeps as many experts as the token needs"
    if isinstance(router, RepresentativeRouter):
        return "router representative scores by a neuron's activation, which is not linear in x"
    return f"router {router.config.kind} is not known here"


def _gate(combine: Combine, kept: int, factor: float, weight: Tensor, bias: Tensor | None, temperature: float) -> Gate:
    weight_ND = weight.detach().float() / temperature
    bias_N = None if bias is None or not bool(bias.any()) else bias.detach().float() / temperature
    return Gate(combine, kept, factor, weight_ND, bias_N)


def _factor(rescale: Rescale, num_experts: int, kept: int) -> float:
    if rescale == "none":
        return 1.0
    return num_experts / kept if isinstance(rescale, str) else float(rescale)


def as_softmax(gate: Gate) -> Gate | None:
    """The same gate as a softmax over all or the kept experts, or None: exact, no approximation.

    One kept expert of weight 1 is a softmax over itself. Weights of 1 for all N experts are N times the softmax of
    equal scores.
    """
    if gate.combine in ("softmax", "softmax_renorm"):
        return gate
    if gate.combine == "unit" and gate.num_kept == gate.num_experts:
        zero_ND = torch.zeros_like(gate.weight_ND)
        factor = gate.factor * gate.num_experts
        return replace(gate, combine="softmax_renorm", weight_ND=zero_ND, factor=factor, bias_N=None)
    if gate.combine == "unit" and gate.num_kept == 1:
        return replace(gate, combine="softmax_renorm")
    return None


def nearly(gate: Gate, largest: float, exponent: int) -> tuple[Gate, int]:
    """A 0/1 gate as a nearly uniform softmax over the kept experts, and the exponent e of 2^-e that its scores got.

    Args:
        gate: with `combine: unit`.
        largest: the largest |score| that was seen.
        exponent: e for scores of up to `NEAR_RANGE`.
    """
    if largest > 0.0:
        exponent += round(torch.tensor(largest / NEAR_RANGE).log2().item())
    factor = gate.factor * gate.num_kept
    weight_ND = gate.weight_ND * 2.0**-exponent
    bias_N = None if gate.bias_N is None else gate.bias_N * 2.0**-exponent
    return replace(gate, combine="softmax_renorm", factor=factor, weight_ND=weight_ND, bias_N=bias_N), exponent


def is_power_of_two(value: float) -> bool:
    """Whether multiplying a floating-point weight by it rounds nothing."""
    return value > 0.0 and float(torch.frexp(torch.tensor(value, dtype=torch.float64)).mantissa) == 0.5
