"""Adapter folders: what is written, bitwise round trips, and what loading says when something is wrong."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import FEW, ROWS, Row
from safetensors.torch import load_file, save_file
from tiny import base_model, batch, mixture_model
from torch import nn

from moadapt import MixtureModel, get_mixture_model
from moadapt.errors import AdapterError
from moadapt.saving import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, base_identity, read_adapter_config

CONFIG = FEW[3].config(losses=[{"kind": "load_balance"}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mixture_model(CONFIG).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(document | changes))


def fingerprint(model: nn.Module) -> Any:
    """Everything about a base model that a failed load must not change."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        {name: (parameter.requires_grad, parameter.detach().clone()) for name, parameter in model.named_parameters()},
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        model.training,
    )


def assert_same(before: Any, after: Any) -> None:
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (trainable, value) in before[1].items():
        assert trainable == after[1][name][0], name
        assert torch.equal(value, after[1][name][1]), name
    assert before[2:] == after[2:]


# -- writing ------------------------------------------------------------------------------------------------------


def test_files_and_their_contents(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    model = mixture_model(CONFIG)
    tensors = load_file(folder / WEIGHTS_FILE)
    assert tensors.keys() == {name for name, _ in model.adapter_parameters()}
    assert sum(tensor.numel() for tensor in tensors.values()) == model.get_nb_trainable_parameters()[0]
    document = json.loads((folder / CONFIG_FILE).read_text())
    assert document["format_version"] == 1
    assert document["base_model"]["architecture"] == "LlamaForCausalLM"
    assert document["base_model"]["hidden_size"] == 16
    assert document["mixture"]["expert"]["kind"] == "malora"
    card = (folder / CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: moadapt\n")
    assert "from_pretrained" in card


def test_no_pickle(folder: Path) -> None:
    for path in folder.iterdir():
        with pytest.raises(ValueError, match=r"opcode|pickle"):
            list(pickletools.genops(path.read_bytes()))
    with pytest.raises(AdapterError, match="safe_serialization"):
        mixture_model(CONFIG).save_pretrained(folder, safe_serialization=False)


def test_unknown_saving_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="push_to_hub"):
        mixture_model(CONFIG).save_pretrained(tmp_path, push_to_hub=True)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    mixture_model(CONFIG).save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()


def test_place_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        mixture_model(CONFIG).save_pretrained(tmp_path / "file")


def test_saving_again_replaces(folder: Path) -> None:
    model = mixture_model(CONFIG, noise=0.7)
    model.save_pretrained(folder)
    stored = load_file(folder / WEIGHTS_FILE)
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.adapter_parameters())
    assert len(list(folder.iterdir())) == 3


# -- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_round_trip_is_bitwise(row: Row, tmp_path: Path) -> None:
    """Every kind of expert and router; scopes alternate."""
    scope = ["linear", "block", ["ffn", "attention"]][len(row.name) % 3]
    model = mixture_model(row.config(scope))
    model.save_pretrained(tmp_path)
    again = MixtureModel.from_pretrained(base_model(), tmp_path)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert again.mixture_config == model.mixture_config
    inputs = batch()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_trainable_on_request(folder: Path) -> None:
    base = base_model().train()
    model = MixtureModel.from_pretrained(base, folder, is_trainable=True)
    assert {name for name, p in model.base_model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.adapter_parameters()
    }
    assert model.training
    model(**batch()).loss.backward()


def test_loads_its_base_model_by_name(folder: Path, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    base = type(base_model()).from_pretrained(tmp_path / "base")
    model = get_mixture_model(base, CONFIG)
    model.save_pretrained(tmp_path / "named")
    again = MixtureModel.from_pretrained(None, tmp_path / "named")
    inputs = batch()
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    with pytest.raises(AdapterError, match="does not name its base model"):
        MixtureModel.from_pretrained(None, folder)


def test_base_model_that_is_gone(folder: Path) -> None:
    base = json.loads((folder / CONFIG_FILE).read_text())["base_model"]
    edit(folder, base_model=base | {"name_or_path": "/no/such/model"})
    with pytest.raises(AdapterError, match="cannot load the base model '/no/such/model'"):
        MixtureModel.from_pretrained(None, folder)


def test_adapter_in_half_precision_base(tmp_path: Path) -> None:
    model = mixture_model(CONFIG, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / WEIGHTS_FILE).values())
    again = MixtureModel.from_pretrained(base_model(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_state_dict_is_the_adapter_alone() -> None:
    model, other = mixture_model(CONFIG), mixture_model(CONFIG, noise=0.9)
    names = {name for name, _ in model.adapter_parameters()}
    assert model.state_dict().keys() == names
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch()).logits, model(**batch()).logits)
    wrapped = nn.ModuleDict({"inner": model})
    assert wrapped.state_dict().keys() == {f"inner.{name}" for name in names}
    with pytest.raises(AdapterError, match="missing: "):
        other.load_state_dict({})


