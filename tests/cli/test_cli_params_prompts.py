"""What `params` and `train` say about mixtures that route prompts or tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import invoke
from transformers import AutoTokenizer

from moadapt import MixtureModel
from moadapt.passes import PassRequest, requesting
from moadapt.run_config import load_run_config
from moadapt.train.tasks import load_tasks

MODULES = ["q_proj", "up_proj", "down_proj"]
MILORA = {"preset": "milora", "target_modules": MODULES, "expert": {"r": 2}}
ONE = ["mixture.router.num_experts_per_tok=1", "mixture.router.norm_topk_prob=false"]
TABLE = {
    "num_experts": 4,
    "target_modules": ["q_proj"],
    "expert": {"kind": "lora", "r": 2},
    "router": {"kind": "task_table"},
}


def _with_mixture(project: Path, name: str, mixture: dict[str, Any]) -> Path:
    """The tiny project's config with another mixture, beside it."""
    config = yaml.safe_load(project.read_text(encoding="utf-8"))
    path = project.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "mixture": mixture}), encoding="utf-8")
    return path


def _cells(stdout: str) -> list[list[str]]:
    lines = [line for line in stdout.splitlines() if "│" in line]
    return [[cell.strip().replace(",", "") for cell in line.split("│")[1:-1]] for line in lines]


def test_params_gives_the_mean_and_its_range(project: Path) -> None:
    """D = 16 and FFN 32: modules of 2 (16 + 16), twice 2 (16 + 32); a router of 3 x 16, a pooler of 16; two layers."""
    config = _with_mixture(project, "milora", MILORA)
    result = invoke("params", config, *ONE)
    assert result.exit_code == 0, result.output
    around, sizes = 2 * (48 + 16), [64, 96, 96]
    assert f"at least {around + 2 * 64:,}, at most {around + 2 * 96:,}" in result.stdout
    rows = _cells(result.stdout)
    assert [row[0] for row in rows] == [*MODULES, "routers", "poolers", "not adapted", "total"]
    assert int(rows[-1][2]) == 2 * sum(sizes) + around
    assert int(rows[-1][3]) == pytest.approx(2 * sum(sizes) / 3 + around, abs=1.5)
    assert "used per prompt" in result.stdout
    values = json.loads(invoke("params", config, *ONE, "--json").stdout)["milora"]
    assert values["active_trainable_range"] == [around + 2 * 64, around + 2 * 96]
    assert values["granularity"] == "prompt"


def test_params_counts_one_row_of_a_table_by_task(project: Path) -> None:
    result = invoke("params", _with_mixture(project, "table", TABLE))
    assert result.exit_code == 0, result.output
    routers = next(row for row in _cells(result.stdout) if row[0] == "routers")
    assert [int(cell) for cell in routers[1:]] == [2, 2 * 3 * 4, 2 * 4, 2 * 4, 2 * 3 * 4]  # three tasks, four experts
    assert "at most" not in result.stdout


def _usage(stdout_of: Path) -> dict[str, Any]:
    usage: dict[str, Any] = json.loads((stdout_of / "results.json").read_text(encoding="utf-8"))["runs"][0]["usage"]
    return usage


def test_train_counts_prompts_by_module(project: Path, tmp_path: Path) -> None:
    """One row at a time, so without padding; each prompt chooses two of three modules."""
    config = _with_mixture(project, "milora", MILORA)
    output = tmp_path / "out"
    more = ["mixture.router.num_experts_per_tok=2", "training.eval_on_start=false"]
    result = invoke("train", config, f"training.output_dir={output}", *more)
    assert result.exit_code == 0, result.output
    assert "where each task's prompts went" in result.stdout
    assert "Where each task's prompts went" in (output / "README.md").read_text(encoding="utf-8")
    header = next(line for line in result.stdout.splitlines() if "up_proj" in line)
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["task", *MODULES]
    run = load_run_config(output / "config.yaml")
    assert run.data is not None
    tasks = load_tasks(run.data, AutoTokenizer.from_pretrained(project.parent / "base"))
    model = MixtureModel.from_pretrained(None, output)
    expected = {f"model.layers.{layer}": {task.name: [0, 0, 0] for task in tasks} for layer in (0, 1)}
    for task in tasks:
        for example in task.eval:
            mask = torch.tensor([example.prompt_mask], dtype=torch.bool)
            with torch.no_grad(), requesting(PassRequest(mask, record=True)) as request:
                model.base_model(input_ids=torch.tensor([example.input_ids]))
            assert request.context is not None
            for record in request.context.records:
                (selected,) = record.routing.selected_TN.tolist()
                assert sum(selected) == 2
                counts = expected[record.name][task.name]
                expected[record.name][task.name] = [a + int(b) for a, b in zip(counts, selected, strict=True)]
    usage = _usage(output)
    assert usage["counted"] == "prompts"
    assert {name: router["selections"] for name, router in usage["routers"].items()} == expected
    for router in usage["routers"].values():
        assert router["prompts"] == {task.name: len(task.eval) for task in tasks}
        assert router["experts"] == ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]


def test_train_counts_rows_of_a_table_by_task(project: Path, tmp_path: Path) -> None:
    """Every row of a task has the same gates: those of its task's logits, in the model's order of the tasks."""
    config = _with_mixture(project, "table", TABLE)
    output = tmp_path / "out"
    more = ["mixture.tasks=[after, copy, next]", "training.eval_on_start=false", "training.learning_rate=1.0"]
    result = invoke("train", config, f"training.output_dir={output}", *more)
    assert result.exit_code == 0, result.output
    usage = _usage(output)
    assert usage["counted"] == "rows"
    model = MixtureModel.from_pretrained(None, output)
    table = model.injection.routers[usage["router"]].router.weight.detach()
    for task, shares in usage["shares"].items():
        gates = table[["after", "copy", "next"].index(task)].double().softmax(-1)
        assert shares == pytest.approx(gates.tolist(), abs=1e-5)
    first, second = (usage["shares"][task] for task in ("copy", "after"))
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 1e-3  # the tasks are told apart
