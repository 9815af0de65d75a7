"""What cannot be converted is refused with the option, the reason and a way out, and the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conversion_helpers import (
    FAMILIES,
    calibration_batches,
    inputs_of,
    mixture_options,
    same_snapshot,
    snapshot,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GraniteMoeConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moadapt import get_mixture_model
from moadapt.convert import convert_ffn_to_experts
from moadapt.errors import ConfigError

_MOE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
}
MOE_CONFIGS = {
    "mixtral": lambda: MixtralConfig(**_MOE, num_local_experts=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(**_MOE, num_experts=2, num_experts_per_tok=1, mlp_only_layers=[0]),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_MOE, num_experts=2, num_experts_per_tok=1, head_dim=4),
}


def refused(model: PreTrainedModel, options: Any, *words: str, **more: Any) -> str:
    """Both ways in refuse (or only the one that takes calibration), and leave no trace."""
    model.train()
    before = snapshot(model)
    with pytest.raises(ConfigError) as caught:
        convert_ffn_to_experts(model, options, **more)
    same_snapshot(model, before)
    if not more:
        with pytest.raises(ConfigError):
            get_mixture_model(model, options)
        same_snapshot(model, before)
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} not in: {text}"
    return text


@pytest.mark.parametrize("name", MOE_CONFIGS)
def test_mixtures_are_not_split_again(name: str) -> None:
    """Also when some of their layers are dense."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MOE_CONFIGS[name]())
    refused(model, mixture_options(2), "mixture of experts already", "start from a dense model", ".mlp")


def test_mixtures_without_experts_of_their_own_names() -> None:
    """GraniteMoe stacks its experts in modules of other names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GraniteMoeConfig(**_MOE, num_local_experts=2, num_experts_per_tok=1))
    refused(model, mixture_options(2), "GraniteMoeForCausalLM", "mixture of experts already")


def test_a_converted_model_is_not_converted_again() -> None:
    model = FAMILIES["llama"].model()
    mixture = get_mixture_model(model, mixture_options(4))
    for make in (get_mixture_model, convert_ffn_to_experts):
        with pytest.raises(ConfigError, match="already"):
            make(model, mixture_options(4))
    assert mixture(**inputs_of("llama")).loss.isfinite()


def test_layers_of_unknown_layout() -> None:
    """Bart's layers hold their parts beside the attention, and nobody has said how these are called."""
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 20))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **sizes, **heads))
    refused(bart, mixture_options(4), "encoder.layers.0 (BartEncoderLayer)", "self_attn", "exclude_modules")
    gpt2 = FAMILIES["gpt2"].model()
    for layer in gpt2.transformer.h:
        layer.mlp.c_fc, layer.mlp.other = nn.Identity(), layer.mlp.c_fc
    refused(gpt2, mixture_options(4), "no feed-forward block of a known layout", "c_fc, c_proj", "gate_proj")


