"""Banks under a routing with one row for each sequence: against the naive loop, and against the same gates by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from kinds import TOLERANCE
from sequence_cases import (
    BODIES,
    CONTEXT,
    IN,
    MODES,
    OPTIONS,
    OUT,
    TASKS,
    G,
    N,
    S,
    base_layer,
    compare,
    force,
    library_pass,
    make,
    naive_pass,
    upstream,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moadapt.experts import sequence, sequence_products
from moadapt.experts.base import ExpertBank
from moadapt.registry import EXPERTS
from moadapt.routing import Routing, RoutingContext, checkpoint_context_fn


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_body_equals_the_loop(kind: str, mode: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if body != "chosen":
        force(monkeypatch, body)
    case = make(kind, mode, torch.float64)
    base, x = base_layer("linear", torch.float64), case.inputs(torch.float64)
    compare(case, library_pass(case, x, base), naive_pass(case, x, base), TOLERANCE[torch.float64])


def test_the_bodies_are_taken_where_they_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, mode, body in [
        ("lora", "top_2", "stacked"),
        ("malora", "top_2", "stacked"),
        ("mtl_lora", "soft", "mixed"),
    ]:
        taken = force(monkeypatch, body)
        case = make(kind, mode, torch.float64)
        library_pass(case, case.inputs(torch.float64), base_layer("linear", torch.float64))
        assert taken == [body], kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("body", BODIES[1:])
@pytest.mark.parametrize("kind", OPTIONS)
def test_lower_precision(kind: str, body: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters and gates in fp32, x and the base layer in this dtype."""
    force(monkeypatch, body)
    for mode in ("top_2", "soft"):
        case = make(kind, mode, dtype)
        base, x = base_layer("linear", dtype), case.inputs(dtype)
        got = library_pass(case, x, base)
        assert got["y"].dtype == got["x"].dtype == dtype
        assert got["gates"].dtype == torch.float32
        compare(case, got, naive_pass(case, x, base), TOLERANCE[dtype])


