"""The bank against loops over tokens, experts and neurons in float64: outputs, every gradient, and what stays zero."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from conversion_helpers import FAMILIES, Family, NaiveNeurons, mixture_options, neuron_lists
from torch import Tensor, nn

from moadapt import get_mixture_model
from moadapt.experts.ffn_partition import PartitionBank
from moadapt.routing import Routing

TOKENS, ROUTED = 5, 3


@dataclass
class Case:
    """A bank with random weights and the same block as loops."""

    row: Family
    bank: PartitionBank
    naive: NaiveNeurons
    lists: list[list[int]]
    num_shared: int


def build(family: str, shared: int = 1, dtype: torch.dtype = torch.float64, **expert: Any) -> Case:
    """20 neurons, or 21 of the families whose width is 64 by default."""
    row = FAMILIES[family]
    base = row.model(dtype, **{"gpt2": {"n_inner": 21}, "gpt_neox": {"intermediate_size": 21}}.get(family, {}))
    naive = NaiveNeurons.of(base, row.owners[0], row)
    expert = {"split": {"kind": "random", "seed": 2}, "num_shared_experts": shared, "padding": True, **expert}
    model = get_mixture_model(base, mixture_options(ROUTED, expert=expert))
    bank = model.injection.layers[row.names()[0]].experts
    with torch.no_grad():
        for name, parameter in bank.named_parameters():
            if name.startswith("lora_"):
                parameter.normal_(std=0.2)
    return Case(row, bank, naive, neuron_lists(bank.neuron_indices), shared)


def gates(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(weights, selected): between none and all experts for a token; zero where not selected."""
    selected_TN = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).bool()
    weights_TN = torch.rand(TOKENS, ROUTED, dtype=dtype) + 0.3
    return weights_TN.masked_fill(~selected_TN, 0.0).requires_grad_(), selected_TN


def routing_of(weights_TN: Tensor, selected_TN: Tensor, straight_through: bool = False) -> Routing:
    zeros = torch.zeros_like(weights_TN)
    return Routing(weights_TN, selected_TN, zeros, zeros, straight_through=straight_through)


def all_gates(case: Case, weights_TN: Tensor) -> Tensor:
    """Gates of shared and routed experts: (T, E)."""
    return torch.cat([torch.ones(TOKENS, case.num_shared, dtype=torch.float64), weights_TN.double()], dim=1)


def stacked_gradient(case: Case, name: str) -> Tensor:
    """A gradient of the naive rows, in the bank's order of rows, zero at padding."""
    bank = case.bank

    def rows(gradient: Tensor) -> Tensor:
        width = bank.out_proj.shape[1]
        out = torch.zeros(len(case.lists), width, *gradient.shape[1:], dtype=torch.float64)
        for e, neurons in enumerate(case.lists):
            for place, f in enumerate(neurons):
                out[e, place] = gradient[f]
        return out

    def of(field: str) -> Tensor:
        gradient = getattr(case.naive, field).grad
        assert gradient is not None
        return rows(gradient)

    if name == "out_proj":
        return of("down_FD")
    kind = "FD" if name == "in_proj" else "bias_F"
    fields = [f"{part}_{kind}" for part in (("gate", "up") if bank.gated else ("up",))]
    return torch.cat([of(field) for field in fields], dim=1)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "gemma", "phi3", "gpt2", "gpt_neox", "opt", "t5_gated"])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("straight_through", [False, True])