def test_config_can_be_read_without_a_model(folder: Path) -> None:
    config, base = read_adapter_config(folder)
    assert config.expert.kind == "malora"
    assert base == {"name_or_path": "", **base_identity(base_model())}


# -- what is wrong ------------------------------------------------------------------------------------------------


def load_fails(folder: Path, model: Any = None) -> str:
    """The error's text; the model that was given is unharmed."""
    model = base_model().train() if model is None else model
    before = fingerprint(model)
    with pytest.raises(AdapterError) as caught:
        MixtureModel.from_pretrained(model, folder)
    assert_same(before, fingerprint(model))
    return str(caught.value)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert file in load_fails(folder)


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = load_fails(tmp_path / "nowhere")
    assert "nowhere" in text
    assert "no such folder" in text


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_weights(folder: Path, damage: str) -> None:
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"\x93" * 200, "empty": b""}[damage])
    text = load_fails(folder)
    assert WEIGHTS_FILE in text
    assert "damaged" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format_version": 1,\n "base_model": }', r":2: not valid JSON"),
        (b"\xff\xfe\x00bin", "damaged"),
        (b"[]", "format_version None"),
        (b"{}", "format_version None"),
        (b'{"format_version": 2}', "format_version 2, this version reads 1; update moadapt"),
        (b'{"format_version": 1}', "no 'mixture' in it"),
        (b'{"format_version": 1, "mixture": {}}', "no 'base_model' in it"),
        (b'{"format_version": 1, "mixture": {}, "base_model": 3}', "base_model"),
    ],
)
def test_damaged_config(folder: Path, content: bytes, message: str) -> None:
    import re

    (folder / CONFIG_FILE).write_bytes(content)
    text = load_fails(folder)
    assert CONFIG_FILE in text
    assert re.search(message, text), text


def test_config_that_is_not_valid_lists_every_problem(folder: Path) -> None:
    mixture = json.loads((folder / CONFIG_FILE).read_text())["mixture"]
    mixture["expert"]["kind"] = "from_a_plugin"
    mixture["num_experts"] = 0
    edit(folder, mixture=mixture)
    text = load_fails(folder)
    assert "2 problems" in text
    assert "expert.kind: unknown expert kind 'from_a_plugin'" in text
    assert "num_experts" in text


def test_another_base_model(folder: Path) -> None:
    text = load_fails(folder, base_model(hidden_size=32, num_hidden_layers=3))
    assert "another base model" in text
    assert "hidden_size: 16 there, 32 here" in text
    assert "num_hidden_layers: 2 there, 3 here" in text
    text = load_fails(folder, base_model("qwen2"))
    assert "architecture: 'LlamaForCausalLM' there, 'Qwen2ForCausalLM' here" in text
    load_fails(folder, base_model("gpt2"))


def test_tensors_that_do_not_fit_are_all_listed(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    names = sorted(tensors)
    missing, misshapen = names[0], names[1]
    del tensors[missing]
    tensors[misshapen] = torch.zeros(3, 3)
    tensors["model.layers.9.extra"] = torch.zeros(2)
    save_file(tensors, path)
    text = load_fails(folder)
    assert f"missing: {missing}" in text
    assert "left over: model.layers.9.extra" in text
    assert f"shape of {misshapen}: (3, 3) in the file" in text
    assert str(path) in text


def test_a_long_list_is_cut(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    count = len(load_file(path))
    save_file({"other": torch.zeros(1)}, path)
    text = load_fails(folder)
    assert f"and {count + 1 - 10} more" in text


def test_loading_after_a_failure_works(folder: Path) -> None:
    base = base_model()
    good = (folder / WEIGHTS_FILE).read_bytes()
    save_file({"other": torch.zeros(1)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError):
        MixtureModel.from_pretrained(base, folder)
    (folder / WEIGHTS_FILE).write_bytes(good)
    model = MixtureModel.from_pretrained(base, folder)
    assert torch.equal(model(**batch()).logits, mixture_model(CONFIG)(**batch()).logits)


def test_config_that_no_longer_fits_the_model(folder: Path) -> None:
    """The identity agrees, but the mixture cannot be built: an error of ours, and the model as it was."""
    from moadapt.errors import MoadaptError

    mixture = json.loads((folder / CONFIG_FILE).read_text())["mixture"]
    edit(folder, mixture=mixture | {"target_modules": ["no_such_linear"]})
    base = base_model()
    before = fingerprint(base)
    with pytest.raises(MoadaptError, match="no_such_linear"):
        MixtureModel.from_pretrained(base, folder)
    assert_same(before, fingerprint(base))
