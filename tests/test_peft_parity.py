"""One expert with gate 1 is peft's LoRA: outputs, gradients, initialisation, merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from tiny import base_model, batch, gradients
from torch import Tensor, nn

from moadapt import MixtureModel, get_mixture_model

peft = pytest.importorskip("peft")

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "gaussian": {"r": 4, "lora_alpha": 16, "init_lora_weights": "gaussian"},
}
# Two orders of the same sums in a two-layer model: some tens of unit roundoffs (fp32: 6e-8), more in gradients.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def pair(family: str, options: dict[str, Any], dtype: torch.dtype, router: str = "softmax") -> tuple[Any, MixtureModel]:
    """peft's model and ours on equal bases, with equal random A and B."""
    base = base_model(family, dtype)
    lora_config = peft.LoraConfig(
        target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2", lora_dropout=0.0, **options
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), lora_config)
    router_options = {"kind": router} | ({"num_experts_per_tok": 1} if router == "top_k" else {})
    ours = get_mixture_model(
        base,
        {
            "num_experts": 1,
            "target_modules": TARGETS[family],
            "expert": {"kind": "lora", **options},
            "router": router_options,
        },
    )
    torch.manual_seed(4)
    for name, layer in ours.injection.layers.items():
        down, up = peft_tensors(theirs, name)
        for tensor in (down, up):
            tensor.data.normal_(std=0.3)
        layer.experts.lora_A.data[0] = down.data
        layer.experts.lora_B.data[0] = up.data.T
    return theirs, ours


def peft_tensors(model: Any, name: str) -> tuple[Tensor, Tensor]:
    layer = model.base_model.model.get_submodule(name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("router", ["softmax", "top_k"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", TARGETS)
def test_outputs_and_gradients(family: str, options: dict[str, Any], dtype: torch.dtype, router: str) -> None:
    theirs, ours = pair(family, options, dtype, router)
    inputs = batch(family=family)
    outputs = [model.train()(**inputs) for model in (theirs, ours)]
    reference.close(outputs[1].logits, outputs[0].logits, TOLERANCE[dtype], "logits")
    for output in outputs:
        output.loss.backward()
    got = gradients(ours)
    for name in ours.injection.layers:
        down, up = peft_tensors(theirs, name)
        assert down.dtype == ours.injection.layers[name].experts.lora_A.dtype
        reference.close(got[f"{name}.experts.lora_A"][0], down.grad, 10 * TOLERANCE[dtype], f"{name} A")
        reference.close(got[f"{name}.experts.lora_B"][0].T, up.grad, 10 * TOLERANCE[dtype], f"{name} B")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.mlp.up_proj"),
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wi"),
    ],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_bf16_layer(family: str, name: str, options: dict[str, Any]) -> None:
    """peft multiplies in the adapter's fp32, we in the base's bf16: two roundings of one number, each some 2^-9."""
    theirs, ours = pair(family, options, torch.bfloat16)
    their_layer, our_layer = theirs.base_model.model.get_submodule(name), ours.injection.layers[name]
    assert our_layer.experts.lora_A.dtype == peft_tensors(theirs, name)[0].dtype == torch.float32
    results = []
    for layer in (their_layer, our_layer):
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(8)).bfloat16().requires_grad_()
        y = layer(x)
        (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
        results.append((y, x.grad))
    assert results[1][0].dtype == torch.bfloat16
    for want, got, what in zip(*results, ("y", "x"), strict=True):
        reference.close(got, want, 2.5e-2, what)
    down, up = peft_tensors(theirs, name)
    reference.close(our_layer.experts.lora_A.grad[0], down.grad, 2.5e-2, "A")
    reference.close(our_layer.experts.lora_B.grad[0].T, up.grad, 2.5e-2, "B")


def test_input_gradient() -> None:
    theirs, ours = pair("llama", OPTIONS["lora"], torch.float64)
    embeddings = torch.randn(2, 5, 16, dtype=torch.float64)
    grads = []
    for model in (theirs, ours):
        x = embeddings.clone().requires_grad_()
        model(inputs_embeds=x).logits.sin().sum().backward()
        grads.append(x.grad)
    reference.close(grads[1], grads[0], 1e-11, "inputs_embeds")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", TARGETS)
def test_merged_weights(family: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    theirs, ours = pair(family, options, dtype)
    names = list(ours.injection.layers)
    merged = theirs.merge_and_unload(), ours.merge_and_unload()
    for name in names:
        want, got = (model.get_submodule(name).weight for model in merged)
        assert got.dtype == want.dtype == dtype
        # bf16: both round the sum to bf16, peft after rounding the delta as well: two steps of 2^-8.
        reference.close(got, want, 2.0**-7 if dtype == torch.bfloat16 else 1e-13, name)
    inputs = batch(family=family)
    want, got = (model.eval()(**inputs).logits for model in merged)
    reference.close(got, want, 0.1 if dtype == torch.bfloat16 else 1e-11, "logits")


def test_disabled_adapters_agree_bitwise() -> None:
    theirs, ours = pair("llama", OPTIONS["lora"], torch.float32)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initial_spread_is_pefts(init: Any) -> None:
    """Same distribution: standard deviation within 3 %, same largest entry within 3 % for the uniform one."""
    linear = nn.Linear(512, 64)
    theirs = (
        peft.tuners.lora.Linear(linear, "default", config=peft.LoraConfig(r=64, init_lora_weights=init), r=64)
        .lora_A["default"]
        .weight
    )
    from moadapt.experts import LoraBank, LoraExpertConfig

    ours = LoraBank(LoraExpertConfig(r=64, init_lora_weights=init), 512, 64, 1).lora_A
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
    if init is True:
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.03)


def test_trainable_parameters_agree() -> None:
    theirs, ours = pair("llama", OPTIONS["lora"], torch.float32)
    # The router of a single expert has nothing to learn, and is frozen.
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
