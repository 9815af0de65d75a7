"""Run configs: overrides, paths, every problem at once, compared mixtures, and the shipped configs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moadapt.errors import ConfigError
from moadapt.overrides import apply_overrides, parse_override
from moadapt.run_config import RunConfig, load_run_config

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))
MINIMAL = """
model_name_or_path: some/model
mixture: {preset: malora, num_experts: 4}
data:
  tasks:
    - {name: a, path: a.jsonl}
    - {name: b, path: b.jsonl, eval_fraction: 0.1}
training: {learning_rate: 5e-4, max_steps: 10}
"""


def write(folder: Path, text: str = MINIMAL, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("a=1", ["a"], 1),
        ("a.b=5e-4", ["a", "b"], 5e-4),
        ("a.b=null", ["a", "b"], None),
        ("a=true", ["a"], True),
        ("a=[1, 2]", ["a"], [1, 2]),
        ("a={kind: lora, r: 8}", ["a"], {"kind": "lora", "r": 8}),
        ("a.0.b=x", ["a", "0", "b"], "x"),
        ("a[0].b=x", ["a", "0", "b"], "x"),
        ("a=x=y", ["a"], "x=y"),
        ("a='8'", ["a"], "8"),
        ("a=Question: {q}", ["a"], "Question: {q}"),
        ("a=", ["a"], None),
        ("a=two words", ["a"], "two words"),
    ],
)
def test_override_is_a_path_and_a_yaml_value(text: str, key: list[str], value: Any) -> None:
    assert parse_override(text) == (key, value)


def test_overrides_reach_into_lists_and_make_missing_sections() -> None:
    data = {"data": {"tasks": [{"name": "a"}, {"name": "b"}]}, "mixture": None}
    changed = apply_overrides(
        data, ["data.tasks.1.path=b.jsonl", "data.tasks.2.name=c", "mixture.expert.r=4", "new.0.x=1", "new.0.y=2"]
    )
    assert changed["data"]["tasks"] == [{"name": "a"}, {"name": "b", "path": "b.jsonl"}, {"name": "c"}]
    assert changed["mixture"] == {"expert": {"r": 4}}
    assert changed["new"] == [{"x": 1, "y": 2}]
    assert data == {"data": {"tasks": [{"name": "a"}, {"name": "b"}]}, "mixture": None}


def test_bad_overrides_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(
            {"data": {"tasks": [1]}, "x": 3}, ["foo", "data.tasks.5=1", "data.tasks.a=1", "x.y=2", "..=1", "a=[1"]
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 overrides cannot be used"
    for text in ("foo: an override is written key=value", "1 entries", "is a list", "x is 3", "not a path", "YAML"):
        assert any(text in line for line in lines), text


# -- reading ------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path), ["training.max_steps=3", "mixture.expert.r=4", "deepspeed=zero1"])
    assert config.training.max_steps == 3
    assert config.training.learning_rate == 5e-4  # without a dot in its mantissa, plain YAML 1.1 reads a string
    assert config.mixture is not None
    assert config.mixture.expert.r == 4  # type: ignore[attr-defined]
    assert config.mixture.expert.kind == "malora"
    assert config.zero_stage == 1


def test_every_problem_of_every_section_at_once(tmp_path: Path) -> None:
    overrides = [
        "trainin.max_steps=1",
        "mixture.expert.rr=3",
        "mixture.router.kind=foo",
        "data.tasks.0.metric=bleu",
        "data.max_lenght=3",
        "training.max_steps=0",
        "training.learning_rate=-1",
        "deepspeed=zero7",
        "dtype=int7",
    ]
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(tmp_path), overrides)
    text = str(caught.value)
    assert "9 problems" in text
    for expected in (
        "trainin: unknown option; did you mean 'training'?",
        "mixture.expert.rr: unknown option",
        "mixture.router.kind: unknown router kind 'foo'",
        "data.tasks.0.metric: ",
        "data.max_lenght: unknown option; did you mean 'max_length'?",
        "training.max_steps: ",
        "training.learning_rate: ",
        "deepspeed: 'zero7'",
        "dtype: ",
    ):
        assert f"\n  {expected}" in text


def test_missing_sections_are_named_with_the_other_problems(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {max_steps: 0}")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, needs=("model_name_or_path", "data"))
    text = str(caught.value)
    assert "3 problems" in text
    assert "data: missing" in text
    assert "model_name_or_path: missing" in text
    assert load_run_config(write(tmp_path, "dtype: float32")).data is None


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOADAPT_TEST_NAME", "night")
    path = write(
        tmp_path, MINIMAL + "  \nrevision: v${training.max_steps}\nattn_implementation: ${oc.env:MOADAPT_TEST_NAME}"
    )
    config = load_run_config(path, ["training.max_steps=7"])
    assert (config.revision, config.attn_implementation) == ("v7", "night")
    with pytest.raises(ConfigError, match="revision"):
        load_run_config(path, ["revision=${nowhere}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2", r"run\.yaml:2"),
        ("a: 1\na: 2", "duplicate"),
        ("- 1\n- 2", "name: value"),
        ("just text", "just text: unknown option"),
    ],
)
def test_broken_yaml_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_run_config(write(tmp_path, text))
    assert "run.yaml" in str(caught.value)


def test_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    write(tmp_path, name="quickstart.yaml")
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'quickstart\.yaml'"):
        load_run_config(tmp_path / "quikstart.yaml")


def test_bare_no_is_the_word(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, "training: {eval_strategy: no, save_strategy: no}"))
    assert config.training.eval_strategy == "no"
    assert config.training.save_strategy == "no"


def test_paths_start_at_the_config_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "configs", tmp_path / "here"
    for folder, names in ((beside, ("a.jsonl", "model", "zero.json")), (here, ("a.jsonl", "b.jsonl", "model"))):
        folder.mkdir()
        for name in names:
            if name == "model":
                (folder / name).mkdir()
            else:
                (folder / name).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(here)
    config = load_run_config(write(beside), ["model_name_or_path=model", "deepspeed=zero.json"])
    assert config.data is not None
    assert config.data.tasks is not None
    assert [task.path for task in config.data.tasks] == [str(beside / "a.jsonl"), str(here / "b.jsonl")]
    assert config.model_name_or_path == str(beside / "model")
    assert config.deepspeed == str(beside / "zero.json")
    assert load_run_config(write(beside), ["model_name_or_path=org/name"]).model_name_or_path == "org/name"


def test_index_lists_of_a_split_start_at_the_config(tmp_path: Path) -> None:
    (tmp_path / "lists.json").write_text("{}", encoding="utf-8")
    mixture = "mixture: {expert: {kind: ffn_partition, split: {kind: file, path: lists.json}}}\n"
    config = load_run_config(write(tmp_path, mixture))
    assert config.mixture.expert.split.path == str(tmp_path / "lists.json")


def test_quantisation_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        load_run_config(write(tmp_path), ["load_in_4bit=true", "load_in_8bit=true"])
    with pytest.raises(ConfigError, match="ZeRO-3"):
        load_run_config(write(tmp_path), ["load_in_4bit=true", "deepspeed=zero3"])
    assert load_run_config(write(tmp_path), ["load_in_4bit=true", "deepspeed=zero1"]).quantized


def test_plugin_beside_the_config_registers_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moadapt.registry import EXPERTS

    source = """
