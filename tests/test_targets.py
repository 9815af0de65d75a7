"""Which modules are adapted: lists, regular expressions, all-linear, exclusions, layers; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import base_model, batch
from torch import nn

from moadapt import get_mixture_model
from moadapt.errors import ConfigError


def adapted(family: str = "llama", **options: Any) -> list[str]:
    model = get_mixture_model(base_model(family), {"num_experts": 2, **options})
    assert model(**batch(family=family)).loss.isfinite()
    return [name.removeprefix("model.").removeprefix("transformer.") for name in model.injection.layers]


def layers(*names: str, numbers: tuple[int, ...] = (0, 1)) -> list[str]:
    return [f"layers.{number}.{name}" for number in numbers for name in names]


ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
FFN = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, layers(*ATTENTION, *FFN)),
        ({"target_modules": "all-linear"}, layers(*ATTENTION, *FFN)),
        ({"target_modules": ["q_proj", "v_proj"]}, layers("self_attn.q_proj", "self_attn.v_proj")),
        ({"target_modules": ["mlp.up_proj"]}, layers("mlp.up_proj")),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, ["layers.1.mlp.up_proj"]),
        ({"target_modules": ["lm_head"]}, ["lm_head"]),
        ({"target_modules": r".*\.(q|k)_proj"}, layers("self_attn.q_proj", "self_attn.k_proj")),
        ({"target_modules": r"model\.layers\.0\.mlp\..*_proj"}, layers(*FFN, numbers=(0,))),
        ({"exclude_modules": ["o_proj", "down_proj"]}, layers(*ATTENTION[:3], *FFN[:2])),
        ({"exclude_modules": r".*\.layers\.0\..*"}, layers(*ATTENTION, *FFN, numbers=(1,))),
        ({"exclude_modules": r".*mlp.*", "target_modules": r".*_proj"}, layers(*ATTENTION)),
        ({"layers_to_transform": 1}, layers(*ATTENTION, *FFN, numbers=(1,))),
        ({"layers_to_transform": [0], "target_modules": ["up_proj"]}, ["layers.0.mlp.up_proj"]),
        ({"layers_to_transform": [0, 1], "target_modules": ["up_proj"]}, layers("mlp.up_proj")),
    ],
    ids=str,
)
def test_selection(options: dict[str, Any], expected: list[str]) -> None:
    assert sorted(adapted(**options)) == sorted(expected)


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "lm_head"), ("gpt2", "lm_head"), ("gpt_neox", "embed_out"), ("opt", "lm_head"), ("t5", "lm_head")],
)
def test_all_linear_leaves_the_output_head_alone(family: str, head: str) -> None:
    names = adapted(family)
    assert not any(name.endswith(head) for name in names)
    assert names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj'.*selects no module.*k_proj.*q_proj"),
        ({"target_modules": "q_proj"}, r"selects no module"),
        ({"target_modules": ["mlp"]}, r"only linear layers can be adapted.*model\.layers\.0\.mlp \(LlamaMLP\)"),
        ({"target_modules": ["embed_tokens"]}, r"model\.embed_tokens \(Embedding\)"),
        ({"target_modules": ["norm"]}, "LlamaRMSNorm"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform: layer 7"),
        ({"layers_to_transform": -1}, r"layers_to_transform: layer -1"),
        ({"layers_to_transform": []}, "selects no module"),
        ({"exclude_modules": r".*"}, "selects no module"),
        ({"router": {"kind": "top_k", "scope": "ffn"}}, r"scope: ffn rules no attention block.*q_proj.*scope: block"),
        ({"router": {"kind": "top_k", "scope": "attention"}}, r"scope: attention rules no ffn block.*gate_proj"),
        (
            {"router": {"kind": "top_k", "scope": "block"}, "target_modules": ["q_proj", "lm_head"]},
            r"needs modules inside transformer layers, but lm_head is in none",
        ),
    ],
    ids=str,
)
def test_refusals_name_the_module_and_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    base = base_model()
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ConfigError, match=message):
        get_mixture_model(base, {"num_experts": 2, **options})
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    ("family", "scope", "expected"),
    [
        ("llama", ["ffn", "attention"], ["model.layers.0.mlp", "model.layers.0.self_attn"]),
        ("gpt2", ["ffn", "attention"], ["transformer.h.0.attn", "transformer.h.0.mlp"]),
        ("gpt_neox", ["ffn", "attention"], ["gpt_neox.layers.0.attention", "gpt_neox.layers.0.mlp"]),
        ("opt", ["ffn", "attention"], ["model.decoder.layers.0.ffn", "model.decoder.layers.0.self_attn"]),
        ("opt", "block", ["model.decoder.layers.0"]),
        ("t5", "block", ["decoder.block.0", "decoder.block.0.layer.1.EncDecAttention.key_value", "encoder.block.0"]),
    ],
)
def test_blocks_of_shared_routers(family: str, scope: Any, expected: list[str]) -> None:
    model = get_mixture_model(base_model(family), {"router": {"kind": "top_k", "scope": scope}})
    first = [name for name in model.injection.routers if ".0" in name.replace(".layer.0", "")]
    assert sorted(first) == expected
    ruled = {layer.ruled_by for layer in model.injection.layers.values()}
    assert ruled == set(model.injection.routers)


def test_router_reads_the_size_of_its_own_input() -> None:
    """Under scope linear that is the layer's input; under shared scopes the hidden size."""
    linear = get_mixture_model(base_model(), {"num_experts": 2}).injection.routers
    assert linear["model.layers.0.mlp.down_proj"].router.in_features == 20
    assert linear["model.layers.0.mlp.up_proj"].router.in_features == 16
    shared = get_mixture_model(base_model(), {"num_experts": 2, "router": {"kind": "top_k", "scope": "block"}})
    assert {site.router.in_features for site in shared.injection.routers.values()} == {16}


def test_subclasses_of_linear_are_adapted() -> None:
    class Special(nn.Linear):
        pass

    base = base_model()
    old = base.model.layers[0].mlp.up_proj
    special = Special(16, 20, bias=False)
    special.weight.data.copy_(old.weight)
    base.model.layers[0].mlp.up_proj = special
    model = get_mixture_model(base, {"num_experts": 2, "target_modules": ["up_proj"]})
    assert len(model.injection.layers) == 2
    assert torch.equal(model.train()(**batch()).logits, base_model()(**batch()).logits)
