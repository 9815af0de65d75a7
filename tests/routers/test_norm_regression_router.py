"""The `norm_regression` router (D2DMoE): its selection against loops, and its fit."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from router_blocks import D, M, N, block, cut, expert_output
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.registry import ROUTERS
from moadapt.routers import NormRegressionRouter, RouterSample
from moadapt.routers.norm_regression import output_norms
from moadapt.routing import RoutingContext

T = 50
FIT = {"steps": 300, "learning_rate": 1e-2, "batch_size": 128}


def make(n: int = N, **options: Any) -> NormRegressionRouter:
    options = {"router_width": 16, "init_std": 0.7, **options}
    router: NormRegressionRouter = ROUTERS.build(ROUTERS.parse({"kind": "norm_regression", **options}), D, n)
    torch.nn.init.normal_(router.hidden_bias)
    torch.nn.init.normal_(router.bias, mean=1.0)
    return router.double()


def inputs(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64)


def naive_norms(router: NormRegressionRouter, x_D: Tensor) -> list[float]:
    hidden = [
        torch.tanh((row * x_D).sum() + bias) for row, bias in zip(router.hidden_weight, router.hidden_bias, strict=True)
    ]
    return [
        (sum(w * h for w, h in zip(row, hidden, strict=True)) + bias).item()
        for row, bias in zip(router.weight, router.bias, strict=True)
    ]


def naive_kept(norms: list[float], rule: str, threshold: float, most: int | None) -> list[bool]:
    norms = [max(norm, 0.0) for norm in norms]
    order = sorted(range(len(norms)), key=lambda i: -norms[i])
    if rule == "max_ratio":
        kept = [i for i in order if norms[i] >= threshold * max(norms)]
    else:
        kept, left = list(order), 0.0
        while len(kept) > 1 and left + norms[kept[-1]] <= threshold * sum(norms):
            left += norms[kept.pop()]
    kept = kept[:most] if most is not None else kept
    return [i in kept for i in range(len(norms))]


@pytest.mark.parametrize("rule", ["max_ratio", "cumulative"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("most", [None, 2])
def test_selection_equals_the_loop(rule: str, threshold: float, most: int | None) -> None:
    router = make(rule=rule, threshold=threshold, num_experts_per_tok=most)
    x = inputs()
    routing = router(x, RoutingContext())
    negative = 0
    for token in range(T):
        norms = naive_norms(router, x[token])
        negative += min(norms) < 0
        reference.close(routing.logits_TN[token], torch.tensor(norms, dtype=torch.float64), 1e-12, "norms")
        assert routing.selected_TN[token].tolist() == naive_kept(norms, rule, threshold, most)
        positive = [max(norm, 0.0) for norm in norms]
        shares = torch.tensor([norm / sum(positive) for norm in positive], dtype=torch.float64)
        reference.close(routing.probs_TN[token], shares, 1e-12, "shares")
    assert negative > 0, "the case of a negative prediction must be among them"
    assert torch.equal(routing.weights_TN, routing.selected_TN.double())
    assert routing.selected_TN.sum(-1).min() >= 1


def test_number_of_experts_follows_the_token_and_the_threshold() -> None:
    router, x = make(), inputs(300)
    numbers = []
    for threshold in (0.1, 0.5, 0.9):
        router.threshold = threshold
        counts = router(x, RoutingContext()).selected_TN.sum(-1)
        numbers.append(int(counts.sum()))
    assert numbers[0] > numbers[1] > numbers[2]
    router.threshold = 0.5
    assert len(router(x, RoutingContext()).selected_TN.sum(-1).unique()) > 1
    with pytest.raises(ConfigError, match=r"threshold: -1 is not in \[0, 1\)"):
        router.threshold = -1


def test_rescale() -> None:
    router = make(rescale="n_over_active")
    routing = router(inputs(), RoutingContext())
    torch.testing.assert_close(routing.weights_TN.sum(-1), torch.full((T,), float(N), dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2])
def test_targets_are_the_norms_of_the_experts_outputs(order: int) -> None:
    ffn, x = block(), inputs(7)
    got = output_norms(RouterSample(cut(ffn), inputs_TD=x), order)
    for token in range(7):
        for i in range(N):
            y_D = expert_output(ffn, list(range(i * M, (i + 1) * M)), x[token])
            want = y_D.abs().sum() if order == 1 else y_D.square().sum().sqrt()
            assert got[token, i].item() == pytest.approx(want.item(), rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_fit_explains_the_norms(scale: float) -> None:
    """Most of their variance, on tokens it has not seen, whatever the size of inputs (here also the outputs' size)."""
    ffn = block()
    x, unseen = scale * inputs(1500), scale * inputs(500)
    router = make(router_width=64, fit=FIT)
    with torch.no_grad():
        router.fit(RouterSample(cut(ffn), inputs_TD=x))
    want = output_norms(RouterSample(cut(ffn), inputs_TD=unseen))
    error = (router.predict(unseen) - want).square().mean()
    variance = (want - want.mean(0)).square().mean()
    assert error < 0.35 * variance, f"{error / variance:.2f} of the variance is unexplained"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in router.parameters())


def test_fit_is_deterministic() -> None:
    sample = RouterSample(cut(block()), inputs_TD=inputs(200))
    routers = [make(fit={**FIT, "steps": 20}) for _ in range(2)]
    for seed, router in enumerate(routers):
        torch.manual_seed(seed)
        router.fit(sample)
    assert torch.equal(routers[0].weight, routers[1].weight)
    other = make(fit={**FIT, "steps": 20, "seed": 5})
    other.fit(sample)
    assert not torch.equal(routers[0].weight, other.weight)


def test_needs_a_block_and_inputs() -> None:
    assert NormRegressionRouter.needs_fit(make().config)
    assert NormRegressionRouter.needs_inputs(make().config)
    with pytest.raises(ConfigError, match=r"router norm_regression needs .* set calibration.path"):
        make().fit(RouterSample(cut(block())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold"),
        ({"rule": "top"}, "rule"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"fit": {"steps": 0}}, "steps"),
        ({"norm_order": 3}, "norm_order"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
