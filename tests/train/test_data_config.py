"""The `data` section: what it accepts, and that every mistake is reported with its path."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from moadapt.errors import ConfigError
from moadapt.registry import config_error
from moadapt.train.data_config import DataConfig, fill_template, template_fields

EXAMPLE = """
max_length: 512
sampling: {strategy: temperature, temperature: 2.0}
tasks:
  - {name: boolq, path: boolq/train.jsonl, eval_path: boolq/test.jsonl, metric: exact_match}
  - {name: e2e, path: e2e/train.jsonl, eval_fraction: 0.05, metric: rouge_l}
"""


def errors(data) -> str:
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate(data)
    return str(config_error(caught.value))


def task(**options):
    return {"name": "a", "path": "a.jsonl", **options}


def test_yaml_with_a_list_of_tasks():
    config = DataConfig.model_validate(yaml.safe_load(EXAMPLE))
    assert config.tasks is not None
    assert [entry.name for entry in config.tasks] == ["boolq", "e2e"]
    assert config.tasks[1].eval_fraction == 0.05
    assert config.sampling.temperature == 2.0
    assert not config.train_on_prompt
    assert DataConfig.model_validate(config.model_dump(exclude_unset=True)) == config


def test_one_file_for_all_tasks():
    config = DataConfig.model_validate({"path": "t.jsonl", "eval_path": "e.jsonl", "task_column": "task"})
    assert config.tasks is None
    assert config.task_column == "task"


def test_every_mistake_is_reported_at_once_with_its_path():
    text = errors(
        {
            "tasks": [
                task(metrc="rouge_l"),
                task(eval_fraction=0.1, eval_path="b", prompt_template="{x", metric="bleu"),
                task(choices=["x", "x"], metric="accuracy", messages_column="m", prompt_column="p"),
            ],
            "sampling": {"strategy": "temperature", "weights": {"q": -1}},
            "padding_side": "up",
        }
    )
    for expected in (
        "tasks.0.metrc: unknown option; did you mean 'metric'?",
        "tasks.1.metric: ",
        "tasks.2.choices: needs at least two different answers",
        "tasks.2.prompt_column: messages_column holds the whole conversation",
        "sampling.temperature: strategy temperature needs it",
        "sampling.weights: read by strategy weights only",
        "sampling.weights.q: a weight is a finite number, 0 or more",
        "padding_side: ",
    ):
        assert expected in text
    text = errors({"tasks": [task(eval_fraction=0.1, eval_path="b", prompt_template="{x")]})
    assert "tasks.0.eval_fraction: give either eval_fraction or eval_path" in text
    assert "tasks.0.prompt_template: a single '{' at character 1" in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "tasks: give a list of tasks, or path"),
        ({"tasks": []}, "tasks: the list is empty"),
        ({"path": "a.jsonl"}, "task_column: path needs task_column"),
        ({"tasks": [task()], "path": "b", "task_column": "t"}, "path: belongs to the single-file form"),
        ({"tasks": [task()], "metrics": {"a": "rouge_l"}}, "metrics: belongs to the single-file form"),
        ({"tasks": [task(), task()]}, "tasks.1.name: this name is taken"),
        ({"tasks": [task(weight=1.0)]}, "tasks.0.weight: read by sampling strategy weights only"),
        ({"tasks": [task()], "sampling": {"strategy": "weights"}}, "tasks.0.weight: strategy weights needs a weight"),
        (
            {"tasks": [task(weight=1.0)], "sampling": {"strategy": "weights", "weights": {"a": 1.0}}},
            "tasks.0.weight: given here and in sampling.weights",
        ),
        (
            {"tasks": [task(weight=1.0)], "sampling": {"strategy": "weights", "weights": {"b": 1.0}}},
            "sampling.weights.b: no such task",
        ),
        ({"tasks": [task()], "sampling": {"temperature": 2.0}}, "sampling.temperature: read by strategy temperature"),
        (
            {"path": "a", "task_column": "t", "sampling": {"strategy": "weights"}},
            "sampling.weights: strategy weights needs them",
        ),
        (
            {"path": "a", "task_column": "t", "sampling": {"strategy": "weights", "weights": {"a": 0}}},
            "sampling.weights: at least one weight must be above 0",
        ),
        ({"tasks": [task(choices=["a", "b"])]}, "tasks.0.choices: read by metric accuracy only"),
        ({"path": "a", "task_column": "t", "choices": ["a", "b"]}, "choices: read by metric accuracy only"),
        ({"tasks": [task(prompt_template="Answer:")]}, "tasks.0.prompt_template: has no {column} field"),
        ({"tasks": [task(prompt_template="{a}", prompt_column="a")]}, "give either prompt_template or prompt_column"),
        ({"tasks": [task(response_template="{a}", response_column="a")]}, "give either response_template or resp"),
        ({"tasks": [task(max_eval_samples=3)]}, "tasks.0.max_eval_samples: needs eval_path"),
        ({"tasks": [task(eval_fraction=1.0)]}, "tasks.0.eval_fraction: "),
        ({"tasks": [task()], "add_eos": False, "eos_token": 1}, "eos_token: has no effect with add_eos: false"),
        ({"tasks": [task()], "max_length": 0}, "max_length: "),
    ],
)
def test_refusals(data, expected):
    assert expected in errors(data)


def test_sampling_weights_come_from_tasks_or_from_the_sampling_section():
    data = {
        "tasks": [task(weight=2.0), {"name": "b", "path": "b"}],
        "sampling": {"strategy": "weights", "weights": {"b": 3.0}},
    }
    config = DataConfig.model_validate(data)
    assert config.sampling_weights(["b", "a"]) == [3.0, 2.0]
    assert DataConfig.model_validate({"tasks": [task()]}).sampling_weights(["a"]) is None
    single = {"path": "x", "task_column": "t", "sampling": {"strategy": "weights", "weights": {"a": 1.0}}}
    with pytest.raises(ConfigError, match=r"no weight for \['b'\]"):
        DataConfig.model_validate(single).sampling_weights(["a", "b"])


def test_relative_paths_start_at_the_config_then_at_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "config" / "both.jsonl").touch()
    (tmp_path / "work" / "both.jsonl").touch()
    (tmp_path / "work" / "work.jsonl").touch()
    monkeypatch.chdir(tmp_path / "work")
    paths = ["both.jsonl", "work.jsonl", "none.jsonl", "owner/name", str(tmp_path / "abs.csv")]
    tasks = [{"name": path, "path": path, "eval_path": "both.jsonl"} for path in paths]
    resolved = DataConfig.model_validate({"tasks": tasks}).resolve(tmp_path / "config")
    assert resolved.tasks is not None
    assert [entry.path for entry in resolved.tasks] == [
        str(tmp_path / "config" / "both.jsonl"),
        str(tmp_path / "work" / "work.jsonl"),
        str(tmp_path / "config" / "none.jsonl"),
        "owner/name",
        str(tmp_path / "abs.csv"),
    ]
    assert {entry.eval_path for entry in resolved.tasks} == {str(tmp_path / "config" / "both.jsonl")}
    single = DataConfig.model_validate({"path": "both.jsonl", "task_column": "t"}).resolve(tmp_path / "config")
    assert single.path == str(tmp_path / "config" / "both.jsonl")


def test_template_fields_and_filling():
    template = "{{x}} {a}: {b[0]}"
    assert template_fields(template) == ["a", "b[0]"]
    assert fill_template(template, {"a": "{b[0]}", "b[0]": "2"}) == "{x} {b[0]}: 2"
    for broken in ("{a", "a}", "{}", "{a{b}}"):
        with pytest.raises(ValueError, match="character"):
            template_fields(broken)


def test_json_schema_names_every_option():
    schema = DataConfig.model_json_schema()
    assert set(schema["properties"]) == set(DataConfig.model_fields)
    assert "eval_fraction" in schema["$defs"]["TaskConfig"]["properties"]
