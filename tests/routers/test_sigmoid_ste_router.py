"""The `sigmoid_ste` router: DSMoE's equations in full, with experts behind the gates, against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from router_blocks import D, M, N, block, cut, expert_output
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.ffn import FeedForward
from moadapt.registry import ROUTERS
from moadapt.routers import SigmoidSTERouter
from moadapt.routing import Routing, RoutingContext

T = 24


def make(n: int = N, std: float = 0.6, **options: Any) -> SigmoidSTERouter:
    router: SigmoidSTERouter = ROUTERS.build(ROUTERS.parse({"kind": "sigmoid_ste", **options}), D, n)
    torch.nn.init.normal_(router.weight, std=std)
    return router.double()


def route(router: SigmoidSTERouter, x: Tensor) -> Routing:
    routing: Routing = router(x, RoutingContext())
    return routing


def inputs(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.3},
    {"threshold": 0.7, "rescale": "none"},
    {"threshold": 0.8, "min_active": 1},
    {"rescale": 1.5, "combine": "unit"},
    {"straight_through": False},
    {"bias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gates_equal_the_loop(options: dict[str, Any]) -> None:
    router = make(**options)
    if router.config.bias:
        torch.nn.init.normal_(router.bias)
    x = inputs()
    routing = route(router, x)
    bias = router.bias if router.config.bias else None
    naive = reference.NaiveRouter({"kind": "sigmoid_ste", **options}, router.weight, bias_N=bias)
    for token in range(T):
        want = naive(x[token], token)
        assert naive.margin(want) > 1e-9
        reference.close(routing.weights_TN[token], torch.stack(want.gates), 1e-12, "gates")
        reference.close(routing.probs_TN[token], torch.stack(want.probs), 1e-12, "probs")
        reference.close(routing.logits_TN[token], torch.stack(want.logits), 1e-12, "logits")
        assert routing.selected_TN[token].tolist() == want.selected
    assert torch.equal(routing.weights_TN != 0, routing.selected_TN)
    assert routing.indices_TK is None
    assert 0 < routing.selected_TN.sum() < T * N


# -- the whole layer: sum_i E_i(x) S(s_i) N / active ------------------------------------------------------------------


def dsmoe(x_TD: Tensor, weight_ND: Tensor, ffn: FeedForward, threshold: float) -> Tensor:
    """Eqs. 7, 8, 10 and 11 token by token; `.item()` is the stopped gradient."""
    rows = []
    for x_D in x_TD:
        sigmas = [1.0 / (1.0 + torch.exp(-(row * x_D).sum())) for row in weight_ND]
        active = sum(1 for sigma in sigmas if sigma.item() > threshold)
        h_D = torch.zeros_like(x_D)
        for i, sigma in enumerate(sigmas):
            kept = sigma.item() if sigma.item() > threshold else 0.0
            s = kept + sigma - sigma.item()
            h_D = h_D + expert_output(ffn, list(range(i * M, (i + 1) * M)), x_D) * s
        rows.append(h_D * (len(sigmas) / max(active, 1)))
    return torch.stack(rows)


def with_grad(ffn: FeedForward) -> tuple[FeedForward, list[Tensor]]:
    names = ("gate_FD", "up_FD", "down_FD")
    leaves = [getattr(ffn, name).clone().requires_grad_() for name in names]
    return FeedForward(leaves[1], leaves[2], leaves[0], ffn.act), leaves


def ours(x_TD: Tensor, router: SigmoidSTERouter, ffn: FeedForward) -> tuple[Tensor, Routing]:
    """Experts from the library, one by one, times the router's weights."""
    experts, routing = cut(ffn), route(router, x_TD)
    parts = [experts.expert(i, x_TD) * routing.weights_TN[:, i : i + 1] for i in range(N)]
    return torch.stack(parts).sum(0), routing


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75])
def test_forward_and_every_gradient_of_the_layer(threshold: float) -> None:
    router = make(threshold=threshold)
    x = inputs()
    mine, mine_leaves = with_grad(block())
    theirs, their_leaves = with_grad(block())
    weight = router.weight.detach().clone().requires_grad_()
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = ours(x_ours, router, mine)
    want = dsmoe(x_theirs, weight, theirs, threshold)
    reference.close(y, want, 1e-12, "forward")
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (want * direction).sum().backward()
    assert routing.straight_through
    assert 0 < routing.selected_TN.sum() < T * N
    reference.close(router.weight.grad, weight.grad, 1e-11, "gates")
    reference.close(x_ours.grad, x_theirs.grad, 1e-11, "input")
    for name, got, wanted in zip(("gate", "up", "down"), mine_leaves, their_leaves, strict=True):
        reference.close(got.grad, wanted.grad, 1e-11, name)