def with_extra_module(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.norm = nn.LayerNorm(20)


def with_another_formula(model: PreTrainedModel) -> None:
    block = model.model.layers[1].mlp
    block.forward = lambda x: block.down_proj(block.act_fn(block.up_proj(x)) * block.gate_proj(x))


def with_scaled_output(model: PreTrainedModel) -> None:
    block = model.model.layers[1].mlp
    block.register_forward_hook(lambda module, args, output: output * 1.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_extra_module, ["model.layers.1.mlp (LlamaMLP)", "beside norm", "exclude_modules"]),
        (with_another_formula, ["model.layers.1.mlp (LlamaMLP)", "computes something else", "exclude_modules"]),
        (with_scaled_output, ["model.layers.1.mlp (LlamaMLP)", "computes something else", "exclude_modules"]),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_a_block_that_computes_something_else(change: Any, words: list[str]) -> None:
    model = FAMILIES["llama"].model()
    change(model)
    refused(model, mixture_options(4), *words)
    ways_out: list[dict[str, Any]] = [
        {"exclude_modules": ["layers.1.mlp"]},
        {"target_modules": ["layers.0.mlp"]},
        {"layers_to_transform": 0},
        {"expert": {"last_k_dense_replace": 1}},
    ]
    for way_out in ways_out:
        mixture = convert_ffn_to_experts(model, mixture_options(4, **way_out))
        assert list(mixture.injection.layers) == ["model.layers.0.mlp"]
        mixture.unload()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_quantised_weights(family: str) -> None:
    row = FAMILIES[family]
    model = row.model()
    module = model.get_submodule(f"{row.owners[1]}.{row.down}")
    module.weight = nn.Parameter(module.weight.detach().mul(20).to(torch.int8), requires_grad=False)
    refused(model, mixture_options(4), f"{row.owners[1]}.{row.down}", "int8", "unquantised")


def test_a_block_in_two_dtypes() -> None:
    """As T5 loaded in fp16, which keeps `wo` in fp32."""
    row = FAMILIES["t5"]
    model = row.model(torch.bfloat16)
    model.get_submodule(row.owners[0]).wo.float()
    refused(model, mixture_options(4), row.owners[0], "bfloat16 and float32", "dtype:")


Case = tuple[dict[str, Any], list[str]]
OPTIONS: dict[str, Case] = {
    "indivisible": (
        mixture_options(3),
        ["num_experts: 3 experts", "20 neurons of model.layers.0.mlp", "1, 2, 4, 5, 10", "expert.padding: true"],
    ),
    "indivisible_shared": (mixture_options(4, expert={"num_shared_experts": 2}), ["6 experts", "routed and shared"]),
    "too_many": (mixture_options(21, expert={"padding": True}), ["21 experts", "only 20 neurons"]),
    "kept_too_many": (
        mixture_options(4, {"kind": "top_k", "num_experts_per_tok": 5}),
        ["router.num_experts_per_tok", "5 exceeds num_experts (4)"],
    ),
    "kept_too_many_in_a_layer": (
        mixture_options(4, {"kind": "top_k", "num_experts_per_tok": [2, 5]}),
        ["router.num_experts_per_tok: 5 at model.layers.1.mlp", "4 experts"],
    ),
    "kept_too_many_of_fewer": (
        mixture_options([4, 2], {"kind": "top_k", "num_experts_per_tok": 4}),
        ["router.num_experts_per_tok: 4 at model.layers.1.mlp", "2 experts"],
    ),
    "list_too_short": (mixture_options([4]), ["num_experts: 1 values for 2 layers"]),
    "list_too_long": (mixture_options([4, 4, 4]), ["num_experts", "3"]),
    "shared_list_too_short": (mixture_options(4, expert={"num_shared_experts": [1]}), ["expert.num_shared_experts"]),
    "scope_block": (mixture_options(4, {"kind": "softmax", "scope": "block"}), ["router.scope: block", "use ffn"]),
    "scope_list": (
        mixture_options(4, {"kind": "softmax", "scope": ["ffn", "attention"]}),
        ["router.scope", "use ffn"],
    ),
    "trained_and_lora": (
        mixture_options(4, expert={"trainable": True, "lora": {"r": 2}}),
        ["trainable: true", "lora", "choose one"],
    ),
    "zero_gates": (mixture_options(4, {"kind": "sigmoid_ste", "init": "zeros"}), ["init: zeros", "init: normal"]),
    "unknown_split": (
        mixture_options(4, expert={"split": {"kind": "contigous"}}),
        ["unknown split kind 'contigous'", "contiguous", "kmeans"],
    ),
    "no_such_layer": (mixture_options(4, layers_to_transform=[0, 7]), ["layers_to_transform", "no layer 7"]),
    "no_layer_left": (
        mixture_options(4, expert={"first_k_dense_replace": 1, "last_k_dense_replace": 1}),
        ["select no feed-forward block", "model.layers.0.mlp"],
    ),
    "linears_as_targets": (mixture_options(4, target_modules=["gate_proj"]), ["target_modules", "model.layers.0.mlp"]),
    "save_a_part": (mixture_options(4, modules_to_save=["layers.0.mlp.up_proj"]), ["modules_to_save", "up_proj"]),
    "save_the_block": (mixture_options(4, modules_to_save=["layers.0.mlp"]), ["modules_to_save"]),
    "save_nothing": (mixture_options(4, modules_to_save=["embed"]), ["modules_to_save", "'embed'"]),
    "file_missing": (
        mixture_options(4, expert={"split": {"kind": "file"}}),
        ["expert", "path"],
    ),
    "several_at_once": (
        mixture_options(0, {"kind": "top_k", "num_experts_per_tok": -1}, expert={"trainable": "maybe"}),
        ["num_experts", "router.num_experts_per_tok", "expert.trainable", "3 problems"],
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_fit(name: str) -> None:
    options, words = OPTIONS[name]
    refused(FAMILIES["llama"].model(), options, *words)


@pytest.mark.parametrize("split", ["coactivation", "activation_rate", "gradient"])
def test_a_split_without_the_calibration_that_it_needs(split: str) -> None:
    options = mixture_options(4, expert={"split": {"kind": split}})
    model = FAMILIES["llama"].model()
    refused(model, options, f"expert.split: {split}", "calibration.path", "choose a split")
    refused(model, options, f"expert.split: {split}", calibration=[])


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "representative"},
        {"kind": "norm_regression"},
        {"kind": "top_k", "combine": "unit", "fit": "prior_approximate"},
    ],
    ids=lambda router: router["kind"],
)
def test_a_router_without_the_calibration_that_it_needs(router: dict[str, Any]) -> None:
    options = mixture_options(4, router)
    refused(FAMILIES["llama"].model(), options, f"router: {router['kind']}", "calibration.path", "choose a router")