def test_trainable_experts(family: str, shared: int, straight_through: bool) -> None:
    case = build(family, shared, trainable=True)
    x_TD = torch.randn(TOKENS, case.bank.in_features, dtype=torch.float64)
    x, x_naive = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    weights, selected = gates()
    weights_naive = weights.detach().clone().requires_grad_()
    y_TD = case.bank(x, routing_of(weights, selected, straight_through))
    want_TD = case.naive.mixture(x_naive, all_gates(case, weights_naive), case.lists)
    reference.close(y_TD, want_TD, 1e-12, "output")
    probe = torch.randn_like(y_TD)
    (y_TD * probe).sum().backward()
    (want_TD * probe).sum().backward()
    reference.close(x.grad, x_naive.grad, 1e-11, "x")
    # Without straight-through an expert that is off is not there, whatever its gate.
    gate_grad = weights_naive.grad if straight_through else weights_naive.grad.masked_fill(~selected, 0.0)
    reference.close(weights.grad, gate_grad, 1e-11, "gates")
    for name in ("in_proj", "out_proj", "in_bias"):
        parameter = getattr(case.bank, name)
        if parameter is not None:
            reference.close(parameter.grad, stacked_gradient(case, name), 1e-11, name)
    if case.bank.out_bias is not None:
        reference.close(case.bank.out_bias.grad, case.naive.down_bias_D.grad, 1e-11, "out_bias")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_experts_get_no_gradient(family: str) -> None:
    case = build(family, 1)
    assert case.bank.adapter_parameters() == []
    x_TD = torch.randn(TOKENS, case.bank.in_features, dtype=torch.float64)
    x, x_naive = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    weights, selected = gates()
    weights_naive = weights.detach().clone().requires_grad_()
    y_TD = case.bank(x, routing_of(weights, selected))
    y_TD.square().sum().backward()
    case.naive.mixture(x_naive, all_gates(case, weights_naive), case.lists).square().sum().backward()
    reference.close(x.grad, x_naive.grad, 1e-11, "x")
    reference.close(weights.grad, weights_naive.grad.masked_fill(~selected, 0.0), 1e-11, "gates")
    assert all(parameter.grad is None for parameter in case.bank.parameters())


class NaiveLora:
    """W_e + s B_e A_e, entry by entry, for the rows of one neuron."""

    def __init__(self, case: Case, scaling: float, r: int) -> None:
        self.case, self.scaling, self.r = case, scaling, r
        self.tensors = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in case.bank.named_parameters()
            if name.startswith("lora_")
        }

    def __call__(self, e: int, place: int) -> dict[str, Tensor]:
        bank, t = self.case.bank, self.tensors
        width = bank.out_proj.shape[1]

        def combine(b_R: Tensor, a_RD: Tensor) -> Tensor:
            return self.scaling * sum(b_R[k] * a_RD[k] for k in range(self.r))

        made = {}
        for number, part in enumerate(("gate_FD", "up_FD") if bank.gated else ("up_FD",)):
            a_RD = t["lora_in_A"][e, number * self.r : (number + 1) * self.r]
            made[part] = combine(t["lora_in_B"][e, number * width + place], a_RD)
        made["down_FD"] = combine(t["lora_out_A"][e, :, place], t["lora_out_B"][e])
        return made