def test_gate_gradient_is_h_times_o_sigma_prime_for_active_and_inactive_experts() -> None:
    """Eqs. 15-16: dL/dY_i = h (dL/dh_out . o_i) s'(h Y_i) N / active, whether or not expert i is active."""
    router, ffn = make(), block()
    seen = {True: 0, False: 0}
    for x_D in inputs(8):
        router.weight.grad = None
        y, routing = ours(x_D[None], router, ffn)
        direction = torch.randn(D, dtype=torch.float64)
        (y[0] * direction).sum().backward()
        active = int(routing.selected_TN.sum())
        for i in range(N):
            sigma = 1.0 / (1.0 + math.exp(-float(router.weight[i].detach() @ x_D)))
            pull = float(direction @ expert_output(ffn, list(range(i * M, (i + 1) * M)), x_D))
            size = pull * sigma * (1.0 - sigma) * N / max(active, 1)
            reference.close(router.weight.grad[i], x_D * size, 1e-11, f"expert {i}")
            assert torch.sign(router.weight.grad[i] @ x_D).item() == math.copysign(1.0, pull)
            seen[bool(routing.selected_TN[0, i])] += 1
    assert min(seen.values()) > 3


def test_weights_of_an_inactive_expert_get_no_gradient() -> None:
    router = make()
    router.weight.data.zero_()
    router.weight.data[:2, 0], router.weight.data[2:, 0] = 1.0, -1.0
    x = inputs()
    x[:, 0] = 1.0 + x[:, 0].abs()
    ffn, leaves = with_grad(block())
    y, routing = ours(x, router, ffn)
    (y * torch.randn_like(y)).sum().backward()
    assert routing.selected_TN.tolist() == [[True, True, False, False]] * T
    for leaf in leaves:
        assert leaf.grad[: 2 * M].abs().min() > 0
        assert leaf.grad[2 * M :].abs().max() == 0
    assert router.weight.grad.abs().max(-1).values.min() > 0, "the gates of inactive experts do learn"


def test_without_the_estimator_inactive_gates_get_no_gradient() -> None:
    router = make(straight_through=False)
    x = inputs(1)
    y, routing = ours(x, router, block())
    (y * torch.randn_like(y)).sum().backward()
    assert not routing.straight_through
    norms = router.weight.grad.abs().max(-1).values
    assert torch.equal(norms > 0, routing.selected_TN[0])


def test_all_active_is_the_sum_of_sigma_times_expert_and_not_the_dense_block() -> None:
    router, ffn, x = make(threshold=0.0), block(), inputs()
    y, routing = ours(x, router, ffn)
    assert routing.selected_TN.all()
    want = torch.stack(
        [
            sum(
                expert_output(ffn, list(range(i * M, (i + 1) * M)), x_D)
                / (1.0 + torch.exp(-(router.weight[i] * x_D).sum()))
                for i in range(N)
            )
            for x_D in x
        ]
    )
    reference.close(y, want, 1e-12, "sigma times expert")
    assert (y - ffn(x)).abs().max() > 0.1


