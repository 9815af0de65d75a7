"""What loading and converting refuse rather than go on with other weights than those that were meant."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from moadapt import saving
from moadapt.convert import convert_ffn_to_experts
from moadapt.converted import save_converted
from moadapt.errors import AdapterError, ConfigError
from moadapt.model import MixtureModel

TOP_2: dict[str, Any] = {"num_experts": 4, "router": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "softmax"}}
IDS = torch.arange(12).view(2, 6)


def dense() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(CONFIGS["llama"])).eval()


def saved(folder: Path, expert: dict[str, Any]) -> Tensor:
    """A converted model whose trained tensors have moved, saved whole; its logits."""
    model = convert_ffn_to_experts(dense(), {**TOP_2, "expert": {"kind": "ffn_partition", **expert}}).eval()
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            parameter.mul_(1.1) if name.endswith("_proj") else parameter.add_(0.01)  # rows that fill up stay zero
        save_converted(model, folder)
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def without(folder: Path, end: str) -> None:
    """Take tensors out of the adapter's file."""
    path = folder / "mixture.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(end)}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("changes", [None, {"losses": [{"kind": "load_balance"}]}])
def test_lora_that_is_missing_is_not_made_anew(changes: dict[str, Any] | None, tmp_path: Path) -> None:
    saved(tmp_path, {"lora": {"r": 2}})
    without(tmp_path, "lora_out_B")
    with pytest.raises(AdapterError, match=r"missing: model.layers.0.mlp.experts.lora_out_B"):
        MixtureModel.from_pretrained(None, tmp_path, changes=changes)


def test_an_adapter_over_linear_layers_is_whole_under_changes_too(tmp_path: Path) -> None:
    model = MixtureModel(dense(), saving.parse_mixture_config({"num_experts": 2, "expert": {"kind": "lora", "r": 2}}))
    model.save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / "mixture.safetensors") if ".experts." in name)
    without(tmp_path, name)
    with pytest.raises(AdapterError, match="missing"):
        MixtureModel.from_pretrained(dense(), tmp_path, changes={"losses": [{"kind": "importance"}]})


def test_trained_experts_are_not_lost_on_another_base(tmp_path: Path) -> None:
    want = saved(tmp_path, {"trainable": True})
    with pytest.raises(AdapterError, match=r"holds trained experts .* pass None"):
        MixtureModel.from_pretrained(dense(), tmp_path)
    for base in (None, AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(MixtureModel.from_pretrained(base, tmp_path)(input_ids=IDS).logits, want)


def test_experts_that_were_trained_once_are_not_lost_either(tmp_path: Path) -> None:
    """Trained, saved whole, then frozen under LoRA and saved whole again."""
    saved(tmp_path / "trained", {"trainable": True})
    changes = {"expert": {"trainable": False, "lora": {"r": 2}}}
    model = MixtureModel.from_pretrained(None, tmp_path / "trained", is_trainable=True, changes=changes).eval()
    save_converted(model, tmp_path / "frozen")
    want = model(input_ids=IDS).logits
    with pytest.raises(AdapterError, match="holds trained experts as a part of its own base model"):
        MixtureModel.from_pretrained(dense(), tmp_path / "frozen")
    assert torch.equal(MixtureModel.from_pretrained(None, tmp_path / "frozen")(input_ids=IDS).logits, want)


def test_frozen_experts_go_onto_their_first_base(tmp_path: Path) -> None:
    want = saved(tmp_path, {"lora": {"r": 2}})
    torch.testing.assert_close(MixtureModel.from_pretrained(dense(), tmp_path)(input_ids=IDS).logits, want)


def test_a_converted_model_of_the_hub_names_the_hub_as_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the repository only the adapter's files are in the cache; transformers must fetch the rest."""
    saved(tmp_path, {})
    monkeypatch.setattr(saving, "adapter_folder", lambda adapter: tmp_path)
    assert saving.read_adapter_config("someone/converted")[1]["name_or_path"] == "someone/converted"
    assert saving.read_adapter_config(tmp_path)[1]["name_or_path"] == str(tmp_path)


def test_weights_that_are_not_there_are_not_cut() -> None:
    with torch.device("meta"):
        offloaded = dense()
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp has no weights in memory"):
        convert_ffn_to_experts(offloaded, TOP_2)


@pytest.mark.parametrize(("what", "message"), [("fp8", "is quantised"), ("spread", "ZeRO-3 has spread")])
def test_weights_that_cannot_be_read_are_refused_by_name(what: str, message: str) -> None:
    model = dense().requires_grad_(False)
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert isinstance(weight, torch.nn.Parameter)
    weight.data = weight.data.to(torch.float8_e4m3fn) if what == "fp8" else weight.data.new_empty(0)
    with pytest.raises(ConfigError, match=rf"model.layers.1.mlp.up_proj .*{message}"):
        convert_ffn_to_experts(model, TOP_2)
    assert not any("experts" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_only_training_keeps_a_second_copy_of_the_experts(is_trainable: bool, tmp_path: Path) -> None:
    losses = [{"kind": "logits_distillation"}]
    options = {**TOP_2, "expert": {"kind": "ffn_partition", "trainable": True}, "losses": losses}
    save_converted(convert_ffn_to_experts(dense(), options), tmp_path)
    model = MixtureModel.from_pretrained(None, tmp_path, is_trainable=is_trainable)
    assert any("_original_" in name for name, _ in model.named_buffers()) == is_trainable
