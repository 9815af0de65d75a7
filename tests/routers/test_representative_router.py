"""The `representative` router (CMoE) against loops over tokens, neurons and experts."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from router_blocks import D, M, N, activation, block, cut, lists
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.ffn import FeedForward, StackedExperts
from moadapt.registry import ROUTERS
from moadapt.routers import RepresentativeRouter, RouterSample
from moadapt.routers.representative import representatives
from moadapt.routing import Routing, RoutingContext

T = 60


def make(**options: Any) -> RepresentativeRouter:
    router: RepresentativeRouter = ROUTERS.build(ROUTERS.parse({"kind": "representative", **options}), D, N)
    return router.double()


def fitted(ffn: FeedForward, x: Tensor, **options: Any) -> RepresentativeRouter:
    router = make(**options)
    with torch.no_grad():
        router.fit(RouterSample(cut(ffn), inputs_TD=x))
    return router


def route(router: RepresentativeRouter, x: Tensor) -> Routing:
    routing: Routing = router(x, RoutingContext())
    return routing


def inputs(tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64)


def naive_representatives(
    ffn: FeedForward, experts: list[list[int]], x_TD: Tensor, markers: int, order: int
) -> list[int]:
    """Marks as a 0/1 table over all neurons, then the distance of columns to the mean column of the expert."""
    neurons = range(ffn.num_neurons)
    table = []
    for x_D in x_TD:
        sizes = [abs(activation(ffn, neuron, x_D).item()) for neuron in neurons]
        top = [neuron for neuron in sorted(neurons, key=lambda i: -sizes[i])[:markers] if sizes[neuron] > 0]
        table.append([1.0 if neuron in top else 0.0 for neuron in neurons])
    picked = []
    for members in experts:
        real = [neuron for neuron in members if neuron >= 0]
        centre = [sum(row[neuron] for neuron in real) / len(real) for row in table]
        distances = [sum(abs(row[n] - c) ** order for row, c in zip(table, centre, strict=True)) for n in real]
        picked.append(min(range(len(real)), key=lambda i: distances[i]))
    return picked


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("markers", [2, 5])
@pytest.mark.parametrize("gated", [True, False])
def test_representatives_equal_the_loop(gated: bool, markers: int, order: int) -> None:
    """With shared experts among the marked neurons, a padding neuron, and either distance."""
    ffn, x = block(gated, bias=True, neurons=17), inputs()
    shared = lists([0, 5, 9], [2, 12, 14])
    routed = lists([3, 8, 1], [16, 10, 4], [15, 13, 11], [7, 6, -1])
    sample = RouterSample(cut(ffn, routed), cut(ffn, shared), x)
    assert representatives(sample, markers).tolist() == naive_representatives(ffn, routed.tolist(), x, markers, order)


def test_many_tokens_in_several_chunks() -> None:
    ffn, x = block(), inputs(2500)
    rows = [list(range(i * M, (i + 1) * M)) for i in range(N)]
    assert representatives(RouterSample(cut(ffn), None, x), 3).tolist() == naive_representatives(ffn, rows, x, 3, 1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_score_is_the_activation_of_the_representative(gated: bool, absolute: bool, biased: bool) -> None:
    ffn, x = block(gated, biased), inputs()
    router = fitted(ffn, x, num_markers=4, absolute=absolute)
    picked = representatives(RouterSample(cut(ffn), None, x), 4)
    routing = route(router, x)
    for token in range(T):
        score = [activation(ffn, i * M + int(picked[i]), x[token]).item() for i in range(N)]
        key = [abs(value) for value in score] if absolute else score
        reference.close(routing.logits_TN[token], torch.tensor(key, dtype=torch.float64), 1e-6, "score")
        best = sorted(range(N), key=lambda i: -key[i])[:2]
        if sorted(key)[-2] - sorted(key)[-3] > 1e-5:
            assert sorted(routing.indices_TK[token].tolist()) == sorted(best)
    assert torch.equal(routing.weights_TN, routing.selected_TN.double())
    assert (routing.selected_TN.sum(-1) == 2).all()


def test_unit_norm_scales_the_rows() -> None:
    ffn, x = block(), inputs()
    plain, unit = fitted(ffn, x), fitted(ffn, x, unit_norm=True)
    for name in ("weight", "up_weight"):
        rows = getattr(plain, name)
        reference.close(getattr(unit, name), rows / rows.norm(dim=-1, keepdim=True), 1e-6, name)


def test_learned_scale_starts_at_one_and_learns() -> None:
    """1 + softmax(s)_i u_i with u = 0."""
    ffn, x = block(), inputs()
    router = fitted(ffn, x, learned_scale=True)
    assert torch.equal(route(router, x).weights_TN, route(router, x).selected_TN.double())
    router.scale.data = torch.randn(N, dtype=torch.float64)
    routing = route(router, x)
    want = torch.zeros(T, N, dtype=torch.float64)
    for token, scores in enumerate(routing.logits_TN):
        shares = reference.softmax(list(scores))
        for expert in routing.indices_TK[token].tolist():
            want[token, expert] = (1.0 + shares[expert] * router.scale[expert]).item()
    reference.close(routing.weights_TN, want, 1e-12, "weights")
    routing.weights_TN.sum().backward()
    for name, parameter in router.named_parameters():
        if name not in ("up_bias", "bias"):
            assert parameter.grad.abs().max() > 0, name


def test_the_representative_is_better_than_chance_at_finding_the_largest_expert() -> None:
    """Neurons of an expert that fire together: the training-free router then finds the expert that matters."""
    ffn = block()
    for expert in range(N):
        rows = slice(expert * M, (expert + 1) * M)
        ffn.gate_FD[rows] = ffn.gate_FD[expert * M] + 0.2 * torch.randn(M, D, dtype=torch.float64)
        ffn.up_FD[rows] = ffn.up_FD[expert * M] + 0.2 * torch.randn(M, D, dtype=torch.float64)
    x = inputs(400)
    hit = fitted(ffn, x, num_experts_per_tok=1, absolute=True, num_markers=3)
    size_TN = cut(ffn).hidden(x).abs().sum(-1)
    share = (route(hit, x).indices_TK[:, 0] == size_TN.argmax(-1)).double().mean().item()
    assert share > 0.6, f"{share:.2f}; chance is 0.25"


def test_used_without_a_block() -> None:
    assert RepresentativeRouter.needs_fit(make().config)
    assert RepresentativeRouter.needs_inputs(make().config)
    with pytest.raises(ConfigError, match="needs experts cut from a feed-forward block"):
        route(make(), inputs())
    with pytest.raises(ConfigError, match=r"router representative needs .* calibration"):
        make().fit(RouterSample(cut(block())))


def test_loaded_into_a_new_router() -> None:
    """The activation function is the block's, not a tensor: `attach` brings it."""
    ffn, x = block(), inputs()
    router, other = fitted(ffn, x), make()
    other.load_state_dict(router.state_dict())
    other.attach(torch.nn.SiLU())
    assert torch.equal(route(other, x).logits_TN, route(router, x).logits_TN)
    assert list(other.state_dict()) == list(router.state_dict())


def test_experts_in_half_precision() -> None:
    ffn, x = block(), inputs()
    experts = cut(ffn)
    half = StackedExperts(experts.in_NPD.bfloat16(), experts.out_NMD.bfloat16(), None, experts.act, True)
    router = make().float()
    router.fit(RouterSample(half, inputs_TD=x.float()))
    assert router.weight.dtype == torch.float32
    assert torch.isfinite(route(router, x.bfloat16()).logits_TN).all()
