"""`combine` x `rescale` of the `top_k` router, its ways to start, and its fit to FactorLLM's pseudo-labels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import reference
import torch
from router_blocks import D, M, N, block, cut, expert_output, lists

from moadapt.errors import ConfigError
from moadapt.per_layer import Site
from moadapt.registry import ROUTERS, KindConfig
from moadapt.routers import RouterSample, TopKRouter
from moadapt.routers.linear import real_neurons
from moadapt.routers.prior_approximate import PriorApproximateConfig, prior_errors, prior_labels, prior_loss
from moadapt.routing import RoutingContext

T = 30


def parse(**options: Any) -> KindConfig:
    return ROUTERS.parse({"kind": "top_k", **options})


def make(n: int = N, noise: bool = True, **options: Any) -> TopKRouter:
    router: TopKRouter = ROUTERS.build(parse(**options), D, n)
    if noise:
        torch.nn.init.normal_(router.weight)
    return router.double()


def inputs(tokens: int = T) -> torch.Tensor:
    return torch.randn(tokens, D, dtype=torch.float64)


FORMS = list(
    itertools.product(
        ["unit", "softmax", "softmax_renorm", "sigmoid"], ["none", "n_over_k", "n_over_active", 2.5], [1, 3, 4]
    )
)


@pytest.mark.parametrize(("combine", "rescale", "k"), FORMS)
def test_gates_and_gradient_equal_the_loop(combine: str, rescale: Any, k: int) -> None:
    if k == 1 and combine == "softmax_renorm":
        pytest.skip("refused, as norm_topk_prob: true")
    options = {"combine": combine, "rescale": rescale, "num_experts_per_tok": k, "temperature": 0.7, "bias": True}
    router, x = make(**options), inputs()
    torch.nn.init.normal_(router.bias)
    routing = router(x, RoutingContext())
    weight, bias = (p.detach().clone().requires_grad_() for p in (router.weight, router.bias))
    naive = reference.NaiveRouter({"kind": "top_k", **options}, weight, bias_N=bias)
    decisions = [naive(x_D, token) for token, x_D in enumerate(x)]
    want = torch.stack([torch.stack(decision.gates) for decision in decisions])
    probs = torch.stack([torch.stack(decision.probs) for decision in decisions])
    reference.close(routing.weights_TN, want, 1e-12, "gates")
    reference.close(routing.probs_TN, probs, 1e-12, "probs")
    assert routing.selected_TN.tolist() == [decision.selected for decision in decisions]
    assert (routing.selected_TN.sum(-1) == k).all()
    if combine == "unit":
        assert not routing.weights_TN.requires_grad, "documented: the task does not train this router"
        assert routing.probs_TN.requires_grad, "an auxiliary loss does"
        return
    direction = torch.randn_like(want)
    (routing.weights_TN * direction).sum().backward()
    (want * direction).sum().backward()
    reference.close(router.weight.grad, weight.grad, 1e-11, "weight gradient")
    reference.close(router.bias.grad, bias.grad, 1e-11, "bias gradient")


def test_llama_moe_convention() -> None:
    """The softmax over the kept sums to 1, so their weights sum to n/k, and their mean is n/k²."""
    routing = make(num_experts_per_tok=2, combine="softmax_renorm", rescale="n_over_k")(inputs(), RoutingContext())
    torch.testing.assert_close(routing.weights_TN.sum(-1), torch.full((T,), N / 2, dtype=torch.float64))


def test_norm_topk_prob_is_a_name_of_softmax_renorm() -> None:
    assert parse(norm_topk_prob=True).combine == "softmax_renorm"
    assert parse(combine="softmax_renorm").norm_topk_prob is True
    assert (parse().combine, parse().norm_topk_prob) == ("softmax", False)
    for config in (parse(norm_topk_prob=True), parse(combine="sigmoid"), parse(combine="softmax_renorm")):
        again = ROUTERS.parse(config.model_dump(mode="json"))
        assert (again.combine, again.norm_topk_prob) == (config.combine, config.norm_topk_prob)
        assert config.at_site(Site("m", 0, 1), "router").combine == config.combine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm_topk_prob": True, "combine": "sigmoid"},
            r"norm_topk_prob: true contradicts combine: sigmoid.*set norm_topk_prob: false",
        ),
        ({"norm_topk_prob": False, "combine": "softmax_renorm"}, r"contradicts.*set norm_topk_prob: true"),
        ({"combine": "softmax_renorm", "num_experts_per_tok": 1}, "no gradient from the task"),
        ({"init": "zeros", "combine": "sigmoid"}, "ties all experts"),
        ({"init": "zeros", "combine": "unit"}, "ties all experts"),
        ({"rescale": -1.0}, "rescale"),
        ({"rescale": "n"}, "rescale"),
        ({"combine": "mean"}, "combine"),
        ({"fit": {"kind": "prior_approximate", "step": 3}}, r"unknown option; did you mean 'steps'"),
        ({"fit": "anything"}, "prior_approximate"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(**options)


def test_constant_weights() -> None:
    assert make(num_experts_per_tok=N, combine="unit").constant_weights().tolist() == [1.0] * N
    assert make(num_experts_per_tok=N, combine="unit", rescale=0.5).constant_weights().tolist() == [0.5] * N
    assert make(num_experts_per_tok=2, combine="unit").constant_weights() is None
    assert make(n=1, num_experts_per_tok=1, rescale=3.0).constant_weights().tolist() == [3.0]
    assert make(n=1, num_experts_per_tok=1, combine="sigmoid").constant_weights() is None
    for n, options in ((N, {"num_experts_per_tok": N, "combine": "unit"}), (1, {"num_experts_per_tok": 1})):
        router = make(n=n, rescale=2.0, **options)
        got = router(inputs(), RoutingContext()).weights_TN
        assert torch.equal(got, router.constant_weights().expand_as(got))


def test_ties_are_broken_the_same_way_whoever_shares_the_batch() -> None:
    router = make(noise=False, init="zeros", num_experts_per_tok=2).eval()
    x = inputs(50)
    indices = router(x, RoutingContext()).indices_TK
    assert (indices == indices[0]).all()
    assert torch.equal(router(x[:1], RoutingContext()).indices_TK, indices[:1])
    assert torch.equal(router.weight, torch.zeros(N, D, dtype=torch.float64))


# -- mean_gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_mean_gate_is_the_mean_pre_activation(gated: bool, biased: bool) -> None:
    """EMoE's score, with neurons in any order; one expert has a padding neuron, which does not count."""
    ffn = block(gated, biased, neurons=11)
    indices = lists([3, 8, 1], [0, 10, 4], [9, 2, 5], [7, 6, -1])
    router = make(init="mean_gate", combine="unit", bias=True, num_experts_per_tok=2)
    with torch.no_grad():
        router.fit(RouterSample(cut(ffn, indices)))
    x = inputs()
    pre_TF = ffn.pre_activation(x)
    for expert, row in enumerate(indices.tolist()):
        want = torch.stack([pre_TF[:, neuron] for neuron in row if neuron >= 0]).mean(0)
        got = router(x, RoutingContext()).logits_TN[:, expert]
        reference.close(got, want, 1e-6, f"expert {expert}")  # the rows are kept in fp32


