"""LoRA banks: initialisation, scaling, sizes, options that are refused."""

from __future__ import annotations

import math

import pytest
import reference
import torch

from moadapt.errors import ConfigError
from moadapt.experts import LoraBank, LoraExpertConfig
from moadapt.routing import Routing


def bank(i: int = 64, o: int = 48, n: int = 4, **options: object) -> LoraBank:
    return LoraBank(LoraExpertConfig(**options), i, o, n)


def all_selected(weights: torch.Tensor) -> Routing:
    return Routing(weights, torch.ones_like(weights, dtype=torch.bool), weights, weights)


def test_kaiming_initialisation() -> None:
    """A is uniform in +-1/sqrt(I), std 1/sqrt(3 I); B is zero. 128k draws: the std is known to 0.5 %."""
    made = bank(i=1000, n=8, r=16)
    assert made.lora_A.abs().max() <= 1000**-0.5
    assert made.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 1000), rel=0.02)
    assert made.lora_A.abs().max() >= 0.99 * 1000**-0.5
    assert made.lora_B.abs().max() == 0
    assert not torch.equal(made.lora_A[0], made.lora_A[1])


@pytest.mark.parametrize(("options", "std"), [({"r": 16}, 1 / 16), ({"r": 16, "init_std": 0.02}, 0.02)])
def test_gaussian_initialisation(options: dict[str, object], std: float) -> None:
    made = bank(i=1000, n=8, init_lora_weights="gaussian", **options)
    assert made.lora_A.std().item() == pytest.approx(std, rel=0.02)
    assert made.lora_A.abs().max() > 3 * std, "normal, not uniform"
    assert made.lora_B.abs().max() == 0


@pytest.mark.parametrize(("options", "scale"), [({}, 6 / 4), ({"use_rslora": True}, 6 / 2)])
@pytest.mark.parametrize("shared", [False, True])
def test_delta_weight_is_what_forward_adds(options: dict[str, object], scale: float, shared: bool) -> None:
    made = bank(r=4, lora_alpha=6.0, shared_down=shared, **options).double()
    torch.nn.init.normal_(made.lora_B)
    x = torch.randn(5, 64, dtype=torch.float64)
    for expert in range(4):
        gates = torch.zeros(5, 4, dtype=torch.float64)
        gates[:, expert] = 1.0
        added = made(x, all_selected(gates), torch.zeros(5, 48, dtype=torch.float64))
        reference.close(added, x @ made.delta_weight(expert).T, 1e-12, "forward")
        naive = scale * made.lora_B[expert].T @ made.lora_A[0 if shared else expert]
        reference.close(made.delta_weight(expert), naive, 1e-14, "scaled product")


@pytest.mark.parametrize(
    ("shared", "total", "active"),
    [(False, 4 * 3 * (64 + 48), 2 * 3 * (64 + 48)), (True, 3 * 64 + 4 * 3 * 48, 3 * 64 + 2 * 3 * 48)],
)
def test_parameter_counts(shared: bool, total: int, active: int) -> None:
    made = bank(r=3, shared_down=shared)
    assert made.num_params() == total
    assert made.num_active_params(2) == active


def test_dropout_only_in_training_and_one_mask_for_all_experts() -> None:
    made = bank(r=3, lora_dropout=0.5)
    torch.nn.init.normal_(made.lora_B)
    x, base = torch.randn(6, 64), torch.zeros(6, 48)
    weights = torch.full((6, 4), 0.25)
    made.eval()
    assert torch.equal(made(x, all_selected(weights), base.clone()), made(x, all_selected(weights), base.clone()))
    made.train()
    assert not torch.equal(made(x, all_selected(weights), base.clone()), made(x, all_selected(weights), base.clone()))
    made.lora_A.data[:] = made.lora_A.data[0]
    made.lora_B.data[:] = made.lora_B.data[0]
    torch.manual_seed(3)
    mixed = made(x, all_selected(weights), base.clone())
    torch.manual_seed(3)
    one_hot = torch.eye(4)[[0] * 6]
    reference.close(mixed, made(x, all_selected(one_hot), base.clone()), 1e-5, "equal experts, one mask")


def test_std_without_gaussian_is_refused() -> None:
    with pytest.raises(ValueError, match="init_std has no effect"):
        LoraExpertConfig(init_std=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"r": -1},
        {"r": 1.5},
        {"r": True},
        {"r": "8"},
        {"lora_dropout": 1.0},
        {"lora_alpha": 0.0},
        {"init_lora_weights": False},
        {"init_lora_weights": "pissa"},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LoraExpertConfig(**options)


def test_rows_must_match() -> None:
    with pytest.raises(ConfigError, match="5 tokens for 4 experts"):
        bank()(torch.randn(5, 64), all_selected(torch.ones(3, 4)), torch.zeros(5, 48))
