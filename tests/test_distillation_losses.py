"""`block_distillation` and `logits_distillation`."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch

from moadapt.errors import ConfigError
from moadapt.losses import AuxiliaryLoss, distillation, distillation_kl
from moadapt.registry import LOSSES
from moadapt.routing import Routing, RoutingRecord

V = 7


def make(kind: str, **options: Any) -> AuxiliaryLoss:
    loss: AuxiliaryLoss = LOSSES.build(LOSSES.parse({"kind": kind, **options}))
    return loss


def record(tokens: int, mask_T: torch.Tensor | None, **outputs: torch.Tensor) -> RoutingRecord:
    empty = torch.zeros(tokens, 2, dtype=torch.float64)
    return RoutingRecord("layers.0.mlp", Routing(empty, empty.bool(), empty, empty), mask_T, 1, outputs)


def test_block_distillation_is_the_mean_over_tokens_then_blocks() -> None:
    errors = [torch.rand(4, dtype=torch.float64, requires_grad=True), torch.rand(6, dtype=torch.float64)]
    mask = torch.tensor([True, False, True, True])
    got = make("block_distillation")(
        [record(4, mask, reconstruction=errors[0]), record(6, None, reconstruction=errors[1])]
    )
    first = (errors[0][0] + errors[0][2] + errors[0][3]).item() / 3
    assert got.item() == pytest.approx((first + sum(errors[1].tolist()) / 6) / 2, rel=1e-12)
    got.backward()
    torch.testing.assert_close(errors[0].grad, mask.double() / 6)


def test_block_distillation_ignores_padding_that_is_not_finite() -> None:
    error = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    value = make("block_distillation")([record(3, mask, reconstruction=error)])
    value.backward()
    assert value.item() == 2.0
    assert error.grad.tolist() == [0.5, 0.0, 0.5]
    assert make("block_distillation")([record(3, ~mask & mask, reconstruction=error)]).item() == 0.0


def test_block_distillation_without_a_block() -> None:
    with pytest.raises(ConfigError, match=r"layers.0.mlp replaces no feed-forward block.*ffn_partition"):
        make("block_distillation")([record(3, None)])
    assert make("block_distillation").wants_reconstruction


# -- logits -------------------------------------------------------------------------------------------------------


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def naive_kl(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² mean over positions of sum_v q log(q / p)."""
    values = []
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if mask[row, column]:
                p = reference.softmax(list(student[row, column] / temperature))
                q = reference.softmax(list(teacher[row, column] / temperature))
                values.append(sum(b * torch.log(b / a) for a, b in zip(p, q, strict=True)))
    return temperature**2 * sum(values) / len(values)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_value_and_gradient_equal_the_loop(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_CHUNK", chunk)
    student, teacher = logits(2, 5, V).requires_grad_(), logits(2, 5, V)
    mask = torch.rand(2, 5) < 0.7
    assert 1 < mask.sum() < 10
    got = make("logits_distillation", temperature=temperature).from_logits(student, teacher, mask)
    want = naive_kl(student, teacher, mask, temperature)
    reference.close(got, want, 1e-12, "value")
    (mine,), (theirs,) = torch.autograd.grad(3.0 * got, student), torch.autograd.grad(3.0 * want, student)
    reference.close(mine, theirs, 1e-12, "gradient")
    assert mine[~mask].abs().max() == 0


def test_gradcheck() -> None:
    student, teacher = logits(3, V).requires_grad_(), logits(3, V)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda s: distillation_kl(s, teacher, mask, 1.7), (student,))


def test_zero_for_the_teacher_itself_and_no_gradient_to_the_teacher() -> None:
    student = logits(4, V).requires_grad_()
    teacher = student.detach().clone().requires_grad_()
    value = distillation_kl(student, teacher, torch.ones(4, dtype=torch.bool))
    assert abs(value.item()) < 1e-14
    value.backward()
    assert student.grad.abs().max() < 1e-15
    assert teacher.grad is None


def test_nothing_to_compare() -> None:
    student = logits(4, V).requires_grad_()
    value = distillation_kl(student, logits(4, V), torch.zeros(4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().max() == 0


def test_forbidden_tokens_and_masked_nonsense_stay_finite() -> None:
    """-inf at the same tokens in both models, and NaN at positions that do not count."""
    student, teacher = logits(4, V), logits(4, V)
    student[:, 2] = teacher[:, 2] = -torch.inf
    student[3], teacher[3] = torch.nan, torch.nan
    student.requires_grad_()
    mask = torch.tensor([True, True, True, False])
    value = distillation_kl(student, teacher, mask)
    value.backward()
    keep = [0, 1, 3, 4, 5, 6]
    want = naive_kl(student[None, :3, keep], teacher[None, :3, keep], mask[None, :3], 1.0)
    assert value.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_logits_are_compared_in_fp32(dtype: torch.dtype) -> None:
    student, teacher = logits(2, 30, V).to(dtype).requires_grad_(), logits(2, 30, V).to(dtype)
    mask = torch.ones(2, 30, dtype=torch.bool)
    value = distillation_kl(student, teacher, mask)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(naive_kl(student.double(), teacher.double(), mask, 1.0).item(), rel=1e-5)
    value.backward()
    assert student.grad.dtype == dtype


def test_wrong_shapes_and_wrong_use() -> None:
    with pytest.raises(ValueError, match="with a mask of"):
        distillation_kl(logits(4, V), logits(4, V), torch.ones(5, dtype=torch.bool))
    loss = make("logits_distillation")
    assert loss.wants_teacher_logits
    with pytest.raises(RuntimeError, match="from_logits"):
        loss([])
    with pytest.raises(TypeError, match="SparsityLoss"):
        make("sparsity").from_logits(logits(4, V), logits(4, V), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature"):
        make("logits_distillation", temperature=0.0)