@pytest.mark.parametrize("family", ["llama_bias", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_frozen_experts(family: str, rslora: bool) -> None:
    r, alpha = 3, 5.0
    case = build(family, 1, lora={"r": r, "lora_alpha": alpha, "use_rslora": rslora})
    lora = NaiveLora(case, alpha / r**0.5 if rslora else alpha / r, r)
    assert {name for name, _ in case.bank.adapter_parameters()} == set(lora.tensors)
    x_TD = torch.randn(TOKENS, case.bank.in_features, dtype=torch.float64)
    x, x_naive = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    weights, selected = gates()
    weights_naive = weights.detach().clone().requires_grad_()
    y_TD = case.bank(x, routing_of(weights, selected, straight_through=True))
    want_TD = case.naive.mixture(x_naive, all_gates(case, weights_naive), case.lists, lora)
    reference.close(y_TD, want_TD, 1e-12, "output")
    with torch.no_grad():
        reference.close(case.bank(x, routing_of(weights, selected)), want_TD, 1e-12, "output without gradients")
    probe = torch.randn_like(y_TD)
    (y_TD * probe).sum().backward()
    (want_TD * probe).sum().backward()
    reference.close(x.grad, x_naive.grad, 1e-11, "x")
    reference.close(weights.grad, weights_naive.grad, 1e-11, "gates")
    for name, tensor in lora.tensors.items():
        reference.close(case.bank.get_parameter(name).grad, tensor.grad, 1e-11, name)
    assert case.bank.in_proj.grad is None
    assert case.bank.out_proj.grad is None
    dense_TD = case.naive.mixture(x_naive, torch.ones(TOKENS, len(case.lists)).double(), case.lists)
    reference.close(case.bank.dense(x), dense_TD, 1e-12, "the dense block is without LoRA")


def test_lora_starts_as_the_experts_without_it() -> None:
    torch.manual_seed(0)
    row, expert = FAMILIES["llama"], {"num_shared_experts": 1}
    weights, selected = gates(dtype=torch.float32)
    x_TD = torch.randn(TOKENS, 16)
    outputs = []
    for lora in (None, {"r": 4}):
        bank = get_mixture_model(row.model(), mixture_options(ROUTED, expert={**expert, "lora": lora}))
        outputs.append(bank.injection.layers[row.names()[0]].experts(x_TD, routing_of(weights, selected)))
    assert torch.equal(*outputs)


def weight_changes() -> list[Any]:
    def in_place(p: Tensor) -> None:
        with torch.no_grad():
            p.mul_(1.5)

    def through_data(p: Tensor) -> None:  # as some optimizers write, which leaves no mark on the parameter
        p.data.mul_(1.5)

    def another_tensor(p: Tensor) -> None:
        p.data = p.data * 1.5

    return [in_place, through_data, another_tensor]


@pytest.mark.parametrize("change", weight_changes(), ids=lambda f: f.__name__)
def test_evaluation_after_a_training_step_sees_the_new_lora(change: Any) -> None:
    """Between two evaluations LoRA is folded once; a step in between must not be missed."""
    case = build("llama", 1, lora={"r": 2})
    weights, selected = gates()
    x_TD, routing = torch.randn(TOKENS, 16, dtype=torch.float64), routing_of(weights.detach(), selected)
    with torch.no_grad():
        before = case.bank(x_TD, routing)
        assert torch.equal(case.bank(x_TD, routing), before)
    case.bank(x_TD, routing).sum().backward()
    change(case.bank.lora_in_B)
    with torch.no_grad():
        after = case.bank(x_TD, routing)
    want = case.bank(x_TD, routing)
    reference.close(after, want, 1e-12, "after the step")
    assert (after - before).abs().max() > 1e-3


def test_inference_mode() -> None:
    """LoRA that was folded in inference mode is used outside of it, copied, and trained after it."""
    case = build("llama", 1, lora={"r": 2})
    weights, selected = gates()
    x_TD, routing = torch.randn(TOKENS, 16, dtype=torch.float64), routing_of(weights.detach(), selected)
    with torch.inference_mode():
        want = case.bank(x_TD, routing)
        made_inside = build("llama", 1, lora={"r": 2}).bank
        assert torch.equal(made_inside(x_TD, routing), made_inside(x_TD, routing))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(case.bank)(x_TD, routing), want)
    case.bank(x_TD, routing).sum().backward()
    assert case.bank.lora_in_B.grad.any()


@pytest.mark.parametrize("family", ["llama_bias", "phi3", "gpt2", "gpt_neox", "opt"])
def test_rows_that_fill_up_a_width_stay_zero_under_training(family: str) -> None:
    """AdamW with weight decay, straight-through gates; also that all else moves."""
    case = build(family, 1, trainable=True)
    bank, parts = case.bank, 2 if case.bank.gated else 1
    width = bank.out_proj.shape[1]
    real_EM = torch.nn.functional.pad(bank.neuron_indices, (0, width - bank.neuron_indices.shape[1]), value=-1) >= 0
    assert not real_EM.all()
    real_EP = real_EM.repeat(1, parts)
    before = {name: parameter.detach().clone() for name, parameter in bank.named_parameters()}
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(4):
        weights, selected = gates()
        y_TD = bank(torch.randn(TOKENS, bank.in_features, dtype=torch.float64), routing_of(weights, selected, True))
        optimizer.zero_grad()
        y_TD.square().sum().backward()
        optimizer.step()
    for name, real in (("out_proj", real_EM), ("in_proj", real_EP), ("in_bias", real_EP)):
        parameter = getattr(bank, name)
        if parameter is None:
            continue
        assert not parameter[~real].any(), name
        assert (parameter[real] != before[name][real]).all(), name


def test_rows_that_fill_up_a_width_stay_without_lora() -> None:
    case = build("gpt2", 1, lora={"r": 2})
    bank = case.bank
    width = bank.out_proj.shape[1]
    real_EM = torch.nn.functional.pad(bank.neuron_indices, (0, width - bank.neuron_indices.shape[1]), value=-1) >= 0
    assert not real_EM.all()
    folded = bank.stacked()
    assert not folded.out_NMD[~real_EM].any()
    assert not folded.in_NPD[~real_EM].any()
    assert (folded.out_NMD[real_EM] != bank.out_proj[real_EM]).any(-1).all()
    weights, selected = gates()
    bank(torch.randn(TOKENS, 16, dtype=torch.float64), routing_of(weights, selected)).sum().backward()
    assert not bank.lora_in_B.grad[~real_EM].any()
    assert not bank.lora_out_A.grad.transpose(1, 2)[~real_EM].any()


EXPERTS: dict[str, dict[str, Any]] = {"frozen": {}, "trained": {"trainable": True}, "lora": {"lora": {"r": 2}}}


@pytest.mark.parametrize("shape", EXPERTS)
def test_numbers_of_parameters(shape: str) -> None:
    """21 neurons of 3 x 16 in 4 experts: padding does not count."""
    base = FAMILIES["llama"].model(intermediate_size=21)
    dense = sum(p.numel() for p in base.model.layers[0].mlp.parameters())
    expert = {"num_shared_experts": 1, "padding": True, **EXPERTS[shape]}
    bank = get_mixture_model(base, mixture_options(3, expert=expert)).injection.layers["model.layers.0.mlp"].experts
    assert dense == 21 * 3 * 16
    lora = 4 * (2 * 2 * 16 + 2 * 8 * 2 + 2 * 8 + 2 * 16) if shape == "lora" else 0
    assert bank.num_params() == dense + lora
    assert bank.num_active_params(1) == (21 * 2 // 4) * 3 * 16 + lora // 2
    assert (
        sum(p.numel() for _, p in bank.adapter_parameters())
        == {
            "frozen": 0,
            "trained": 4 * 3 * 8 * 16,
            "lora": lora,
        }[shape]
    )


@pytest.mark.parametrize("expert", EXPERTS.values(), ids=EXPERTS)
def test_half_precision_and_autocast(expert: dict[str, Any]) -> None:
    """A bf16 block with fp32 trained tensors, as the trainer keeps them; and fp32 under autocast."""
    case = build("gpt2", 1, torch.bfloat16, **expert)
    for _, parameter in case.bank.adapter_parameters():
        parameter.data = parameter.data.float()
    weights, selected = gates(dtype=torch.float32)
    x_TD = torch.randn(TOKENS, 16).bfloat16()
    want_TD = case.naive.mixture(
        x_TD.double(), all_gates(case, weights), case.lists, NaiveLora(case, 8.0, 2) if "lora" in expert else None
    )
    for bank, x, context in ((case.bank, x_TD, False), (case.bank.float(), x_TD.float(), True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=context):
            y_TD = bank(x, routing_of(weights, selected))
            dense_TD = bank.dense(x)
        if not context:
            assert y_TD.dtype == torch.bfloat16
        reference.close(y_TD, want_TD, 0.03, "output")
        y_TD.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for _, p in bank.adapter_parameters())
        assert dense_TD.isfinite().all()


def test_a_token_without_experts_gets_the_shared_ones_and_the_bias() -> None:
    case = build("gpt2", 1)
    weights = torch.zeros(TOKENS, ROUTED, dtype=torch.float64)
    x_TD = torch.randn(TOKENS, 16, dtype=torch.float64)
    got_TD = case.bank(x_TD, routing_of(weights, weights.bool()))
    reference.close(got_TD, case.naive.mixture(x_TD, all_gates(case, weights), case.lists), 1e-12, "output")
    none = build("llama", 0)
    assert not none.bank(x_TD, routing_of(weights, weights.bool())).any()


def test_the_teacher_moves_with_the_model() -> None:
    """Original weights that are kept for distillation follow to another device and dtype."""
    case = build("gpt2", 1, trainable=True)
    bank = case.bank
    bank.keep_original()
    x_TD = torch.randn(TOKENS, 16, dtype=torch.float64)
    want_TD = bank.dense(x_TD)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(1.0)
    assert torch.equal(bank.dense(x_TD), want_TD)
    assert not any("original" in name for name in bank.state_dict())
    bank.to("meta")
    assert bank.dense(x_TD.to("meta")).is_meta
    assert isinstance(bank, nn.Module)
