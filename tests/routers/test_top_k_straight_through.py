"""The `top_k` router with `straight_through`: values of the kept gates, gradients of all probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch

from moadapt.registry import ROUTERS
from moadapt.routers import TopKRouter
from moadapt.routing import RoutingContext

D, N, T = 6, 5, 12
CASES: list[dict[str, Any]] = [
    {"num_experts_per_tok": 2},
    {"num_experts_per_tok": 1, "norm_topk_prob": True},
    {"num_experts_per_tok": 3, "combine": "unit", "rescale": "n_over_k"},
    {"num_experts_per_tok": 2, "combine": "sigmoid", "rescale": 2.0, "temperature": 0.5},
    {"num_experts_per_tok": 5, "norm_topk_prob": True},
]


def make(**options: Any) -> TopKRouter:
    router: TopKRouter = ROUTERS.build(ROUTERS.parse({"kind": "top_k", **options}), D, N)
    torch.nn.init.normal_(router.weight)
    return router.double()


@pytest.mark.parametrize("options", CASES)
def test_values_and_gradients_equal_the_loop(options: dict[str, Any]) -> None:
    router = make(straight_through=True, **options)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    routing = router(x, RoutingContext())
    x_naive = x.detach().clone().requires_grad_()
    weight = router.weight.detach().clone().requires_grad_()
    naive = reference.NaiveRouter({"kind": "top_k", "straight_through": True, **options}, weight)
    decisions = [naive(row, token) for token, row in enumerate(x_naive)]
    gates = torch.stack([torch.stack(decision.gates) for decision in decisions])
    reference.close(routing.weights_TN, gates, 1e-12, "gates")
    assert routing.selected_TN.tolist() == [decision.selected for decision in decisions]
    upstream = torch.sin(torch.arange(T * N).double() + 1.0).view(T, N)
    (routing.weights_TN * upstream).sum().backward()
    (gates * upstream).sum().backward()
    assert weight.grad.abs().max() > 0
    reference.close(router.weight.grad, weight.grad, 1e-11, "gradient of the weights")
    reference.close(x.grad, x_naive.grad, 1e-11, "gradient of the input")


@pytest.mark.parametrize("options", CASES)
def test_the_value_is_that_of_the_hard_gate_in_every_mode(options: dict[str, Any]) -> None:
    router = make(straight_through=True, **options)
    x = torch.randn(T, D, dtype=torch.float64)
    routing = router(x, RoutingContext())
    assert routing.straight_through
    assert routing.indices_TK is None
    with torch.no_grad():
        calm = router(x, RoutingContext())
    assert not calm.straight_through
    assert calm.indices_TK.shape == (T, options["num_experts_per_tok"])
    torch.testing.assert_close(routing.weights_TN.detach(), calm.weights_TN, rtol=0.0, atol=0.0)
    if options != CASES[1]:  # without straight-through that one is refused
        plain = make(**options)
        plain.load_state_dict(router.state_dict())
        assert torch.equal(plain(x, RoutingContext()).weights_TN, calm.weights_TN)


def test_the_gradient_has_the_right_sign_and_reaches_every_expert() -> None:
    """A gate rises with its own logit, kept or not, and falls with the others'."""
    router = make(num_experts_per_tok=1, norm_topk_prob=True, straight_through=True)
    x = torch.randn(1, D, dtype=torch.float64)
    routing = router(x, RoutingContext())
    assert routing.selected_TN.sum() == 1
    for expert in range(N):
        (grad,) = torch.autograd.grad(routing.weights_TN[0, expert], router.weight, retain_graph=True)
        slope_N = grad @ x[0]
        assert slope_N[expert] > 0
        assert (slope_N[torch.arange(N) != expert] < 0).all()


def test_constant_gates_learn_with_it() -> None:
    assert make(num_experts_per_tok=2, combine="unit", straight_through=True).learns_from_task
    assert not make(num_experts_per_tok=2, combine="unit").learns_from_task
    zeros: Any = {"combine": "sigmoid", "init": "zeros"}
    with pytest.raises(ValueError, match=r"ties all experts.*straight_through: true"):
        make(**zeros)
    assert make(straight_through=True, **zeros).config.init == "zeros"
    with pytest.raises(ValueError, match="norm_topk_prob: false, or straight_through: true"):
        make(num_experts_per_tok=1, norm_topk_prob=True)