from typing import Literal
from moadapt.experts.lora import LoraBank, LoraExpertConfig
from moadapt.registry import EXPERTS

class FancyConfig(LoraExpertConfig):
    kind: Literal["fancy"] = "fancy"

EXPERTS.register("fancy", FancyConfig)(type("FancyBank", (LoraBank,), {}))
"""
    (tmp_path / "moadapt_fancy_plugin.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        config = load_run_config(
            write(tmp_path), ["plugins=[moadapt_fancy_plugin]", "mixture={expert: {kind: fancy, r: 3}}"]
        )
        assert config.mixture is not None
        assert config.mixture.expert.kind == "fancy"
    finally:
        EXPERTS._kinds.pop("fancy", None)
        sys.modules.pop("moadapt_fancy_plugin", None)
    with pytest.raises(ConfigError, match="cannot import 'moadapt_no_such_plugin'"):
        load_run_config(write(tmp_path), ["plugins=[moadapt_no_such_plugin]"])


# -- compared mixtures --------------------------------------------------------------------------------------------

COMPARED = (
    MINIMAL
    + """
compare:
  lora: {preset: lora, expert: {r: 48}}
  small: {expert: {r: 6}}
"""
)


def test_compared_mixtures_start_from_their_preset_or_from_the_mixture(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, COMPARED))
    lora, small = config.compare["lora"], config.compare["small"]
    assert (lora.num_experts, lora.expert.kind, lora.expert.r) == (1, "lora", 48)  # type: ignore[attr-defined]
    assert lora.target_modules == "all-linear"  # the preset's, not the mixture's
    assert (small.num_experts, small.expert.kind, small.expert.r) == (4, "malora", 6)  # type: ignore[attr-defined]
    runs = config.runs()
    assert list(runs) == ["malora", "lora", "small"]
    assert runs["malora"].training.output_dir == config.training.output_dir
    assert runs["small"].training.output_dir == str(Path(config.training.output_dir) / "compare" / "small")
    assert runs["small"].mixture == small
    assert all(run.data == config.data and not run.compare for run in runs.values())


def test_what_an_entry_takes_over_is_reported_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(tmp_path, COMPARED), ["mixture.router.kind=foo", "compare.lora.expert.r=0"])
    text = str(caught.value)
    assert "2 problems" in text
    assert "mixture.router.kind" in text
    assert "compare.lora.expert.r" in text


def test_names_of_compared_mixtures_become_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\.\./up' becomes a folder's name"):
        load_run_config(write(tmp_path, COMPARED), ["compare={../up: {preset: lora}}"])


# -- writing ------------------------------------------------------------------------------------------------------


def test_written_config_reads_as_the_same_config(tmp_path: Path) -> None:
    config = load_run_config(
        write(tmp_path, COMPARED), ["data.system_prompt=Be brief", "data.tasks.0.prompt_template='\\${{x}} {q}'"]
    )
    assert config.data is not None
    assert config.data.tasks is not None
    assert config.data.tasks[0].prompt_template == "${{x}} {q}"
    again = load_run_config(write(tmp_path, config.to_yaml(), "config.yaml"))
    assert again == config
    # A task takes over what it leaves out only if it is still left out.
    assert again.data is not None
    assert again.data.tasks is not None
    assert "system_prompt" not in again.data.tasks[0].model_fields_set


# -- shipped ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_is_valid(path: Path) -> None:
    converts, heals = path.stem.startswith("convert_"), path.stem.startswith("heal_")
    needs = ["model_name_or_path", *([] if converts else ["data"]), *([] if heals else ["mixture"])]
    config = load_run_config(path, needs=needs, converts=converts)
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line describes the config"
    assert RunConfig.model_validate(config.model_dump(exclude_unset=True)).mixture == config.mixture


def test_there_are_shipped_configs() -> None:
    names = {path.stem for path in SHIPPED}
    assert {"malora_qwen2.5_0.5b", "malora_llama3.1_8b_zero1", "malora_llama3.1_8b_zero3"} <= names
    for stage in (1, 3):
        path = next(path for path in SHIPPED if path.stem == f"malora_llama3.1_8b_zero{stage}")
        assert load_run_config(path).zero_stage == stage


def test_deepspeed_files_hold_what_the_names_mean() -> None:
    from moadapt.train.deepspeed_config import BUILT_IN

    files = sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json"))
    assert files
    for path in files:
        assert json.loads(path.read_text(encoding="utf-8")) == BUILT_IN[path.stem]
