"""Exports load in a process that knows only transformers, and compute there what the converted model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import Case, export_case, load_elsewhere
from tiny import FAMILIES

from moadapt.export import equivalence

pytestmark = pytest.mark.slow

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOWED = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "max_window_layers": 1,
}
ONE = {"layers_to_transform": [1]}

STOCK = [
    Case("mixtral", "mixtral", "renorm"),
    Case("mixtral_cool", "mixtral", "cool"),
    Case("mixtral_all", "mixtral", "all"),
    Case("mixtral_one", "mixtral", "unit_one"),
    Case("mixtral_dense", "mixtral", "unit_all"),
    Case("mixtral_llama3_tied", "mixtral", "renorm", base={"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    Case("mixtral_window", "mixtral", "renorm", "mistral", base={"sliding_window": 4}),
    Case("mixtral_phi3", "mixtral", "renorm", "phi3"),
    Case("mixtral_head_dim", "mixtral", "renorm", base={"head_dim": 8}),
    Case("mixtral_lora", "mixtral", "renorm", expert={"lora": {"r": 2}}),
    Case("mixtral_trained", "mixtral", "renorm", expert={"trainable": True}),
    Case("mixtral_clusters", "mixtral", "renorm", expert={"split": {"kind": "random", "seed": 3}}),
    Case(
        "mixtral_head",
        "mixtral",
        "renorm",
        mixture={"modules_to_save": ["lm_head"]},
        base={"tie_word_embeddings": True},
    ),
    Case("qwen2_moe", "qwen2_moe", "softmax", shared=1),
    Case("qwen2_moe_renorm", "qwen2_moe", "renorm", "qwen2"),
    Case("qwen2_moe_window", "qwen2_moe", "softmax", "qwen2", shared=2, base=WINDOWED),
    Case("qwen2_moe_layer", "qwen2_moe", "softmax", "qwen2", shared=1, mixture=ONE),
    Case("qwen2_moe_last", "qwen2_moe", "all", expert={"last_k_dense_replace": 1}),
    Case("qwen2_moe_shared", "qwen2_moe", "renorm", shared=[1, 2]),
    Case("qwen2_moe_head_dim", "qwen2_moe", "renorm", base={"head_dim": 8}),
    Case("qwen3_moe", "qwen3_moe", "softmax", "qwen3"),
    Case("qwen3_moe_layer", "qwen3_moe", "renorm", "qwen3", mixture=ONE),
    Case("granite", "granitemoeshared", "renorm", shared=1),
    Case("granite_alone", "granitemoeshared", "cool"),
    Case("granite_bias", "granitemoeshared", "renorm", base={"attention_bias": True}),
    Case("granite_qwen2", "granitemoeshared", "renorm", "qwen2"),
    Case("granite_head_dim", "granitemoeshared", "renorm", shared=2, base={"head_dim": 8}),
    Case("glm4", "glm4_moe", "sigmoid", shared=1),
    Case("glm4_alone", "glm4_moe", "sigmoid"),
    Case("glm4_qwen3", "glm4_moe", "sigmoid", "qwen3", shared=2),
    Case("glm4_qwen2", "glm4_moe", "sigmoid", "qwen2"),
    Case("glm4_first", "glm4_moe", "sigmoid", mixture=ONE, shared=1),
    Case("glm4_one", "glm4_moe", "unit_one"),
    Case("glm4_dense", "glm4_moe", "unit_all", shared=1),
    Case("glm4_head_dim", "glm4_moe", "sigmoid", base={"head_dim": 8}),
]
ROUTED = ["renorm", "softmax", "all", "sigmoid", "bias", "unit", "ste", "ste_one", "ste_unit", "relu"]
ROUTED += ["representative", "signed", "norm", "norm_sum"]
CUSTOM = [
    *(Case(f"llama_{router}", "auto_map", router, shared=1) for router in ROUTED),
    *(Case(f"{family}_ste", "auto_map", "ste", family) for family in FAMILIES if family != "llama"),
    Case("gpt2_representative", "auto_map", "representative", "gpt2", shared=1),
    Case("opt_norm", "auto_map", "norm", "opt", shared=1),
    Case("gemma_relu", "auto_map", "relu", "gemma", shared=1),
    Case(
        "numbers",
        "auto_map",
        {"kind": "top_k", "num_experts_per_tok": [1, 3], "combine": "sigmoid", "init_std": 0.5},
        shared=[0, 2],
        mixture={"num_experts": [2, 3]},
    ),
    Case("one_layer", "auto_map", "ste", "gpt_neox", mixture=ONE),
    Case("lora", "auto_map", "ste", expert={"lora": {"r": 2}}, base={"tie_word_embeddings": True}),
    Case("trained", "auto_map", "ste", "gpt2", expert={"trainable": True}, mixture={"num_experts": 8}),
]


MORE = ["llama_ste", "llama_representative", "gpt2_ste", "opt_norm", "t5_ste", "gemma_ste"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equivalence, "_NEW_TOKENS", 3)  # what is generated is compared below
        for case in (*STOCK, *CUSTOM):
            try:
                export_case(case, folder)
            except Exception as error:
                raise AssertionError(f"{case.name}: {error}") from error
    return load_elsewhere((*STOCK, *CUSTOM), folder, MORE)


@pytest.mark.parametrize("case", STOCK, ids=lambda case: case.name)
def test_stock(case: Case, elsewhere: dict[str, Any]) -> None:
    result = elsewhere[case.name]
    assert result["type"] == case.to
    assert result["difference"] <= 1e-5 * max(1.0, result["scale"])
    assert result["generated"]
    assert not result["loading"], "every tensor in its place"


@pytest.mark.parametrize("case", CUSTOM, ids=lambda case: case.name)
def test_auto_map(case: Case, elsewhere: dict[str, Any]) -> None:
    result = elsewhere[case.name]
    assert result["type"] == f"{case.family}_routed_ffn"
    assert result["class"] == "RoutedFFNForLM"
    assert result["difference"] <= 1e-5 * max(1.0, result["scale"])
    assert result["generated"]
    assert not result["loading"]


@pytest.mark.parametrize("name", MORE)
def test_auto_map_in_other_ways(name: str, elsewhere: dict[str, Any]) -> None:
    result = elsewhere[name]
    assert result["again"] <= 1e-5 * max(1.0, result["scale"]), "saved again and loaded again"
    assert result["headless"] == "RoutedFFNModel"
    assert result["half"], "finite in half precision"
    assert result["router"] == [str(torch.float32)], "routers stay in fp32 in a half-precision model"
    assert result["fresh"], "finite with random weights"
