"""The function between the pooled prompt and the router, element by element.

    none:      g(h) = h
    gelu:      g(h) = h Phi(h)                           Phi the normal distribution function (erf, not tanh)
    relu:      g(h) = max(0, h)
    rational:  g(h) = (sum_{j=0..6} a_j h^j) / (1 + |sum_{i=1..5} b_i h^i|)        12 learned scalars for each router

MiLoRA (2410.18035): the rational function starts near GELU, and its coefficients are trained with a
learning rate of their own, in the paper on a split of their own.

The start. GELU is h/2 plus an even function, so the fit takes b_1 = b_3 = b_5 = 0, a_1 = 1/2, a_3 = b_2 / 2 and
a_5 = b_4 / 2, and finds the other six by least squares (Gauss-Newton): at 400 Chebyshev nodes of [-8, 8], and with
the weight 0.03 / |h| at 120 points up to |h| = 1000. Largest error within [-8, 8]: 0.0037. Beyond, no such function
follows GELU: where b_5 is not zero both tails grow like |h| a_6 / |b_5|, here like h² a_6 / b_4. The far points keep
that small: 69 at 100 (GELU: 100), -31 at -100 (0), 1374 at 1000 and 374 at -1000.

In powers of h the numerator would leave fp32 at |h| = 2e6. For |h| > 1 both sums are therefore divided by |h|^5 and
taken in powers of 1/h; this is the same function, and at the start it and its gradients are finite to |h| = 1e12.

Shapes: any; G rows and D hidden size where a router uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moadapt.routers.base import RouterConfig
from moadapt.routing import router_dtype

_B2, _B4 = 0.252881, 0.00154365
_NUMERATOR = (-0.00343639, 0.5, 0.419635, _B2 / 2, 0.0163066, _B4 / 2, 1.33344e-06)
_DENOMINATOR = (0.0, _B2, 0.0, _B4, 0.0)


def build_activation(config: RouterConfig, device: torch.device | None = None) -> nn.Module:
    """The activation that a config of granularity `prompt` names.

    Args:
        config: the router's options.
        device: where to create the parameters.

    Returns:
        A module that maps the pooled hidden states (in router precision) element by element.
    """
    assert config.activation is not None, "the config is of another granularity"
    if config.activation == "rational":
        return Rational(device)
    plain: dict[str, type[nn.Module]] = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}
    return plain[config.activation]()


class Rational(nn.Module):
    """The learned rational function. See the module's docstring for the equation and its start.

    Its parameters are `numerator` (7,), a_0 to a_6, and `denominator` (5,), b_1 to b_5.

    Args:
        device: where to create them.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.empty(len(_NUMERATOR), dtype=torch.float32, device=device))
        self.denominator = nn.Parameter(torch.empty(len(_DENOMINATOR), dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start near GELU."""
        self.numerator.copy_(torch.tensor(_NUMERATOR))
        self.denominator.copy_(torch.tensor(_DENOMINATOR))

    def forward(self, h: Tensor) -> Tensor:
        """Any shape -> the same, in router precision."""
        h = h.to(router_dtype(h))
        a, b = self.numerator.to(h.dtype).unbind(), self.denominator.to(h.dtype).unbind()
        far = h.abs() > 1.0
        # Each side is computed at a harmless place where it does not count, so that no gradient there is NaN.
        x = torch.where(far, 0.0, h)
        near = _polynomial(x, a) / (1.0 + (x * _polynomial(x, b)).abs())
        t = 1.0 / torch.where(far, h, 1.0)
        beyond = h.abs() * _polynomial(t, a[::-1]) / (t.abs() ** 5 + _polynomial(t, b[::-1]).abs())
        return torch.where(far, beyond, near)


def _polynomial(x: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
    """sum_j c_j x^j by Horner's rule."""
    value = coefficients[-1].expand_as(x)
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