# -- no active expert ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_active_expert_gives_zero_and_never_nan(dtype: torch.dtype) -> None:
    router = make(threshold=0.999).to(torch.promote_types(dtype, torch.float32))
    x = (0.1 * torch.randn(T, D)).to(dtype).requires_grad_()
    routing = route(router, x)
    assert not routing.selected_TN.any()
    assert routing.weights_TN.abs().max() == 0
    (routing.weights_TN * torch.randn(T, N)).sum().backward()
    for grad in (router.weight.grad, x.grad):
        assert torch.isfinite(grad).all()
    assert router.weight.grad.abs().max() > 0


def test_exactly_at_the_threshold_is_off() -> None:
    router = make()
    router.weight.data.zero_()
    routing = route(router, inputs())
    assert (routing.probs_TN == 0.5).all()
    assert not routing.selected_TN.any()


@pytest.mark.parametrize("count", [1, 3])
def test_min_active_keeps_the_best(count: int) -> None:
    router = make(threshold=0.7, min_active=count, rescale="none")
    routing = route(router, inputs())
    numbers = routing.selected_TN.sum(-1)
    assert numbers.min() == count
    for probs, selected in zip(routing.probs_TN, routing.selected_TN, strict=True):
        assert probs[selected].min() > probs[~selected].max() if (~selected).any() else True


def test_extreme_inputs_stay_finite() -> None:
    router = make()
    x = (1e5 * inputs()).requires_grad_()
    routing = route(router, x)
    routing.weights_TN.sum().backward()
    assert torch.isfinite(routing.weights_TN).all()
    assert torch.isfinite(router.weight.grad).all()


# -- threshold, modes, precision -----------------------------------------------------------------------------------


def test_threshold_can_be_changed_after_training() -> None:
    router, x = make(), inputs(200)
    numbers = []
    for threshold in (0.2, 0.4, 0.5, 0.6, 0.8):
        router.threshold = threshold
        assert router.threshold == threshold
        routing = route(router, x)
        assert torch.equal(routing.selected_TN, routing.probs_TN > threshold)
        numbers.append(int(routing.selected_TN.sum()))
    assert sorted(numbers, reverse=True) == numbers
    assert len(set(numbers)) == 5
    with pytest.raises(ConfigError, match=r"threshold: 1.2 is not in \[0, 1\)"):
        router.threshold = 1.2


def test_straight_through_only_where_a_gradient_can_flow() -> None:
    router, x = make(), inputs()
    with torch.no_grad():
        quiet = route(router, x)
    assert not quiet.straight_through
    loud = route(router.eval(), x)
    assert loud.straight_through
    assert torch.equal(quiet.weights_TN, loud.weights_TN), "the forward value is exactly G"
    router.requires_grad_(False)
    assert not route(router, x).straight_through
    assert route(router, x.requires_grad_()).straight_through


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_whatever_the_input(dtype: torch.dtype) -> None:
    router = make().float()
    x = torch.randn(T, D).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = route(router, x)
    for tensor in (routing.weights_TN, routing.probs_TN, routing.logits_TN):
        assert tensor.dtype == torch.float32
    reference.close(routing.logits_TN, x.double() @ router.weight.double().T, 1e-6, "logits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, r"init: zeros makes every gate exactly 0.5.*init_std: 0.02"),
        ({"init_std": 0.0}, r"init_std: 0 makes every gate exactly 0.5"),
        ({"combine": "unit", "straight_through": False}, "no gradient at all"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": -0.1}, "threshold"),
        ({"rescale": "n_over_k"}, "rescale"),
        ({"rescale": 0.0}, "rescale"),
        ({"combine": "softmax"}, "combine"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS.parse({"kind": "sigmoid_ste", **options})


def test_more_forced_experts_than_there_are() -> None:
    with pytest.raises(ConfigError, match="min_active: 5 exceeds the 4 experts"):
        make(min_active=5)


def test_initialisation() -> None:
    router = ROUTERS.build(ROUTERS.parse({"kind": "sigmoid_ste"}), 3000, 8)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
