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


def test_normalised_scores_and_their_gradients_equal_the_loop() -> None:
    router = make(normalize=True, temperature=0.5).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    tensors = {name: parameter.detach().clone().requires_grad_() for name, parameter in router.named_parameters()}
    assert sorted(tensors) == ["bias", "input_scale", "weight", "weight_scale"]
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    x_naive = x.detach().clone().requires_grad_()
    routing = router(x, RoutingContext())
    naive = reference.NaiveRouter.of({"kind": "softmax", "temperature": 0.5}, tensors)
    decisions = [naive(row, token) for token, row in enumerate(x_naive)]
    gates = torch.stack([torch.stack(decision.gates) for decision in decisions])
    reference.close(routing.weights_TN, gates, 1e-12, "gates")
    reference.close(
        routing.logits_TN, torch.stack([torch.stack(decision.logits) for decision in decisions]), 1e-12, "logits"
    )
    upstream = torch.sin(torch.arange(T * N).double() + 1.0).view(T, N)
    (routing.weights_TN * upstream).sum().backward()
    (gates * upstream).sum().backward()
    reference.close(x.grad, x_naive.grad, 1e-10, "x")
    for name, parameter in router.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        reference.close(parameter.grad, tensors[name].grad, 1e-10, name)


def test_normalised_scores_do_not_depend_on_the_size_of_the_input() -> None:
    router = ROUTERS.build(ROUTERS.parse({"kind": "softmax", "normalize": True}), 512, N)
    assert router.bias.abs().max() == 0
    assert torch.equal(router.input_scale, torch.ones(512))
    assert torch.equal(router.weight_scale, torch.full((512,), 0.01))
    x = torch.randn(T, 512)
    routing = router(x, RoutingContext())
    torch.testing.assert_close(
        router(100.0 * x + 3.0, RoutingContext()).logits_TN, routing.logits_TN, rtol=1e-3, atol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x, RoutingContext()).logits_TN, routing.logits_TN)
