"""`MixtureConfig`: every error at once with its path and the valid values, presets, per-layer values, JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from kinds import ROWS, Row
from tiny import base_model, batch

from moadapt import get_mixture_model
from moadapt.config import MixtureConfig, parse_mixture_config
from moadapt.errors import ConfigError
from moadapt.per_layer import Site, map_values, value_at
from moadapt.presets import PRESETS, merge_preset
from moadapt.registry import EXPERTS, LOSSES, ROUTERS


def problems(options: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_mixture_config(options)
    return str(caught.value)


# -- errors -------------------------------------------------------------------------------------------------------


def test_all_errors_come_at_once_with_their_paths() -> None:
    text = problems(
        {
            "num_experts": 0,
            "target_module": ["q_proj"],
            "expert": {"kind": "lora", "r": -1, "lora_dropout": 2.0, "rank": 4},
            "router": {"kind": "top_q"},
            "losses": [{"kind": "load_balance", "coef": -1}, {"kind": "loadbalance"}, 3],
            "target_modules": "(",
        }
    )
    lines = text.splitlines()
    assert "10 problems" in lines[0]
    for path in (
        "num_experts:",
        "target_module:",
        "expert.r:",
        "expert.lora_dropout:",
        "expert.rank:",
        "router.kind:",
        "losses.0.coef:",
        "losses.1.kind:",
        "losses.2:",
        "target_modules:",
    ):
        assert sum(line.strip().startswith(path) for line in lines) == 1, f"{path} in\n{text}"


def test_a_loss_that_does_nothing_is_named_by_its_place() -> None:
    text = problems({"router": "softmax", "losses": [{"kind": "router_z"}, {"kind": "load_balance"}]})
    assert "losses.1: load_balance with count: topk is constant" in text


@pytest.mark.parametrize("preset", [3, ["malora"], {"name": "malora"}])
def test_a_preset_is_a_name(preset: Any) -> None:
    assert "preset:" in problems({"preset": preset})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_expert": 4}, ["num_expert:", "did you mean 'num_experts'?", "target_modules", "losses"]),
        ({"expert": {"kind": "lora", "alpha": 3}}, ["expert.alpha:", "lora_alpha", "use_rslora"]),
        ({"expert": {"kind": "malorra"}}, ["expert.kind:", "did you mean 'malora'?", "lora, malora"]),
        ({"router": "top-k"}, ["router.kind:", "top_k", "softmax"]),
        ({"losses": [{"kind": "z"}]}, ["losses.0.kind:", "importance", "load_balance", "router_z"]),
        ({"expert": {"r": 4}}, ["expert:", "needs a mapping with `kind`", "lora, malora"]),
        ({"preset": "malorra"}, ["preset", "did you mean 'malora'?", *PRESETS]),
        ({"router": {"kind": "top_k", "scope": "layer"}}, ["router.scope", "linear", "block"]),
        ({"exclude_modules": []}, ["exclude_modules:", "the list is empty"]),
        ({"target_modules": "q_proj("}, ["target_modules:", "not a regular expression"]),
        ({"num_experts": [2, 0]}, ["num_experts:", "positive integer"]),
        ({"num_experts": []}, ["num_experts:", "empty"]),
        ({"num_experts": {"(": 2}}, ["num_experts:", "not a regular expression"]),
        ({"num_experts": {"q_proj": 0}}, ["num_experts:", "positive integer"]),
        (
            {"num_experts": 2, "router": {"kind": "top_k", "num_experts_per_tok": 3}},
            ["router.num_experts_per_tok: 3 exceeds num_experts (2)"],
        ),
        ({"losses": [{"kind": "router_z"}, {"kind": "router_z"}]}, ["router_z is listed more than once"]),
        ({"router_z_loss_coef": 0.1, "losses": [{"kind": "router_z"}]}, ["router_z_loss_coef and losses both set"]),
        ({"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef:"]),
    ],
)
def test_messages_name_path_reason_and_way_out(options: dict[str, Any], parts: list[str]) -> None:
    text = problems(options)
    for part in parts:
        assert part in text, f"{part!r} not in\n{text}"


def test_contradictions_between_options_come_at_once_too() -> None:
    text = problems(
        {
            "num_experts": 2,
            "router": {"kind": "top_k", "num_experts_per_tok": 3},
            "losses": [{"kind": "router_z"}, {"kind": "router_z"}, {"kind": "importance"}, {"kind": "importance"}],
        }
    )
    assert "router.num_experts_per_tok: 3 exceeds" in text
    assert "losses: router_z is listed more than once" in text
    assert "losses: importance is listed more than once" in text


def test_an_unknown_preset_does_not_hide_other_errors() -> None:
    text = problems({"preset": "nope", "num_experts": -1, "expert": {"kind": "lora", "r": 0}})
    assert "preset: " in text
    assert "num_experts: " in text
    assert "expert.r: " in text


def test_source_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^my\.yaml: 1 problem in"):
        parse_mixture_config({"num_experts": 0}, "my.yaml")


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="num_experts"):
        get_mixture_model(base_model(), {"num_experts": 0})


def test_not_a_mapping() -> None:
    with pytest.raises(ConfigError):
        parse_mixture_config([1, 2])  # type: ignore[arg-type]


# -- what is accepted ---------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = MixtureConfig()
    assert config.expert.kind == "lora"
    assert config.router.kind == "top_k"
    assert config.losses == []
    assert config.target_modules == "all-linear"


def test_kind_may_be_a_bare_name() -> None:
    config = MixtureConfig.model_validate({"expert": "malora", "router": "softmax", "losses": ["router_z"]})
    assert (config.expert.kind, config.router.kind, config.losses[0].kind) == ("malora", "softmax", "router_z")


def test_a_shorthand_stands_above_the_loss_of_a_preset() -> None:
    config = parse_mixture_config({"preset": "malora", "router_aux_loss_coef": 0.125, "router_z_loss_coef": 0.5})
    assert {loss.kind: loss.coef for loss in config.losses} == {"load_balance": 0.125, "router_z": 0.5}
    assert parse_mixture_config(config.model_dump(mode="json")) == config


def test_the_sizes_rule_replaces_the_sizes_of_a_preset() -> None:
    config = parse_mixture_config({"preset": "malora", "expert": {"molora_r": 4}})
    sizes = config.expert.resolve_sizes(8)
    assert (sizes.r, sizes.shared_r) == (6, 16)
    assert parse_mixture_config(config.model_dump(mode="json")) == config


def test_load_balance_of_a_top_k_that_keeps_all_is_refused() -> None:
    text = problems({"num_experts": 2, "router_aux_loss_coef": 0.1})
    assert "losses.0" in text
    assert "selects every expert" in text


def test_shorthands_become_losses() -> None:
    config = MixtureConfig(router_aux_loss_coef=0.02, router_z_loss_coef=0.003)
    assert [(loss.kind, loss.coef) for loss in config.losses] == [("load_balance", 0.02), ("router_z", 0.003)]
    again = MixtureConfig.model_validate(json.loads(config.model_dump_json()))
    assert again == config


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_json_round_trip(row: Row) -> None:
    config = MixtureConfig.model_validate(row.config("block", losses=[{"kind": "router_z", "coef": 0.5}]))
    again = MixtureConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert type(again.expert) is type(config.expert)
    for name, value in {**row.expert, **row.router, "scope": "block"}.items():
        if name != "kind":
            assert getattr(again.expert, name, None) == value or getattr(again.router, name, None) == value


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_json(preset: str) -> None:
    config = MixtureConfig.model_validate({"preset": preset})
    assert config.preset == preset
    again = MixtureConfig.model_validate(json.loads(config.model_dump_json()))
    assert again == config


ADAPTERS = [name for name in PRESETS if PRESETS[name]["expert"]["kind"] != "ffn_partition"]
"""Those of conversions are in conversion/test_conversion_convert.py."""


@pytest.mark.parametrize("preset", ADAPTERS)
def test_presets_train_on_a_tiny_model(preset: str) -> None:
    options: dict[str, Any] = {"preset": preset}
    if isinstance(PRESETS[preset].get("num_experts"), list):
        options["num_experts"] = [2, 4]
    if PRESETS[preset]["expert"]["kind"] == "malora":
        options["expert"] = {"r": 4, "shared_r": 8}
    if PRESETS[preset]["router"]["kind"] == "task_table":
        options["tasks"] = ["one", "two", "three"]
    model = get_mixture_model(base_model(), options).train()
    inputs = batch()
    inputs["labels"][:, :3] = -100
    loss = model(**inputs, task_ids=torch.tensor([2, 0])).loss
    loss.backward()
    assert loss.isfinite()
    assert any(parameter.grad.abs().max() > 0 for _, parameter in model.adapter_parameters())


def test_preset_values_are_the_papers() -> None:
    made = {name: MixtureConfig.model_validate({"preset": name}) for name in PRESETS}
    malora = made["malora"]
    assert (malora.expert.r, malora.expert.shared_r, malora.expert.lora_alpha, malora.num_experts) == (12, 32, 24.0, 8)
    assert (malora.router.num_experts_per_tok, malora.router.norm_topk_prob) == (2, False)
    assert malora.losses[0].coef == 0.01
    assert "o_proj" not in malora.target_modules
    small = made["malora_small"]
    assert (small.expert.r, small.expert.shared_r) == (8, 22)
    molora = made["molora"]
    assert (molora.expert.r, molora.expert.lora_alpha, molora.num_experts, molora.losses) == (4, 16.0, 10, [])
    assert molora.router.kind == "softmax"
    top = made["molora_topk"]
    assert (top.expert.r, top.expert.lora_alpha, top.num_experts, top.router.num_experts_per_tok) == (8, 16.0, 8, 2)
    assert made["hydralora"].expert.shared_down
    dsmoe = made["dsmoe"]
    assert (dsmoe.num_experts, dsmoe.expert.split.kind, dsmoe.expert.trainable) == (8, "contiguous", True)
    assert (dsmoe.router.threshold, dsmoe.router.combine, dsmoe.router.rescale) == (0.5, "sigmoid", "n_over_active")
    assert (dsmoe.losses[0].kind, dsmoe.losses[0].coef, dsmoe.losses[0].penalise) == ("sparsity", 1.0, "G")
    cmoe = made["cmoe"]
    assert (cmoe.expert.num_shared_experts, cmoe.router.num_experts_per_tok, cmoe.num_experts) == (3, 3, 8 - 3)
    llama_moe = made["llama_moe"].router
    assert (llama_moe.combine, llama_moe.rescale, llama_moe.noisy_gating) == ("softmax_renorm", "n_over_k", True)
    factorllm = made["factorllm"]
    assert (factorllm.num_experts, factorllm.router.num_experts_per_tok, factorllm.router.combine) == (4, 2, "unit")
    assert made["mola"].num_experts == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    milora = made["milora"]
    assert (milora.expert.r, milora.expert.lora_alpha, milora.expert_unit) == (32, 32.0, "module")
    assert (milora.router.num_experts_per_tok, milora.router.scope, milora.router.granularity) == (3, "block", "prompt")
    assert (milora.router.pooler, milora.router.activation) == ("self_attention", "gelu")
    assert (milora.losses[0].coef, milora.losses[0].count, milora.losses[0].reduce) == (0.01, "argmax", "mean")
    mtl_lora, poly = made["mtl_lora"], made["poly"]
    assert (mtl_lora.num_experts, mtl_lora.expert.r, mtl_lora.expert.lora_alpha) == (3, 8, 16.0)
    assert (mtl_lora.router.temperature, mtl_lora.router.granularity, mtl_lora.losses) == (0.1, "task", [])
    assert (poly.num_experts, poly.expert.r, poly.expert.lora_alpha, poly.expert.mixing) == (4, 8, 1.0, "factors")
    smear = made["smear"]
    assert (smear.num_experts, smear.router.pooler, smear.router.normalize, smear.losses) == (8, "mean", True, [])


# -- granularity, unit and tasks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_unit": "module"}, "router.scope: linear with expert_unit: module"),
        (
            {"expert_unit": "module", "num_experts": 4, "router": {"kind": "top_k", "scope": "block"}},
            "leave num_experts out",
        ),
        ({"expert_unit": "module", "preset": "dsmoe", "num_experts": 1}, "expert_unit: module with expert.kind"),
        ({"tasks": ["a", "b"]}, "tasks: it has no effect"),
        ({"preset": "poly", "tasks": ["a", "a"]}, "tasks: the names of the tasks must be there, and differ"),
        ({"preset": "poly", "tasks": []}, "tasks: the names of the tasks must be there, and differ"),
        ({"preset": "poly", "tasks": ["a"], "router": {"num_tasks": 2}}, "router.num_tasks: 2, but tasks names 1"),
        (
            {"expert": {"kind": "lora", "mixing": "factors"}},
            "expert.mixing: factors merges the experts of a whole sequence",
        ),
        ({"preset": "emoe", "router": {"granularity": "prompt"}}, "granularity is prompt"),
        ({"preset": "cmoe", "router": {"granularity": "prompt"}}, "router.granularity"),
        ({"router": {"kind": "softmax", "granularity": "task"}}, "router.granularity"),
        ({"preset": "poly", "router": {"granularity": "token"}}, "router.granularity"),
        ({"router": {"kind": "top_k", "pooler": "mean"}}, "pooler"),
        ({"preset": "milora", "router": {"num_experts_per_tok": 1}}, "makes every gate 1"),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, Any], message: str) -> None:
    assert message in problems(options)


def test_tasks_size_the_tables() -> None:
    config = MixtureConfig.model_validate({"preset": "mtl_lora", "tasks": ["a", "b"]})
    assert (config.router.num_tasks, config.expert.num_tasks) == (2, 2)
    model = get_mixture_model(base_model(), config)
    assert {site.router.weight.shape for site in model.injection.routers.values()} == {(2, 3)}
    assert MixtureConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_unit_module_counts_the_modules_of_each_block() -> None:
    model = get_mixture_model(base_model(), {"preset": "milora", "expert": {"r": 2}, "exclude_modules": ["o_proj"]})
    assert {site.router.num_experts for site in model.injection.routers.values()} == {6}
    assert {layer.experts.num_experts for layer in model.injection.layers.values()} == {1}
    names = [f"self_attn.{x}_proj" for x in "qkv"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert model.expert_names("model.layers.1") == names
    with pytest.raises(ConfigError, match=r"num_experts_per_tok: 3 at model\.layers\.0, which has 2 adapted modules"):
        get_mixture_model(base_model(), {"preset": "milora", "target_modules": ["q_proj", "v_proj"]})


def test_given_options_override_the_preset_one_by_one() -> None:
    config = MixtureConfig.model_validate(
        {"preset": "malora", "num_experts": 4, "expert": {"beta": 1.25}, "router": {"scope": "ffn"}, "losses": []}
    )
    assert (config.num_experts, config.expert.beta, config.expert.r) == (4, 1.25, 12)
    assert (config.router.scope, config.router.num_experts_per_tok) == ("ffn", 2)
    assert config.losses == []


def test_another_kind_discards_the_presets_options_for_the_old_one() -> None:
    config = MixtureConfig.model_validate({"preset": "malora", "expert": {"kind": "lora"}})
    assert config.expert == EXPERTS.parse({"kind": "lora"})
    assert merge_preset({"a": {"kind": "x", "b": 1}}, {"a": {"c": 2}}) == {"a": {"kind": "x", "b": 1, "c": 2}}


def test_presets_are_not_changed_by_use() -> None:
    before = json.dumps(PRESETS)
    MixtureConfig.model_validate({"preset": "malora", "expert": {"r": 3}}).expert.r = 5
    assert json.dumps(PRESETS) == before


def test_assignment_is_validated_and_keeps_the_rest() -> None:
    config = MixtureConfig.model_validate({"preset": "malora", "num_experts": 4})
    config.num_experts = 6
    assert (config.num_experts, config.expert.kind) == (6, "malora")
    with pytest.raises(ValueError, match="num_experts"):
        config.num_experts = -1
    with pytest.raises(ValueError, match="no_such"):
        config.no_such = 1
    assert config.num_experts == 6


# -- per-layer values ---------------------------------------------------------------------------------------------


SITE = Site("model.layers.3.self_attn.q_proj", 3, 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 5),
        ([1, 2, 3, 4], 4),
        ({"default": 7}, 7),
        ({"q_proj": 2, "default": 7}, 2),
        ({"k_proj": 2, "default": 7}, 7),
        ({"layers.3.*": 6}, 6),
        ({r"layers\.[0-2]\..*": 1, r"layers\.3\..*": 9}, 9),
        ({"proj": 3, "default": 7}, 7),  # the end of the name begins at a dot
        ({"self_attn.q_proj": 4, "q_proj": 5}, 4),  # the first match wins
        ({"default": 1, "q_proj": 5}, 5),  # the default only when nothing matches
    ],
)
def test_value_at(value: Any, expected: int) -> None:
    assert value_at("r", value, SITE) == expected


@pytest.mark.parametrize(
    ("value", "site", "message"),
    [
        ([1, 2], SITE, r"r: 2 values for 4 layers .*layers\.3"),
        ([1, 2], Site("lm_head", None, 0), "lm_head is in no layer; use a map"),
        ({"k_proj": 1}, SITE, "no pattern matches .*add one, or a `default`"),
    ],
)
def test_value_at_errors(value: Any, site: Site, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        value_at("r", value, site)


def test_map_values_keeps_the_form() -> None:
    double = [map_values(value, lambda item: 2 * item) for value in (3, [1, 2], {"a": 1})]
    assert double == [6, [2, 4], {"a": 2}]


def test_per_layer_values_reach_the_layers() -> None:
    model = get_mixture_model(
        base_model(),
        {
            "num_experts": [2, 3],
            "expert": {"kind": "lora", "r": {r"layers\.0\..*": 2, "down_proj": 5, "default": 4}},
            "router": {"kind": "top_k", "num_experts_per_tok": [1, 3]},
        },
    )
    for name, layer in model.injection.layers.items():
        first = ".0." in name
        assert layer.experts.num_experts == (2 if first else 3)
        assert layer.experts.r == (2 if first else 5 if name.endswith("down_proj") else 4)
        assert layer.router.router.num_experts_per_tok == (1 if first else 3)
    assert model(**batch()).loss.isfinite()


def test_per_layer_malora_and_shared_routers() -> None:
    model = get_mixture_model(
        base_model(),
        {
            "num_experts": {r"layers\.0\..*": 3, "default": 5},
            "expert": {"kind": "malora", "r": [2, 4], "shared_r": {r"layers\.0\..*": 4, "default": 8}},
            "router": {"kind": "top_k", "scope": "block", "num_experts_per_tok": {r"layers\.0": 1, "default": 2}},
        },
    )
    shapes = {name: tuple(p.shape) for name, p in model.adapter_parameters()}
    assert shapes["model.layers.0.self_attn.q_proj.experts.malora_P"] == (3, 2, 4)
    assert shapes["model.layers.1.self_attn.q_proj.experts.malora_P"] == (5, 4, 8)
    assert shapes["model.layers.0.mixture_router.router.weight"] == (3, 16)
    kept = [site.router.num_experts_per_tok for site in model.injection.routers.values()]
    assert kept == [1, 2]
    assert model(**batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": [2, 2, 2]}, "num_experts: 3 values for 2 layers"),
        ({"num_experts": {"q_proj": 2}}, "num_experts: no pattern matches"),
        ({"expert": {"kind": "lora", "r": [4]}}, "expert.r: 1 values for 2 layers"),
        ({"num_experts": [1, 2]}, "num_experts_per_tok: 2 at .*layers.0.* which has 1 expert"),
        ({"router": {"kind": "top_k", "num_experts_per_tok": [9, 1]}}, "num_experts_per_tok: 9"),
        (
            {"num_experts": {"q_proj": 2, "default": 4}, "router": {"kind": "top_k", "scope": "block"}},
            "one router can only rule layers with the same number",
        ),
        ({"expert": {"kind": "malora", "r": [4, 8], "shared_r": 6}}, "must not exceed shared_r"),
        ({"expert": {"kind": "malora", "shared_r": 17, "r": 4}}, "exceeds the 16 input features"),
        ({"router": {"kind": "top_k", "num_experts_per_tok": [1, 2], "norm_topk_prob": True}}, "no gradient"),
    ],
)
def test_values_that_do_not_fit_the_model(options: dict[str, Any], message: str) -> None:
    base = base_model()
    names = [name for name, _ in base.named_modules()]
    trainable = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(ConfigError, match=message):
        get_mixture_model(base, options)
    assert [name for name, _ in base.named_modules()] == names, "the model was changed"
    assert [parameter.requires_grad for parameter in base.parameters()] == trainable


# -- JSON Schema --------------------------------------------------------------------------------------------------


def test_json_schema_lists_every_kind_and_option() -> None:
    schema = MixtureConfig.model_json_schema()
    text = json.dumps(schema)
    assert set(schema["properties"]) == set(MixtureConfig.model_fields)
    for table in (EXPERTS, ROUTERS, LOSSES):
        for name in table.names():
            assert f'"const": "{name}"' in text
            for option in table.get(name).config.model_fields:
                assert f'"{option}"' in text
    assert schema["additionalProperties"] is False


def test_json_schema_references_resolve() -> None:
    schema = MixtureConfig.model_json_schema()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].split("/")[-1] in schema["$defs"]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(schema)
