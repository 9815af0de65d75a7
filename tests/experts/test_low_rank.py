"""`mix_low_rank` by itself: gradcheck, what it saves for backward, when it writes into its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from moadapt.experts.low_rank import mix_low_rank
from moadapt.routing import Routing

T, N, K, R, IN, OUT = 5, 4, 2, 3, 6, 7


def routing_of(weights_TN: Tensor, indices_TK: Tensor | None) -> Routing:
    selected = torch.ones_like(weights_TN, dtype=torch.bool)
    return Routing(weights_TN, selected, weights_TN, weights_TN, indices_TK=indices_TK)


def some_indices(tokens: int = T, kept: int = K) -> Tensor:
    return torch.rand(tokens, N).topk(kept, -1).indices


def tensors(**sizes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = sizes.get("tokens", T)
    shapes = (tokens, IN), (tokens, N), (N, R, IN), (N, R, OUT)
    x, weights, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, weights, a, b


def keep_selected(weights_TN: Tensor, indices_TK: Tensor | None) -> Tensor:
    if indices_TK is None:
        return weights_TN
    return torch.zeros_like(weights_TN).scatter(-1, indices_TK, weights_TN.gather(-1, indices_TK))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "top_k"])
@pytest.mark.parametrize("form", ["leaf", "in_place", "layer"])
def test_gradcheck(form: str, sparse: bool) -> None:
    """Numerical gradients in float64, for a base output that may not be overwritten, one that may, and a base layer."""
    indices = some_indices() if sparse else None
    layer = nn.Linear(IN, OUT, dtype=torch.float64)

    def function(base: Tensor, x: Tensor, weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
        routing = routing_of(keep_selected(weights, indices), indices)
        given: Any = layer if form == "layer" else base if form == "leaf" else base * 1.0
        return mix_low_rank(given, x, routing, a, b, 0.7)

    base = torch.randn(T, OUT, dtype=torch.float64, requires_grad=form != "layer")
    assert torch.autograd.gradcheck(function, (base, *tensors()))


@pytest.mark.parametrize("wanted", ["base", "x", "weights", "a", "b"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "top_k"])
def test_each_gradient_alone(wanted: str, sparse: bool) -> None:
    """Asking for one gradient only gives the same one as asking for all."""
    indices = some_indices() if sparse else None
    values = dict(zip(["x", "weights", "a", "b"], tensors(), strict=True))
    values["base"] = torch.randn(T, OUT, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(T, OUT, dtype=torch.float64)

    def run(leaves: dict[str, Tensor]) -> Tensor:
        routing = routing_of(keep_selected(leaves["weights"], indices), indices)
        return mix_low_rank(leaves["base"] + 0.0, leaves["x"], routing, leaves["a"], leaves["b"], 0.7)

    (everything,) = torch.autograd.grad(run(values), values[wanted], upstream)
    alone = {name: value.detach().requires_grad_(name == wanted) for name, value in values.items()}
    (single,) = torch.autograd.grad(run(alone), alone[wanted], upstream)
    assert torch.equal(everything, single)


@pytest.mark.parametrize(("sparse", "kept"), [(False, N), (True, 1), (True, 2)], ids=["dense", "top_1", "top_2"])
@pytest.mark.parametrize("form", ["tensor", "layer"])
def test_saves_only_rank_space_activations(form: str, sparse: bool, kept: int) -> None:
    """Beyond x and the parameters: T*K*R activations, T*K gates and T*K indices. Nothing of size T*N*R or T*O."""
    tokens = 64
    x, weights, a, b = tensors(tokens=tokens)
    indices = some_indices(tokens, kept) if sparse else None
    routing = routing_of(keep_selected(weights, indices).detach().requires_grad_(), indices)
    layer = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    base: Any = layer if form == "layer" else torch.randn(tokens, OUT, dtype=torch.float64)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, a, b, layer.weight)}
    extra: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            extra[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mix_low_rank(base, x, routing, a, b, 1.0)
    total = sum(extra.values())
    assert tokens * kept * R <= total <= tokens * kept * R + 3 * tokens * kept, extra


def test_overwrites_only_what_it_may() -> None:
    """A fresh base output is accumulated into; a view of something else and a trained leaf are left alone."""
    x, weights, a, b = (tensor.detach() for tensor in tensors())
    routing = routing_of(weights, None)
    fresh = torch.randn(T, OUT, dtype=torch.float64)
    before = fresh.clone()
    mixed = mix_low_rank(fresh, x, routing, a, b, 1.0)
    assert mixed.data_ptr() == fresh.data_ptr()
    for protected in (before.clone().view(T, OUT), before.clone().requires_grad_()):
        kept = protected.detach().clone()
        assert torch.equal(mix_low_rank(protected, x, routing, a, b, 1.0), mixed)
        assert torch.equal(protected, kept)


def test_gradient_buffer_of_x_is_not_shared_with_other_users() -> None:
    """The gradient to x is accumulated in place; what else reads x, or sees that gradient, must not notice."""
    x, weights, a, b = tensors()
    layer = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    routing = routing_of(weights, None)
    mixed = mix_low_rank(layer, x, routing, a, b, 1.0)
    grads = []
    mixed.register_hook(lambda grad: grads.append((grad, grad.clone())))
    (mixed.sum() + (x * 3.0).sum()).backward()
    want = torch.autograd.grad(mix_low_rank(layer(x), x, routing, a, b, 1.0).sum() + (x * 3.0).sum(), x)[0]
    reference.close(x.grad, want, 1e-13, "gradient of x")
    assert all(torch.equal(grad, copy) for grad, copy in grads)


def test_hooks_of_the_base_layer_see_untouched_gradients() -> None:
    x, weights, a, b = tensors()
    layer = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append((grad_in[0], grad_in[0].clone())))
    mix_low_rank(layer, x, routing_of(weights, None), a, b, 1.0).sum().backward()
    assert len(seen) == 1
    assert torch.equal(*seen[0])


def test_weights_off_the_selection_get_no_gradient() -> None:
    x, weights, a, b = tensors()
    indices = some_indices()
    mix_low_rank(torch.zeros(T, OUT, dtype=torch.float64), x, routing_of(weights, indices), a, b, 1.0).sum().backward()
    chosen = torch.zeros(T, N, dtype=torch.bool).scatter_(1, indices, True)
    assert weights.grad[~chosen].abs().max() == 0
    assert weights.grad[chosen].abs().min() > 0
    unused = [expert for expert in range(N) if not chosen[:, expert].any()]
    for expert in unused:
        assert a.grad[expert].abs().max() == 0


def test_every_parameter_gets_a_gradient_even_without_tokens() -> None:
    """An expert nobody selected has a gradient of zeros, not None: every rank reduces the same tensors."""
    x, weights, a, b = tensors()
    indices = torch.zeros(T, 1, dtype=torch.int64)
    mix_low_rank(torch.zeros(T, OUT, dtype=torch.float64), x, routing_of(weights, indices), a, b, 1.0).sum().backward()
    assert a.grad.shape == a.shape
    assert a.grad[0].abs().max() > 0
    assert a.grad[1:].abs().max() == 0
    assert b.grad[1:].abs().max() == 0
