"""The dense `softmax` router."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch

from moadapt.registry import ROUTERS
from moadapt.routers import SoftmaxRouter
from moadapt.routing import RoutingContext

D, N, T = 6, 5, 20


def make(n: int = N, **options: Any) -> SoftmaxRouter:
    router: SoftmaxRouter = ROUTERS.build(ROUTERS.parse({"kind": "softmax", **options}), D, n)
    torch.nn.init.normal_(router.weight)
    return router


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_gates_are_the_softmax(temperature: float) -> None:
    router = make(temperature=temperature).double()
    x = torch.randn(T, D, dtype=torch.float64)
    routing = router(x, RoutingContext())
    naive = reference.NaiveRouter({"kind": "softmax", "temperature": temperature}, router.weight)
    for token in range(T):
        want = naive(x[token], token)
        reference.close(routing.weights_TN[token], torch.stack(want.gates), 1e-12, "gates")
        reference.close(routing.logits_TN[token], torch.stack(want.logits), 1e-12, "logits")
    assert routing.selected_TN.all()
    assert routing.indices_TK is None
    torch.testing.assert_close(routing.weights_TN.sum(-1), torch.ones(T, dtype=torch.float64))


def test_jitter_in_training_only() -> None:
    router = make(router_jitter_noise=0.3)
    x = torch.randn(T, D)
    before = x.clone()
    assert not torch.equal(router(x, RoutingContext()).weights_TN, router(x, RoutingContext()).weights_TN)
    assert torch.equal(x, before)
    router.eval()
    assert torch.equal(router(x, RoutingContext()).weights_TN, router(x, RoutingContext()).weights_TN)


def test_extreme_logits_stay_finite() -> None:
    router = make()
    routing = router(1e4 * torch.randn(T, D), RoutingContext())
    assert torch.isfinite(routing.weights_TN).all()


def test_single_expert_is_constant() -> None:
    router = make(n=1)
    assert router.constant_weights().tolist() == [1.0]
    assert torch.equal(router(torch.randn(T, D), RoutingContext()).weights_TN, torch.ones(T, 1))
    assert make().constant_weights() is None


def test_top_k_options_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        ROUTERS.parse({"kind": "softmax", "num_experts_per_tok": 2})
