"""`moadapt export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import WORDS, invoke, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from moadapt.convert import convert_ffn_to_experts
from moadapt.converted import save_converted


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model on disk, and a text beside it."""
    folder = tmp_path_factory.mktemp("converted")
    save_base(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    options: dict[str, Any] = {
        "num_experts": 4,
        "router": {"num_experts_per_tok": 2, "combine": "softmax_renorm", "rescale": "n_over_k", "init_std": 0.5},
    }
    options["router"]["init"] = "normal"
    save_converted(
        convert_ffn_to_experts(model, options), folder / "moe", AutoTokenizer.from_pretrained(folder / "base")
    )
    (folder / "text.txt").write_text(" ".join(WORDS * 20), encoding="utf-8")
    return folder


def test_export(converted: Path, tmp_path: Path) -> None:
    options = ("--text", converted / "text.txt", "--max-tokens", 100, "--cpu")
    result = invoke("export", converted / "moe", "--to", "mixtral", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "mixtral, exact: logits differ by at most" in result.stdout
    report = json.loads((tmp_path / "out" / "equivalence.json").read_text())
    assert report["comparison"]["text"] == "given text"
    assert 0 < report["comparison"]["tokens"] <= 100
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "mixtral"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"][-1] == 5


def test_export_with_its_own_code(converted: Path, tmp_path: Path) -> None:
    result = invoke("export", converted / "moe", "--to", "auto_map", "-o", tmp_path / "out", "--cpu")
    assert result.exit_code == 0, result.output
    assert "compared on random tokens" in result.stderr
    assert (tmp_path / "out" / "modeling_routed_ffn.py").is_file()


def test_export_refuses(converted: Path, tmp_path: Path) -> None:
    result = invoke("export", converted / "moe", "--to", "glm4_moe", "-o", tmp_path / "out", "--cpu")
    assert result.exit_code == 2
    assert "glm4_moe cannot hold this model exactly" in result.stderr
    assert "--to mixtral or qwen2_moe or granitemoeshared or auto_map" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--to: missing. Valid targets: mixtral"),
        (("--to", "mixtrel", "-o", "new"), "did you mean 'mixtral'"),
        (("--to", "mixtral"), "--output: missing"),
        (("--to", "mixtral", "-o", "base"), "not an empty folder"),
        (("--to", "mixtral", "-o", "new", "--text-column", "x"), "--text-column needs --text"),
        (("--to", "mixtral", "-o", "new", "--max-tokens", "8"), "--max-tokens needs --text"),
        (("--to", "mixtral", "-o", "new", "--dtype", "int8"), "--dtype"),
        (("--to", "mixtral", "-o", "new", "--text", "none.txt", "--cpu"), "none.txt"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...], message: str, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(converted)
    result = invoke("export", "moe", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert not (converted / "new").exists()


def test_help_names_the_targets() -> None:
    result = invoke("export", "--help")
    assert result.exit_code == 0
    for name in ("mixtral", "qwen2_moe", "auto_map", "--approximate", "--max-shard-size"):
        assert name in result.output
