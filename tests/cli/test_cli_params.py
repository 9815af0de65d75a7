"""`params` against models that are really built, for every preset on several families, and by independent sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import invoke
from tiny import CONFIGS, base_model, batch

from moadapt import convert_ffn_to_experts, get_mixture_model
from moadapt.params import count_parameters
from moadapt.presets import PRESETS

FAMILIES = ["llama", "gemma", "phi3", "gpt2", "opt", "t5"]


PARTITIONS = [name for name, preset in PRESETS.items() if preset["expert"]["kind"] == "ffn_partition"]
WIDTHS = {"gpt2": "n_inner", "opt": "ffn_dim", "t5": "d_ff"}


def _mixture(preset: str, family: str) -> dict[str, Any]:
    mixture: dict[str, Any] = {"preset": preset, "target_modules": "all-linear"}
    if preset in PARTITIONS:
        mixture["num_experts"] = 3 if preset == "cmoe" else 4
        mixture["expert"] = {"num_shared_experts": 1} if preset == "cmoe" else {}
        if "num_experts_per_tok" in PRESETS[preset]["router"]:
            mixture["router"] = {"num_experts_per_tok": 2}
        fit = {"factorllm": {"kind": "prior_approximate"}, "d2dmoe": {}}
        if preset in fit:
            mixture["router"] = {**mixture.get("router", {}), "fit": {**fit[preset], "steps": 2}}
    if preset == "mola":
        mixture["num_experts"] = [2, 4]
    if preset in ("mtl_lora", "poly"):
        mixture["tasks"] = ["first", "second", "third"]
    if "malora" in preset:
        mixture["expert"] = {"r": 2, "shared_r": 8}
    return mixture


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_counts_without_weights_are_those_of_the_built_model(preset: str, family: str, tmp_path: Path) -> None:
    width = {WIDTHS.get(family, "intermediate_size"): 64} if preset in PARTITIONS else {}
    base = base_model(family, **width)
    base.config.save_pretrained(tmp_path / "base")
    config = tmp_path / "run.yaml"
    mixture = _mixture(preset, family)
    config.write_text(json.dumps({"model_name_or_path": "base", "mixture": mixture}), encoding="utf-8")
    result = invoke("params", config, "--json")
    assert result.exit_code == 0, result.output
    counted = json.loads(result.stdout)[preset]
    if preset in PARTITIONS:
        model = convert_ffn_to_experts(base, mixture, [batch(4, family=family)])
    else:
        model = get_mixture_model(base, mixture)
    assert counted == count_parameters(model).to_dict()
    assert (counted["total"]["trainable"], counted["total"]["total"]) == model.get_nb_trainable_parameters()
    assert counted["total"]["frozen"] == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_rows_of_a_mixture_by_hand() -> None:
    """Llama with D = 16, FFN 20, 2 layers: q_proj 16 -> 16 and down_proj 20 -> 16, four experts of rank 3, top-2."""
    mixture = {
        "num_experts": 4,
        "target_modules": ["q_proj", "down_proj"],
        "expert": {"kind": "lora", "r": 3},
        "router": {"kind": "top_k", "num_experts_per_tok": 2},
    }
    counts = count_parameters(get_mixture_model(base_model("llama"), mixture))
    rows = {row.kind: row for row in counts.rows}
    assert list(rows) == ["q_proj", "down_proj", "routers", "not adapted"]
    for kind, inputs in (("q_proj", 16), ("down_proj", 20)):
        row = rows[kind]
        assert row.modules == 2
        assert row.frozen == 2 * inputs * 16
        assert row.trainable == 2 * 4 * 3 * (inputs + 16)
        assert row.active == row.frozen + 2 * 2 * 3 * (inputs + 16)
    assert rows["routers"].trainable == 2 * 4 * (16 + 20)
    assert counts.total.active == sum(row.active for row in counts.rows)


@pytest.mark.parametrize(
    ("expert", "trainable"),
    [({}, 0), ({"trainable": True}, 3 * 16 * 60), ({"lora": {"r": 2}}, None)],
)
def test_rows_of_a_partition_by_hand(expert: dict[str, Any], trainable: int | None) -> None:
    """Llama with D = 16 and FFN 60 as one shared and three routed experts, one of which is selected: half of it.

    A width of 15 is filled up to 16: rows of zeros are no parameters, but a LoRA's matrices are as wide as they are.
    """
    mixture = {
        "num_experts": 3,
        "expert": {"kind": "ffn_partition", "num_shared_experts": 1, **expert},
        "router": {"kind": "top_k", "num_experts_per_tok": 1},
        "layers_to_transform": [1],
    }
    model = get_mixture_model(base_model("llama", intermediate_size=60), mixture)
    counts = count_parameters(model)
    rows = {row.kind: row for row in counts.rows}
    assert list(rows) == ["mlp", "routers", "not adapted"]
    lora = sum(p.numel() for name, p in model.adapter_parameters() if ".lora_" in name)
    assert rows["mlp"].trainable == (lora if trainable is None else trainable)
    assert rows["mlp"].total == 3 * 16 * 60 + lora
    assert rows["mlp"].active == rows["mlp"].total // 2
    assert rows["routers"].trainable == 3 * 16
    assert not counts.active_is_bound


@pytest.mark.parametrize("router", [{"kind": "sigmoid_ste"}, {"kind": "relu"}])
def test_routers_without_a_fixed_number_count_all_experts(router: dict[str, Any]) -> None:
    mixture = {"num_experts": 4, "expert": {"kind": "ffn_partition"}, "router": router}
    counts = count_parameters(get_mixture_model(base_model("llama", intermediate_size=64), mixture))
    assert counts.active_is_bound
    assert counts.total.active == counts.total.total


def test_dense_routers_use_all_experts() -> None:
    model = get_mixture_model(base_model("llama"), {"num_experts": 4, "router": {"kind": "softmax"}})
    total = count_parameters(model).total
    assert total.active == total.total


@pytest.mark.parametrize("tied", [True, False])
def test_modules_to_save_count_as_trainable_and_their_originals_are_idle(tied: bool) -> None:
    mixture = {"num_experts": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = get_mixture_model(base_model("llama", tie_word_embeddings=tied), mixture)
    counts = count_parameters(model)
    row = next(row for row in counts.rows if row.kind == "lm_head")
    assert row.trainable == row.active == 16 * 40
    assert row.frozen == (0 if tied else 16 * 40)  # tied, the original is the embedding, which is counted there
    assert (counts.total.trainable, counts.total.total) == model.get_nb_trainable_parameters()


def test_meta_model_has_no_data(tmp_path: Path) -> None:
    from moadapt.pretrained import empty_base
    from moadapt.run_config import RunConfig

    CONFIGS["llama"].save_pretrained(tmp_path)
    model = empty_base(RunConfig(model_name_or_path=str(tmp_path)))
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


def test_table_shows_kinds_and_totals(project: Path) -> None:
    result = invoke("params", project)
    assert result.exit_code == 0
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [line[0] for line in lines] == ["q_proj", "down_proj", "routers", "not adapted", "total"]
    numbers = [[int(cell.replace(",", "")) for cell in line[2:]] for line in lines]
    assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == numbers[-1]


def test_model_that_cannot_be_read_exits_2(project: Path) -> None:
    result = invoke("params", project, f"model_name_or_path={project.parent}")
    assert result.exit_code == 2
    assert "model_name_or_path: cannot load" in result.stderr
