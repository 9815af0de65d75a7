"""`mix_experts`: every body against a naive float64 loop over tokens, experts and neurons, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moadapt.experts import partition_dispatch
from moadapt.experts.partition_blocks import BODIES, Body, GroupedBlock
from moadapt.experts.partition_compute import mix_experts
from moadapt.experts.partition_dispatch import choose_body
from moadapt.ffn import StackedExperts
from moadapt.routing import Routing

T, N, D, M = 6, 4, 5, 3
NAMES = ("x", "weights", "in", "out", "bias")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROUTINGS = ("random", "top_2", "none", "all", "one_empty", "one_token_off")


def naive(leaves: dict[str, Tensor], selected_TN: Tensor, gated: bool, straight_through: bool) -> Tensor:
    """y_t = sum_i w_ti sum_m h_m out_m, one neuron at a time. A gate that may not learn is left out of the sum."""
    x, weights, into, out, bias = (leaves.get(name) for name in NAMES)
    assert x is not None
    assert weights is not None
    assert into is not None
    assert out is not None
    rows = []
    for token in range(x.shape[0]):
        row = torch.zeros_like(x[token])
        for expert in range(weights.shape[1]):
            if not (straight_through or selected_TN[token, expert]):
                continue
            width = out.shape[1]
            inner = [(into[expert, p] * x[token]).sum() for p in range(into.shape[1])]
            if bias is not None:
                inner = [value + bias[expert, p] for p, value in enumerate(inner)]
            for neuron in range(width):
                if gated:  # SwiGLU
                    h = inner[neuron] / (1 + torch.exp(-inner[neuron])) * inner[width + neuron]
                else:  # ReLU squared
                    h = inner[neuron].clamp(min=0) ** 2
                row = row + weights[token, expert] * h * out[expert, neuron]
        rows.append(row)
    return torch.stack(rows)


def relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def make_selection(kind: str, tokens: int = T) -> tuple[Tensor, Tensor | None]:
    """(selected_TN, indices_TK)."""
    if kind == "top_2":
        indices = torch.rand(tokens, N).topk(2, -1).indices
        return torch.zeros(tokens, N, dtype=torch.bool).scatter_(-1, indices, True), indices
    selected = torch.rand(tokens, N) < 0.5
    selected[0, 0], selected[0, 2] = True, False
    if kind in ("none", "all"):
        selected[:] = kind == "all"
    if kind == "one_empty":
        selected[:, 2] = False
    if kind == "one_token_off":
        selected[tokens // 2] = False
    return selected, None


def make_leaves(
    selected: Tensor, gated: bool, dtype: torch.dtype = torch.float64, biased: bool | None = None
) -> dict[str, Tensor]:
    tokens, rows = selected.shape[0], 2 * M if gated else M
    leaves = {
        "x": torch.randn(tokens, D),
        "weights": torch.rand(tokens, N) * selected,
        "in": torch.randn(N, rows, D) * 0.5,
        "out": torch.randn(N, M, D) * 0.5,
    }
    if (not gated) if biased is None else biased:
        leaves["bias"] = torch.randn(N, rows)
    gates = torch.promote_types(dtype, torch.float32)
    return {name: value.to(gates if name == "weights" else dtype) for name, value in leaves.items()}


def stack(leaves: dict[str, Tensor], gated: bool, dropout: float = 0.0, act: Any = None) -> StackedExperts:
    act = act or (nn.functional.silu if gated else relu_squared)
    return StackedExperts(leaves["in"], leaves["out"], leaves.get("bias"), act, gated, dropout)


def route(weights: Tensor, selected: Tensor, indices: Tensor | None = None, straight_through: bool = False) -> Routing:
    return Routing(weights, selected, weights, weights, indices_TK=indices, straight_through=straight_through)


def gradients(y: Tensor, leaves: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
    }


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    scale = expected.abs().max().item() + 1e-2
    return bool((actual.double() - expected).abs().max() <= TOLERANCE[dtype] * scale)


def compare(
    leaves: dict[str, Tensor],
    selection: tuple[Tensor, Tensor | None],
    gated: bool,
    straight_through: bool,
    body: Body | None,
    trained: tuple[str, ...] = NAMES,
) -> None:
    """Output and the gradients of the trained leaves against the naive loop; the forward pass alone as well."""
    selected, indices = selection
    dtype = leaves["x"].dtype
    mine = {name: leaf.clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    y = mix_experts(
        mine["x"], route(mine["weights"], selected, indices, straight_through), stack(mine, gated), body=body
    )
    assert y.dtype == dtype
    exact = {name: leaf.double().requires_grad_(name in trained) for name, leaf in leaves.items()}
    expected = naive(exact, selected, gated, straight_through)
    assert close(y, expected, dtype)
    with torch.no_grad():
        alone = mix_experts(
            leaves["x"], route(leaves["weights"], selected, indices, straight_through), stack(leaves, gated), body=body
        )
    assert close(alone, expected, dtype)
    upstream = torch.randn_like(y)
    wanted = gradients(expected, exact, upstream.double()) if expected.requires_grad else {}
    for name, gradient in gradients(y, mine, upstream).items():
        assert gradient.dtype == leaves[name].dtype
        assert close(gradient, wanted.get(name, torch.zeros_like(gradient).double()), dtype), name


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("straight_through", [False, True], ids=["active", "straight_through"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("body", BODIES)
def test_matches_naive_loop(body: Body, gated: bool, dtype: torch.dtype, straight_through: bool, kind: str) -> None:
    """Gated without biases, plain with. Gates of experts that are off get exactly the gradient they should."""
    selection = make_selection(kind)
    compare(make_leaves(selection[0], gated, dtype), selection, gated, straight_through, body)


@pytest.mark.parametrize("body", [*BODIES, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "chosen", [[], [0], [1, 2], [0, 3], [0, 1, 2, 3]], ids=["none", "first", "run", "two_runs", "all"]
)
def test_one_token(chosen: list[int], dtype: torch.dtype, body: Body | None) -> None:
    """One token, gated with biases: any set of experts, with and without neighbours."""
    selected = torch.zeros(1, N, dtype=torch.bool)
    selected[0, chosen] = True
    compare(make_leaves(selected, True, dtype, biased=True), (selected, None), True, False, body)


@pytest.mark.parametrize("trained", [*NAMES, ("x", "weights"), ("weights", "out")])
@pytest.mark.parametrize("straight_through", [False, True], ids=["active", "straight_through"])
@pytest.mark.parametrize("body", BODIES)
def test_frozen_tensors(body: Body, straight_through: bool, trained: str | tuple[str, ...]) -> None:
    """Any subset of gradients alone is what it is among all."""
    selection = make_selection("random")
    leaves = make_leaves(selection[0], True, biased=True)
    names = (trained,) if isinstance(trained, str) else trained
    compare(leaves, selection, True, straight_through, body, names)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gradcheck(gated: bool, body: Body) -> None:
    selected, _ = make_selection("one_empty")
    leaves = make_leaves(selected, gated, biased=True)

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(leaves, values, strict=True))
        act = nn.functional.silu  # smooth, for numerical gradients
        return mix_experts(
            given["x"], route(given["weights"] * selected, selected), stack(given, gated, 0.0, act), body=body
        )

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves.values()])


@pytest.mark.parametrize("straight_through", [False, True], ids=["active", "straight_through"])
def test_grouped_mm_call(straight_through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch that CUDA takes, run on the CPU, where `F.grouped_mm` exists for fp32 as well."""
    monkeypatch.setattr(GroupedBlock, "_one_call", staticmethod(lambda a, b: True))
    selected = torch.rand(9, 3) < 0.5
    selected[:, 1] = False
    tensors = [(9, 8), (9, 3), (3, 16, 8), (3, 8, 8), (3, 16)]
    values = [torch.randn(shape) for shape in tensors]
    values[1] *= selected
    upstream = torch.randn(9, 8)

    def run(body: Body) -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in zip(NAMES, values, strict=True)}
        routing = route(leaves["weights"], selected, None, straight_through)
        y = mix_experts(leaves["x"], routing, stack(leaves, True), body=body)
        return [y, *gradients(y, leaves, upstream).values()]

    for actual, expected in zip(run("grouped"), run("dense"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", BODIES)
def test_rows_do_not_depend_on_their_mates(body: Body) -> None:
    """A token alone gets what it gets in a batch, and a token of NaN spoils its own row only."""
    selected, _ = make_selection("random")
    leaves = make_leaves(selected, True)
    batch = mix_experts(leaves["x"], route(leaves["weights"], selected), stack(leaves, True), body=body)
    for token in range(T):
        row = slice(token, token + 1)
        alone = mix_experts(
            leaves["x"][row], route(leaves["weights"][row], selected[row]), stack(leaves, True), body=body
        )
        torch.testing.assert_close(alone, batch[row], rtol=1e-12, atol=1e-12)
    leaves["x"][0] = torch.nan
    spoilt = mix_experts(leaves["x"], route(leaves["weights"], selected), stack(leaves, True), body=body)
    torch.testing.assert_close(spoilt[1:], batch[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("body", [*BODIES, None])
def test_no_tokens(body: Body | None) -> None:
    selected = torch.zeros(0, N, dtype=torch.bool)
    leaves = {name: leaf.requires_grad_() for name, leaf in make_leaves(selected, True).items()}
    y = mix_experts(leaves["x"], route(leaves["weights"], selected), stack(leaves, True), body=body)
    assert y.shape == (0, D)
    assert all(not gradient.any() for gradient in gradients(y, leaves, torch.zeros_like(y)).values())


@pytest.mark.parametrize("body", BODIES)
def test_gates_are_multiplied_in_fp32(body: Body) -> None:
    """A gate that bf16 cannot hold: (1 + 2^-8)(1 + 2^-7) rounds to 1 + 2/128; with a rounded gate it were 1 + 1/128."""
    selected = torch.ones(2, 1, dtype=torch.bool)
    gates = torch.full((2, 1), 1 + 2**-8)
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    experts = StackedExperts(one * (1 + 2**-7), one, None, nn.Identity(), False)
    y = mix_experts(one[0].expand(2, 1), route(gates, selected), experts, body=body)
    assert y.flatten().tolist() == [1.015625, 1.015625]


def test_autocast() -> None:
    """Products in the autocast dtype, gradients in the dtype of their tensors; backward outside of autocast."""
    selected, _ = make_selection("random")
    leaves = make_leaves(selected, True, torch.float32)
    exact = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    mine = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = mix_experts(mine["x"], route(mine["weights"], selected), stack(mine, True), body="sorted")
    assert y.dtype == torch.bfloat16
    expected = naive(exact, selected, True, False)
    assert close(y, expected, torch.bfloat16)
    upstream = torch.randn(T, D)
    wanted = gradients(expected, exact, upstream.double())
    for name, gradient in gradients(y, mine, upstream.bfloat16()).items():
        assert gradient.dtype == torch.float32
        assert close(gradient, wanted[name], torch.bfloat16), name


def test_fp32_experts_in_a_bf16_model() -> None:
    selected, _ = make_selection("random")
    leaves = make_leaves(selected, True, torch.float32)
    mine = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    y = mix_experts(mine["x"].bfloat16(), route(mine["weights"], selected), stack(mine, True))
    assert y.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients(y, mine, torch.ones_like(y)).values()} == {torch.float32}


@pytest.mark.parametrize("straight_through", [False, True], ids=["active", "straight_through"])
def test_dropout(straight_through: bool) -> None:
    """With out = 1 every output is one neuron's activation: dropped, or scaled up by 1 / (1 - p). Only in training."""
    tokens, width = 200, 4
    selected = torch.zeros(tokens, 2, dtype=torch.bool)
    selected[:, 0] = True
    weights = (torch.rand(tokens, 2) * selected).requires_grad_()
    x = torch.randn(tokens, width)
    out = torch.eye(width).expand(2, -1, -1)
    experts = StackedExperts(torch.randn(2, width, width), out, None, torch.sigmoid, False, dropout=0.25)
    routing = route(weights, selected, None, straight_through)
    kept = mix_experts(x, routing, experts)
    dropped = mix_experts(x, routing, experts, training=True)
    is_zero = dropped == 0
    torch.testing.assert_close(dropped[~is_zero], kept[~is_zero] / 0.75)
    assert 0.15 < is_zero.float().mean().item() < 0.35
    (gradient,) = torch.autograd.grad(dropped.sum(), weights)
    assert bool(gradient[:, 1].any()) is straight_through


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_an_activation_that_returns_its_input(gated: bool, body: Body) -> None:
    """Nothing may write into what the backward pass needs, and the backward pass may run twice."""
    selected, _ = make_selection("random")
    leaves = {name: leaf.requires_grad_() for name, leaf in make_leaves(selected, gated).items()}
    routing = route(leaves["weights"], selected)
    y = mix_experts(leaves["x"], routing, stack(leaves, gated, 0.0, nn.Identity()), body=body)
    copied = mix_experts(leaves["x"], routing, stack(leaves, gated, 0.0, torch.clone), body=body)
    upstream = torch.randn_like(y)
    wanted = torch.autograd.grad(copied, list(leaves.values()), upstream)
    for _ in range(2):
        found = torch.autograd.grad(y, list(leaves.values()), upstream, retain_graph=True)
        for gradient, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_an_activation_with_parameters() -> None:
    selected, _ = make_selection("random")
    leaves = make_leaves(selected, False)
    act = nn.PReLU(dtype=torch.float64)
    y = mix_experts(leaves["x"], route(leaves["weights"], selected), stack(leaves, False, 0.0, act))
    (gradient,) = torch.autograd.grad(y.sum(), act.weight)
    inner = torch.einsum("td,npd->tnp", leaves["x"], leaves["in"]) + leaves["bias"]
    expected = torch.einsum("tn,tnm,nmd->", leaves["weights"], inner.clamp(max=0), leaves["out"])
    torch.testing.assert_close(gradient, expected.reshape(1))


@pytest.mark.parametrize("straight_through", [False, True], ids=["active", "straight_through"])
@pytest.mark.parametrize("body", BODIES)
def test_what_is_kept_for_backward(body: Body, straight_through: bool) -> None:
    """Beyond inputs: P numbers for each computed pair and two indices; nothing of size (T, N, D) or (pairs, D)."""
    tokens, features, width = 64, 48, 8
    selected = torch.zeros(tokens, N, dtype=torch.bool)
    selected[:, 0], selected[::2, 2] = True, True
    pairs = {"dense": tokens * N, "union": tokens * 2}.get(body, tokens * 3 // 2)
    x = torch.randn(tokens, features, requires_grad=True)
    weights = (torch.rand(tokens, N) * selected).requires_grad_()
    into, out = (torch.randn(N, rows, features, requires_grad=True) for rows in (2 * width, width))
    experts = StackedExperts(into, out, None, nn.functional.silu, True)
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, weights, into, out, selected)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mix_experts(x, route(weights, selected, None, straight_through), experts, body=body)
    assert 0 < sum(kept.values()) <= pairs * (2 * width * 4 + 2 * 8)


@pytest.mark.parametrize("body", BODIES)
def test_activation_checkpointing(body: Body) -> None:
    selected, _ = make_selection("random")
    leaves = {name: leaf.requires_grad_() for name, leaf in make_leaves(selected, True).items()}
    upstream = torch.randn(T, D, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return mix_experts(x, route(leaves["weights"], selected, None, True), stack(leaves, True), body=body)

    wanted = gradients(run(leaves["x"]), leaves, upstream)
    again = checkpoint(run, leaves["x"], use_reentrant=False)
    assert isinstance(again, Tensor)
    found = gradients(again, leaves, upstream)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_unknown_body() -> None:
    selected, _ = make_selection("all")
    leaves = make_leaves(selected, True)
    with pytest.raises(ValueError, match="dense, union, grouped, sorted"):
        mix_experts(leaves["x"], route(leaves["weights"], selected), stack(leaves, True), body="fast")  # type: ignore[arg-type]


def pick(tokens: int, active: int, dtype: torch.dtype = torch.float32, **options: Any) -> Body:
    """What is chosen for 8 experts of 352 neurons, 1024 features; nothing is allocated."""
    with torch.device("meta"):
        experts = StackedExperts(
            torch.empty(8, 704, 1024, dtype=dtype), torch.empty(8, 352, 1024, dtype=dtype), None, torch.relu, True
        )
        x = torch.empty(tokens, 1024, dtype=dtype)
    selected = torch.zeros(tokens, 8, dtype=torch.bool)
    selected[:, :active] = True
    routing = route(selected.float(), selected, None, options.get("straight_through", False))
    return choose_body(x, routing, experts, options.get("gradients", False))


def test_choice_of_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules that measurements left no doubt about."""
    monkeypatch.setattr(partition_dispatch, "_has_amx", lambda: False)
    assert pick(1, 4) == pick(1, 4, torch.bfloat16) == "union"
    assert pick(512, 4) == "grouped"
    assert pick(4096, 4) == pick(4096, 4, torch.bfloat16) == "sorted"
    assert pick(4, 4, torch.bfloat16) == "dense"
    assert pick(4096, 8) == pick(4096, 8, torch.bfloat16) == pick(2, 8) == "dense"
    assert pick(2048, 4, gradients=True) == pick(2048, 4, gradients=True, straight_through=True) == "sorted"
    assert pick(2048, 7, torch.bfloat16, gradients=True, straight_through=True) == "dense"
    monkeypatch.setattr(partition_dispatch, "_has_amx", lambda: True)
    assert pick(128, 4, torch.bfloat16) == "dense"
    assert pick(2048, 4, torch.bfloat16) == "sorted"
