"""A converted model on disk: beside its base model, whole with it, and loaded again to be trained in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conversion_helpers import (
    FAMILIES,
    ROUTERS,
    by_router,
    calibration_batches,
    converted,
    inputs_of,
    mixture_options,
    same_snapshot,
    snapshot,
)
from safetensors.torch import load_file, save_file
from tiny import gradients
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moadapt import MixtureModel, get_mixture_model
from moadapt.converted import dense_state_dict, save_converted
from moadapt.errors import AdapterError, ConfigError

EXPERTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "trained": {"trainable": True},
    "lora": {"lora": {"r": 2, "lora_alpha": 6.0}},
}
FIRST = "model.layers.0.mlp"


def moved(
    experts: str = "trained",
    router: str = "top_2_renorm",
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> MixtureModel:
    """A converted model whose trainable tensors are not where they were."""
    expert = {"split": {"kind": "random"}, "num_shared_experts": 1, "padding": True, **EXPERTS[experts]}
    model = converted(
        mixture_options(4, ROUTERS[router], expert=expert, **more), family, dtype, calibration_batches(family=family)
    )
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if parameter.requires_grad:
                real = parameter != 0 if name.endswith(("in_proj", "out_proj", "in_bias")) else torch.ones(1).bool()
                parameter.add_(0.1 * torch.randn_like(parameter) * real)
    return model


def logits(model: Any, family: str = "llama") -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs_of(family)).logits
    return result


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_beside_its_base(router: str, tmp_path: Path) -> None:
    model = by_router(router, torch.float32, expert={"split": {"kind": "random"}, "trainable": True, "padding": True})
    model.save_pretrained(tmp_path)
    base = FAMILIES["llama"].model()
    before = snapshot(base)
    again = MixtureModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training
    same_snapshot(again.unload(), before)


@pytest.mark.parametrize("experts", EXPERTS)
def test_files_beside_the_base(experts: str, tmp_path: Path) -> None:
    """Routers and index lists always, experts and LoRA only if trained; and nothing of the rest of the model."""
    model = moved(experts)
    model.save_pretrained(tmp_path)
    names = {"frozen": [], "trained": ["in_proj", "out_proj"]}.get(
        experts, ["lora_in_A", "lora_in_B", "lora_out_A", "lora_out_B"]
    )
    parts = ["router.router.weight", "experts.neuron_indices", *(f"experts.{name}" for name in names)]
    tensors = load_file(tmp_path / "mixture.safetensors")
    assert set(tensors) == {f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in parts}
    again = MixtureModel.from_pretrained(FAMILIES["llama"].model(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "gpt2", "gpt_neox", "opt", "t5_gated"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_whole_folder(family: str, experts: str, tmp_path: Path) -> None:
    """Loads without naming a base model; transformers reads the dense model out of it, permutation undone."""
    model = moved(experts, family=family)
    save_converted(model, tmp_path, report={"perplexity": 1.0})
    assert json.loads((tmp_path / "conversion.json").read_text()) == {"perplexity": 1.0}
    again = MixtureModel.from_pretrained(None, tmp_path)
    is_t5 = family.startswith("t5")  # which is made here with an attention that is not its default
    reference.close(logits(again, family), logits(model, family), 1e-5 if is_t5 else 0.0, "loaded")
    auto = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
    plain, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with model.disable_adapter():
        reference.close(logits(plain, family), logits(model, family), 1e-5, "dense")
    original = FAMILIES[family].model().state_dict()
    unloaded = {name: tensor.clone() for name, tensor in model.unload().state_dict().items()}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, unloaded[name]), name
        in_block = any(
            name.startswith(f"{owner}.{part}") for owner in FAMILIES[family].owners for part in _parts(family)
        )
        assert torch.equal(tensor, original[name]) == (experts != "trained" or not in_block), name


def _parts(family: str) -> list[str]:
    row = FAMILIES[family]
    return [f"{part}." for part in (row.up, row.down, row.gate) if part]


def test_whole_folder_in_shards(tmp_path: Path) -> None:
    model = moved("trained")
    save_converted(model, tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert f"{FIRST}.gate_proj.weight" in index["weight_map"]
    assert torch.equal(logits(MixtureModel.from_pretrained(None, tmp_path)), logits(model))


@pytest.mark.parametrize("experts", EXPERTS)
def test_whole_folder_in_bf16(experts: str, tmp_path: Path) -> None:
    """Trained experts are kept in fp32 by the trainer; the folder holds the base model's dtype."""
    model = moved(experts, dtype=torch.bfloat16)
    save_converted(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = MixtureModel.from_pretrained(None, tmp_path)
    assert again.base_model.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    if experts == "trained":
        for layer in model.injection.layers.values():
            for _, parameter in layer.experts.adapter_parameters():
                parameter.data = parameter.data.float() * 1.001
        save_converted(model, tmp_path)
        assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
        assert {p.dtype for p in model.unload().parameters()} == {torch.bfloat16}


def test_a_model_that_is_cast_after_its_conversion_comes_back_in_its_new_dtype(tmp_path: Path) -> None:
    model = moved("lora").to(torch.float64)
    want = logits(model)
    save_converted(model, tmp_path)
    assert torch.equal(logits(MixtureModel.from_pretrained(None, tmp_path)), want)
    base = model.unload()
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float64}
    reference.close(logits(base), logits(FAMILIES["llama"].model()), 1e-5, "dense")


