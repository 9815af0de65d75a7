"""A run's config where routing and data must go together: every mistake at once, and names of tasks filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moadapt.errors import ConfigError
from moadapt.run_config import RunConfig, load_run_config

PROMPT = {"router": {"kind": "top_k", "granularity": "prompt", "scope": "block"}}
RATIONAL = {"router": {**PROMPT["router"], "activation": "rational"}}
TASK = {"router": {"kind": "task_table", "scope": "block"}}
ROWS = [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl", "eval_fraction": 0.1}]
TEXT = {"name": "text", "path": "text.txt"}


def load(folder: Path, mixture: dict[str, Any], tasks: list[dict[str, Any]] | None = None, **more: Any) -> RunConfig:
    given = {"model_name_or_path": "some/model", "mixture": mixture, "data": {"tasks": tasks or ROWS}, **more}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return load_run_config(path)


def problems(folder: Path, *args: Any, **more: Any) -> list[str]:
    """The lines of the error, without the first."""
    with pytest.raises(ConfigError) as caught:
        load(folder, *args, **more)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


# -- names of tasks -----------------------------------------------------------------------------------------------


def test_names_of_tasks_are_those_of_the_data(tmp_path: Path) -> None:
    config = load(tmp_path, TASK, compare={"lora": {"router": {"kind": "top_k"}}, "other": {"num_experts": 3}})
    assert config.mixture is not None
    assert config.mixture.tasks == ["a", "b"]
    assert config.mixture.router.num_tasks == 2  # type: ignore[attr-defined]
    assert config.compare["other"].tasks == ["a", "b"]
    assert config.compare["lora"].tasks is None
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = load_run_config(tmp_path / "again.yaml")
    assert again.mixture == config.mixture
    assert again.compare == config.compare


def test_given_names_stay_and_must_hold_the_datas(tmp_path: Path) -> None:
    config = load(tmp_path, {**TASK, "tasks": ["b", "c", "a"]})
    assert config.mixture is not None
    assert config.mixture.tasks == ["b", "c", "a"]
    [line] = problems(tmp_path, {**TASK, "tasks": ["aa", "b"]})
    assert line.startswith("data.tasks.0.name: task 'a' is none of the mixture's tasks; did you mean 'aa'?")
    assert "router.unknown_task: mean" in line
    lenient = {"router": {**TASK["router"], "unknown_task": "mean"}, "tasks": ["b"]}
    assert load(tmp_path, lenient).mixture is not None


def test_a_number_of_tasks_that_differs_is_named_with_its_mixture(tmp_path: Path) -> None:
    compare = {"three": {"router": {**TASK["router"], "num_tasks": 3}}}
    [line] = problems(tmp_path, PROMPT, compare=compare)
    assert line.startswith("compare.three.router.num_tasks: 3, but tasks names 2")


def test_one_file_for_all_tasks_needs_the_names(tmp_path: Path) -> None:
    data = {"path": "all.jsonl", "task_column": "kind"}
    [line] = problems(tmp_path, TASK, data=data)
    assert line.startswith("mixture.tasks: missing; ")
    assert "'kind'" in line
    assert load(tmp_path, {**TASK, "tasks": ["x", "y"]}, data=data).mixture is not None


# -- plain text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "option"), [(None, "text_column"), (True, "packing"), (False, "text_column")])
def test_prompt_routing_refuses_plain_text(tmp_path: Path, packing: bool | None, option: str) -> None:
    text = TEXT if packing is None else {**TEXT, "packing": packing}
    [line] = problems(tmp_path, PROMPT, [*ROWS, text])
    assert line.startswith(f"data.tasks.2.{option}: plain text, in packed rows or not, has no prompt")
    assert "mixture.router.granularity: prompt" in line
    assert "set it to token" in line


def test_prompt_routing_refuses_plain_text_in_one_file(tmp_path: Path) -> None:
    data = {"path": "all.jsonl", "task_column": "kind", "text_column": "text"}
    [line] = problems(tmp_path, PROMPT, data=data)
    assert line.startswith("data.text_column: plain text")


def test_task_routing_takes_packed_text(tmp_path: Path) -> None:
    """Rows are packed within a task, so a row has one."""
    assert load(tmp_path, TASK, [*ROWS, TEXT]).mixture is not None


def test_token_routing_takes_packed_text_and_prompt_routing_takes_train_on_prompt(tmp_path: Path) -> None:
    assert load(tmp_path, {}, [*ROWS, TEXT]).mixture is not None
    assert load(tmp_path, PROMPT, data={"tasks": ROWS, "train_on_prompt": True}).mixture is not None


# -- the routers' activation --------------------------------------------------------------------------------------


def test_options_for_the_activation_need_one_that_learns(tmp_path: Path) -> None:
    training = {"activation_learning_rate": 1e-6, "bilevel_activation": True, "bilevel_steps": 4}
    assert load(tmp_path, RATIONAL, training=training).training.bilevel_steps == 4
    lines = problems(tmp_path, PROMPT, training=training)
    assert [line.split(":")[0] for line in lines] == [f"training.{name}" for name in list(training)[:2]]
    assert all("set mixture.router.activation: rational, or leave the option out" in line for line in lines)
    [line] = problems(tmp_path, RATIONAL, training=training | {"fp16": True})
    assert "bilevel_activation has no loss scaling" in line


def test_two_levels_need_evaluation_rows_and_whole_tensors(tmp_path: Path) -> None:
    training = {"bilevel_activation": True}
    lines = problems(tmp_path, RATIONAL, ROWS[:1], training=training, deepspeed="zero3")
    assert len(lines) == 2
    assert all(line.startswith("training.bilevel_activation: ") for line in lines)
    assert "deepspeed: zero1 or zero2" in lines[0]
    assert "eval_fraction" in lines[1]
    assert load(tmp_path, RATIONAL, training=training, deepspeed="zero2").zero_stage == 2


def test_every_mistake_at_once(tmp_path: Path) -> None:
    lines = problems(
        tmp_path,
        PROMPT,
        [*ROWS, TEXT],
        compare={"table": {**TASK, "tasks": ["a", "b", "c"]}},
        training={"bilevel_activation": True},
        deepspeed="zero3",
        load_in_4bit=True,
        load_in_8bit=True,
    )
    starts = [
        "load_in_4bit and load_in_8bit exclude each other",
        "load_in_4bit and load_in_8bit do not go with ZeRO-3",
        "training.bilevel_activation: there are no coefficients to learn; set mixture.",
        "training.bilevel_activation: there are no coefficients to learn; set compare.table.",
        "training.bilevel_activation: does not go with ZeRO-3",
        "data.tasks.2.text_column: plain text",
        "data.tasks.2.name: task 'text' is none of",
    ]
    assert len(lines) == len(starts)
    assert all(any(line.startswith(start) for line in lines) for start in starts), lines
