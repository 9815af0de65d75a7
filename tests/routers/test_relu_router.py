"""The `relu` router."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch

from moadapt.registry import ROUTERS
from moadapt.routers import ReLURouter
from moadapt.routing import RoutingContext

D, N, T = 6, 5, 30


def make(**options: Any) -> ReLURouter:
    router: ReLURouter = ROUTERS.build(ROUTERS.parse({"kind": "relu", **options}), D, N)
    torch.nn.init.normal_(router.weight)
    return router.double()


@pytest.mark.parametrize("rescale", ["none", "n_over_active", 0.5])
def test_gates_and_gradient_equal_the_loop(rescale: Any) -> None:
    router = make(rescale=rescale)
    x = torch.randn(T, D, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight = router.weight.detach().clone().requires_grad_()
    naive = reference.NaiveRouter({"kind": "relu", "rescale": rescale}, weight)
    decisions = [naive(x_D, token) for token, x_D in enumerate(x)]
    want = torch.stack([torch.stack(decision.gates) for decision in decisions])
    reference.close(routing.weights_TN, want, 1e-12, "gates")
    assert routing.selected_TN.tolist() == [decision.selected for decision in decisions]
    assert torch.equal(routing.probs_TN, routing.logits_TN.clamp(min=0.0)), "the ReLUs, not rescaled"
    assert not routing.straight_through
    direction = torch.randn_like(want)
    (routing.weights_TN * direction).sum().backward()
    (want * direction).sum().backward()
    reference.close(router.weight.grad, weight.grad, 1e-12, "gradient")


@pytest.mark.parametrize("rescale", ["none", "n_over_active"])
def test_a_token_without_any_expert(rescale: str) -> None:
    router = make(rescale=rescale)
    router.weight.data = -torch.ones(N, D, dtype=torch.float64)
    x = torch.rand(T, D, dtype=torch.float64).add(0.1).requires_grad_()
    routing = router(x, RoutingContext())
    routing.weights_TN.sum().backward()
    assert routing.weights_TN.abs().max() == 0
    assert not routing.selected_TN.any()
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"init": "zeros"}, "whose gradient is 0"), ({"init_std": 0}, "init_std: 0 makes")]
)
def test_gates_that_could_never_open_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
