"""`convert_ffn_to_experts`: which layers, how many experts, every split and router, calibration, presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conversion_helpers import (
    CALIBRATED,
    FAMILIES,
    ROUTERS,
    NaiveNeurons,
    calibration_batches,
    converted,
    inputs_of,
    mixture_options,
    neuron_lists,
    same_snapshot,
    snapshot,
)
from torch import Tensor

from moadapt import MixtureModel
from moadapt.convert import conversion_config, convert_ffn_to_experts
from moadapt.errors import ConfigError, DataError
from moadapt.registry import SPLITS
from moadapt.routing import RoutingContext

ALL_SPLITS = [name for name in SPLITS.names() if name != "file"]
FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"


def index_lists(model: MixtureModel) -> dict[str, Tensor]:
    return {name: layer.experts.neuron_indices for name, layer in model.injection.layers.items()}


def same_model(got: MixtureModel, want: MixtureModel) -> None:
    """The same tensors and the same answers, bit by bit."""
    state, wanted = got.base_model.state_dict(), want.base_model.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    inputs = inputs_of("llama")
    assert torch.equal(got(**inputs).logits, want(**inputs).logits)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("split", ALL_SPLITS)
def test_every_split_with_every_router(split: str, router: str) -> None:
    """Shared experts, padding, calibration: a partition, and a model that answers otherwise than the dense one."""
    options = mixture_options(
        4, ROUTERS[router], expert={"split": {"kind": split}, "num_shared_experts": 1, "padding": True}
    )
    base = FAMILIES["llama"].model(num_hidden_layers=1)
    inputs = inputs_of("llama")
    with torch.no_grad():
        want = base(**inputs).logits
    model = convert_ffn_to_experts(base, options, calibration_batches(2))
    bank = model.injection.layers[FIRST].experts
    assert bank.neuron_indices.shape == (5, 4)
    assert sorted(bank.neuron_indices.flatten().tolist()) == list(range(20))
    with torch.no_grad():
        got = model(**inputs).logits
        assert got.isfinite().all()
        assert (got - want).abs().max() > 1e-3
        with model.disable_adapter():
            reference.close(model(**inputs).logits, want, 1e-5, "dense")
    assert not model.training


@pytest.mark.parametrize("name", ["top_2_renorm", "sigmoid_ste", "relu"])
def test_model_is_the_mixture_of_the_dense_rows(name: str) -> None:
    """The first block of a converted model, with the gates that its router gave, against the loop."""
    row = FAMILIES["llama"]
    naive = NaiveNeurons.of(row.model(torch.float64), FIRST, row)
    options = mixture_options(
        4, ROUTERS[name], expert={"split": {"kind": "random"}, "num_shared_experts": 1, "padding": True}
    )
    model = converted(options, dtype=torch.float64)
    seen: dict[str, Any] = {}
    layer = model.injection.layers[FIRST]
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    layer.router.register_forward_hook(lambda module, args, output: seen.update(routing=output))
    with torch.no_grad():
        model(**inputs_of("llama"))
        gates_TN = seen["routing"].weights_TN
        gates_TE = torch.cat([torch.ones(len(gates_TN), 1, dtype=torch.float64), gates_TN], dim=1)
        want = naive.mixture(seen["x"].flatten(0, 1), gates_TE, neuron_lists(layer.experts.neuron_indices))
    reference.close(seen["y"].flatten(0, 1), want, 1e-12, "block")
    assert len(gates_TN.unique()) > 4


def test_the_default() -> None:
    """Eight contiguous slices, four of them by mean gate rows, weights 1."""
    model = converted({}, intermediate_size=24)
    config = model.mixture_config
    assert config.num_experts == 8
    assert (config.expert.kind, config.expert.split.kind) == ("ffn_partition", "contiguous")
    assert torch.equal(index_lists(model)[FIRST], torch.arange(24).view(8, 3))
    base = FAMILIES["llama"].model(intermediate_size=24)
    router = model.injection.routers[SECOND].router
    gate_FD = base.model.layers[1].mlp.gate_proj.weight
    reference.close(router.weight, gate_FD.view(8, 3, 16).mean(1), 1e-6, "mean gate rows")
    assert router.num_experts_per_tok == 4
    routing = router(torch.randn(5, 16), RoutingContext())
    assert torch.equal(routing.weights_TN, routing.selected_TN.float())
    assert (routing.selected_TN.sum(-1) == 4).all()


def test_defaults_fill_what_is_not_said() -> None:
    config = conversion_config({"router": {"num_experts_per_tok": 2}, "expert": {"split": {"kind": "random"}}})
    assert (config.expert.kind, config.router.kind, config.router.combine) == ("ffn_partition", "top_k", "unit")
    config = conversion_config({"router": {"norm_topk_prob": True}})
    assert (config.router.combine, config.router.num_experts_per_tok) == ("softmax_renorm", 4)
    config = conversion_config({"router": {"kind": "sigmoid_ste"}})
    assert config.router.kind == "sigmoid_ste"


@pytest.mark.parametrize(("number", "kept"), [(4, 2), (5, 3), ([4, 8], [2, 4]), ({"default": 16}, {"default": 8})])
def test_half_of_the_experts_are_kept_where_nothing_is_said(number: Any, kept: Any) -> None:
    assert conversion_config({"num_experts": number}).router.num_experts_per_tok == kept


def test_routers_are_made_from_the_experts_that_they_rule() -> None:
    """Not from the shared ones, nor from the zero rows of padding."""
    router = {"kind": "top_k", "num_experts_per_tok": 2, "combine": "unit", "init": "mean_gate"}
    expert = {"split": {"kind": "random"}, "num_shared_experts": 2, "padding": True}
    model = converted(mixture_options(4, router, expert=expert))
    base = FAMILIES["llama"].model()
    for name, layer in model.injection.layers.items():
        gate_FD = base.get_submodule(name).gate_proj.weight
        lists = neuron_lists(layer.experts.neuron_indices)
        assert [len(part) for part in lists] == [4, 4, 3, 3, 3, 3]
        want = torch.stack([gate_FD[part].mean(0) for part in lists[2:]])
        reference.close(layer.router.router.weight, want, 1e-6, name)


def test_dense_weights_are_not_kept_beside_the_experts() -> None:
    base = FAMILIES["llama"].model()
    linears = [base.model.layers[i].mlp.get_submodule(name) for i in (0, 1) for name in ("gate_proj", "down_proj")]
    model = convert_ffn_to_experts(base, mixture_options(4), calibration_batches())
    assert [linear.weight.numel() for linear in linears] == [0] * 4
    model.unload()
    assert [linear.weight.numel() for linear in linears] == [320] * 4


def test_numbers_per_layer() -> None:
    options = mixture_options(
        [2, 5],
        {"kind": "top_k", "num_experts_per_tok": [1, 3], "combine": "softmax", "init": "normal"},
        expert={"num_shared_experts": {"default": 0, r"layers\.0\.mlp": 2}},
    )
    model = converted(options)
    assert {name: tuple(lists.shape) for name, lists in index_lists(model).items()} == {FIRST: (4, 5), SECOND: (5, 4)}
    assert [site.router.num_experts for site in model.injection.routers.values()] == [2, 5]
    assert [site.router.num_experts_per_tok for site in model.injection.routers.values()] == [1, 3]
    assert model(**inputs_of("llama")).logits.isfinite().all()


CHOICES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "all": ({}, [0, 1, 2, 3]),
    "one": ({"layers_to_transform": 2}, [2]),
    "two": ({"layers_to_transform": [3, 0]}, [0, 3]),
    "not_first": ({"expert": {"first_k_dense_replace": 1}}, [1, 2, 3]),
    "not_last": ({"expert": {"last_k_dense_replace": 2}}, [0, 1]),
    "middle": ({"expert": {"first_k_dense_replace": 1, "last_k_dense_replace": 1}}, [1, 2]),
    "both": ({"expert": {"first_k_dense_replace": 1}, "layers_to_transform": [0, 2]}, [2]),
    "by_name": ({"target_modules": ["layers.1.mlp"]}, [1]),
    "by_pattern": ({"target_modules": r".*\.[13]\.mlp"}, [1, 3]),
    "but_one": ({"exclude_modules": ["layers.1.mlp"]}, [0, 2, 3]),
    "but_a_pattern": ({"target_modules": ["mlp"], "exclude_modules": r".*\.(0|3)\.mlp"}, [1, 2]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_of_layers(name: str) -> None:
    more, layers = CHOICES[name]
    base = FAMILIES["llama"].model(num_hidden_layers=4)
    dense = {name: module for name, module in base.named_modules() if name.endswith(".mlp")}
    model = convert_ffn_to_experts(base, mixture_options(4, **more))
    assert list(model.injection.layers) == [f"model.layers.{i}.mlp" for i in layers]
    for name, module in dense.items():
        assert (base.get_submodule(name) is module) == (name not in model.injection.layers)
    model.unload()
    assert all(base.get_submodule(name) is module for name, module in dense.items())


@pytest.mark.parametrize("split", ["activation_rate", "gradient", "coactivation"])
def test_calibration_a_block_at_a_time(split: str) -> None:
    """What fits into the memory changes nothing but the number of passes."""
    options = mixture_options(
        4, ROUTERS["representative"], expert={"split": {"kind": split}, "num_shared_experts": 1, "padding": True}
    )
    models, passes = [], []
    for memory in (2.0, 1e-9):
        seen: list[str] = []
        torch.manual_seed(5)
        base = FAMILIES["llama"].model()
        passes.append(0)
        base.register_forward_pre_hook(lambda *_: passes.append(passes.pop() + 1))
        model = convert_ffn_to_experts(
            base,
            options,
            calibration_batches(3),
            calibration_memory=memory,
            progress=lambda what, done, total: seen.append(f"{what} {done}/{total}"),  # noqa: B023
        )
        models.append(model)
        assert seen[-1] == "splitting 2/2"
        assert any(text.startswith("calibrating") for text in seen)
    assert passes[1] == 2 * passes[0] > 0
    same_model(models[1], models[0])


def test_importance_by_as_many_text_clusters_as_a_block_has_experts() -> None:
    """Blocks with other numbers of experts are calibrated by themselves."""
    expert = {"split": {"kind": "gradient"}}
    together = converted(mixture_options([2, 4], {"kind": "softmax"}, expert=expert), calibration=calibration_batches())
    for layer, number in ((0, 2), (1, 4)):
        options = mixture_options(number, {"kind": "softmax"}, expert=expert, layers_to_transform=layer)
        alone = converted(options, calibration=calibration_batches())
        ((name, lists),) = index_lists(alone).items()
        assert torch.equal(index_lists(together)[name], lists)


@pytest.mark.parametrize("router", [*sorted(CALIBRATED), "sigmoid_ste"])
def test_deterministic(router: str) -> None:
    options = mixture_options(4, ROUTERS[router], expert={"split": {"kind": "coactivation"}})
    same_model(*(converted(options, calibration=calibration_batches()) for _ in range(2)))


def test_calibration_does_not_see_padding_or_batches() -> None:
    options = mixture_options(4, ROUTERS["norm_regression"], expert={"split": {"kind": "activation_rate"}})
    batches = calibration_batches(3)
    rows = [
        {key: value[i : i + 1, : int(item["attention_mask"][i].sum())] for key, value in item.items()}
        for item in batches
        for i in range(4)
    ]
    wider = [{key: torch.nn.functional.pad(value, (0, 5)) for key, value in item.items()} for item in batches]
    models = [converted(options, dtype=torch.float64, calibration=given) for given in (batches, rows, wider)]
    for other in models[1:]:
        for name, lists in index_lists(models[0]).items():
            assert torch.equal(index_lists(other)[name], lists)
        for name, parameter in models[0].adapter_parameters():
            reference.close(dict(other.adapter_parameters())[name], parameter, 1e-5, name)


def test_calibration_leaves_the_model_as_it_was() -> None:
    """Also when it fails midway, and whatever was in training before."""
    base = FAMILIES["llama"].model().train()
    base.model.layers[0].eval()
    base.lm_head.weight.requires_grad_(False)
    before = snapshot(base)
    options = mixture_options(4, ROUTERS["representative"], expert={"split": {"kind": "gradient"}})
    batches = calibration_batches()
    with pytest.raises(DataError, match="texts"):
        convert_ffn_to_experts(base, options, [{key: value[:1] for key, value in batches[0].items()}])
    same_snapshot(base, before)
    batches[1]["input_ids"] = batches[1]["input_ids"] + 1000
    with pytest.raises(IndexError):
        convert_ffn_to_experts(base, options, batches)
    same_snapshot(base, before)
    base.train()
    before = snapshot(base)
    model = convert_ffn_to_experts(base, options, calibration_batches())
    assert all(parameter.grad is None for parameter in base.parameters())
    same_snapshot(model.unload(), before)


def test_unloaded_blocks_are_in_the_mode_of_the_model() -> None:
    for family in ("llama", "opt"):
        model = converted(mixture_options(4), family)
        base = model.train().unload()
        assert all(module.training for module in base.modules())


def test_few_calibration_tokens() -> None:
    options = mixture_options(4, ROUTERS["representative"], expert={"split": {"kind": "activation_rate"}})
    few = converted(options, calibration=calibration_batches(1, rows=1, length=6))
    assert few(**inputs_of("llama")).logits.isfinite().all()
    base = FAMILIES["llama"].model()
    capped = convert_ffn_to_experts(base, options, calibration_batches(), calibration_tokens=8)
    assert capped(**inputs_of("llama")).logits.isfinite().all()


PRESETS: dict[str, dict[str, Any]] = {
    "dsmoe": {"num_experts": 4},
    "llama_moe": {"num_experts": 4},
    "llama_moe_v2": {"num_experts": 4},
    "factorllm": {"router": {"fit": {"kind": "prior_approximate", "steps": 30}}},
    "cmoe": {"expert": {"padding": True}},
    "emoe": {"num_experts": 4, "router": {"num_experts_per_tok": 2}},
    "d2dmoe": {"num_experts": 4, "router": {"fit": {"steps": 30}}},
    "remoe": {"num_experts": 4},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    """Converted, evaluated, and where it is a method that trains, trained: every trained tensor gets a gradient."""
    from moadapt.presets import PRESETS as ALL

    batches = calibration_batches()
    model = converted({"preset": preset, **PRESETS[preset]}, calibration=batches)
    config = model.mixture_config
    assert config.preset == preset
    assert config.expert.split.kind == ALL[preset]["expert"].get("split", {"kind": "contiguous"})["kind"]
    assert config.router.kind == ALL[preset]["router"]["kind"]
    inputs = inputs_of("llama")
    assert model(**inputs).loss.isfinite()
    if not ALL[preset]["expert"].get("trainable"):
        return
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    without = {name for name, parameter in model.adapter_parameters() if parameter.grad is None}
    assert without == ({name for name in without if ".router." in name} if preset == "factorllm" else set())


def test_presets_without_the_text_that_they_need() -> None:
    for preset in ("cmoe", "factorllm", "d2dmoe"):
        base = FAMILIES["llama"].model()
        before = snapshot(base)
        with pytest.raises(ConfigError, match="calibration"):
            convert_ffn_to_experts(base, {"preset": preset, **PRESETS[preset]})
        same_snapshot(base, before)


def test_index_lists_from_a_converted_folder(tmp_path: Path) -> None:
    """A split that took calibration, again without any."""
    expert = {"split": {"kind": "activation_rate"}, "num_shared_experts": 1, "padding": True}
    router = {"kind": "top_k", "num_experts_per_tok": 2, "combine": "unit", "init": "mean_gate"}
    model = converted(mixture_options(4, router, expert=expert), calibration=calibration_batches())
    model.save_pretrained(tmp_path)
    again = converted(mixture_options(4, router, expert={**expert, "split": {"kind": "file", "path": str(tmp_path)}}))
    same_model(again, model)
    by_hand = tmp_path / "lists.json"
    by_hand.write_text(json.dumps({name: neuron_lists(lists) for name, lists in index_lists(model).items()}))
    again = converted(mixture_options(4, router, expert={**expert, "split": {"kind": "file", "path": str(by_hand)}}))
    same_model(again, model)
    base = FAMILIES["llama"].model()
    before = snapshot(base)
    for options in (
        mixture_options(3, router, expert={**expert, "split": {"kind": "file", "path": str(tmp_path)}}),
        mixture_options(4, router, expert={**expert, "split": {"kind": "file", "path": str(tmp_path / "none")}}),
    ):
        with pytest.raises(DataError):
            convert_ffn_to_experts(base, options)
        same_snapshot(base, before)


def test_a_model_in_training_mode_converts_to_one_in_training_mode() -> None:
    base = FAMILIES["llama"].model().train()
    model = convert_ffn_to_experts(base, mixture_options(4), calibration_batches())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "top_k", "combine": "unit"},
        {"kind": "representative"},
        {"kind": "norm_regression"},
    ],
    ids=lambda router: router["kind"],
)
def test_a_router_that_nothing_trains_is_frozen(router: dict[str, Any]) -> None:
    """Optimizers would decay it: no loss gives it a gradient. A loss of routings does."""
    expert = {"trainable": True, "padding": True}
    for losses, trains in (([], False), (["block_distillation"], False), (["load_balance"], True)):
        options = {"num_experts": 4, "router": router, "expert": expert, "losses": losses}
        model = converted(options, calibration=calibration_batches()).train()
        weights = [p for name, p in model.adapter_parameters() if ".router." in name]
        assert weights
        assert all(p.requires_grad == trains for p in weights)
        model(**inputs_of("llama")).loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for _, p in model.adapter_parameters())


def test_dropout_by_a_function_is_kept() -> None:
    """Starcoder2 drops outputs of its block without a module for it."""
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = Starcoder2ForCausalLM(Starcoder2Config(**sizes, **heads, residual_dropout=0.25))
    model = convert_ffn_to_experts(base, {"num_experts": 3})
    layer = model.injection.layers[FIRST].train()
    assert layer.output_dropout == 0.25
    torch.manual_seed(0)
    dropped = layer(torch.randn(1, 400, 16)) == 0
    assert 0.2 < float(dropped.float().mean()) < 0.3
    assert not (layer.eval()(torch.randn(1, 400, 16)) == 0).any()
