"""What a stock target cannot hold is refused with every reason, and with what can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import ROUTERS, Case
from tiny import base_model

from moadapt import get_mixture_model
from moadapt.convert import convert_ffn_to_experts
from moadapt.errors import AdapterError, ConfigError
from moadapt.export import STOCK, export_converted, refusals

PER_LAYER_K = {"kind": "top_k", "num_experts_per_tok": [1, 2], "combine": "softmax"}
WINDOW = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
}
ONE = {"kind": "top_k", "combine": "sigmoid", "num_experts_per_tok": 1}
TABLE: list[tuple[Case, str]] = [
    (Case("", "mixtral", "softmax"), "combine: softmax leaves the kept weights"),
    (Case("", "granitemoeshared", "softmax"), "combine: softmax leaves the kept weights"),
    (Case("", "mixtral", "sigmoid"), "combine: sigmoid weighs each expert by itself"),
    (Case("", "qwen2_moe", "sigmoid"), "combine: sigmoid weighs each expert by itself"),
    (Case("", "glm4_moe", "renorm"), "glm4_moe scores by sigmoids"),
    (Case("", "glm4_moe", "bias"), "its router has a bias"),
    (Case("", "mixtral", "unit"), "only come near"),
    (Case("", "glm4_moe", "ste"), "every expert above a threshold"),
    (Case("", "mixtral", "relu"), "every expert with a positive score"),
    (Case("", "mixtral", "representative"), "not linear in x"),
    (Case("", "mixtral", "norm"), "a network of two layers"),
    (Case("", "mixtral", "renorm", shared=1), "it has shared experts"),
    (Case("", "qwen3_moe", "renorm", "qwen3", shared=1), "it has shared experts"),
    (Case("", "mixtral", "renorm", mixture={"layers_to_transform": [1]}), "has a mixture in every layer"),
    (Case("", "granitemoeshared", "renorm", mixture={"layers_to_transform": [0]}), "has a mixture in every layer"),
    (Case("", "glm4_moe", "sigmoid", mixture={"layers_to_transform": [0]}), "only the first layers dense"),
    (Case("", "qwen2_moe", PER_LAYER_K), "router.num_experts_per_tok differs among layers (layer 0: 1, layer 1: 2)"),
    (Case("", "qwen2_moe", "softmax", mixture={"num_experts": [2, 4]}), "num_experts differs among layers"),
    (Case("", "mixtral", "renorm", "qwen2"), "self_attn.q_proj.bias"),
    (Case("", "mixtral", "renorm", "qwen3"), "self_attn.q_norm.weight"),
    (Case("", "qwen3_moe", "renorm", "llama"), "it has no self_attn.k_norm.weight, self_attn.q_norm.weight"),
    (Case("", "glm4_moe", "sigmoid", base={"attention_bias": True}), "it has self_attn.o_proj.bias"),
    (Case("", "glm4_moe", "sigmoid", base={"mlp_bias": True}), "its experts have biases"),
    (Case("", "granitemoeshared", "renorm", "mistral", base={"sliding_window": 4}), "a sliding window"),
    (Case("", "qwen3_moe", "renorm", "qwen3", base=WINDOW), "only some of its layers have a sliding window"),
    (Case("", "mixtral", "renorm", "gemma"), "gemma models have another architecture"),
    (Case("", "mixtral", "renorm", "gpt2"), "no gate projection"),
    (Case("", "mixtral", "renorm", "gpt2"), "gpt2 models have another architecture"),
    (Case("", "glm4_moe", ONE, mixture={"num_experts": 1}), "needs 2"),
]


@pytest.mark.parametrize(("case", "reason"), TABLE, ids=lambda value: value.to if isinstance(value, Case) else value)
def test_each_reason(case: Case, reason: str, tmp_path: Path) -> None:
    model = case.converted()
    assert any(reason in text for text in refusals(model, case.to)), refusals(model, case.to)
    with pytest.raises(ConfigError, match=f"{case.to} cannot hold this model exactly"):
        export_converted(model, case.to, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert refusals(model, "auto_map") == []


def test_partial_rotary_needs_glm4(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    case = Case("", "mixtral", "sigmoid", "phi3", base={"rope_parameters": rope})
    model = case.converted()
    assert any("partial_rotary_factor: 0.5" in text for text in refusals(model, "mixtral"))
    report = export_converted(model, "glm4_moe", tmp_path / "out")
    assert report["exact"]


def test_all_reasons_at_once_and_the_way_out(tmp_path: Path) -> None:
    model = Case("", "mixtral", "softmax", "qwen2", shared=1, mixture={"layers_to_transform": [1]}).converted()
    with pytest.raises(ConfigError) as caught:
        export_converted(model, "mixtral", tmp_path / "out")
    text = str(caught.value)
    for reason in ("combine: softmax", "q_proj.bias", "shared experts", "layers 0 are dense"):
        assert reason in text
    assert "What can: exact: --to qwen2_moe or auto_map" in text
    assert "--approximate" not in text


def test_approximate_does_not_help_against_a_threshold(tmp_path: Path) -> None:
    model = Case("", "glm4_moe", "ste").converted()
    with pytest.raises(ConfigError, match=r"What can: exact: --to auto_map$"):
        export_converted(model, "glm4_moe", tmp_path / "out", approximate=True)


def test_approximate_is_offered_where_it_helps(tmp_path: Path) -> None:
    model = Case("", "mixtral", "unit").converted()
    with pytest.raises(ConfigError, match="nearly the same, with the error measured: --approximate"):
        export_converted(model, "mixtral", tmp_path / "out")


def test_rounding_a_factor_in_half_precision_is_refused(tmp_path: Path) -> None:
    router = ROUTERS["renorm"] | {"rescale": 3.0}
    model = Case("", "mixtral", router, dtype=torch.bfloat16).converted()
    assert any("no power of two" in text for text in refusals(model, "mixtral"))
    report = export_converted(model, "mixtral", tmp_path / "out", approximate=True)
    assert not report["exact"]
    assert 1e-5 < report["comparison"]["max_logit_difference"] < 0.05
    assert refusals(Case("", "mixtral", "renorm", dtype=torch.bfloat16).converted(), "mixtral") == []
    assert refusals(Case("", "mixtral", router).converted(), "mixtral") == []


def test_wrong_arguments(tmp_path: Path) -> None:
    model = Case("", "mixtral", "renorm").converted()
    with pytest.raises(ConfigError, match="unknown target 'mixtrall'; did you mean 'mixtral'"):
        export_converted(model, "mixtrall", tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown target"):
        refusals(model, "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "file").write_text("")
    for taken in ("full", "file"):
        with pytest.raises(ConfigError, match="not an empty folder"):
            export_converted(model, "mixtral", tmp_path / taken)
    (tmp_path / "empty").mkdir()
    export_converted(model, "mixtral", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_only_converted_models(tmp_path: Path) -> None:
    adapted = get_mixture_model(base_model(), {"expert": {"kind": "lora"}, "num_experts": 2})
    for to in (*STOCK, "auto_map"):
        with pytest.raises(AdapterError, match="only a converted model can be exported"):
            export_converted(adapted, to, tmp_path / "out")


def test_unknown_router_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moadapt.registry import ROUTERS as TABLE_OF_KINDS
    from moadapt.routers.relu import ReLURouter, ReLURouterConfig

    class OtherConfig(ReLURouterConfig):
        kind: Any = "other"

    class Other(ReLURouter):
        pass

    monkeypatch.setattr(TABLE_OF_KINDS, "_kinds", dict(TABLE_OF_KINDS._kinds))
    TABLE_OF_KINDS.register("other", OtherConfig)(Other)
    model = convert_ffn_to_experts(base_model(), {"num_experts": 4, "router": {"kind": "other"}})
    with pytest.raises(ConfigError, match="router other is not among those"):
        export_converted(model, "auto_map", tmp_path / "out")
