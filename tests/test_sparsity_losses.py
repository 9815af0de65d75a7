"""`sparsity` and `target_sparsity` against loops, and whether they reach their target."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from moadapt.config import MixtureConfig
from moadapt.losses import AuxiliaryLoss
from moadapt.registry import LOSSES, ROUTERS
from moadapt.routing import Routing, RoutingContext, RoutingRecord

B, S, N = 3, 4, 5
MASKS = {
    "none": None,
    "right": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool().reshape(-1),
    "left": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]).bool().reshape(-1),
}


def make(kind: str, **options: Any) -> AuxiliaryLoss:
    loss: AuxiliaryLoss = LOSSES.build(LOSSES.parse({"kind": kind, **options}))
    return loss


def record(logits_TN: Tensor, mask_T: Tensor | None = None, name: str = "r", relu: bool = False) -> RoutingRecord:
    probs = logits_TN.relu() if relu else torch.sigmoid(logits_TN)
    selected = probs > (0.0 if relu else 0.5)
    return RoutingRecord(name, Routing(probs * selected, selected, logits_TN, probs), mask_T, B)


def rows(item: RoutingRecord) -> list[tuple[list[Tensor], list[bool]]]:
    """(scores, selected) of every real token."""
    real = [True] * len(item.routing.probs_TN) if item.mask_T is None else item.mask_T.tolist()
    return [
        (list(probs), selected.tolist())
        for probs, selected, on in zip(item.routing.probs_TN, item.routing.selected_TN, real, strict=True)
        if on
    ]


def naive_sparsity(records: list[RoutingRecord], penalise: str) -> Tensor:
    """(1 / L N) sum_l sum_i mean_t; S has G's value and gradient 1 everywhere."""
    total = torch.zeros((), dtype=torch.float64)
    for item in records:
        for probs, selected in rows(item):
            for prob, on in zip(probs, selected, strict=True):
                gate = prob if on else 0.0 * prob
                if penalise == "S":
                    gate = gate.item() + prob - prob.item()
                total = total + gate / (len(rows(item)) * len(probs) * len(records))
    return total


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("penalise", ["G", "S"])
def test_sparsity_value_and_gradient_equal_the_loop(penalise: str, mask: str) -> None:
    logits = [torch.randn(B * S, n, dtype=torch.float64, requires_grad=True) for n in (N, 3, N)]
    records = [record(item, MASKS[mask], str(i)) for i, item in enumerate(logits)]
    got, want = make("sparsity", penalise=penalise)(records), naive_sparsity(records, penalise)
    reference.close(got, want, 1e-12, "value")
    grads = torch.autograd.grad(got, logits, retain_graph=True)
    for mine, theirs in zip(grads, torch.autograd.grad(want, logits), strict=True):
        reference.close(mine, theirs, 1e-12, "gradient")
        if MASKS[mask] is not None:
            assert mine[~MASKS[mask]].abs().max() == 0


def test_g_pushes_down_the_active_gates_only_and_s_all() -> None:
    logits = torch.randn(B * S, N, dtype=torch.float64, requires_grad=True)
    active = record(logits).routing.selected_TN
    gradients = {}
    for penalise in ("G", "S"):
        value = make("sparsity", penalise=penalise)([record(logits)])
        (gradients[penalise],) = torch.autograd.grad(value, logits)
    assert torch.equal(gradients["G"] > 0, active)
    assert (gradients["S"] > 0).all()
    torch.testing.assert_close(gradients["G"][active], gradients["S"][active])


def test_default_coefficients_are_one() -> None:
    kinds = ("sparsity", "target_sparsity", "block_distillation", "logits_distillation")
    assert [LOSSES.parse({"kind": kind}).coef for kind in kinds] == [1.0] * 4


def naive_target(records: list[RoutingRecord], form: str, target: float, strength: float) -> tuple[Tensor, float]:
    """ReMoE's N / (k T²) sum_i (sum_t ReLU_ti) c_i with k = target N, or the straight-through distance; the share."""
    penalty = torch.zeros((), dtype=torch.float64)
    soft = torch.zeros((), dtype=torch.float64)
    share = 0.0
    for item in records:
        tokens = rows(item)
        n = len(tokens[0][0])
        for i in range(n):
            count = sum(selected[i] for _, selected in tokens)
            gates = sum(probs[i] if selected[i] else 0.0 * probs[i] for probs, selected in tokens)
            penalty = penalty + n / (target * n * len(tokens) ** 2) * gates * count / len(records)
            share += count / (n * len(tokens) * len(records))
            for probs, selected in tokens:
                soft = soft + (float(selected[i]) + probs[i] - probs[i].item()) / (n * len(tokens) * len(records))
    return (strength * penalty if form == "adaptive" else (soft - target).abs()), share


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("form", ["adaptive", "absolute"])
def test_target_sparsity_value_and_gradient_equal_the_loop(form: str, relu: bool, mask: str) -> None:
    logits = [torch.randn(B * S, n, dtype=torch.float64, requires_grad=True) for n in (N, 3, N)]
    records = [record(item, MASKS[mask], str(i), relu) for i, item in enumerate(logits)]
    loss = make("target_sparsity", form=form, target=0.3, initial_strength=0.02)
    got = loss(records)
    want, share = naive_target(records, form, 0.3, 0.02)
    reference.close(got, want, 1e-12, "value")
    assert loss.measured["active_share"].item() == pytest.approx(share, rel=1e-12)
    assert not loss.measured["active_share"].requires_grad
    grads = torch.autograd.grad(got, logits, retain_graph=True)
    for mine, theirs in zip(grads, torch.autograd.grad(want, logits), strict=True):
        reference.close(mine, theirs, 1e-12, "gradient")


