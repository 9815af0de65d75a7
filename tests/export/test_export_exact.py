"""Exported mixtures against the paper's sums, neuron by neuron, and the dense model; near-exact gates; the report.

Shapes: T tokens, D hidden size, N experts, M neurons of an expert.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import ROUTERS, Case
from tiny import base_model, batch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moadapt import MixtureModel
from moadapt.convert import convert_ffn_to_experts
from moadapt.errors import AdapterError
from moadapt.export import export as module
from moadapt.export import export_converted
from moadapt.export.gates import NEAR_EXPONENT, is_power_of_two, nearly, read_gate
from moadapt.export.source import activation_name, read_source


def expert_outputs(model: MixtureModel, base: nn.Module, x_TD: Tensor) -> list[Tensor]:
    """Every expert's output in float64 (T, D), shared ones first, from the dense model's own matrices."""
    mlp = base.get_submodule("model.layers.0.mlp")
    gate_FD, up_FD, down_DF = (getattr(mlp, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
    outputs = []
    for neurons in model.injection.layers["model.layers.0.mlp"].experts.neuron_indices.tolist():
        y_TD = torch.zeros_like(x_TD)
        for neuron in (index for index in neurons if index >= 0):
            z_T = x_TD @ gate_FD[neuron]
            y_TD += ((z_T / (1 + torch.exp(-z_T))) * (x_TD @ up_FD[neuron]))[:, None] * down_DF[:, neuron]
        outputs.append(y_TD)
    return outputs


def reference_mixture(
    router: dict[str, Any], weight_ND: Tensor, outputs: list[Tensor], num_shared: int, x_TD: Tensor
) -> Tensor:
    """Token by token, from the formulas of the options."""
    num_experts, kept = weight_ND.shape[0], router["num_experts_per_tok"]
    factor = {"none": 1.0, "n_over_k": num_experts / kept}.get(router.get("rescale", "none"), router.get("rescale"))
    y_TD = sum(outputs[:num_shared], torch.zeros_like(x_TD))
    for token, x_D in enumerate(x_TD):
        score_N = (weight_ND @ x_D) / router.get("temperature", 1.0)
        best = sorted(range(num_experts), key=lambda i: -float(score_N[i]))[:kept]
        exp_N = torch.exp(score_N - score_N.max())
        for i in best:
            share = {
                "softmax": exp_N[i] / exp_N.sum(),
                "softmax_renorm": exp_N[i] / exp_N[best].sum(),
                "sigmoid": 1 / (1 + torch.exp(-score_N[i])),
                "unit": torch.ones(()),
            }[router["combine"]]
            y_TD[token] += float(factor) * share * outputs[num_shared + i][token]
    return y_TD


def exported_block(loaded: nn.Module, to: str, x_TD: Tensor) -> Tensor:
    layer = loaded.get_submodule("model.layers.0").double()
    x_BSD = x_TD[None]
    if to != "granitemoeshared":
        y: Tensor = layer.mlp(x_BSD)[0]
        return y
    y = layer.block_sparse_moe(x_BSD)[0]
    return y if layer.shared_mlp is None else y + layer.shared_mlp(x_BSD)[0]


@pytest.mark.parametrize(
    ("to", "router", "family", "shared"),
    [
        ("mixtral", "renorm", "llama", 0),
        ("mixtral", "cool", "llama", 0),
        ("mixtral", "unit_one", "llama", 0),
        ("mixtral", "unit_all", "llama", 0),
        ("qwen2_moe", "softmax", "llama", 1),
        ("qwen2_moe", "renorm", "qwen2", 2),
        ("qwen3_moe", "softmax", "qwen3", 0),
        ("granitemoeshared", "renorm", "llama", 1),
        ("glm4_moe", "sigmoid", "llama", 1),
        ("glm4_moe", "sigmoid", "qwen3", 0),
        ("auto_map", "softmax", "llama", 1),
        ("auto_map", "unit", "qwen2", 1),
    ],
)
@torch.no_grad()
def test_a_block_against_the_formulas(to: str, router: str, family: str, shared: int, tmp_path: Path) -> None:
    options = ROUTERS[router]
    model = Case("", to, router, family, shared=shared).converted()
    site = model.injection.routers["model.layers.0.mlp"].router
    x_TD = torch.randn(9, 16, dtype=torch.float64)
    outputs = expert_outputs(model, base_model(family), x_TD)
    want_TD = reference_mixture(options, site.weight.detach().double(), outputs, shared, x_TD)
    export_converted(model, to, tmp_path / "out")
    if to == "auto_map":
        loaded: nn.Module = module.load_custom(tmp_path / "out", dtype=torch.float32)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, experts_implementation="eager"
        )
    got_TD = exported_block(loaded, to, x_TD)
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-5, atol=1e-5)
    assert want_TD.abs().max() > 0.05


@pytest.mark.parametrize("to", ["mixtral", "granitemoeshared", "glm4_moe"])
@torch.no_grad()
def test_all_experts_with_weight_one_are_the_dense_model(to: str, tmp_path: Path) -> None:
    dense, model = base_model(), Case("", to, "unit_all").converted()
    export_converted(model, to, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    inputs = batch(2, 12)
    want, got = dense(**inputs).logits, loaded(**inputs).logits
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-5 * float(want.abs().max()))
    routers = [tensor for name, tensor in loaded.named_parameters() if name.endswith(("gate.weight", "router.weight"))]
    assert routers
    assert not any(bool(tensor.any()) for tensor in routers)


# Largest error of a weight at e = 14, scores of 6.4.
NEAR = {"mixtral": 4.3e-4, "qwen2_moe": 4.3e-4, "granitemoeshared": 4.3e-4, "glm4_moe": 2.1e-4}


@pytest.mark.parametrize("to", NEAR)
@torch.no_grad()
def test_near_exact_gates(to: str, tmp_path: Path) -> None:
    """Weights of kept experts are nearly 1, and on the text the whole model is close."""
    case = Case("", to, "unit", shared=1 if to != "mixtral" else 0, expert={"padding": True})
    model = case.converted()
    report = export_converted(model, to, tmp_path / "out", approximate=True)
    assert not report["exact"]
    assert report["not_exact_because"]
    assert 0.0 < report["comparison"]["max_logit_difference"] < 0.02 * report["comparison"]["max_logit"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    block = loaded.get_submodule("model.layers.0." + ("block_sparse_moe" if to == "granitemoeshared" else "mlp"))
    router = block.router if to == "granitemoeshared" else block.gate
    weight_ND = model.injection.routers["model.layers.0.mlp"].router.weight
    folded = report["blocks"]["model.layers.0.mlp"]["folded"]
    factor, kind = folded["down_projections"], "sigmoid" if to == "glm4_moe" else "softmax"
    x_TD = torch.randn(512, 16)
    x_TD *= 6.4 / (x_TD @ weight_ND.T).abs().amax(-1, keepdim=True)  # every token's largest score is 6.4 in size
    want_TK = (x_TD @ weight_ND.T).softmax(-1).topk(2).indices
    usual = nearly(read_gate(model.injection.routers["model.layers.0.mlp"].router), 6.4, NEAR_EXPONENT[kind])[
        0
    ].weight_ND
    for scaled_ND, least, figure in ((weight_ND * 2.0**-14, 1e-6, NEAR[to]), (usual, 1e-4, 1.8e-3)):
        router.weight.copy_(scaled_ND)
        _, weights_TK, indices_TK = router(x_TD)
        error = float((weights_TK * factor - 1.0).abs().max())
        assert least < error < figure
        assert (indices_TK.sort(-1).values == want_TK.sort(-1).values).float().mean() > 0.99
    assert is_power_of_two(folded["router_scale"])
    assert folded["down_projections"] == (1.0 if to == "glm4_moe" else 2.0)


def test_folded_factors_are_in_the_report(tmp_path: Path) -> None:
    glm = export_converted(Case("", "glm4_moe", "sigmoid").converted(), "glm4_moe", tmp_path / "glm")
    want = {"router_scale": 1.0, "down_projections": 1.0, "routed_scaling_factor": 2.0}
    assert glm["blocks"]["model.layers.1.mlp"]["folded"] == want
    mixtral = export_converted(Case("", "mixtral", "renorm").converted(), "mixtral", tmp_path / "mixtral")
    want = {"router_scale": 1.0, "down_projections": 2.0, "routed_scaling_factor": 1.0}
    assert mixtral["blocks"]["model.layers.1.mlp"]["folded"] == want


def test_the_report(tmp_path: Path) -> None:
    model = Case("", "mixtral", "renorm").converted()
    text = [batch(3, 10, seed=4), batch(3, 10, seed=5)]
    text[0]["attention_mask"][0, :4] = 0
    seen: list[tuple[str, int, int]] = []
    report = export_converted(
        model,
        "mixtral",
        tmp_path / "out",
        text_batches=text,
        max_tokens=40,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert report == json.loads((tmp_path / "out" / "equivalence.json").read_text())
    numbers = report["comparison"]
    assert numbers["tokens"] == 36, "26 of the first batch, one row of the second"
    assert numbers["text"] == "given text"
    assert numbers["argmax_agreement"] == 1.0
    assert numbers["generation_equal"]
    assert 0.0 < numbers["mean_logit_difference"] <= numbers["max_logit_difference"] <= numbers["bound"]
    assert report["exact"]
    assert set(report["versions"]) == {"moadapt", "transformers", "torch"}
    assert report["blocks"]["model.layers.0.mlp"]["num_experts"] == 4
    assert seen[0][1:] == (0, 3)
    assert seen[-1][1:] == (3, 3)
    assert export_converted(model, "mixtral", tmp_path / "other")["comparison"]["text"] == "random tokens"


@pytest.mark.parametrize("to", ["mixtral", "auto_map"])
def test_a_wrong_export_is_not_left_behind(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reload = module._reload

    def damaged(*arguments: Any) -> Any:
        loaded = reload(*arguments)
        with torch.no_grad():
            loaded.get_submodule("model.layers.1.mlp.experts").down_proj.mul_(1.001)
        return loaded

    monkeypatch.setattr(module, "_reload", damaged)
    model = Case("", to, "renorm").converted()
    with pytest.raises(AdapterError, match="computes something else than the converted model"):
        export_converted(model, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    report = export_converted(model, to, tmp_path / "out", tolerance=0.5)
    assert report["comparison"]["max_logit_difference"] > 1e-4


def test_other_generated_tokens_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reload = module._reload

    def other(*arguments: Any) -> Any:
        loaded = reload(*arguments)
        generate = loaded.generate
        loaded.generate = lambda **options: torch.cat([generate(**options)[:, :-1], options["input_ids"][:, :1]], dim=1)
        return loaded

    monkeypatch.setattr(module, "_reload", other)
    with pytest.raises(AdapterError, match="generates other tokens"):
        export_converted(Case("", "mixtral", "renorm").converted(), "mixtral", tmp_path / "out")


@torch.no_grad()
def test_a_near_tie_explains_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts with the same scores: whichever a kernel picks is right, and neither is an error."""
    model = Case("", "mixtral", "renorm").converted()
    for site in model.injection.routers.values():
        site.router.weight[1] = site.router.weight[0] * (1 + 1e-6)
    reload = module._reload

    def picks_the_other(*arguments: Any) -> Any:
        loaded = reload(*arguments)
        for layer in loaded.model.layers:
            layer.mlp.gate.weight[0] *= 1 + 3e-6
        return loaded

    monkeypatch.setattr(module, "_reload", picks_the_other)
    report = export_converted(model, "mixtral", tmp_path / "out")
    assert report["comparison"]["positions_above_bound"] > 0
    assert report["comparison"]["unexplained_positions"] == 0