def test_clusters_do_not_say_which_is_shared() -> None:
    options = mixture_options(4, expert={"split": {"kind": "kmeans"}, "num_shared_experts": 1})
    refused(FAMILIES["llama"].model(), options, "expert.split: kmeans", "calibration")
    model = convert_ffn_to_experts(FAMILIES["llama"].model(), options, calibration_batches())
    assert model.injection.layers["model.layers.0.mlp"].experts.num_shared == 1


def test_routers_of_split_blocks_are_not_for_adapters() -> None:
    options = {"expert": {"kind": "lora"}, "router": {"kind": "top_k", "combine": "unit", "init": "mean_gate"}}
    model = FAMILIES["llama"].model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="ffn_partition"):
        get_mixture_model(model, options)
    same_snapshot(model, before)


def test_adapters_are_no_conversion() -> None:
    options = {"expert": {"kind": "lora"}, "num_experts": 4}
    refused(FAMILIES["llama"].model(), options, "expert.kind: lora", "ffn_partition", calibration=[])


class Sigmoid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x)


def test_training_zero_rows_under_an_activation_that_is_not_zero_at_zero() -> None:
    """Frozen ones do no harm: their rows of the down-projection are zero."""
    row = FAMILIES["opt"]
    model = row.model()
    for layer in model.model.decoder.layers:
        layer.activation_fn = Sigmoid()
    inputs = inputs_of("opt")
    want = model(**inputs).logits
    refused(model, mixture_options(4, expert={"trainable": True}), "expert.trainable", "act(0)", "multiples of 8")
    model.eval()
    kept = {"kind": "top_k", "combine": "unit", "num_experts_per_tok": 4}
    mixture = get_mixture_model(model, mixture_options(4, kept))
    assert (mixture(**inputs).logits - want).abs().max() < 1e-5 * want.abs().max()
    mixture.unload()
    wide = row.model(ffn_dim=32)
    for layer in wide.model.decoder.layers:
        layer.activation_fn = Sigmoid()
    get_mixture_model(wide, mixture_options(4, expert={"trainable": True}))


def test_index_lists_of_another_shape_or_with_a_neuron_twice() -> None:
    from moadapt import MixtureModel
    from moadapt.config import parse_mixture_config

    model, config = FAMILIES["llama"].model(), parse_mixture_config(mixture_options(4))
    good = torch.arange(20).view(4, 5)
    twice = good.clone()
    twice[0, 0] = 19
    name = "model.layers.1.mlp"
    before = snapshot(model)
    for lists, words in (
        ({name: good}, "model.layers.0.mlp: needs shape"),
        ({"model.layers.0.mlp": good, name: good.view(5, 4)}, f"{name}: needs shape"),
        ({"model.layers.0.mlp": good, name: twice}, "exactly once"),
    ):
        with pytest.raises(ConfigError, match=words):
            MixtureModel(model, config, lists)
        same_snapshot(model, before)


def test_training_that_can_reach_nothing() -> None:
    """Frozen experts under gates of 1: a plain step would do nothing, and says so."""
    options = mixture_options(4, {"kind": "top_k", "num_experts_per_tok": 2, "combine": "unit", "init": "mean_gate"})
    model = convert_ffn_to_experts(FAMILIES["llama"].model(), options).train()
    with pytest.raises(ConfigError, match=r"expert.trainable: true"):
        model(**inputs_of("llama"))
    assert model.eval()(**inputs_of("llama")).loss.isfinite()