def test_strength_follows_the_share_of_the_step() -> None:
    loss = make("target_sparsity", target=0.25)
    assert loss.state == {"strength": 1e-8}
    loss.end_step({"active_share": 0.5})
    assert loss.state["strength"] == pytest.approx(1.2e-8)
    loss.end_step({"active_share": 0.6})
    loss.end_step({"active_share": 0.2})
    assert loss.state["strength"] == pytest.approx(1.2e-8)
    loss.end_step({})
    assert loss.state["strength"] == pytest.approx(1.2e-8)
    restored = make("target_sparsity", target=0.25)
    restored.state.update(loss.state)
    items = [record(torch.randn(B * S, N, dtype=torch.float64), relu=True)]
    assert restored(items).item() == loss(items).item()


def test_strength_never_vanishes_nor_overflows() -> None:
    loss = make("target_sparsity", target=0.25)
    for share, bound in ((0.0, 1e-12), (1.0, 1e6)):
        for _ in range(400):
            loss.end_step({"active_share": share})
        assert loss.state["strength"] == bound


def test_absolute_form_has_no_state() -> None:
    loss = make("target_sparsity", form="absolute")
    assert loss.state == {}
    loss.end_step({"active_share": 1.0})
    assert loss.state == {}


def trained_shares(loss: AuxiliaryLoss, router: dict[str, Any], coef: float, lr: float) -> list[float]:
    """Active shares while a router descends, which a task pulls towards gates of 1 for every expert."""
    gates = ROUTERS.build(ROUTERS.parse({**router, "init_std": 0.3}), 8, 8)
    optimizer = torch.optim.SGD(gates.parameters(), lr=lr)
    x = torch.randn(256, 8)
    x[:, 0] = 2.0
    shares = []
    for _ in range(600):
        routing = gates(x, RoutingContext())
        value = loss([RoutingRecord("r", routing, None, 1)])
        optimizer.zero_grad()
        (coef * value + (1.0 - routing.probs_TN).square().mean()).backward()
        optimizer.step()
        shares.append(loss.measured["active_share"].item())
        loss.end_step({"active_share": shares[-1]})
    return shares


@pytest.mark.parametrize("target", [0.25, 0.5])
def test_adaptive_strength_drives_relu_gates_to_the_target(target: float) -> None:
    loss = make("target_sparsity", target=target, initial_strength=1e-4, multiplier=1.05)
    shares = trained_shares(loss, {"kind": "relu"}, coef=1.0, lr=0.3)
    assert abs(sum(shares[-100:]) / 100 - target) < 0.03
    assert abs(shares[0] - target) > 0.1
    assert loss.state["strength"] > 0.05, "the task pulls the other way, so the strength stays up"


@pytest.mark.parametrize("target", [0.25, 0.75])
def test_absolute_form_drives_sigmoid_gates_to_the_target(target: float) -> None:
    loss = make("target_sparsity", target=target, form="absolute")
    shares = trained_shares(loss, {"kind": "sigmoid_ste"}, coef=10.0, lr=0.02)
    assert abs(sum(shares[-100:]) / 100 - target) < 0.05
    assert abs(shares[0] - target) > 0.1


def test_no_real_token_at_all_is_finite() -> None:
    nothing = torch.zeros(B * S, dtype=torch.bool)
    for kind, options in (("sparsity", {}), ("sparsity", {"penalise": "S"}), ("target_sparsity", {})):
        logits = torch.randn(B * S, N, requires_grad=True)
        value = make(kind, **options)([record(logits, nothing)])
        value.backward()
        assert value.item() == 0.0
        assert logits.grad.abs().max() == 0


def test_what_is_not_finite_at_padding_does_not_matter() -> None:
    mask = torch.arange(B * S) < 7
    logits = torch.randn(B * S, N, dtype=torch.float64)
    clean = record(logits, mask, relu=True)
    logits = logits.clone()
    logits[~mask] = torch.inf
    for kind in ("sparsity", "target_sparsity"):
        got = make(kind)([record(logits, mask, relu=True)])
        assert got.item() == make(kind)([clean]).item()


def test_target_for_a_router_that_selects_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_sparsity does nothing .* relu or sigmoid_ste"):
        MixtureConfig.model_validate({"router": {"kind": "softmax"}, "losses": [{"kind": "target_sparsity"}]})


@pytest.mark.parametrize("form", ["adaptive", "absolute"])
@pytest.mark.parametrize("kind", ["top_k", "representative"])
def test_target_for_a_router_that_keeps_a_fixed_number_is_refused(kind: str, form: str) -> None:
    """Its share never moves, and the adaptive strength would grow to its bound."""
    loss = {"kind": "target_sparsity", "form": form}
    with pytest.raises(ValueError, match=rf"steers how many experts are kept, and router.kind: {kind} .* relu or"):
        MixtureConfig.model_validate({"router": {"kind": kind, "num_experts_per_tok": 2}, "losses": [loss]})
    for free in ({"kind": "norm_regression", "num_experts_per_tok": 2}, {"kind": "sigmoid_ste"}, {"kind": "relu"}):
        assert MixtureConfig.model_validate({"router": free, "losses": [loss]}).losses


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sparsity", {"penalise": "L2"}),
        ("target_sparsity", {"target": 1.0}),
        ("target_sparsity", {"multiplier": 1.0}),
        ("target_sparsity", {"initial_strength": 0.0}),
        ("target_sparsity", {"form": "hinge"}),
    ],
)
def test_bad_options(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make(kind, **options)