@pytest.mark.parametrize("to", ["mixtral", "glm4_moe", "auto_map"])
@torch.no_grad()
def test_half_precision(to: str, tmp_path: Path) -> None:
    """Exact in fp32 although stored in bf16; the default kernels run on padded widths; the model is untouched."""
    case = Case("", to, "sigmoid" if to == "glm4_moe" else "renorm", dtype=torch.bfloat16, expert={"lora": {"r": 2}})
    model = case.converted()
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.base_model.state_dict().items()}
    report = export_converted(model, to, tmp_path / "out")
    after = model.base_model.state_dict()
    assert all(
        after[name].dtype == dtype and torch.equal(after[name], tensor) for name, (dtype, tensor) in before.items()
    )
    assert report["exact"]
    assert report["comparison"]["max_logit_difference"] < 1e-5 * max(1.0, report["comparison"]["max_logit"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    if to == "auto_map":
        loaded: Any = module.load_custom(tmp_path / "out", dtype="auto")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert loaded.config._experts_implementation == "grouped_mm"
        indices: list[Tensor] = []
        for layer in loaded.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda _, args: indices.append(args[1]))
    inputs = batch(2, 12)
    got, want = loaded(**inputs).logits.float(), model(**inputs).logits.float()
    assert loaded.dtype == torch.bfloat16
    assert (got - want).abs().mean() < 0.05 * want.abs().max()
    if to != "auto_map":
        assert all(int(index.max()) < 4 for index in indices), "no index stands for no expert"


@pytest.mark.parametrize("to", ["mixtral", "auto_map"])
def test_shards_tokenizer_and_generation_config(to: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    model = Case("", to, "renorm").converted()
    model.base_model.generation_config.max_length = 33
    export_converted(model, to, tmp_path / "out", tokenizer, max_shard_size="8KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 2
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 33
    assert not list(tmp_path.glob(".*")), "nothing unfinished"


def test_stock_layout_on_disk(tmp_path: Path) -> None:
    """The files have the names that the family's own checkpoints have."""
    from safetensors import safe_open

    for to, router, name in (
        ("mixtral", "renorm", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ("qwen2_moe", "softmax", "model.layers.0.mlp.experts.3.down_proj.weight"),
        ("granitemoeshared", "renorm", "model.layers.0.block_sparse_moe.output_linear.weight"),
        ("glm4_moe", "sigmoid", "model.layers.0.mlp.experts.3.gate_proj.weight"),
    ):
        export_converted(Case("", to, router).converted(), to, tmp_path / to)
        with safe_open(tmp_path / to / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert name in names
        assert not any(part.startswith(("weight_g", "weight_v")) for key in names for part in key.split("."))


@torch.no_grad()
def test_the_threshold_is_changed_in_config_json(tmp_path: Path) -> None:
    model = Case("", "auto_map", "ste").converted()
    export_converted(model, "auto_map", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["routed_ffn"]["router"]["threshold"] == 0.45
    config["routed_ffn"]["router"]["threshold"] = 0.55
    config["routed_ffn"]["blocks"]["layers.1.mlp"]["router"]["threshold"] = 0.6
    path.write_text(json.dumps(config))
    for site, threshold in zip(model.injection.routers.values(), (0.55, 0.6), strict=True):
        site.router.threshold = threshold
    loaded = module.load_custom(tmp_path / "out", dtype=torch.float32)
    inputs = batch(2, 12)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    report = export_converted(model, "auto_map", tmp_path / "again")
    blocks = json.loads((tmp_path / "again" / "config.json").read_text())["routed_ffn"]["blocks"]
    assert [block["router"] for block in blocks.values()] == [{"threshold": 0.55}, {"threshold": 0.6}]
    assert report["exact"]


def test_a_foreign_format_is_refused(tmp_path: Path) -> None:
    export_converted(Case("", "auto_map", "ste").converted(), "auto_map", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (({"format": 2}, "needs format 1, found 2"), ({"router": {"kind": "x"}}, "'x' is none of")):
        path.write_text(json.dumps(config | {"routed_ffn": config["routed_ffn"] | change}))
        with pytest.raises(ValueError, match=message):
            module.load_custom(tmp_path / "out")


def test_gradients_flow_through_the_exported_code(tmp_path: Path) -> None:
    model = Case("", "auto_map", "relu", shared=1).converted()
    export_converted(model, "auto_map", tmp_path / "out")
    loaded = module.load_custom(tmp_path / "out", dtype=torch.float32)
    model.base_model.requires_grad_(True)
    inputs = batch(2, 8)
    for each in (loaded, model):
        each(**inputs).loss.backward()
    want = model.injection.routers["model.layers.0.mlp"].router.weight.grad
    got = loaded.get_submodule("model.layers.0.mlp.router").weight.grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    bank = model.injection.layers["model.layers.0.mlp"].experts
    got = loaded.get_submodule("model.layers.0.mlp.experts").gate_up_proj.grad
    torch.testing.assert_close(got, bank.in_proj.grad[1:], rtol=1e-4, atol=1e-6)


def test_gates() -> None:
    assert [is_power_of_two(value) for value in (1.0, 2.0, 0.25, 3.0, 8 / 3, 0.0)] == [True] * 3 + [False] * 3
    model = convert_ffn_to_experts(
        base_model(),
        {
            "num_experts": 4,
            "router": {"kind": "top_k", "num_experts_per_tok": 3, "combine": "softmax", "rescale": "n_over_k",
                       "temperature": 0.5, "bias": True, "init": "normal"},
        },
    )  # fmt: skip
    router = next(iter(model.injection.routers.values())).router
    gate = read_gate(router)
    assert not isinstance(gate, str)
    assert (gate.combine, gate.num_kept, gate.num_experts, gate.factor) == ("softmax", 3, 4, 4 / 3)
    torch.testing.assert_close(gate.weight_ND, router.weight.detach() * 2)
    assert gate.bias_N is None, "a bias of zero is none"
    with torch.no_grad():
        router.bias[2] = 1.0
    again = read_gate(router)
    assert not isinstance(again, str)
    assert again.bias_N is not None
    assert again.bias_N.tolist() == [0.0, 0.0, 2.0, 0.0]
    assert read_source(model).activation == "silu"
    with pytest.raises(AdapterError, match="has no name in transformers"):
        activation_name(lambda x: x * 1.5)
