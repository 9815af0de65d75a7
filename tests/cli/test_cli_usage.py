"""Help, lists, exit codes and messages: what does not need a trained model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_helpers import environment, invoke, run_python

import moadapt
from moadapt.cli import console
from moadapt.errors import AdapterError, ConfigError, DataError

COMMANDS = ["train", "eval", "generate", "merge", "convert", "sweep", "params", "list", "config-schema"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"  moadapt {command}" in result.stdout
    assert "\\b" not in result.stdout


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_help_fit_80_columns(command: str) -> None:
    lines = invoke(command, "--help").stdout.splitlines()
    examples = [line.rstrip() for line in lines if line.startswith("   ") and "moadapt" in line]
    assert examples
    assert max(len(line) for line in examples) <= 80


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"moadapt {moadapt.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian"),
        (["train"], "CONFIG"),
        (["train", "nowhere.yaml"], "no such file"),
        (["list", "expertz"], "did you mean 'experts'?"),
        (["generate", "somewhere"], "--prompt"),
        (["merge", "somewhere"], "--output"),
        (["convert", "somewhere"], "--output"),
        (["sweep", "somewhere"], "--text"),
    ],
)
def test_wrong_usage_exits_2_with_a_message(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_wrong_config_exits_2_and_lists_all_problems(project: Path) -> None:
    result = invoke("params", project, "training.max_steps=0", "mixture.expert.rank=3", "foo=1")
    assert result.exit_code == 2
    for text in ("3 problems", "training.max_steps", "mixture.expert.rank: unknown option", "foo: unknown option"):
        assert text in result.stderr
    assert result.stdout == ""


def test_config_that_does_not_fit_the_model_exits_2_before_training(project: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = invoke(
        "train", project, f"training.output_dir={output}", "compare={bad: {preset: lora, target_modules: [nope]}}"
    )
    assert result.exit_code == 2
    assert "bad: target_modules" in result.stderr
    assert not output.exists()


def test_missing_data_file_exits_1_and_is_named(project: Path) -> None:
    result = invoke("train", project, "data.tasks.1.path=gone.jsonl")
    assert result.exit_code == 1
    assert "gone.jsonl" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError, 2), (DataError, 1), (AdapterError, 1), (KeyboardInterrupt, 130)]
)
def test_exit_codes_by_kind_of_error(error: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import moadapt.run_config

    def fail(*args: object, **kwargs: object) -> None:
        raise error("because [bold]so[/bold]")

    monkeypatch.setattr(moadapt.run_config, "load_run_config", fail)
    result = invoke("params", "x.yaml")
    assert result.exit_code == code
    assert result.stdout == ""
    if code != 130:
        assert "because [bold]so[/bold]" in result.stderr  # markup in a message is text


def test_traceback_flag_shows_the_traceback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(console.settings, "traceback", False)
    assert "Traceback" not in invoke("params", "nowhere.yaml").stderr
    result = invoke("--traceback", "params", "nowhere.yaml")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "Traceback" not in invoke("params", "nowhere.yaml").stderr


def test_local_rank_of_launchers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for spelling in ("--local_rank=1", "--local-rank=1"):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        result = invoke(spelling, "list", "metrics")
        assert result.exit_code == 0
        assert os.environ.pop("LOCAL_RANK") == "1"
    assert "local" not in invoke("--help").stdout


# -- lists --------------------------------------------------------------------------------------------------------


def test_list_names_everything() -> None:
    from moadapt.presets import PRESETS
    from moadapt.registry import EXPERTS, LOSSES, ROUTERS, SPLITS
    from moadapt.train.metrics import METRICS

    result = invoke("list")
    assert result.exit_code == 0
    for name in (*EXPERTS.names(), *ROUTERS.names(), *LOSSES.names(), *SPLITS.names(), *PRESETS, *METRICS):
        assert any(line.split()[:1] == [name] for line in result.stdout.splitlines()), name


@pytest.mark.parametrize("kind", ["experts", "routers", "losses", "splits"])
def test_list_of_kinds_shows_every_option_with_a_meaning(kind: str) -> None:
    from moadapt.cli.listing import _TABLES

    result = invoke("list", kind)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    for name in _TABLES[kind].names():
        for option in _TABLES[kind].get(name).config.model_fields:
            if option != "kind":
                assert any(row[0] == option and len(row) > 3 for row in rows), f"{name}.{option}"


def test_list_takes_the_singular_and_shows_configs() -> None:
    assert invoke("list", "preset").stdout == invoke("list", "presets").stdout
    result = invoke("list", "configs")
    assert "malora_qwen2.5_0.5b.yaml" in result.stdout.replace("\n", "")


def test_list_shows_kinds_of_plugins(tmp_path: Path) -> None:
    plugin = tmp_path / "moadapt_listed_plugin.py"
    plugin.write_text(
        '''"""A module."""
from typing import Literal
from moadapt.routers.softmax import SoftmaxRouter, SoftmaxRouterConfig
from moadapt.registry import ROUTERS

class ListedConfig(SoftmaxRouterConfig):
    kind: Literal["listed"] = "listed"

@ROUTERS.register("listed", ListedConfig)
class Listed(SoftmaxRouter):
    """Routes by a list. Really."""
''',
        encoding="utf-8",
    )
    arguments = ["list", "routers", "--plugin", "moadapt_listed_plugin"]
    code = f"import sys; sys.path.append({str(tmp_path)!r}); sys.argv[1:] = {arguments!r}"
    result = run_python("-c", f"{code}; from moadapt.cli import main; main()")
    assert result.returncode == 0, result.stderr
    assert "listed  Routes by a list" in result.stdout


# -- processes of their own ---------------------------------------------------------------------------------------


def test_runs_as_a_module_and_stays_light() -> None:
    result = run_python("-m", "moadapt", "--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"moadapt {moadapt.__version__}")
    heavy = ("torch", "transformers", "datasets", "deepspeed", "accelerate")
    code = f"import sys, moadapt.cli.app; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_mistake_has_no_traceback_and_its_exit_code_reaches_the_shell(project: Path) -> None:
    result = run_python("-m", "moadapt", "params", project, "mixture.num_experts=0")
    assert result.returncode == 2
    assert "mixture.num_experts" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_other_processes_than_the_first_print_errors_only(project: Path) -> None:
    env = {**environment(), "RANK": "1"}
    command = [sys.executable, "-m", "moadapt", "params", str(project)]
    quiet = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    failed = subprocess.run([*command, "x=1"], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert "error (process 1)" in failed.stderr


@pytest.mark.slow
def test_interrupt_exits_130_without_a_traceback(project: Path, tmp_path: Path) -> None:
    arguments = ["train", str(project), f"training.output_dir={tmp_path / 'out'}", "training.max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moadapt", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what runs in its background with this signal ignored, and everything below inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr.decode()
    assert "Traceback" not in stderr.decode()
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == 0