def test_saving_again_what_was_loaded_from_a_whole_folder(tmp_path: Path) -> None:
    """Beside its base (the first folder), and whole."""
    model = moved("trained")
    save_converted(model, tmp_path / "one")
    again = MixtureModel.from_pretrained(None, tmp_path / "one", is_trainable=True)
    with torch.no_grad():
        for _, parameter in again.adapter_parameters():
            parameter.mul_(1.25)
    again.save_pretrained(tmp_path / "beside")
    save_converted(again, tmp_path / "whole")
    for folder in ("beside", "whole"):
        assert torch.equal(logits(MixtureModel.from_pretrained(None, tmp_path / folder)), logits(again)), folder
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    assert torch.equal(logits(MixtureModel.from_pretrained(None, tmp_path / "whole")), logits(again))
    assert torch.equal(logits(MixtureModel.from_pretrained(None, tmp_path / "elsewhere")), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save(tied: bool, tmp_path: Path) -> None:
    """Trained copies go into the whole folder; the originals are what unload() gives."""
    options = mixture_options(4, ROUTERS["top_2_renorm"], modules_to_save=["norm", "input_layernorm"])
    model = converted(options, tie_word_embeddings=tied)
    before = FAMILIES["llama"].model(tie_word_embeddings=tied).state_dict()
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if ".copy." in name:
                parameter.mul_(1.5)
    want = logits(model)
    save_converted(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "beside")
    assert torch.equal(logits(MixtureModel.from_pretrained(None, tmp_path / "whole")), want)
    base = FAMILIES["llama"].model(tie_word_embeddings=tied)
    assert torch.equal(logits(MixtureModel.from_pretrained(base, tmp_path / "beside")), want)
    dense = dense_state_dict(model)
    assert set(dense) == set(before)
    for name, tensor in dense.items():
        factor = 1.5 if "norm" in name and "post" not in name else 1.0
        assert torch.equal(tensor, before[name] * factor), name
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=",".join)
def test_trained_embeddings(names: list[str], tied: bool, tmp_path: Path) -> None:
    """A copy that is trained is tied to nothing any more, and the folder says so by holding both."""
    options = mixture_options(4, ROUTERS["top_2_renorm"], modules_to_save=names)
    model = converted(options, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if ".copy." in name:
                parameter.mul_(1.5)
    want = logits(model)
    save_converted(model, tmp_path)
    assert torch.equal(logits(MixtureModel.from_pretrained(None, tmp_path)), want)


def test_state_dict_goes_and_comes() -> None:
    model, other = (
        moved("trained"),
        converted(
            mixture_options(
                4,
                ROUTERS["top_2_renorm"],
                expert={"split": {"kind": "random"}, "num_shared_experts": 1, "padding": True, "trainable": True},
            )
        ),
    )
    assert (logits(other) - logits(model)).abs().max() > 1e-3
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    wrong = {name: tensor.flip(0) if "indices" in name else tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match="other neurons"):
        other.load_state_dict(wrong)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("experts", EXPERTS)
def test_further_training_in_another_way(experts: str, whole: bool, tmp_path: Path) -> None:
    """From routers alone to experts or LoRA, with other losses; the answers are the same before the first step."""
    model = moved("frozen")
    (save_converted if whole else MixtureModel.save_pretrained)(model, tmp_path)  # type: ignore[arg-type]
    changes = {"expert": EXPERTS[experts], "losses": [{"kind": "block_distillation"}, {"kind": "load_balance"}]}
    base = None if whole else FAMILIES["llama"].model()
    again = MixtureModel.from_pretrained(base, tmp_path, is_trainable=True, changes=changes)
    assert torch.equal(logits(again), logits(model))
    again.train()
    again(**inputs_of("llama")).loss.backward()
    assert {"block_distillation", "load_balance"} <= set(again.last_losses)
    kinds = {"frozen": set(), "trained": {"in_proj", "out_proj"}}.get(
        experts, {"lora_in_A", "lora_in_B", "lora_out_A", "lora_out_B"}
    )
    assert {name.rsplit(".", 1)[-1] for name in gradients(again)} == {"weight", *kinds}


def test_from_trained_experts_to_lora_on_them(tmp_path: Path) -> None:
    """A whole folder holds the trained experts as its base; beside a base they would be lost, which is refused."""
    model = moved("trained")
    save_converted(model, tmp_path / "whole")
    changes = {"expert": {"trainable": False, "lora": {"r": 2}}}
    again = MixtureModel.from_pretrained(None, tmp_path / "whole", is_trainable=True, changes=changes)
    assert torch.equal(logits(again), logits(model))
    model.save_pretrained(tmp_path / "beside")
    base = FAMILIES["llama"].model()
    before = snapshot(base)
    with pytest.raises(AdapterError, match="in_proj"):
        MixtureModel.from_pretrained(base, tmp_path / "beside", changes=changes)
    same_snapshot(base, before)


STRUCTURE: dict[str, dict[str, Any]] = {
    "num_experts": {"num_experts": 5},
    "target_modules": {"target_modules": ["mlp"]},
    "layers_to_transform": {"layers_to_transform": [0]},
    "expert.num_shared_experts": {"expert": {"num_shared_experts": 2}},
    "expert.split": {"expert": {"split": {"kind": "contiguous"}}},
    "expert.padding": {"expert": {"padding": False}},
    "expert.first_k_dense_replace": {"expert": {"first_k_dense_replace": 1}},
    "expert.kind": {"expert": {"kind": "lora"}},
}


@pytest.mark.parametrize("option", STRUCTURE)
def test_what_cannot_change_any_more(option: str, tmp_path: Path) -> None:
    moved("frozen").save_pretrained(tmp_path)
    base = FAMILIES["llama"].model()
    before = snapshot(base)
    with pytest.raises(ConfigError, match=option):
        MixtureModel.from_pretrained(base, tmp_path, changes=STRUCTURE[option])
    same_snapshot(base, before)


def test_a_preset_as_a_change(tmp_path: Path) -> None:
    """Its losses and ways to train, over the experts that there are."""
    model = moved("frozen", "sigmoid_ste")
    save_converted(model, tmp_path)
    again = MixtureModel.from_pretrained(None, tmp_path, is_trainable=True, changes={"preset": "dsmoe"})
    config = again.mixture_config
    assert config.num_experts == 4
    assert config.expert.num_shared_experts == 1
    assert config.expert.split.kind == "random"
    assert config.expert.trainable
    assert [loss.kind for loss in config.losses] == ["sparsity"]
    assert torch.equal(logits(again), logits(model))
    changes = {"preset": "dsmoe", "expert": {"trainable": False}, "router": {"threshold": 0.6}}
    again = MixtureModel.from_pretrained(None, tmp_path, is_trainable=True, changes=changes)
    assert not again.mixture_config.expert.trainable
    assert {site.router.threshold for site in again.injection.routers.values()} == {0.6}
    with pytest.raises(ConfigError, match="dsmoe"):
        MixtureModel.from_pretrained(None, tmp_path, changes={"preset": "dsmo"})


def test_another_router_starts_anew_or_is_refused(tmp_path: Path) -> None:
    """Tensors of equal names and shapes are taken over; others do not fit, and are named."""
    model = moved("frozen", "sigmoid_ste")
    model.save_pretrained(tmp_path)
    base = FAMILIES["llama"].model()
    again = MixtureModel.from_pretrained(base, tmp_path, changes={"preset": "remoe"})
    name = f"{FIRST}.router.router.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    again.unload()
    before = snapshot(base)
    with pytest.raises(AdapterError, match=r"router\.bias"):
        MixtureModel.from_pretrained(base, tmp_path, changes={"router": {"bias": True}})
    same_snapshot(base, before)


def damaged(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "mixture.safetensors")
    change(tensors)
    save_file(tensors, folder / "mixture.safetensors")


INDICES = f"{FIRST}.experts.neuron_indices"
DAMAGES: dict[str, tuple[Any, str]] = {
    "missing_router": (lambda t: t.pop(f"{FIRST}.router.router.weight"), "missing: .*router"),
    "missing_lists": (lambda t: t.pop(INDICES), "index lists of model.layers.0.mlp"),
    "neuron_twice": (lambda t: t[INDICES].__setitem__((0, 0), int(t[INDICES][0, 1])), "exactly once"),
    "other_shape": (
        lambda t: t.__setitem__(f"{FIRST}.router.router.weight", torch.zeros(3, 16)),
        r"\(3, 16\) in the file, \(4, 16\) in the model",
    ),
    "missing_experts": (lambda t: t.pop(f"{FIRST}.experts.in_proj"), "missing: .*in_proj"),
    "left_over": (lambda t: t.update(other=torch.zeros(1)), "left over: other"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(name: str, tmp_path: Path) -> None:
    change, words = DAMAGES[name]
    moved("trained").save_pretrained(tmp_path)
    damaged(tmp_path, change)
    base = FAMILIES["llama"].model()
    before = snapshot(base)
    with pytest.raises((AdapterError, ConfigError), match=words):
        MixtureModel.from_pretrained(base, tmp_path)
    same_snapshot(base, before)


def test_another_base_model(tmp_path: Path) -> None:
    moved("frozen").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="intermediate_size: 20 there, 24 here"):
        MixtureModel.from_pretrained(FAMILIES["llama"].model(intermediate_size=24), tmp_path)


def test_places_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        save_converted(moved("frozen"), tmp_path / "file")
    adapters = get_mixture_model(FAMILIES["llama"].model(), {"num_experts": 2})
    with pytest.raises(AdapterError, match="converted"):
        save_converted(adapters, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    adapters.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="moadapt export"):
        moved("frozen").merge_and_unload()


def test_loss_states_are_saved(tmp_path: Path) -> None:
    losses = [{"kind": "target_sparsity", "target": 0.25}]
    model = moved("frozen", "relu", losses=losses).train()
    model(**inputs_of("llama"))
    for _ in range(3):
        model.end_step({name: float(value) for name, value in model.last_losses.items()})
    state = model.objective.states()
    assert list(state) == ["losses.target_sparsity.strength"]
    model.save_pretrained(tmp_path)
    again = MixtureModel.from_pretrained(FAMILIES["llama"].model(), tmp_path, is_trainable=True)
    assert again.objective.states() == state
    want = 1e-8 * 1.2**3 if float(model.last_losses["target_sparsity/active_share"]) > 0.25 else 1e-8 / 1.2**3
    assert float(state["losses.target_sparsity.strength"]) == pytest.approx(want)
