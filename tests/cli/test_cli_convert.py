"""`convert`, and the commands that go on with a converted folder, on a tiny model and random text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import WORDS, invoke, save_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moadapt import MixtureModel
from moadapt.run_config import load_run_config
from moadapt.text_measure import measure
from moadapt.train.logging import read_metrics
from moadapt.train.text import text_batches

DSMOE = "mixture={preset: dsmoe, num_experts: 4, router: {init_std: 0.5}}"


def write_text(path: Path, seed: int, documents: int = 30) -> Path:
    rng = random.Random(seed)
    rows = [{"text": " ".join(rng.choice(WORDS) for _ in range(rng.randrange(5, 40)))} for _ in range(documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two texts."""
    folder = tmp_path_factory.mktemp("conversion")
    save_base(folder / "base")
    write_text(folder / "train.jsonl", 0)
    write_text(folder / "test.jsonl", 1, 12)
    training = {"max_steps": 3, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "logging_steps": 1}
    task = {"name": "words", "path": "train.jsonl", "text_column": "text", "eval_path": "test.jsonl"}
    data = {"max_length": 24, "tasks": [task]}
    (folder / "heal.yaml").write_text(yaml.safe_dump({"data": data, "training": training}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dsmoe(folder: Path) -> Path:
    """A DSMoE that was healed for three steps."""
    output = folder / "dsmoe"
    result = invoke(
        "convert",
        folder / "base",
        "-o",
        output,
        "--config",
        folder / "heal.yaml",
        DSMOE,
        "--text",
        folder / "test.jsonl",
    )
    assert result.exit_code == 0, result.output
    (folder / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    return output


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """The default conversion with four experts, two at work: nothing is trained."""
    output = folder / "plain"
    options = ["mixture.num_experts=4", "mixture.router.num_experts_per_tok=2", f"calibration.path={folder}/test.jsonl"]
    result = invoke("convert", folder / "base", "--output", output, "--cpu", *options)
    assert result.exit_code == 0, result.output
    return output


def read(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The text that is measured on, as the commands read it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return text_batches(str(folder / "test.jsonl"), tokenizer, max_length=64)


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    return loaded


def test_without_options_blocks_are_cut_and_nothing_is_trained(plain: Path, folder: Path) -> None:
    report = report_of(plain)
    assert set(report) == {"base_model", "text", "dense", "ungated", "converted", "seconds"}
    assert report["ungated"]["loss"] == pytest.approx(report["dense"]["loss"], abs=1e-5)
    assert report["converted"]["active_share"] == 0.5
    assert report["converted"]["reconstruction"] > 0
    dense = AutoModelForCausalLM.from_pretrained(plain)  # without moadapt it is the dense model
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder / "base").state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor)
    config = load_run_config(plain / "config.yaml").mixture
    assert config is not None
    assert config.router.init == "mean_gate"  # type: ignore[attr-defined]


def test_report_is_what_the_saved_model_does(dsmoe: Path, folder: Path) -> None:
    report = report_of(dsmoe)
    model = MixtureModel.from_pretrained(None, dsmoe)
    batches = read(folder)
    again = measure(model, batches)
    assert again.loss == pytest.approx(report["healed"]["loss"], abs=1e-5)
    assert [block.selections for block in again.blocks] == [block["selections"] for block in report["healed"]["blocks"]]
    assert report["healing"]["steps"] == 3
    assert report["healed"]["loss"] < report["converted"]["loss"]
    assert report["healed"]["loss"] != report["dense"]["loss"]
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert measure(base, batches).loss == pytest.approx(report["dense"]["loss"], abs=1e-6)


def test_table_and_files(dsmoe: Path, folder: Path) -> None:
    stdout = (folder / "stdout.txt").read_text(encoding="utf-8")
    report = report_of(dsmoe)
    for name in ("dense", "ungated", "converted", "healed"):
        row = next(line for line in stdout.splitlines() if line.startswith(f"│ {name} "))
        assert f"{report[name]['loss']:.4f}" in row
    names = {path.name for path in dsmoe.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "mixture_config.json", "mixture.safetensors"}
    assert {path.name for path in (dsmoe / "training").iterdir()} >= {"checkpoint-3", "metrics.jsonl", "config.yaml"}
    assert not any(name.endswith(".in_proj") for name in MixtureModel.from_pretrained(None, dsmoe).adapter_buffers())


def test_what_the_training_saved_is_the_converted_model(dsmoe: Path, folder: Path) -> None:
    """The healing's own adapter, with the trained experts over the original base, against the converted folder."""
    batches = read(folder)
    whole = measure(MixtureModel.from_pretrained(None, dsmoe), batches)
    adapter = measure(MixtureModel.from_pretrained(None, dsmoe / "training"), batches)
    assert adapter.loss == pytest.approx(whole.loss, abs=1e-6)
    result = invoke("eval", dsmoe / "training")
    assert result.exit_code == 0, result.output
    assert "words" in result.stdout


@pytest.mark.parametrize(
    "preset",
    ["cmoe", "emoe", "d2dmoe", "factorllm", "llama_moe", "remoe"],
)
def test_presets_convert(preset: str, folder: Path, tmp_path: Path) -> None:
    """On 32 neurons a block: the presets' numbers of experts are for larger models."""
    sizes = {
        "cmoe": "mixture.num_experts=3 mixture.expert.num_shared_experts=1 mixture.router.num_experts_per_tok=2",
        "emoe": "mixture.num_experts=8 mixture.router.num_experts_per_tok=2",
        "d2dmoe": "mixture.num_experts=4 mixture.router.fit.steps=5",
        "factorllm": "mixture.router.fit.kind=prior_approximate mixture.router.fit.steps=5",
    }
    options = [*sizes.get(preset, "mixture.num_experts=4").split(), f"calibration.path={folder}/train.jsonl"]
    result = invoke("convert", folder / "base", "-o", tmp_path / "out", f"mixture.preset={preset}", *options)
    assert result.exit_code == 0, result.output
    assert 0 < report_of(tmp_path / "out")["converted"]["ffn_share"] <= 1
    answer = invoke("generate", tmp_path / "out", "--prompt", "w1 w2", "--max-new-tokens", 3, "--cpu")
    assert answer.exit_code == 0, answer.output


def test_nothing_to_measure_on(folder: Path, tmp_path: Path) -> None:
    result = invoke("convert", folder / "base", "-o", tmp_path / "out", "mixture.num_experts=4")
    assert result.exit_code == 0, result.output
    assert "nothing was measured" in result.stderr
    assert report_of(tmp_path / "out")["text"] is None


MISTAKES = [
    (["mixture.num_experts=5"], "do not divide the 32 neurons"),
    (
        ["mixture.num_experts=4", "mixture.expert.split.kind=activation_rate"],
        "needs calibration text; give calibration.path",
    ),
    (["mixture.preset=d2dmoe", "mixture.num_experts=4"], "norm_regression needs calibration text"),
    (["mixture.preset=malora"], "mixture.expert.kind: malora adapts linear layers"),
    (["mixture.expert.split.kind=kmean"], "unknown split kind 'kmean'; did you mean 'kmeans'?"),
    (["mixture.num_experts=4", "mixture.router.scope=block"], "router.scope"),
    (["mixture.num_experts=4", "deepspeed=zero2"], "deepspeed: convert runs in one process"),
    (["mixture.num_experts=4", "load_in_4bit=true"], "quantised weights cannot be cut"),
    (["mixture.num_experts=4", "compare={other: {preset: dsmoe}}"], "compare: convert makes one model"),
    (["mixture.num_experts=4", "--text", "gone.txt"], "gone.txt: no such file"),
    (["mixture.num_experts=4", "calibration.path=gone.txt"], "gone.txt: no such file"),
    (["mixture.num_experts=4", "calibration.max_token=3"], "calibration.max_token: unknown option"),
    (["mixture.num_experts=4", "--max-length", "64"], "--max-length needs --text; for calibration text set"),
    (["mixture.num_experts=4", "mixture.expert.layers=3"], "mixture.expert.layers: unknown option"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes_show_before_any_weight_is_loaded(
    options: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moadapt.cli.converting

    monkeypatch.setattr(moadapt.cli.converting, "load_base", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    result = invoke("convert", folder / "base", "-o", tmp_path / "out", *options)
    assert result.exit_code in (1, 2), result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_healing_is_rehearsed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moadapt.cli.converting

    monkeypatch.setattr(moadapt.cli.converting, "load_base", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    arguments = ["convert", folder / "base", "-o", tmp_path / "out", "--config", folder / "heal.yaml", DSMOE]
    for change, message in (
        ("training.loraplus_lr_ratio=2", "training.loraplus_lr_ratio"),
        ("data.tasks.0.path=gone.jsonl", "gone.jsonl"),
        ("training.metric_for_best_model=rouge_l", "metric_for_best_model"),
    ):
        result = invoke(*arguments, change, *(["training.eval_strategy=epoch"] if "best" in change else []))
        assert result.exit_code in (1, 2)
        assert message in result.stderr


def test_models_that_cannot_be_converted(folder: Path, plain: Path, tmp_path: Path) -> None:
    filled = invoke("convert", folder / "base", "-o", folder, "mixture.num_experts=4")
    assert filled.exit_code == 2
    assert "--output" in filled.stderr
    again = invoke("convert", plain, "-o", tmp_path / "out", "mixture.num_experts=4")
    assert again.exit_code == 2
    assert "holds a mixture already" in again.stderr
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=23, num_key_value_heads=2, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    moe = invoke("convert", tmp_path / "moe", "-o", tmp_path / "out", "mixture.num_experts=4")
    assert moe.exit_code == 2
    assert "is a mixture of experts already" in " ".join(moe.stderr.split())


# -- sweep ----------------------------------------------------------------------------------------------------------


def test_sweep_over_thresholds(dsmoe: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "sweep.json"
    text = ["--text", folder / "test.jsonl"]
    result = invoke("sweep", dsmoe, *text, "--thresholds", "0.3,0.5,0.7", "-o", output)
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text(encoding="utf-8"))
    assert [row["threshold"] for row in document["rows"]] == [0.3, 0.5, 0.7]
    shares = [row["active_share"] for row in document["rows"]]
    assert shares[0] > shares[1] > shares[2]
    assert document["saved"] == {"threshold": 0.5}
    assert document["rows"][1]["loss"] == pytest.approx(report_of(dsmoe)["healed"]["loss"], abs=1e-5)
    assert "0.5 *" in result.stdout
    model = MixtureModel.from_pretrained(None, dsmoe)
    model.set_router_threshold(0.3)
    batches = read(folder)
    assert measure(model, batches).loss == pytest.approx(document["rows"][0]["loss"], abs=1e-6)
    assert invoke("sweep", dsmoe, *text, "-o", output).exit_code == 0
    assert len(json.loads(output.read_text(encoding="utf-8"))["rows"]) == 7


def test_sweep_over_numbers_of_experts(plain: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "sweep.json"
    result = invoke("sweep", plain, "--text", folder / "test.jsonl", "--experts", "1,2,4", "-o", output)
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text(encoding="utf-8"))
    assert [row["active_share"] for row in document["rows"]] == [0.25, 0.5, 1.0]
    assert document["rows"][2]["loss"] == pytest.approx(document["dense"]["loss"], abs=1e-5)  # unit gates, all of them


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("plain", [], "the router top_k has no threshold; give --experts"),
        ("plain", ["--experts", "9"], "which has 4 experts"),
        ("plain", ["--experts", "one"], "'one' is no list of numbers"),
        ("plain", ["--experts", "1", "--thresholds", "0.5"], "give one of both"),
        ("dsmoe", ["--experts", "1"], "keeps no fixed number of experts; give --thresholds"),
        ("dsmoe", ["--thresholds", "1.5"], "router.threshold"),
    ],
)
def test_sweeps_that_are_refused(
    which: str, options: list[str], message: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    result = invoke("sweep", request.getfixturevalue(which), "--text", folder / "test.jsonl", *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_sweep_needs_a_converted_model(trained: Path, folder: Path) -> None:
    result = invoke("sweep", trained, "--text", folder / "test.jsonl")
    assert result.exit_code == 2
    assert "needs a converted model" in result.stderr


# -- train goes on ----------------------------------------------------------------------------------------------------


def go_on(folder: Path, start: Path, output: Path, *options: str) -> Any:
    changes = ["training.eval_on_start=true", "training.eval_strategy=steps", "training.eval_steps=3", *options]
    result = invoke(
        "train", folder / "heal.yaml", f"model_name_or_path={start}", f"training.output_dir={output}", *changes
    )
    assert result.exit_code == 0, result.output
    return json.loads((output / "results.json").read_text(encoding="utf-8"))["runs"][0]


@pytest.mark.parametrize(
    ("change", "trained_parts"),
    [
        ("mixture.expert.trainable=false", {"router"}),
        ("mixture.expert.trainable=true", {"router", "in_proj", "out_proj"}),
        (
            "mixture.expert={trainable: false, lora: {r: 2}}",
            {"router", "lora_in_A", "lora_in_B", "lora_out_A", "lora_out_B"},
        ),
    ],
)
def test_routers_alone_with_experts_and_with_lora(
    change: str, trained_parts: set[str], dsmoe: Path, folder: Path, tmp_path: Path
) -> None:
    run = go_on(folder, dsmoe, tmp_path / "out", change)
    model = MixtureModel.from_pretrained(None, tmp_path / "out")
    parts = {name.rsplit(".", 1)[-1] if ".experts." in name else "router" for name, _ in model.adapter_parameters()}
    assert parts == trained_parts
    assert run["after"]["words"]["loss"] < run["before"]["words"]["loss"]
    assert model.base_model.name_or_path == str(dsmoe)
    assert invoke("eval", tmp_path / "out").exit_code == 0
    assert invoke("generate", tmp_path / "out", "--prompt", "w1", "--max-new-tokens", 2).exit_code == 0
    assert invoke("sweep", tmp_path / "out", "--text", folder / "test.jsonl", "--thresholds", "0.5").exit_code == 0
    counted = json.loads(
        invoke("params", folder / "heal.yaml", f"model_name_or_path={tmp_path / 'out'}", "--json").stdout
    )["dsmoe"]
    again = MixtureModel.from_pretrained(None, tmp_path / "out", is_trainable=True)
    assert (counted["total"]["trainable"], counted["total"]["total"]) == again.get_nb_trainable_parameters()


def test_training_goes_on_where_it_stopped(dsmoe: Path, folder: Path, tmp_path: Path) -> None:
    """Before the first step the loss is that of what it starts from, whether a converted model or what came of one."""
    first = go_on(folder, dsmoe, tmp_path / "one", "mixture.losses=[]")
    second = go_on(folder, tmp_path / "one", tmp_path / "two")
    assert second["before"]["words"]["loss"] == pytest.approx(first["after"]["words"]["loss"], abs=1e-6)
    config = load_run_config(tmp_path / "two" / "config.yaml")
    assert config.mixture is not None
    assert config.mixture.losses == []  # what was changed once stays changed
    third = go_on(folder, tmp_path / "two", tmp_path / "three", "mixture.router.threshold=0.4")
    assert third["before"]["words"]["loss"] != pytest.approx(second["after"]["words"]["loss"], abs=1e-6)
    saved = json.loads((tmp_path / "three" / "mixture_config.json").read_text(encoding="utf-8"))
    assert saved["mixture"]["router"]["threshold"] == 0.4
    assert saved["base_model"]["name_or_path"] == str(dsmoe)


def test_adaptive_losses_go_on_and_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    loss = "losses: [{kind: target_sparsity, target: 0.3, initial_strength: 0.1}]"
    remoe = f"mixture={{preset: remoe, num_experts: 4, {loss}}}"
    go_on(folder, folder / "base", tmp_path / "one", remoe)
    strength = MixtureModel.from_pretrained(None, tmp_path / "one").objective.states()[
        "losses.target_sparsity.strength"
    ]
    assert float(strength) != 0.1
    go_on(folder, tmp_path / "one", tmp_path / "two", "training.learning_rate=1e-9")
    shares = [entry["train/aux/target_sparsity/active_share"] for entry in read_metrics(tmp_path / "two")[1:4]]
    for share in shares:
        strength = strength * (1.2 if share > 0.3 else 1 / 1.2)
    again = MixtureModel.from_pretrained(None, tmp_path / "two").objective.states()["losses.target_sparsity.strength"]
    assert float(again) == pytest.approx(float(strength))
    go_on(folder, tmp_path / "one", tmp_path / "three", "mixture.losses=[]")
    assert MixtureModel.from_pretrained(None, tmp_path / "three").objective.states() == {}


def test_a_damaged_start_is_refused(trained: Path, project: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    tensors = load_file(broken / "mixture.safetensors")
    tensors.pop(next(name for name in tensors if ".experts." in name))
    save_file(tensors, broken / "mixture.safetensors")
    result = invoke("train", project, f"model_name_or_path={broken}", f"training.output_dir={tmp_path / 'out'}")
    assert result.exit_code == 1
    assert "missing: " in result.stderr


def test_adapters_go_on_too(trained: Path, project: Path, tmp_path: Path) -> None:
    arguments = ["train", project, f"model_name_or_path={trained}", f"training.output_dir={tmp_path / 'out'}"]
    result = invoke(*arguments, "training.max_steps=1", "training.eval_steps=1")
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["runs"][0]
    before = json.loads((trained / "results.json").read_text(encoding="utf-8"))["runs"][0]["after"]
    assert run["before"]["copy"]["loss"] == pytest.approx(before["copy"]["loss"], abs=1e-6)
    refused = invoke(*arguments, "mixture.num_experts=8")
    assert refused.exit_code == 2
    assert "num_experts cannot differ" in refused.stderr


def test_compared_mixtures_are_changes_too(dsmoe: Path, folder: Path, tmp_path: Path) -> None:
    compare = "compare={frozen: {expert: {trainable: false}}}"
    go_on(folder, dsmoe, tmp_path / "out", compare)
    frozen = MixtureModel.from_pretrained(None, tmp_path / "out" / "compare" / "frozen")
    assert not any(".experts." in name for name, _ in frozen.adapter_parameters())
    assert frozen.mixture_config.router.kind == "sigmoid_ste"


def test_a_dense_model_trains_with_a_preset_that_needs_no_calibration(folder: Path, tmp_path: Path) -> None:
    run = go_on(folder, folder / "base", tmp_path / "out", DSMOE)
    assert run["trainable_parameters"] == 2 * (3 * 16 * 32 + 4 * 16)
    refused = invoke(
        "train",
        folder / "heal.yaml",
        f"model_name_or_path={folder}/base",
        "mixture={preset: cmoe, num_experts: 3, expert: {num_shared_experts: 1}}",
        f"training.output_dir={tmp_path / 'no'}",
    )
    assert refused.exit_code == 2
    assert "use `moadapt convert`" in " ".join(refused.stderr.split())
