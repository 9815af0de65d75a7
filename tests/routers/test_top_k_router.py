"""The `top_k` router: its gates, its precision, its noises, its gradients, options that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.registry import ROUTERS
from moadapt.routers import TopKRouter
from moadapt.routing import Routing, RoutingContext

D, N, T = 6, 5, 40


def make(n: int = N, **options: Any) -> TopKRouter:
    router: TopKRouter = ROUTERS.build(ROUTERS.parse({"kind": "top_k", **options}), D, n)
    torch.nn.init.normal_(router.weight)
    return router


def route(router: TopKRouter, x: Tensor) -> Routing:
    routing: Routing = router(x, RoutingContext())
    return routing


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gates(k: int, norm: bool, temperature: float) -> None:
    if k == 1 and norm:
        pytest.skip("refused, see below")
    router = make(num_experts_per_tok=k, norm_topk_prob=norm, temperature=temperature).double().eval()
    x = torch.randn(T, D, dtype=torch.float64)
    routing = route(router, x)
    naive = reference.NaiveRouter(
        {"kind": "top_k", "num_experts_per_tok": k, "norm_topk_prob": norm, "temperature": temperature}, router.weight
    )
    for token in range(T):
        want = naive(x[token], token)
        reference.close(routing.weights_TN[token], torch.stack(want.gates), 1e-12, "gates")
        reference.close(routing.probs_TN[token], torch.stack(want.probs), 1e-12, "probs")
        reference.close(routing.logits_TN[token], torch.stack(want.logits), 1e-12, "logits")
        assert routing.selected_TN[token].tolist() == want.selected
        assert sorted(routing.indices_TK[token].tolist()) == [i for i, on in enumerate(want.selected) if on]
    assert routing.granularity == "token"
    assert torch.equal(routing.weights_TN != 0, routing.selected_TN)
    assert not norm or torch.allclose(routing.weights_TN.sum(-1), torch.ones(T, dtype=torch.float64))


def test_renormalised_equals_a_softmax_over_the_kept_logits() -> None:
    router = make(num_experts_per_tok=2, norm_topk_prob=True).eval()
    routing = route(router, torch.randn(T, D))
    kept = routing.logits_TN.gather(-1, routing.indices_TK).softmax(-1)
    torch.testing.assert_close(routing.weights_TN.gather(-1, routing.indices_TK), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_whatever_the_input(dtype: torch.dtype) -> None:
    router = make(num_experts_per_tok=2).eval()
    x = torch.randn(T, D).to(dtype)
    routing = route(router, x)
    for tensor in (routing.weights_TN, routing.probs_TN, routing.logits_TN):
        assert tensor.dtype == torch.float32
    reference.close(routing.logits_TN, x.double() @ router.weight.double().T, 1e-6, "logits")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = route(router, x)
    assert torch.equal(again.logits_TN, routing.logits_TN)


def test_float64_stays_float64() -> None:
    assert route(make().double(), torch.randn(T, D).double()).weights_TN.dtype == torch.float64


@pytest.mark.parametrize("options", [{"router_jitter_noise": 0.5}, {"noisy_gating": True}])
def test_noise_acts_in_training_only_and_never_on_the_callers_tensor(options: dict[str, Any]) -> None:
    router = make(**options)
    x = torch.randn(T, D)
    before = x.clone()
    router.eval()
    calm = route(router, x)
    assert torch.equal(calm.logits_TN, route(router, x).logits_TN)
    reference.close(calm.logits_TN, x @ router.weight.T, 1e-6, "no noise in evaluation")
    router.train()
    first, second = route(router, x), route(router, x)
    assert not torch.equal(first.logits_TN, calm.logits_TN)
    assert not torch.equal(first.logits_TN, second.logits_TN)
    assert torch.equal(x, before)


def test_jitter_multiplies_by_one_plus_minus_noise() -> None:
    router = make(router_jitter_noise=0.25)
    router.weight.data = torch.eye(N, D)
    x = torch.full((4000, D), 2.0)
    factors = route(router, x).logits_TN / 2.0
    assert factors.min() >= 0.75
    assert factors.max() <= 1.25
    assert factors.min() < 0.76
    assert factors.max() > 1.24
    assert factors.mean().item() == pytest.approx(1.0, abs=0.01)


def test_noisy_gating_starts_at_the_published_spread() -> None:
    """W_noise = 0, so the noise is N(0, (ln 2 + 0.01)²) for every logit."""
    router = make(noisy_gating=True)
    assert router.noise_weight.abs().max() == 0
    x = torch.randn(8000, D)
    noise = route(router, x).logits_TN - x @ router.weight.T
    assert noise.std().item() == pytest.approx(torch.log(torch.tensor(2.0)).item() + 0.01, rel=0.02)


def test_every_router_parameter_learns_from_the_gates() -> None:
    router = make(noisy_gating=True, num_experts_per_tok=2)
    routing = route(router, torch.randn(T, D))
    (routing.weights_TN * torch.randn(T, N)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gate_of_a_selected_expert_rises_with_its_logit() -> None:
    router = make(num_experts_per_tok=2).double().eval()
    x = torch.randn(1, D, dtype=torch.float64)
    routing = route(router, x)
    expert = routing.indices_TK[0, 0]
    (grad,) = torch.autograd.grad(routing.weights_TN[0, expert], router.weight)
    assert (grad[expert] @ x[0]) > 0


def test_initialisation() -> None:
    router = ROUTERS.build(ROUTERS.parse({"kind": "top_k", "init_std": 0.05}), 2000, 8)
    assert router.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert ROUTERS.build(ROUTERS.parse({"kind": "top_k"}), 2000, 8).weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_single_expert_is_constant() -> None:
    assert make(n=1, num_experts_per_tok=1).constant_weights().tolist() == [1.0]
    assert make(num_experts_per_tok=1).constant_weights() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "no gradient"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"temperature": 0.0}, "temperature"),
        ({"router_jitter_noise": 1.0}, "router_jitter_noise"),
        ({"scope": []}, "scope"),
        ({"scope": "layer"}, "scope"),
        ({"scope": ["linear"]}, "scope"),
        ({"granularity": "task"}, "decides per token or prompt"),
        ({"jitter": 0.1}, "jitter"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS.parse({"kind": "top_k", **options})


def test_a_gate_that_is_always_one_is_refused_per_layer_too() -> None:
    """A list hides the K = 1 of one layer; the router there would never learn."""
    config = ROUTERS.parse({"kind": "top_k", "num_experts_per_tok": [1, 2], "norm_topk_prob": True})
    with pytest.raises(ConfigError, match="no gradient"):
        ROUTERS.build(config.model_copy(update={"num_experts_per_tok": 1}), D, N)