def test_mean_gate_without_a_bias_leaves_the_biases_out() -> None:
    ffn = block(gated=True, bias=True)
    router = make(init="mean_gate", num_experts_per_tok=2)
    router.fit(RouterSample(cut(ffn)))
    want = ffn.gate_FD.view(N, M, D).mean(1)
    reference.close(router.weight, want, 1e-6, "rows")
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_padding_is_told_from_a_neuron_with_some_zeros() -> None:
    ffn = block(neurons=11)
    ffn.gate_FD[7].zero_()
    ffn.up_FD[7].zero_()
    experts = cut(ffn, lists([3, 8, 1], [0, 10, 4], [9, 2, 5], [7, 6, -1]))
    assert real_neurons(experts).tolist() == [[True] * 3] * 3 + [[True, True, False]]


def test_only_fitted_routers_need_a_block() -> None:
    def needs(**options: Any) -> tuple[bool, bool]:
        config = parse(**options)
        return TopKRouter.needs_fit(config), TopKRouter.needs_inputs(config)

    assert needs() == (False, False)
    assert needs(init="mean_gate") == (True, False)
    assert needs(fit="prior_approximate") == (True, True)
    router = make()
    before = router.weight.clone()
    router.fit(RouterSample(cut(block())))
    assert torch.equal(router.weight, before), "nothing to fit: the weights stay as they were drawn"


