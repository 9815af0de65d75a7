"""MALoRA's published numbers and identities (2410.22782): sizes, counts, initialisation, beta, degenerate cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from moadapt import get_mixture_model
from moadapt.errors import ConfigError
from moadapt.experts import LoraBank, LoraExpertConfig, MaloraBank, MaloraExpertConfig, malora_sizes
from moadapt.routing import Routing

ALL_BUT_O = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def bank(
    i: int = 256, o: int = 48, n: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> MaloraBank:
    torch.manual_seed(seed)
    return MaloraBank(MaloraExpertConfig(lora_dropout=0.0, **options), i, o, n, dtype=dtype)


def all_selected(weights: torch.Tensor) -> Routing:
    return Routing(weights, torch.ones_like(weights, dtype=torch.bool), weights, weights)


# -- parameter counts on LLaMA-2-7B's shapes ----------------------------------------------------------------------

MOLORA = {"num_experts": 8, "expert": {"kind": "lora", "r": 8}, "router": {"kind": "top_k"}}


def malora(r: int, d: int) -> dict[str, Any]:
    return {"num_experts": 8, "expert": {"kind": "malora", "r": r, "shared_r": d}, "router": {"kind": "top_k"}}


LORA_64 = {"preset": "lora", "num_experts": 1, "expert": {"kind": "lora", "r": 64}}
COUNTS = [
    # name, options, experts (M), routers (M): the shares in tables 1 and 3 of the paper
    ("lora_r64", LORA_64 | {"target_modules": ALL_BUT_O}, 143.13, 0.0),
    ("lora_r64_with_o", LORA_64 | {"target_modules": "all-linear"}, 159.91, 0.0),
    ("molora_8x8", MOLORA | {"target_modules": ALL_BUT_O}, 143.13, 8.06),
    ("malora_12_32", malora(12, 32) | {"target_modules": ALL_BUT_O}, 150.80, 8.06),
    ("malora_8_22", malora(8, 22) | {"target_modules": ALL_BUT_O}, 101.08, 8.06),
    ("malora_8_64", malora(8, 64) | {"target_modules": ALL_BUT_O}, 143.92, 8.06),
    ("preset_molora_topk", {"preset": "molora_topk"}, 143.13, 8.06),
    ("preset_malora", {"preset": "malora"}, 150.80, 8.06),
    ("preset_malora_small", {"preset": "malora_small"}, 101.08, 8.06),
]


@pytest.mark.parametrize(("options", "experts", "routers"), [row[1:] for row in COUNTS], ids=[row[0] for row in COUNTS])
def test_published_parameter_counts(options: dict[str, Any], experts: float, routers: float) -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mixture = get_mixture_model(model, options)
    counts = {"router": 0, "expert": 0}
    for name, parameter in mixture.adapter_parameters():
        if parameter.requires_grad:
            counts["router" if mixture.parameter_role(name) == "router" else "expert"] += parameter.numel()
    # The table prints hundredths of a million.
    assert counts["expert"] / 1e6 == pytest.approx(experts, abs=0.0051)
    assert counts["router"] / 1e6 == pytest.approx(routers, abs=0.0051)
    assert mixture.get_nb_trainable_parameters()[0] == counts["router"] + counts["expert"]
    assert sum(layer.experts.num_params() for layer in mixture.injection.layers.values()) == counts["expert"]


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "d", "r"), [(0.25, 16, 14), (0.5, 32, 12), (0.75, 48, 10), (1.0, 64, 8)])
def test_sizes_rule_gives_the_ablation_grid(share: float, d: int, r: int) -> None:
    assert malora_sizes(8, 8, share) == {"r": r, "shared_r": d}


@pytest.mark.parametrize(("molora_r", "r", "d"), [(4, 6, 16), (8, 12, 32), (16, 24, 64), (32, 48, 128)])
def test_sizes_rule_gives_table_11(molora_r: int, r: int, d: int) -> None:
    made = bank(i=160, n=8, molora_r=molora_r)
    assert (made.r, made.shared_r) == (r, d)
    assert made.malora_P.shape == (8, r, d)
    assert made.scaling == pytest.approx(24 / r)


def test_sizes_rule_refuses_a_rank_above_the_shared_one() -> None:
    with pytest.raises(ConfigError, match="raise share_ratio or the number of experts"):
        malora_sizes(8, 2, 0.25)
    with pytest.raises(ConfigError, match="share_ratio"):
        malora_sizes(8, 8, 0.0)
    with pytest.raises(ConfigError):
        bank(n=1, molora_r=8)


def test_rank_must_not_exceed_the_shared_rank() -> None:
    with pytest.raises(ValueError, match=r"r \(33\) must not exceed shared_r \(32\)"):
        MaloraExpertConfig(r=33)
    MaloraExpertConfig(r=32)
    # Per layer it is known only where the bank is made.
    listed = MaloraExpertConfig(r=[4, 12], shared_r=8)
    with pytest.raises(ConfigError, match="must not exceed"):
        MaloraBank(listed.model_copy(update={"r": 12}), 64, 8, 2)


def test_shared_rank_must_not_exceed_the_input() -> None:
    with pytest.raises(ConfigError, match="exceeds the 16 input features"):
        bank(i=16, r=4, shared_r=17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"molora_r": 8, "r": 4}, "either molora_r"),
        ({"molora_r": 8, "r": 12}, "either molora_r"),
        ({"molora_r": 8, "shared_r": 16}, "either molora_r"),
        ({"share_ratio": 0.25}, "share_ratio has no effect"),
        ({"share_ratio": 0.5}, "share_ratio has no effect"),
        ({"beta": 0.0}, "beta"),
        ({"molora_r": 0}, "molora_r"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaloraExpertConfig(**options)


def test_active_and_total_parameters() -> None:
    made = bank(i=64, o=48, n=4, r=3, shared_r=5)
    assert made.num_params() == 5 * 64 + 4 * 3 * 5 + 4 * 3 * 48
    assert made.num_active_params(2) == 5 * 64 + 2 * (3 * 5 + 3 * 48)


# -- initialisation -----------------------------------------------------------------------------------------------


def products(made: MaloraBank) -> torch.Tensor:
    """P_t S_A for every expert: (N, R, I)."""
    return made.malora_P @ made.shared_A


def test_every_expert_starts_as_the_zero_map() -> None:
    made = bank()
    assert made.malora_B.abs().max() == 0
    assert all(made.delta_weight(expert).abs().max() == 0 for expert in range(4))


@pytest.mark.parametrize("beta", [1.0, 1.25, 3.5])
def test_initial_variance_is_kaimings(beta: float) -> None:
    """std(P_t S_A) = 1/sqrt(3 I) for every expert. 12 x 4096 dependent draws: within 1.5 %."""
    made = bank(i=4096, n=3, beta=beta, dtype=torch.float32)
    for product in products(made):
        assert product.std().item() == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.015)
        assert product.mean().abs().item() < 2e-4


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_shared_rows_are_orthogonal_with_length_beta(beta: float) -> None:
    shared = bank(beta=beta).shared_A.detach()
    reference.close(shared @ shared.T, beta**2 * torch.eye(32, dtype=torch.float64), 1e-12, "S_A S_A^T")


def test_product_does_not_depend_on_beta() -> None:
    reference.close(products(bank(beta=5.0)), products(bank(beta=1.0)), 1e-12, "P S_A")


@pytest.mark.parametrize("beta", [1.0, 1.25])
def test_first_expert_reproduces_its_draw(beta: float) -> None:
    """P_0 S_A = K_0[:r]: the draw is recreated by its seed."""
    made = bank(beta=beta, seed=11)
    torch.manual_seed(11)
    k_NCI = torch.empty(4, 32, 256, dtype=torch.float64).uniform_(-1 / 16, 1 / 16)
    reference.close(products(made)[0], k_NCI[0, :12], 1e-12, "P_0 S_A")
    # The others are rotated into the span of V_0: same Gram matrix of P_t, other rows.
    for expert in range(1, 4):
        gram = made.malora_P[expert] @ made.malora_P[expert].T * beta**2
        draw = k_NCI[expert, :12]
        reference.close(gram, draw @ draw.T, 1e-12, "P_t P_t^T")
        assert (products(made)[expert] - draw).abs().max() > 0.01


def test_experts_start_differently() -> None:
    product = products(bank())
    assert all((product[0] - product[expert]).abs().max() > 0.01 for expert in range(1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_decomposed_in_fp32(dtype: torch.dtype) -> None:
    made = bank(dtype=dtype)
    shared = made.shared_A.detach().float()
    assert made.shared_A.dtype == dtype
    reference.close(shared @ shared.T, torch.eye(32), 5e-3, "S_A S_A^T")


# -- beta and gradients -------------------------------------------------------------------------------------------


def gradient_norms(beta: float, updated: bool) -> dict[str, float]:
    made = bank(beta=beta, seed=5)
    if updated:
        torch.manual_seed(6)
        nn.init.normal_(made.malora_B, std=0.1)
    torch.manual_seed(7)
    x, weights = torch.randn(20, 256, dtype=torch.float64), torch.rand(20, 4, dtype=torch.float64)
    made(x, all_selected(weights), torch.zeros(20, 48, dtype=torch.float64)).square().mul(0.5).add(
        1.0
    ).log().sum().backward()
    return {name: parameter.grad.norm().item() for name, parameter in made.named_parameters()}


def test_only_b_moves_in_the_first_step() -> None:
    made = bank()
    x, weights = torch.randn(9, 256, dtype=torch.float64), torch.rand(9, 4, dtype=torch.float64)
    made(x, all_selected(weights), torch.zeros(9, 48, dtype=torch.float64)).sum().backward()
    assert made.shared_A.grad.abs().max() == 0
    assert made.malora_P.grad.abs().max() == 0
    assert made.malora_B.grad.abs().min() > 0


@pytest.mark.parametrize("beta", [0.5, 2.0, 4.0])
def test_gradients_follow_beta_after_the_first_step(beta: float) -> None:
    """The function is the same, so dL/dS_A ~ 1/beta and dL/dP ~ beta, exactly (appendix A.3)."""
    one, scaled = gradient_norms(1.0, True), gradient_norms(beta, True)
    assert scaled["shared_A"] * beta == pytest.approx(one["shared_A"], rel=1e-9)
    assert scaled["malora_P"] / beta == pytest.approx(one["malora_P"], rel=1e-9)
    assert scaled["malora_B"] == pytest.approx(one["malora_B"], rel=1e-9)
    assert one["shared_A"] > 0


# -- degenerate cases ---------------------------------------------------------------------------------------------


def test_one_expert_is_lora_with_a_factored_a() -> None:
    made = bank(n=1, r=6, shared_r=10, lora_alpha=12.0)
    nn.init.normal_(made.malora_B)
    lora = LoraBank(LoraExpertConfig(r=6, lora_alpha=12.0), 256, 48, 1, dtype=torch.float64)
    lora.lora_A.data[0] = made.malora_P[0] @ made.shared_A
    lora.lora_B.data[0] = made.malora_B[0]
    x, gates, base = torch.randn(9, 256).double(), torch.ones(9, 1).double(), torch.randn(9, 48).double()
    reference.close(made(x, all_selected(gates), base.clone()), lora(x, all_selected(gates), base.clone()), 1e-12, "y")
    reference.close(made.delta_weight(0), lora.delta_weight(0), 1e-12, "delta")


def test_identity_p_with_the_whole_subspace_is_molora_with_one_a() -> None:
    """P_t = I with d = r: every expert is B_t S_A, which is MoLoRA whose A's are equal."""
    made = bank(r=6, shared_r=6, lora_alpha=12.0)
    nn.init.normal_(made.malora_B)
    made.malora_P.data[:] = torch.eye(6)
    lora = LoraBank(LoraExpertConfig(r=6, lora_alpha=12.0), 256, 48, 4, dtype=torch.float64)
    lora.lora_A.data[:] = made.shared_A.data
    lora.lora_B.data[:] = made.malora_B.data
    x, gates, base = torch.randn(9, 256).double(), torch.rand(9, 4).double(), torch.randn(9, 48).double()
    reference.close(made(x, all_selected(gates), base.clone()), lora(x, all_selected(gates), base.clone()), 1e-12, "y")


def test_full_sharing_without_reduction_holds_any_molora() -> None:
    """d = N r: with S_A the stacked A's and P_t picking its own rows, MALoRA is un-shared MoLoRA."""
    lora = LoraBank(LoraExpertConfig(r=3, lora_alpha=6.0), 64, 8, 4, dtype=torch.float64)
    nn.init.normal_(lora.lora_B)
    made = MaloraBank(
        MaloraExpertConfig(r=3, shared_r=12, lora_alpha=6.0, lora_dropout=0.0), 64, 8, 4, dtype=torch.float64
    )
    made.shared_A.data[:] = lora.lora_A.data.reshape(12, 64)
    made.malora_P.data.zero_()
    for expert in range(4):
        made.malora_P.data[expert, :, 3 * expert : 3 * expert + 3] = torch.eye(3)
    made.malora_B.data[:] = lora.lora_B.data
    x, gates, base = torch.randn(9, 64).double(), torch.rand(9, 4).double(), torch.randn(9, 8).double()
    reference.close(made(x, all_selected(gates), base.clone()), lora(x, all_selected(gates), base.clone()), 1e-12, "y")
