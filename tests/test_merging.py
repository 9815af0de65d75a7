"""Leaving a mixture: merge_and_unload, unload, disable_adapter, modules_to_save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from kinds import FEW, ROUTERS, SCOPES, targets_of
from tiny import base_model, batch, mixture_model, randomize_adapter
from torch import nn

from moadapt import MixtureModel, get_mixture_model
from moadapt.errors import AdapterError, ConfigError

MERGEABLE = {
    "lora": {"kind": "lora", "r": 3, "lora_alpha": 6.0},
    "rslora": {"kind": "lora", "r": 3, "use_rslora": True},
    "shared_down": {"kind": "lora", "r": 3, "shared_down": True},
    "malora": {"kind": "malora", "r": 3, "shared_r": 5},
}


def names_and_types(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def no_hooks(model: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("router", ["softmax", "top_k"])
@pytest.mark.parametrize("expert", MERGEABLE.values(), ids=MERGEABLE)
def test_one_expert_merges_exactly(expert: dict[str, Any], router: str, family: str) -> None:
    options = {"num_experts": 1, "expert": expert, "router": {"kind": router}}
    if router == "top_k":
        options["router"] = {"kind": "top_k", "num_experts_per_tok": 1}
    model = mixture_model(options, family, torch.float64).eval()
    inputs = batch(family=family)
    want = model(**inputs).logits
    base = base_model(family, torch.float64)
    merged = model.merge_and_unload()
    assert names_and_types(merged) == names_and_types(base)
    assert no_hooks(merged)
    reference.close(merged(**inputs).logits, want, 1e-10, "logits")
    assert (merged(**inputs).logits - base(**inputs).logits).abs().max() > 1e-3, "the adapter did nothing"


@pytest.mark.parametrize("scope", SCOPES[1:], ids=str)
def test_one_expert_merges_under_shared_routers_too(scope: Any) -> None:
    options = {
        "num_experts": 1,
        "expert": MERGEABLE["lora"],
        "router": {"kind": "softmax", "scope": scope},
        "target_modules": targets_of(scope),
    }
    model = mixture_model(options, dtype=torch.float64).eval()
    want = model(**batch()).logits
    merged = model.merge_and_unload()
    assert names_and_types(merged) == names_and_types(base_model())
    assert no_hooks(merged)
    reference.close(merged(**batch()).logits, want, 1e-10, "logits")


def test_merging_into_bf16_rounds_once() -> None:
    """W + dW is formed in fp32 and rounded once, so every weight is within half a bf16 step of the exact sum."""
    options = {"num_experts": 1, "expert": MERGEABLE["lora"], "router": {"kind": "softmax"}}
    model = mixture_model(options, dtype=torch.bfloat16)
    layer = model.injection.layers["model.layers.0.mlp.up_proj"]
    exact = layer.weight.double() + layer.experts.delta_weight(0).double()
    merged = model.merge_and_unload().get_submodule("model.layers.0.mlp.up_proj")
    assert merged.weight.dtype == torch.bfloat16
    assert ((merged.weight.double() - exact).abs() <= exact.abs() * 2.0**-8).all()


@pytest.mark.parametrize("scope", ["linear", "block"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_input_dependent_routing_is_refused_and_changes_nothing(router: dict[str, Any], scope: str) -> None:
    model = mixture_model({"num_experts": 4, "expert": MERGEABLE["lora"], "router": {**router, "scope": scope}}).eval()
    before, modules = model(**batch()).logits, names_and_types(model)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(
        AdapterError, match=r"cannot merge model\.layers\.0.*routing depends on the input.*num_experts: 1"
    ):
        model.merge_and_unload()
    assert names_and_types(model) == modules
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model(**batch()).logits, before)


def test_one_layer_that_cannot_merge_stops_all(tmp_path: Path) -> None:
    options = {"num_experts": [1, 2], "expert": MERGEABLE["lora"], "router": {"kind": "softmax"}}
    model = mixture_model(options)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterError, match=r"layers\.1"):
        model.merge_and_unload()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_tied_weights_are_not_merged_into() -> None:
    """The output head shares its weight with the embedding, which must not change."""
    options = {
        "num_experts": 1,
        "expert": MERGEABLE["lora"],
        "router": {"kind": "softmax"},
        "target_modules": ["lm_head"],
    }
    model = mixture_model(options, tie_word_embeddings=True)
    assert model.base_model.lm_head.weight is model.base_model.model.embed_tokens.weight
    with pytest.raises(AdapterError, match="tied"):
        model.merge_and_unload()
    untied = mixture_model(options, dtype=torch.float64, tie_word_embeddings=False).eval()
    want = untied(**batch()).logits
    reference.close(untied.merge_and_unload()(**batch()).logits, want, 1e-12, "logits")


@pytest.mark.parametrize("scope", ["linear", "block", ["ffn", "attention"]], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_unload_gives_the_base_model_back(family: str, scope: Any) -> None:
    base = base_model(family)
    want = base(**batch(family=family)).logits
    modules = names_and_types(base)
    next(iter(base.parameters())).requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in base.parameters()]
    model = get_mixture_model(base, FEW[1].config(scope))
    randomize_adapter(model)
    model(**batch(family=family)).loss.backward()
    assert model.unload() is base
    assert names_and_types(base) == modules
    assert no_hooks(base)
    assert [parameter.requires_grad for parameter in base.parameters()] == trainable
    assert torch.equal(base(**batch(family=family)).logits, want)
    again = get_mixture_model(base, FEW[3].config("linear"))
    assert again(**batch(family=family)).loss.isfinite()


def test_two_mixtures_in_one_model_are_refused() -> None:
    base = base_model()
    get_mixture_model(base, FEW[0].config())
    with pytest.raises(ConfigError, match="already holds a mixture"):
        get_mixture_model(base, FEW[0].config())


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_disable_adapter_is_the_base_model_bitwise(scope: Any) -> None:
    model = mixture_model(FEW[1].config(scope, target_modules=targets_of(scope)))
    want, inputs = base_model()(**batch()).logits, batch()
    adapted = model(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, want)
        with model.disable_adapter():
            pass
        assert torch.equal(model(**inputs).logits, want), "the inner block switched it on"
    assert torch.equal(model(**inputs).logits, adapted)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(**inputs).logits, adapted), "an error left it off"


# -- modules_to_save ----------------------------------------------------------------------------------------------

SAVED = {"modules_to_save": ["lm_head", "norm"]}


def train(model: MixtureModel) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch()).loss.backward()
        optimizer.step()
    model.eval()


def test_modules_to_save_are_trained_saved_loaded_and_restored(tmp_path: Path) -> None:
    model = get_mixture_model(base_model(), FEW[1].config(**SAVED))
    names = {name for name, _ in model.adapter_parameters()}
    assert {"lm_head.copy.weight", "model.norm.copy.weight"} < names
    assert all(model.parameter_role(name) == "other" for name in names if ".copy." in name)
    want_base = base_model()(**batch()).logits
    reference.close(model(**batch()).logits, want_base, 1e-5, "before training")
    train(model)
    assert (model.base_model.lm_head.copy.weight - base_model().lm_head.weight).abs().max() > 1e-4
    assert torch.equal(model.base_model.lm_head.original_module.weight, base_model().lm_head.weight)
    trained = model(**batch()).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, want_base)
    model.save_pretrained(tmp_path)
    again = MixtureModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(again(**batch()).logits, trained)
    base = again.unload()
    assert torch.equal(base(**batch()).logits, want_base)
    assert names_and_types(base) == names_and_types(base_model())


def test_merging_keeps_the_trained_copies() -> None:
    options = {"num_experts": 1, "expert": MERGEABLE["lora"], "router": {"kind": "softmax"}, **SAVED}
    model = get_mixture_model(base_model(dtype=torch.float64), options)
    train(model)
    want = model(**batch()).logits
    merged = model.merge_and_unload()
    reference.close(merged(**batch()).logits, want, 1e-10, "logits")
    assert names_and_types(merged) == names_and_types(base_model())


def test_embedding_as_module_to_save_generates() -> None:
    model = get_mixture_model(base_model(), FEW[1].config(modules_to_save=["embed_tokens"]))
    train(model)
    ids = batch()["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert model.base_model.get_input_embeddings().weight is model.base_model.model.embed_tokens.copy.weight


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["no_such"], "no module 'no_such'"),
        (["q_proj"], "adapted module"),
        (["layers.0"], "adapted module"),
        (["model"], "adapted module"),
    ],
)
def test_modules_that_cannot_be_saved(wanted: list[str], message: str) -> None:
    base = base_model()
    modules = names_and_types(base)
    with pytest.raises(ConfigError, match=message):
        get_mixture_model(base, FEW[1].config(modules_to_save=wanted))
    assert names_and_types(base) == modules, "the model was changed before the error"
    assert all(parameter.requires_grad for parameter in base.parameters())
    get_mixture_model(base, FEW[1].config())