@pytest.mark.parametrize("body", BODIES[1:])
@pytest.mark.parametrize("kind", ["lora", "shared_down", "malora", "factors", "mtl_lora"])
def test_autocast(kind: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, body)
    case = make(kind, "top_2", torch.float32)
    base, x = base_layer("linear", torch.float32), case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = library_pass(case, x, base)
    assert got["y"].dtype == torch.bfloat16
    assert got["x"].dtype == torch.float32
    compare(case, got, naive_pass(case, x, base), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("body", BODIES[1:])
@pytest.mark.parametrize("kind", ["lora", "shared_down", "malora", "factors"])
def test_base_layers(kind: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conv1D hands out a view; an output given may be overwritten; a leaf that is trained may not."""
    force(monkeypatch, body)
    case = make(kind, "top_2", torch.float64)
    x = case.inputs(torch.float64)
    conv = base_layer("conv1d", torch.float64)
    compare(case, library_pass(case, x, conv), naive_pass(case, x, conv), 1e-11)
    linear = base_layer("linear", torch.float64)
    want = naive_pass(case, x, linear)
    given = library_pass(case, x, linear(x))
    reference.close(given["y"], want["y"], 1e-11, "given output")
    leaf = linear(x).detach().requires_grad_()
    kept = leaf.detach().clone()
    reference.close(library_pass(case, x, leaf)["y"], want["y"], 1e-11, "trained leaf")
    assert torch.equal(leaf.detach(), kept)
    reference.close(leaf.grad, upstream(leaf), 1e-14, "gradient to the base output")
    narrow = linear(x).float()
    got = case.bank(x, case.routing, narrow)
    assert got.dtype == torch.float32
    reference.close(got, want["y"], 1e-6, "base output of another dtype")


@pytest.mark.parametrize("body", BODIES[1:])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["lora", "shared_down", "malora", "mtl_lora"])
def test_equals_the_same_gates_by_token(kind: str, mode: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token in each sequence, and longer sequences than the loop is quick for."""
    force(monkeypatch, body)
    for length in (1, 37):
        case = make(kind, mode, torch.float64, length=length, experts=8)
        base, x = base_layer("linear", torch.float64), case.inputs(torch.float64)
        by_token = library_pass(case, x, base, case.routing.per_token(len(x)))
        compare(case, library_pass(case, x, base), by_token, 1e-12)


@pytest.mark.parametrize("kind", ["lora", "shared_down", "malora", "factors", "mtl_lora"])
def test_several_turns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rows_T` says which row a token follows: the same as the tokens of each row in a sequence of their own."""
    case = make(kind, "top_2", torch.float64, length=2 * S)
    rows_T = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, *([2] * S), *([1] * S), *([2] * 2 * S)])
    x, base = case.inputs(torch.float64), base_layer("linear", torch.float64)
    got = library_pass(case, x, base, replace(case.routing, rows_T=rows_T))
    each = case.routing.select(rows_T)
    tokens = replace(case, routing=replace(each, weights_TN=each.weights_TN.detach().requires_grad_()), length=1)
    monkeypatch.setitem(CONTEXT, "task_ids_B", torch.tensor(TASKS).repeat_interleave(2 * S))
    want = library_pass(tokens, x, base)
    want["gates"] = torch.zeros_like(case.gates).index_add(0, rows_T, want["gates"])
    compare(case, got, want, 1e-11)


@pytest.mark.parametrize("kind", ["lora", "shared_down", "malora", "mtl_lora"])
@pytest.mark.parametrize("active", [(), (2,), (0, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_loop_over_active_experts(
    kind: str, active: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In inference only the experts of `active` take part; with none of them only the base layer runs."""
    taken = force(monkeypatch, "active")
    case = make(kind, "soft", dtype)
    selected = torch.zeros(G, N, dtype=torch.bool)
    selected[1:, list(active)] = True
    routing = replace(case.routing, weights_TN=case.gates.detach() * selected, selected_TN=selected, active=active)
    case.routing = replace(routing, weights_TN=routing.weights_TN.requires_grad_())
    unused = [expert for expert in range(N) if expert not in active]
    stacks = [p for p in case.bank.parameters() if p.dim() == 3 and len(p) == N]
    for kind_of_base in ("linear", "conv1d"):
        base, x = base_layer(kind_of_base, dtype), case.inputs(dtype)
        want = naive_pass(case, x, base)["y"]
        with torch.no_grad(), RoutingContext(**CONTEXT).active():
            for stack in stacks:
                kept = stack[unused].clone()
                stack[unused] = float("nan")
                reference.close(case.bank(x, case.routing, base), want, TOLERANCE[dtype], "output")
                stack[unused] = kept
    assert set(taken) <= {"active"}
    assert bool(taken) == bool(active)


@pytest.mark.parametrize("active", [(2,), (0, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("kind_of_base", ["linear", "conv1d"])
def test_one_step_of_decoding(
    active: tuple[int, ...], dtype: torch.dtype, kind_of_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token for each sequence; other experts' weights are not read."""
    steps: list[int] = []
    one_step = sequence._mix_one_step
    monkeypatch.setattr(sequence, "_mix_one_step", lambda *args: (steps.append(1), one_step(*args))[1])
    case = make("lora", "soft", dtype, length=1)
    selected = torch.zeros(G, N, dtype=torch.bool)
    selected[1:, list(active)] = True
    case.routing = replace(case.routing, weights_TN=case.gates.detach() * selected, selected_TN=selected, active=active)
    case.routing = replace(case.routing, weights_TN=case.routing.weights_TN.requires_grad_())
    base, x = base_layer(kind_of_base, dtype), case.inputs(dtype)
    want = naive_pass(case, x, base)["y"]
    with torch.no_grad():
        for stack in case.bank.parameters():
            stack[[expert for expert in range(N) if expert not in active]] = float("nan")
        reference.close(case.bank(x, case.routing, base), want, TOLERANCE[dtype], "output")
    assert steps


def test_active_is_not_read_where_gradients_are_wanted() -> None:
    case = make("lora", "soft", torch.float64)
    x, base = case.inputs(torch.float64), base_layer("linear", torch.float64)
    wrong = replace(case.routing, active=())
    compare(case, library_pass(case, x, base, wrong), naive_pass(case, x, base), 1e-11)


@pytest.mark.parametrize("kind", ["lora", "shared_down", "malora", "factors", "mtl_lora"])
def test_checkpointing_repeats_the_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "stacked")
    case = make(kind, "top_2", torch.float64)
    x, base = case.inputs(torch.float64), base_layer("linear", torch.float64)
    want = library_pass(case, x, base)
    again = replace(case, bank=_Checkpointed(case.bank))
    compare(case, library_pass(again, x, base), want, 1e-14)


class _Checkpointed(nn.Module):
    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, *args: Any) -> Tensor:
        return checkpoint(self.bank, *args, use_reentrant=False, context_fn=checkpoint_context_fn)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.bank.named_parameters(*args, **kwargs)


@pytest.mark.parametrize("wanted", ["base", "x", "gates", "lora_A", "lora_B"])
@pytest.mark.parametrize("mode", ["top_2", "soft"])
def test_each_gradient_alone(mode: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for one gradient only gives the same one as asking for all."""
    force(monkeypatch, "stacked")
    case = make("lora", mode, torch.float64)
    leaves = {"gates": case.gates, **dict(case.bank.named_parameters())}
    leaves["x"] = case.inputs(torch.float64).requires_grad_()
    leaves["base"] = torch.randn(G * S, OUT, dtype=torch.float64, requires_grad=True)

    def run(base: Tensor) -> Tensor:
        return case.bank(leaves["x"], case.routing, base + 0.0)

    grad = upstream(leaves["base"])
    (everything,) = torch.autograd.grad(run(leaves["base"]), leaves[wanted], grad)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    (alone,) = torch.autograd.grad(run(leaves["base"]), leaves[wanted], grad)
    assert torch.equal(everything, alone)


@pytest.mark.parametrize("mode", ["top_2", "soft"])
def test_gradcheck(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "stacked")
    case = make("lora", mode, torch.float64)
    base = base_layer("linear", torch.float64)
    indices = case.routing.indices_TK

    def function(x: Tensor, gates: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kept = gates if indices is None else torch.zeros_like(gates).scatter(1, indices, gates.gather(1, indices))
        routing = replace(case.routing, weights_TN=kept)
        return sequence.mix_sequences(base, x, routing, a, b, 0.7)

    inputs = [case.inputs(torch.float64), torch.rand(G, N, dtype=torch.float64), *case.bank.parameters()]
    assert torch.autograd.gradcheck(function, [value.detach().requires_grad_() for value in inputs])


@pytest.mark.parametrize(("mode", "kept"), [("top_2", 2), ("soft", N), ("one", 1)])
@pytest.mark.parametrize("body", ["all", "stacked"])
def test_saves_only_rank_space_activations(mode: str, kept: int, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond x and the parameters: T*K*R activations, and gates and indices. No gathered weights."""
    force(monkeypatch, body)
    length = 64
    case = make("lora", mode, torch.float64, length=length)
    base, x = base_layer("linear", torch.float64), case.inputs(torch.float64).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, base.weight, *case.bank.parameters())}
    extra: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            extra[storage.data_ptr()] = storage.nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.bank(x, case.routing, base)
    activations = G * length * kept * case.bank.r
    rows = G * length if mode == "top_2" and body == "all" else G  # gates and indices spread over the tokens
    assert activations <= sum(extra.values()) <= activations + 4 * rows * N, extra


def test_the_choice_of_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences: the selected experts, whatever N. Short ones in a large batch: all. Decoding: the active ones."""
    taken: list[str] = []
    cheapest = sequence._cheapest
    monkeypatch.setattr(sequence, "_cheapest", lambda costs: taken.append(cheapest(costs)) or taken[-1])
    one_step = sequence._mix_one_step
    monkeypatch.setattr(sequence, "_mix_one_step", lambda *args: (taken.append("one step"), one_step(*args))[1])

    def body(rows: int, length: int, experts: int, active: tuple[int, ...] | None = None) -> str:
        bank = EXPERTS.build(EXPERTS.parse({"kind": "lora", "r": 4}), 1024, 1024, experts)
        weights = torch.rand(rows, experts)
        indices = weights.topk(2, -1).indices
        selected = torch.zeros(rows, experts, dtype=torch.bool).scatter(1, indices, True)
        routing = Routing(weights * selected, selected, weights, weights, "prompt", indices, active=active)
        with torch.set_grad_enabled(active is None):
            bank(torch.randn(rows * length, 1024), routing, torch.zeros(rows * length, 1024))
        return taken[-1]

    assert [body(4, 128, experts) for experts in (4, 8, 64)] == ["stacked"] * 3
    assert body(64, 1, 8) == "all"
    assert body(1, 1, 64, active=(3, 5)) == "one step"
    assert body(1, 128, 64, active=(3, 5)) == "active"


def test_both_sums_over_the_sequences_of_an_expert_agree() -> None:
    """The one for GPUs, where the order of the other is not fixed."""
    rows, experts = torch.randn(6, 3, 5, dtype=torch.float64), torch.tensor([3, 0, 3, 1, 0, 3])
    want = torch.stack([rows[experts == expert].sum(0) for expert in range(N)])
    reference.close(sequence_products._add_by_product(rows, experts, N), want, 1e-14, "product")
    weight = torch.zeros(N, 3, 5, dtype=torch.float64)
    reference.close(
        sequence_products._unstack(rows.view(3, 6, 5), weight, experts.view(3, 2)), want, 1e-14, "index_add"
    )


def test_rows_must_divide_the_tokens() -> None:
    from moadapt.errors import ConfigError

    case = make("lora", "soft", torch.float32)
    with pytest.raises(ConfigError, match="10 tokens for 4 experts"):
        case.bank(torch.randn(10, IN), case.routing, torch.zeros(10, OUT))
    turns = replace(case.routing, rows_T=torch.zeros(11, dtype=torch.int64))
    with pytest.raises(ConfigError, match="12 tokens for 4 experts"):
        case.bank(torch.randn(12, IN), turns, torch.zeros(12, OUT))


@pytest.mark.parametrize("kind", ["lora", "shared_down", "malora", "factors"])
def test_no_sequences_at_all(kind: str) -> None:
    case = make(kind, "top_2", torch.float64, rows=0)
    y = case.bank(torch.zeros(0, IN, dtype=torch.float64), case.routing, base_layer("linear", torch.float64))
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in case.bank.parameters())
