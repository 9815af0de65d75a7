"""The auxiliary losses by themselves: every option against a loop, published values, masks, gradients, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from moadapt.config import MixtureConfig
from moadapt.errors import ConfigError
from moadapt.losses import AuxiliaryLoss
from moadapt.registry import LOSSES
from moadapt.routing import Routing, RoutingRecord

B, S, N, K = 3, 4, 5, 2


def make(kind: str, **options: Any) -> AuxiliaryLoss:
    loss: AuxiliaryLoss = LOSSES.build(LOSSES.parse({"kind": kind, **options}))
    return loss


def record(
    logits_TN: Tensor, k: int, mask_T: Tensor | None = None, batch_size: int = B, name: str = "r"
) -> RoutingRecord:
    probs = torch.softmax(logits_TN, -1)
    indices = probs.topk(k, -1).indices
    selected = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, indices, True)
    return RoutingRecord(name, Routing(probs * selected, selected, logits_TN, probs), mask_T, batch_size)


def routed(item: RoutingRecord) -> reference.Routed:
    routing = item.routing
    real = [True] * len(routing.logits_TN) if item.mask_T is None else item.mask_T.tolist()
    decisions = [
        reference.Decision(list(weights), selected.tolist(), list(logits), reference.softmax(list(logits)))
        for weights, selected, logits in zip(routing.weights_TN, routing.selected_TN, routing.logits_TN, strict=True)
    ]
    return reference.Routed(decisions, real, item.batch_size)


MASKS = {
    "none": None,
    "right": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool().reshape(-1),
    "left": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]).bool().reshape(-1),
    "one_row_empty": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool().reshape(-1),
}
OPTIONS = [
    ("load_balance", dict(zip(("count", "probs", "reduce", "level"), values, strict=True)))
    for values in itertools.product(
        ("topk", "topk_unnormalized", "argmax"), ("full", "selected"), ("mean", "sum", "pooled"), ("batch", "sequence")
    )
]
OPTIONS += [("router_z", {"reduce": reduce}) for reduce in ("mean", "sum")]
OPTIONS += [("importance", {"probs": p, "reduce": r}) for p in ("full", "selected") for r in ("mean", "sum")]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"), OPTIONS, ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value
)
def test_value_and_gradient_equal_the_loop(kind: str, options: dict[str, str], mask: str) -> None:
    logits = [torch.randn(B * S, N, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    records = [record(item, K, MASKS[mask], name=str(i)) for i, item in enumerate(logits)]
    got = make(kind, **options)(records)
    want = getattr(reference, kind)([routed(item) for item in records], **options)
    assert got.shape == ()
    reference.close(got, want, 1e-12, "value")
    grads = torch.autograd.grad(got, logits)
    for mine, theirs in zip(grads, torch.autograd.grad(want, logits), strict=True):
        reference.close(mine, theirs, 1e-12, "gradient")
    if MASKS[mask] is not None:
        assert all(grad[~MASKS[mask]].abs().max() == 0 for grad in grads), "padding gets a gradient"


@pytest.mark.parametrize("kind", ["load_balance", "router_z", "importance"])
def test_different_numbers_of_experts_and_masks_per_router(kind: str) -> None:
    """Layers with 3 and 5 experts, an encoder with other padding than the decoder: the mean over all routers."""
    shapes = [(3, "right"), (5, "right"), (3, "left"), (5, "none"), (3, "right")]
    records = [
        record(torch.randn(B * S, n, dtype=torch.float64), K, MASKS[m], name=str(i)) for i, (n, m) in enumerate(shapes)
    ]
    records.append(record(torch.randn(B * 2, 3, dtype=torch.float64), K, None, name="short"))
    want = getattr(reference, kind)([routed(item) for item in records])
    reference.close(make(kind)(records), want, 1e-12, "value")


def test_pooled_over_different_numbers_of_experts_is_refused() -> None:
    records = [record(torch.randn(B * S, n), K) for n in (3, 5)]
    with pytest.raises(ConfigError, match=r"reduce: pooled .* use mean"):
        make("load_balance", reduce="pooled")(records)


# -- published values ---------------------------------------------------------------------------------------------


def balanced(n: int, k: int) -> Tensor:
    """Logits so small that probabilities are uniform, with selections that rotate over the experts."""
    tokens = n
    logits = torch.zeros(tokens, n, dtype=torch.float64)
    for token in range(tokens):
        for place in range(k):
            logits[token, (token + place) % n] = 1e-9 * (k - place)
    return logits


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_uniform_router_gives_one_for_every_k(k: int, level: str) -> None:
    value = make("load_balance", level=level)([record(balanced(8, k), k, batch_size=1)])
    assert value.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_collapse_gives_n(n: int) -> None:
    logits = torch.zeros(12, n, dtype=torch.float64)
    logits[:, 1] = 60.0
    assert make("load_balance")([record(logits, 1)]).item() == pytest.approx(n, rel=1e-9)
    assert make("load_balance", count="argmax")([record(logits, 2)]).item() == pytest.approx(n, rel=1e-9)


def test_layers_collapsed_on_different_experts() -> None:
    """The mean over routers sees it (N); the pooled form of transformers does not (1)."""
    records = []
    for layer in range(4):
        logits = torch.zeros(12, 4, dtype=torch.float64)
        logits[:, layer] = 60.0
        records.append(record(logits, 1, name=str(layer)))
    assert make("load_balance")(records).item() == pytest.approx(4.0, rel=1e-9)
    assert make("load_balance", reduce="sum")(records).item() == pytest.approx(16.0, rel=1e-9)
    assert make("load_balance", reduce="pooled")(records).item() == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_mixtral_form_is_k_at_balance(k: int) -> None:
    value = make("load_balance", count="topk_unnormalized", reduce="pooled")([record(balanced(8, k), k)] * 3)
    assert value.item() == pytest.approx(k, abs=1e-6)


@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_parity_with_transformers(k: int, mask: str) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tuple(torch.randn(B * S, N) for _ in range(4))
    records = [record(item, k, MASKS[mask], name=str(i)) for i, item in enumerate(logits)]
    attention_mask = None if MASKS[mask] is None else MASKS[mask].long().view(B, S)
    want = load_balancing_loss_func(logits, N, k, attention_mask)
    got = make("load_balance", count="topk_unnormalized", reduce="pooled")(records)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_mixlora_equation_9_at_balance() -> None:
    """N sum F_i P_i with F from argmax and P of the top-2-masked router: near k/N = 0.25 (N = 8, k = 2)."""
    logits = 1e-3 * torch.randn(20000, 8, dtype=torch.float64)
    value = make("load_balance", count="argmax", probs="selected")([record(logits, 2, batch_size=1)])
    assert value.item() == pytest.approx(0.25, abs=0.01)


def test_importance_values() -> None:
    """0 at balance; (N - 1) when one of N experts has everything: std² / mean² = (1/N)(1 - 1/N) / (1/N²)."""
    assert make("importance")([record(balanced(4, 1), 1)]).item() == pytest.approx(0.0, abs=1e-12)
    logits = torch.zeros(12, 4, dtype=torch.float64)
    logits[:, 2] = 80.0
    assert make("importance")([record(logits, 1)]).item() == pytest.approx(3.0, rel=1e-9)


def test_router_z_value() -> None:
    """logsumexp of N equal logits c is c + ln N."""
    logits = torch.full((12, 4), 2.0, dtype=torch.float64)
    assert make("router_z")([record(logits, 1)]).item() == pytest.approx(
        (2.0 + torch.tensor(4.0).log().item()) ** 2, rel=1e-6
    )


# -- masks and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("load_balance", {}), ("load_balance", {"level": "sequence"}), ("router_z", {}), ("importance", {})],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind: str, options: dict[str, Any], side: str) -> None:
    logits = torch.randn(B, S, N, dtype=torch.float64)
    junk = 50 * torch.randn(B, 3, N, dtype=torch.float64)
    parts = (junk, logits) if side == "left" else (logits, junk)
    masks = [torch.full(part.shape[:2], part is logits) for part in parts]
    padded = record(torch.cat(parts, 1).reshape(-1, N), K, torch.cat(masks, 1).reshape(-1))
    loss = make(kind, **options)
    assert loss([padded]).item() == pytest.approx(loss([record(logits.reshape(-1, N), K)]).item(), rel=1e-12)


def test_no_real_token_at_all_is_finite() -> None:
    nothing = torch.zeros(B * S, dtype=torch.bool)
    for kind in ("load_balance", "router_z", "importance"):
        logits = torch.randn(B * S, N, requires_grad=True)
        value = make(kind)([record(logits, K, nothing)])
        value.backward()
        assert value.item() == 0.0
        assert torch.isfinite(logits.grad).all()


def test_load_balance_gradient_only_through_p() -> None:
    """With P written as p_ti = softmax(logits), dL/dlogits is that of N sum_i f_i P_i with constant f."""
    logits = torch.randn(B * S, N, dtype=torch.float64, requires_grad=True)
    item = record(logits, K)
    (got,) = torch.autograd.grad(make("load_balance")([item]), logits)
    f = torch.tensor([item.routing.selected_TN[:, i].sum().item() / (K * B * S) for i in range(N)], dtype=torch.float64)
    (want,) = torch.autograd.grad((N * f * torch.softmax(logits, -1).mean(0)).sum(), logits)
    reference.close(got, want, 1e-12, "gradient")


def test_descending_load_balance_spreads_the_tokens() -> None:
    weight = torch.zeros(8, 4, dtype=torch.float64)
    weight[0, 0] = 3.0
    weight += 0.1 * torch.randn(8, 4, dtype=torch.float64)
    weight.requires_grad_()
    x = torch.randn(64, 8, dtype=torch.float64)
    x[:, 0] = 1.0
    first = None
    for _ in range(200):
        value = make("load_balance")([record(x @ weight, 1, batch_size=1)])
        first = value.item() if first is None else first
        (grad,) = torch.autograd.grad(value, weight)
        weight.data -= 0.5 * grad
    assert first > 2.5
    assert value.item() < 1.3


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["topk", "topk_unnormalized"])
def test_counting_a_dense_router_is_refused(count: str) -> None:
    with pytest.raises(ValueError, match=r"constant for a router that selects every expert.*argmax.*importance"):
        MixtureConfig.model_validate(
            {"router": {"kind": "softmax"}, "losses": [{"kind": "load_balance", "count": count}]}
        )
    MixtureConfig.model_validate(
        {"router": {"kind": "softmax"}, "losses": [{"kind": "load_balance", "count": "argmax"}]}
    )


@pytest.mark.parametrize(
    "options", [{"coef": -1.0}, {"count": "top2"}, {"reduce": "max"}, {"level": "token"}, {"probs": "all"}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make("load_balance", **options)


def test_default_coefficients() -> None:
    kinds = {kind: LOSSES.parse({"kind": kind}).coef for kind in ("load_balance", "router_z")}
    assert kinds == {"load_balance": 0.01, "router_z": 0.001}
