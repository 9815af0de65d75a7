"""`mixing: factors` of the lora experts: peft's Poly, merging, and where it is refused."""

from __future__ import annotations

import pytest
import reference
import torch
from kinds import randomize
from peft import PolyConfig
from peft.tuners.poly.layer import Linear as PolyLinear
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.experts import LoraBank, LoraExpertConfig
from moadapt.routing import Routing

IN, OUT, N, R, TASKS = 6, 5, 4, 3, 3


def bank(**options: object) -> LoraBank:
    made = LoraBank(LoraExpertConfig(r=R, mixing="factors", **options), IN, OUT, N, dtype=torch.float64)
    randomize(made.parameters())
    return made


def routing_of(gates: Tensor, granularity: str = "task") -> Routing:
    return Routing(gates, torch.ones_like(gates, dtype=torch.bool), gates, gates, granularity)  # type: ignore[arg-type]


def test_equals_peft_poly() -> None:
    """Outputs and the gradients of x, A, B and the logits, with gates as Poly has them in evaluation."""
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    config = PolyConfig(r=R, n_tasks=TASKS, n_skills=N, n_splits=1, target_modules=["unused"])
    poly = PolyLinear(base, "default", config).double().eval()
    randomize(poly.poly_router.parameters())
    made = bank(lora_alpha=1.0)
    with torch.no_grad():
        poly.poly_lora_A["default"].copy_(made.lora_A.transpose(1, 2).unsqueeze(0))
        poly.poly_lora_B["default"].copy_(made.lora_B.unsqueeze(0))
    logits = poly.poly_router["default"].module_logits.detach().clone().requires_grad_()
    tasks = torch.tensor([2, 0, 2, 1])
    x = torch.randn(4, 7, IN, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    activation = torch.sigmoid(logits[tasks])
    y = made(ours.flatten(0, 1), routing_of(activation / activation.sum(-1, keepdim=True)), base)
    want = poly(theirs, task_ids=tasks)
    reference.close(y.view(want.shape), want, 1e-11, "output")  # Poly adds 1e-12 to the sum that it divides by

    upstream = torch.randn_like(want)
    (y.view(want.shape) * upstream).sum().backward()
    (want * upstream).sum().backward()
    grad_a = poly.poly_lora_A["default"].grad
    grad_b = poly.poly_lora_B["default"].grad
    assert grad_a is not None
    assert grad_b is not None
    reference.close(ours.grad, theirs.grad, 1e-11, "x")
    reference.close(made.lora_A.grad, grad_a[0].transpose(1, 2), 1e-11, "A")
    reference.close(made.lora_B.grad, grad_b[0], 1e-11, "B")
    reference.close(logits.grad, poly.poly_router["default"].module_logits.grad, 1e-11, "logits")


@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_mixed_delta_is_what_forward_adds(mixing: str) -> None:
    made = LoraBank(LoraExpertConfig(r=R, lora_alpha=5.0, mixing=mixing), IN, OUT, N, dtype=torch.float64)
    randomize(made.parameters())
    gates, x = torch.rand(2, N, dtype=torch.float64), torch.randn(8, IN, dtype=torch.float64)
    added = made(x, routing_of(gates), torch.zeros(8, OUT, dtype=torch.float64))
    for row in range(2):
        tokens = slice(4 * row, 4 * row + 4)
        reference.close(added[tokens], x[tokens] @ made.mixed_delta(gates[row]).T, 1e-12, "delta")


def test_one_expert_with_gate_one_is_an_ordinary_lora() -> None:
    made, gates = bank(lora_alpha=6.0), torch.eye(N, dtype=torch.float64)[:2]
    x = torch.randn(6, IN, dtype=torch.float64)
    added = made(x, routing_of(gates), torch.zeros(6, OUT, dtype=torch.float64))
    for row in range(2):
        want = x[3 * row : 3 * row + 3] @ made.lora_A[row].T @ made.lora_B[row] * 2.0
        reference.close(added[3 * row : 3 * row + 3], want, 1e-12, "one expert")


def test_decisions_for_tokens_are_refused() -> None:
    gates = torch.rand(4, N, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"granularity: prompt or task, or expert\.mixing: outputs"):
        bank()(torch.randn(4, IN).double(), routing_of(gates, "token"), torch.zeros(4, OUT).double())


def test_an_expert_has_no_delta_of_its_own() -> None:
    with pytest.raises(ConfigError, match="mixed_delta"):
        bank().delta_weight(0)


def test_shared_down_is_refused() -> None:
    with pytest.raises(ValueError, match="mixing: factors"):
        LoraExpertConfig(mixing="factors", shared_down=True)
