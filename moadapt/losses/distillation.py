"""Losses that hold a converted model to the dense one: block by block, and at the final logits.

Shapes: T tokens, V vocabulary, B batch, S sequence, C tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from moadapt.errors import ConfigError
from moadapt.losses.base import AuxiliaryLoss, LossConfig, reduce_routers
from moadapt.registry import LOSSES
from moadapt.routing import RoutingRecord

_CHUNK = 1024  # tokens whose probabilities are in memory at a time


class BlockDistillationConfig(LossConfig):
    """Options of `block_distillation`: none but `coef`."""

    kind: Literal["block_distillation"] = "block_distillation"
    coef: float = Field(default=1.0, ge=0.0)


@LOSSES.register("block_distillation", BlockDistillationConfig)
class BlockDistillationLoss(AuxiliaryLoss):
    """L = mean over blocks and tokens of ||y - y_dense||² / ||y_dense||², on the input that the block gets now.

    The layer computes the ratio of every token; the dense block is a constant in it.
    """

    wants_reconstruction = True
    config: BlockDistillationConfig

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """Scalar; see the class. Raises ConfigError where a layer has no dense block to compare with."""
        values = []
        for record in records:
            error_T = record.outputs.get("reconstruction")
            if error_T is None:
                raise ConfigError(
                    f"losses.block_distillation: {record.name} replaces no feed-forward block, so there is nothing to "
                    "compare with; it needs expert.kind: ffn_partition"
                )
            if record.mask_T is None:
                values.append(error_T.mean())
                continue
            mask_T = record.mask_T.to(error_T.device)
            values.append(torch.where(mask_T, error_T, 0.0).sum() / mask_T.sum().clamp(min=1))
        return reduce_routers(values, "mean")


class LogitsDistillationConfig(LossConfig):
    """Options of `logits_distillation`.

    Attributes:
        temperature: divides both models' logits; the loss is multiplied by its square (1503.02531).
    """

    kind: Literal["logits_distillation"] = "logits_distillation"
    coef: float = Field(default=1.0, ge=0.0)
    temperature: float = Field(default=1.0, gt=0.0)


@LOSSES.register("logits_distillation", LogitsDistillationConfig)
class LogitsDistillationLoss(AuxiliaryLoss):
    """L = mean over label positions of KL(dense model || this model), at the final logits."""

    wants_teacher_logits = True
    config: LogitsDistillationConfig

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """Routings do not hold what this loss needs."""
        raise RuntimeError("logits_distillation is computed by from_logits, from both models' logits")

    def from_logits(self, student_BSV: Tensor, teacher_BSV: Tensor, mask_BS: Tensor) -> Tensor:
        """Scalar; see the class."""
        return distillation_kl(student_BSV, teacher_BSV, mask_BS, self.config.temperature)


def distillation_kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature² * mean over masked positions of sum_v q_v log(q_v / p_v), p and q softmaxes of logits / temperature.

    Probabilities are made for some positions at a time, forward and backward, and never kept: beside the logits and
    their gradient nothing of the size of the vocabulary times the tokens is in memory.

    Args:
        student: (..., V), whose distribution is p.
        teacher: (..., V), whose distribution is q; a constant.
        mask: (...) bool, positions to compare.
        temperature: softens both.

    Returns:
        A scalar in fp32 (fp64 for float64 logits); 0 when nothing is masked in. Differentiable once, in `student`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if student.shape != teacher.shape or mask.shape != student.shape[:-1]:
        raise ValueError(
            f"logits of shape {tuple(student.shape)} and {tuple(teacher.shape)} with a mask of {tuple(mask.shape)}"
        )
    value: Tensor = _KL.apply(student, teacher.detach(), mask, temperature)  # type: ignore[no-untyped-call]
    return value


class _KL(torch.autograd.Function):
    """See `distillation_kl`. d/ds of T² KL / n is T (p - q) / n."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        index_T = mask.flatten().nonzero().squeeze(-1)
        ctx.save_for_backward(student, teacher, index_T)
        ctx.temperature = temperature
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=student.device)
        for _, log_p_CV, log_q_CV in _log_probs(student, teacher, index_T, temperature):
            # A token of probability 0 contributes 0, also where its logit is -inf in both.
            term_CV = log_q_CV.exp() * (log_q_CV - log_p_CV)
            total += torch.where(log_q_CV == -torch.inf, 0.0, term_CV).sum()
        return total * (temperature**2 / max(len(index_T), 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, index_T = ctx.saved_tensors
        grad_student = torch.zeros_like(student, memory_format=torch.contiguous_format)
        grad_TV = grad_student.view(-1, student.shape[-1])
        factor = grad * (ctx.temperature / max(len(index_T), 1))
        for index_C, log_p_CV, log_q_CV in _log_probs(student, teacher, index_T, ctx.temperature):
            grad_TV[index_C] = ((log_p_CV.exp() - log_q_CV.exp()) * factor).to(student.dtype)
        return grad_student, None, None, None


def _log_probs(student: Tensor, teacher: Tensor, index_T: Tensor, temperature: float) -> Any:
    """Yields (positions, log p, log q) for some of the positions at a time."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    flat = [logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher.to(student.device))]
    for start in range(0, len(index_T), _CHUNK):
        index_C = index_T[start : start + _CHUNK]
        log_p_CV, log_q_CV = (torch.log_softmax(rows[index_C].to(dtype) / temperature, dim=-1) for rows in flat)
        yield index_C, log_p_CV, log_q_CV
