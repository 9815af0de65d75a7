"""Similarity of experts against the whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.registry import EXPERTS
from moadapt.statistics.similarity import delta_similarity, factor_similarity, output_similarity

N, T, R, I, O = 3, 40, 2, 7, 5  # noqa: E741


def naive_cosine(matrices: list[Tensor]) -> Tensor:
    result = torch.zeros(len(matrices), len(matrices), dtype=torch.float64)
    for i, first in enumerate(matrices):
        for j, second in enumerate(matrices):
            dot = sum(float(a) * float(b) for a, b in zip(first.flatten(), second.flatten(), strict=True))
            result[i, j] = dot / float(first.double().norm() * second.double().norm())
    return result


def test_factors_give_the_cosine_of_the_products() -> None:
    a, b = torch.randn(N, R, I, dtype=torch.float64), torch.randn(N, R, O, dtype=torch.float64)
    a[1], b[1] = 3 * b.new_tensor([[0.0, 1.0], [1.0, 0.0]]) @ a[0], b[0].flip(0)  # the same delta, three times as large
    found = factor_similarity(a, b)
    torch.testing.assert_close(found, naive_cosine([b[e].T @ a[e] for e in range(N)]))
    assert float(found[0, 1]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "lora"},
        {"kind": "lora", "shared_down": True},
        {"kind": "malora", "shared_r": 6},
        {"kind": "mtl_lora", "num_tasks": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_banks(options: dict[str, object]) -> None:
    bank = EXPERTS.build(EXPERTS.parse({**options, "r": R}), 12, 10, N)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(generator=generator)
        expected = naive_cosine([bank.delta_weight(expert) for expert in range(N)])
    torch.testing.assert_close(delta_similarity(bank), expected, atol=1e-5, rtol=1e-5)


def test_an_untrained_expert_has_no_direction() -> None:
    bank = EXPERTS.build(EXPERTS.parse("lora"), 12, 10, N)
    assert bool(delta_similarity(bank).isnan().all())


def test_experts_without_a_delta_say_so() -> None:
    bank = EXPERTS.build(EXPERTS.parse({"kind": "lora", "mixing": "factors"}), 12, 10, N)
    with pytest.raises(ConfigError, match="no delta of its own"):
        delta_similarity(bank)


def naive_cka(x: Tensor, y: Tensor) -> float:
    """From the doubly centred kernels, entry by entry."""

    def kernel(z: Tensor) -> Tensor:
        raw = torch.tensor([[float(a @ b) for b in z] for a in z], dtype=torch.float64)
        return raw - raw.mean(0, keepdim=True) - raw.mean(1, keepdim=True) + raw.mean()

    k, m = kernel(x), kernel(y)
    return float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())


@pytest.mark.parametrize("rows", [T, 4], ids=["more rows", "fewer rows"])
def test_linear_cka(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(N, rows, O, generator=generator).double() + 5
    found = output_similarity(outputs)
    for i in range(N):
        for j in range(N):
            assert float(found[i, j]) == pytest.approx(naive_cka(outputs[i], outputs[j]), abs=1e-9)
    assert bool((found == found.T).all())


@pytest.mark.parametrize("rows", [T, 4], ids=["more rows", "fewer rows"])
def test_linear_cka_does_not_see_rotation_scale_and_shift(rows: int) -> None:
    x = torch.randn(rows, O, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(O, O, dtype=torch.float64)).Q
    found = output_similarity(torch.stack([x, 3 * x @ turn + 1, torch.ones_like(x)]))
    assert float(found[0, 1]) == pytest.approx(1.0)
    assert bool(found[2].isnan().all())
