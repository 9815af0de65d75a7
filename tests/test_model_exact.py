"""Whole tiny Llamas against the naive loop: every router scope, logits, loss with auxiliary losses, all gradients.

The reference model is the same Llama whose targeted linears are loops in float64. Each router reads what its block
was called with, captured by a hook on that block.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import reference
import torch
from kinds import FEW, SCOPES, Row, targets_of
from tiny import base_model, batch, gradients, randomize_adapter
from torch import Tensor, nn

from moadapt import MixtureModel, get_mixture_model

LOSSES = [
    {"kind": "load_balance", "coef": 0.3},
    {"kind": "router_z", "coef": 0.05},
    {"kind": "importance", "coef": 0.2},
]
DENSE_LOSSES = [{"kind": "load_balance", "coef": 0.3, "count": "argmax"}, *LOSSES[1:]]


class NaiveModel:
    """A base model in float64 whose linears are replaced by token loops, with the tensors of a mixture."""

    def __init__(self, base: nn.Module, row: Row, scope: Any, tensors: dict[str, Tensor]) -> None:
        self.model = copy.deepcopy(base).double().requires_grad_(False)
        self.row = row
        self.tensors = {name: value.double().clone().requires_grad_() for name, value in tensors.items()}
        self.decisions: dict[str, list[reference.Decision]] = {}
        for name in [name for name in tensors if name.endswith("_B")]:
            linear = name.rpartition(".experts.")[0]
            self._replace(linear, scope)

    def _replace(self, name: str, scope: Any) -> None:
        layer, part, _ = name.rsplit(".", 2)  # model.layers.0, self_attn | mlp, q_proj
        if scope == "linear":
            block, router = name, f"{name}.router.router"
        else:
            block = layer if scope == "block" else f"{layer}.{part}"
            router = f"{block}.mixture_router.router"
        linear = self.model.get_submodule(name)
        prefix = f"{name}.experts."
        own = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

        def forward(x: Tensor) -> Tensor:
            y_TO = reference.mixture(
                x.reshape(-1, x.shape[-1]), self.decisions[block], self.row.expert, own, linear.weight, linear.bias
            )
            return y_TO.view(*x.shape[:-1], -1)

        if block not in self.decisions:
            self.decisions[block] = []
            naive = reference.NaiveRouter(self.row.router, self.tensors[f"{router}.weight"])

            def route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                rows = hidden.reshape(-1, hidden.shape[-1])
                self.decisions[block] = [naive(x, token) for token, x in enumerate(rows)]
                assert min(naive.margin(decision) for decision in self.decisions[block]) > 1e-5, "near tie"

            self.model.get_submodule(block).register_forward_pre_hook(route, with_kwargs=True)
        linear.forward = forward

    def loss(self, inputs: dict[str, Tensor], losses: list[dict[str, Any]], rows: int) -> tuple[Tensor, Tensor]:
        output = self.model(**inputs)
        real = inputs["attention_mask"].reshape(-1).bool().tolist()
        routed = [reference.Routed(decisions, real, rows) for decisions in self.decisions.values()]
        total = output.loss
        for item in losses:
            options = {key: value for key, value in item.items() if key not in ("kind", "coef")}
            total = total + item["coef"] * getattr(reference, item["kind"])(routed, **options)
        return output.logits, total


def padded_batch() -> dict[str, Tensor]:
    inputs = batch(2, 5)
    inputs["attention_mask"][1, 3:] = 0
    inputs["labels"][1, 3:] = -100
    return inputs


def build(row: Row, scope: Any, dtype: torch.dtype, losses: list[dict[str, Any]]) -> tuple[nn.Module, MixtureModel]:
    base = base_model(dtype=dtype)
    model = get_mixture_model(copy.deepcopy(base), row.config(scope, target_modules=targets_of(scope), losses=losses))
    randomize_adapter(model)
    return base, model


def without_noise(row: Row) -> Row:
    router = {key: value for key, value in row.router.items() if key != "router_jitter_noise"}
    return Row(row.name, row.expert, router)


# float64: chains of a few thousand operations. bf16: about 30 roundings in a row of 2^-9 each, partly in softmaxes.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.15}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("scope", SCOPES, ids=json.dumps)
@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_llama_equals_the_loop(row: Row, scope: Any, dtype: torch.dtype) -> None:
    row = without_noise(row)
    losses = DENSE_LOSSES if row.router["kind"] == "softmax" else LOSSES
    base, model = build(row, scope, dtype, losses)
    inputs = padded_batch()
    naive = NaiveModel(base, row, scope, model.adapter_state_dict())
    want_logits, want_loss = naive.loss(inputs, losses, 2)
    want_loss.backward()

    model.train()
    output = model(**inputs)
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    reference.close(output.logits[real], want_logits[real], TOLERANCE[dtype], "logits")
    reference.close(output.loss, want_loss, TOLERANCE[dtype], "loss")
    got = gradients(model)
    assert got.keys() == naive.tensors.keys()
    for name, tensor in got.items():
        reference.close(tensor, naive.tensors[name].grad, TOLERANCE[dtype], name)


@pytest.mark.parametrize("scope", ["linear", "block"])
def test_bf16_llama_with_fp32_adapters(scope: str) -> None:
    """Only the direction of the gradients is asked for: a whole bf16 model rounds some thirty times in a row."""
    row = FEW[0]
    base, model = build(row, scope, torch.bfloat16, [])
    assert all(parameter.dtype == torch.float32 for _, parameter in model.adapter_parameters())
    inputs = padded_batch()
    naive = NaiveModel(base, row, scope, model.adapter_state_dict())
    want_logits, want_loss = naive.loss(inputs, [], 2)
    want_loss.backward()
    output = model.train()(**inputs)
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    reference.close(output.logits[real], want_logits[real], TOLERANCE[torch.bfloat16], "logits")
    for name, tensor in gradients(model).items():
        want = naive.tensors[name].grad.flatten()
        cosine = nn.functional.cosine_similarity(tensor.double().flatten(), want, dim=0)
        assert cosine > 0.9, f"{name}: {cosine}"


@pytest.mark.parametrize("scope", SCOPES, ids=json.dumps)
def test_number_of_routers(scope: Any) -> None:
    """7 linears, 2 blocks or 1 layer per transformer layer; 2 layers."""
    _, model = build(FEW[3], scope, torch.float32, [])
    expected = {"linear": 14, "block": 2, "ffn": 2, "attention": 2}
    number = 4 if isinstance(scope, list) else expected[scope]
    assert len(model.injection.routers) == number
    routers = [name for name, _ in model.adapter_parameters() if model.parameter_role(name) == "router"]
    assert len(routers) == number
    assert all(".router." in name or name.endswith("router.weight") for name in routers)
