"""The functions between the pooled prompt and the router, and the options of granularity `prompt`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from moadapt.registry import ROUTERS
from moadapt.routers.activation import Rational, build_activation


def make(kind: str) -> nn.Module:
    config: Any = ROUTERS.parse({"kind": "top_k", "granularity": "prompt", "activation": kind})
    return build_activation(config)


def gelu(x: Tensor) -> Tensor:
    return torch.tensor([value * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x.tolist()]).double()


@pytest.mark.parametrize("kind", ["none", "gelu", "relu", "rational"])
def test_outputs_and_gradients_equal_the_loop(kind: str) -> None:
    activation = make(kind).double()
    for parameter in activation.parameters():
        nn.init.normal_(parameter)
    tensors = dict(activation.named_parameters())
    results = []
    for function in (activation, lambda h: reference.activated(kind, h, tensors)):
        activation.zero_grad()
        h = torch.cat([torch.linspace(-4, 4, 41), torch.tensor([-1.0, 1.0, -60.0, 60.0])]).double().requires_grad_()
        g = function(h)
        (g * torch.sin(torch.arange(len(h)).double() + 1.0)).sum().backward()
        results.append([g, h.grad, *[parameter.grad for parameter in tensors.values()]])
    assert len(results[0]) == (4 if kind == "rational" else 2)
    for got, want in zip(*results, strict=True):
        reference.close(got, want, 1e-11, kind)


def test_rational_starts_near_gelu() -> None:
    for reach in (3.0, 8.0):
        x = torch.linspace(-reach, reach, 2001, dtype=torch.float64)
        assert (Rational().double()(x) - gelu(x)).abs().max() < 0.0038
    # A fit of this form is no better than that by chance: other coefficients are far away.
    other = Rational().double()
    other.numerator.data[2] += 0.01
    assert (other(x) - gelu(x)).abs().max() > 0.01


def test_rational_start_is_a_least_squares_fit() -> None:
    """With its denominators, the free coefficients of the numerator are those of a linear fit of the stated points."""
    nodes = 8.0 * torch.cos(torch.pi * (torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    far = torch.logspace(math.log10(8.0), 3.0, 60, dtype=torch.float64)
    x, weight = torch.cat([nodes, far, -far]), torch.cat([torch.ones(400), 0.03 / far, 0.03 / far])
    b2, b4 = Rational().denominator[[1, 3]].tolist()
    lower = 1.0 + b2 * x**2 + b4 * x**4
    columns = torch.stack([x**power / lower for power in (0, 2, 4, 6)], dim=1) * weight.unsqueeze(1)
    size = columns.norm(dim=0)
    want = torch.linalg.lstsq(columns / size, ((gelu(x) - x / 2) * weight).unsqueeze(1)).solution.squeeze(1) / size
    torch.testing.assert_close(Rational().numerator[[0, 2, 4, 6]].double(), want, rtol=1e-3, atol=0.0)
    numerator = Rational().numerator.tolist()
    assert numerator[1::2] == pytest.approx([0.5, b2 / 2, b4 / 2])


def test_rational_is_finite_in_fp32_far_out() -> None:
    activation = Rational()
    h = torch.tensor([0.0, -1e3, 1e3, -1e5, 1e5, -1e9, 1e9, -1e12, 1e12], requires_grad=True)
    g = activation(h)
    g.sum().backward()
    for tensor in (g, h.grad, activation.numerator.grad, activation.denominator.grad):
        assert torch.isfinite(tensor).all()
    want = reference.activated("rational", h.detach().double(), dict(Rational().double().named_parameters()))
    assert ((g - want).abs() <= 1e-5 * want.abs() + 1e-9).all()
    assert g[1:3].tolist() == pytest.approx([374.0, 1374.0], abs=2.0)


def test_rational_has_seven_and_five_coefficients_and_works_in_router_precision() -> None:
    activation = Rational()
    assert [(name, tuple(p.shape)) for name, p in activation.named_parameters()] == [
        ("numerator", (7,)),
        ("denominator", (5,)),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert activation(torch.randn(3, 4)).dtype == torch.float32
    assert activation(torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64


# -- options ------------------------------------------------------------------------------------------------------


def test_defaults_of_granularity_prompt() -> None:
    config: Any = ROUTERS.parse({"kind": "relu", "granularity": "prompt"})
    assert (config.pooler, config.activation) == ("self_attention", "gelu")
    assert ROUTERS.parse(config.model_dump()) == config
    token: Any = ROUTERS.parse({"kind": "relu"})
    assert (token.granularity, token.pooler, token.activation) == ("token", None, None)
    assert ROUTERS.parse(token.model_dump()) == token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "softmax", "pooler": "mean"}, r"pooler: mean acts on pooled prompts.*granularity: prompt"),
        ({"kind": "top_k", "activation": "gelu"}, r"activation: gelu acts on pooled prompts"),
        ({"kind": "task_table", "pooler": "last"}, r"pooler: last .* granularity is task"),
        ({"kind": "softmax", "granularity": "prompt", "pooler": "first"}, "pooler"),
        ({"kind": "softmax", "granularity": "task"}, "decides per token or prompt.*task_table"),
        ({"kind": "norm_regression", "granularity": "prompt"}, "decides per token; set granularity: token"),
        ({"kind": "representative", "granularity": "prompt"}, "decides per token; set granularity: token"),
        ({"kind": "top_k", "granularity": "prompt", "fit": "prior_approximate"}, "fit takes the router from"),
        ({"kind": "relu", "granularity": "prompt", "init": "mean_gate"}, "init: mean_gate takes the router from"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS.parse(options)