# -- FactorLLM's first stage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_labels_and_loss_equal_the_loop(k: int) -> None:
    """Section 3.1 of the code of 2408.11855, token by token."""
    ffn, x = block(), inputs(10)
    sample = RouterSample(cut(ffn), inputs_TD=x)
    logits = torch.randn(10, N, dtype=torch.float64, requires_grad=True)
    config = PriorApproximateConfig(route_coef=0.05, balance_coef=0.01)
    route, balance = [], []
    for x_D, row in zip(x, logits, strict=True):
        target = expert_output(ffn, list(range(N * M)), x_D) / (N // k)
        errors = [
            ((expert_output(ffn, list(range(i * M, (i + 1) * M)), x_D) - target) ** 2).mean().item() for i in range(N)
        ]
        best = sorted(range(N), key=lambda i: errors[i])[:k]
        exps = [math.exp(1.0 if i in best else 0.0) for i in range(N)]
        q = [e / sum(exps) for e in exps]
        p = reference.softmax(list(row))
        route.append(sum(p_i * (p_i.log() - math.log(q_i)) for p_i, q_i in zip(p, q, strict=True)))
        top = sorted(range(N), key=lambda i: -p[i].item())[:k]
        balance.append(sum(p[i] for i in top) / N)
    want = 0.05 * sum(route) / len(route) + 0.01 * sum(balance) / len(balance)
    got = prior_loss(logits, prior_labels(prior_errors(sample, k), k), k, config)
    reference.close(got, want, 1e-12, "loss")
    (mine,), (theirs,) = torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)
    reference.close(mine, theirs, 1e-12, "gradient")


def test_label_of_two_in_four() -> None:
    """Very soft: 0.37 / 0.37 / 0.13 / 0.13."""
    label = prior_labels(torch.tensor([[0.1, 5.0, 0.2, 7.0]]), 2)[0]
    assert [round(value, 2) for value in label.tolist()] == [0.37, 0.13, 0.37, 0.13]


def test_fit_learns_which_expert_comes_closest() -> None:
    """Two experts that matter on different halves of the input space: a linear router can tell them apart."""
    ffn, x = block(), inputs(600)
    sample = RouterSample(cut(ffn), inputs_TD=x)
    fit = {"kind": "prior_approximate", "steps": 300, "learning_rate": 0.05, "balance_coef": 0.0}
    router = make(bias=True, combine="unit", num_experts_per_tok=2, fit=fit)
    frozen = make(bias=True, combine="unit", num_experts_per_tok=2, fit=fit)
    frozen.load_state_dict(router.state_dict())
    frozen.requires_grad_(False)
    label = prior_labels(prior_errors(sample, 2), 2)

    def value() -> float:
        return prior_loss(router.logits(x), label, 2, router.config.fit).item()

    before = value()
    with torch.no_grad():
        router.fit(sample)
        torch.manual_seed(99)
        frozen.fit(sample)
    assert value() < 0.5 * before
    assert value() > 0.0
    assert torch.equal(frozen.weight, router.weight), "same seed, same fit, whatever else draws numbers"
    assert not frozen.weight.requires_grad
    assert router.weight.requires_grad
    assert router.weight.grad is None
    constant = prior_loss(router.bias.detach().expand(600, N), label, 2, router.config.fit).item()
    assert value() < constant, "the weights help, not the bias alone"


def test_fit_without_calibration_inputs() -> None:
    router = make(fit="prior_approximate", num_experts_per_tok=2)
    with pytest.raises(ConfigError, match=r"fit: prior_approximate needs .* set calibration.path"):
        router.fit(RouterSample(cut(block())))
