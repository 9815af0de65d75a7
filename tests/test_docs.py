"""The documentation holds: its YAML parses, links resolve, commands and options that it names exist, examples run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from typer.main import get_command

from moadapt.cli.app import app
from moadapt.convert import conversion_options
from moadapt.ffn import FeedForward
from moadapt.presets import PRESETS
from moadapt.registry import EXPERTS, LOSSES, ROUTERS, SPLITS
from moadapt.routing import RoutingContext
from moadapt.run_config import RunConfig, load_run_config
from moadapt.splits import BlockSample, Sizes

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
)
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in _FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def yaml_blocks() -> list[Any]:
    cases = []
    for page in PAGES:
        for number, body in enumerate(blocks(page, "yaml")):
            cases.append(pytest.param(body, id=f"{page.relative_to(ROOT)}:{number}"))
    return cases


@pytest.mark.parametrize("body", yaml_blocks())
def test_yaml_in_the_docs_is_a_valid_config(body: str) -> None:
    document = yaml.safe_load(body)
    assert set(document) <= set(RunConfig.model_fields), "a block shows whole sections of a config"
    document.pop("plugins", None)  # modules of the reader's
    mixture = document.get("mixture") or {}
    if "calibration" in document or (mixture and not {"preset", "target_modules"} & set(mixture)):
        document["mixture"] = conversion_options(mixture)  # as `convert` and training on a converted folder read it
    RunConfig.model_validate(document)


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_ready_configs_parse(path: Path) -> None:
    config = load_run_config(path)
    assert config.model_name_or_path is not None
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# "), "the first line says what it is; `moadapt list configs` shows it"


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_configs_that_convert_hold_a_mixture_of_blocks(path: Path) -> None:
    config = load_run_config(path)
    if path.name.startswith("convert_"):
        assert config.mixture is not None
        assert EXPERTS.get(config.mixture.expert.kind).cls.replaces_block
    if path.name.startswith("heal_"):
        made = next(line for line in path.read_text().splitlines() if "convert_" in line)
        source = ROOT / re.findall(r"configs/convert_\S+\.yaml", made)[0]
        assert f"--output {config.model_name_or_path} " in source.read_text(), "it heals what that config makes"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: there is no {path}"
        assert not anchor or anchor in anchors(there), f"{target}: {there.name} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_and_scripts_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(
        re.findall(r"\b((?:configs|examples|benchmarks|docs|tests)/[\w./-]+\.(?:py|yaml|md|json))\b", text)
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_tables_have_as_many_cells_in_every_row(page: Path) -> None:
    above = 0
    for line in prose(page).splitlines():
        code_free = re.sub(r"`[^`]*`", lambda span: span.group().replace(r"\|", ""), line)
        cells = len(re.findall(r"(?<!\\)\|", code_free)) if line.startswith("|") else 0
        assert not (above and cells) or cells == above, line
        above = cells


def commands() -> dict[str, click.Command]:
    group = get_command(app)
    return dict(group.commands)  # type: ignore[attr-defined]


def shown_commands() -> list[Any]:
    """Every line of a shell block or comment in a config that runs `moadapt COMMAND`."""
    cases = []
    sources = [(page, "\n".join([*blocks(page, "bash"), *blocks(page, "text")])) for page in PAGES]
    for path in CONFIGS:
        lines = path.read_text(encoding="utf-8").splitlines()
        sources.append((path, "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))))
    for path, text in sources:
        text = text.replace("\\\n", " ")
        for line in text.splitlines():
            for found in re.finditer(r"(?:^|[\s/])(?:-m |--module )?moadapt ([a-z-]+)( .*)?$", line):
                rest = (found.group(2) or "").split(" #")[0].split(" && ")[0].split(" | ")[0]
                cases.append(pytest.param(found.group(1), rest, id=f"{path.name}: {found.group(0).strip()[:60]}"))
    return cases


@pytest.mark.parametrize(("name", "rest"), shown_commands())
def test_commands_in_the_docs_exist_with_their_options(name: str, rest: str) -> None:
    known = commands()
    assert name in known
    options = {option for parameter in known[name].params for option in parameter.opts}
    for word in re.findall(r"(?<!\S)\[?(--?[a-z][a-z-]*)", rest):
        assert word in options, f"moadapt {name} has no option {word}"
    for key, value in re.findall(r"(?<!\S)'?((?:mixture|calibration|training|data|deepspeed)[\w.]*)=([^\s']*)", rest):
        assert key.split(".")[0] in RunConfig.model_fields
        if key == "mixture.preset":
            assert value in PRESETS
    assert shlex.split(rest.replace("'", "").replace('"', "")) is not None


def test_every_command_and_kind_is_documented() -> None:
    reference = (ROOT / "docs" / "commands.md").read_text()
    for name in commands():
        assert f"\n## {name}\n" in reference, name
    methods = (ROOT / "docs" / "methods.md").read_text()
    tables = (*EXPERTS.names(), *ROUTERS.names(), *LOSSES.names(), *SPLITS.names(), *PRESETS)
    missing = [name for name in tables if f"`{name}`" not in methods]
    assert not missing


def test_options_in_the_tables_of_the_conversion_page_exist() -> None:
    page = (ROOT / "docs" / "conversion.md").read_text()
    fields: set[str] = set()
    for table in (EXPERTS, ROUTERS, LOSSES, SPLITS):
        for name in table.names():
            fields |= set(table.get(name).config.model_fields)
    for section in ("expert", "router"):
        for name in re.findall(rf"`{section}\.(\w+)", page):
            assert name in fields, f"{section}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_python_in_the_docs_is_python_and_its_imports_work(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("moadapt"):
                exec(compile(ast.Module([node], []), str(page), "exec"), {})


def test_the_kinds_of_the_extending_page_work() -> None:
    before = {table: dict(table._kinds) for table in (ROUTERS, SPLITS)}
    try:
        for body in blocks(ROOT / "docs" / "extending.md", "python"):
            exec(compile(body, "extending.md", "exec", dont_inherit=True), {"__name__": "my_package.kinds"})
        router = ROUTERS.build(ROUTERS.parse("above_mean"), 8, 4)
        routing = router(torch.randn(5, 8), RoutingContext())
        assert routing.weights_TN.shape == (5, 4)
        assert bool(routing.selected_TN.any(-1).all())
        assert bool((~routing.selected_TN).any(-1).all())
        ffn = FeedForward(torch.randn(10, 8), torch.diag(torch.arange(10.0))[:, :8], None, torch.relu)
        split = SPLITS.build(SPLITS.parse("by_norm"))
        lists_EM = split.assign(ffn, Sizes(1, 1, 10), BlockSample(), "block")
        assert lists_EM.tolist() == [[3, 4, 5, 6, 7], [0, 1, 2, 8, 9]]
    finally:
        for table, kinds in before.items():
            table._kinds = kinds


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "dense_to_experts.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    shown = {
        line.split(" perplexity")[0].strip(): float(line.split("perplexity")[1].split()[0])
        for line in result.stdout.splitlines()
        if " perplexity " in line
    }
    assert shown["k-means, all experts ungated"] == shown["dense"]
    assert shown["dense"] < shown["DSMoE healed"] < shown["DSMoE before healing"]
    assert shown["saved and loaded"] == shown["DSMoE healed"]
    assert "MixtralForCausalLM: The plural of cat, wolf made" in result.stdout
    assert {"converted", "auto_map", "mixtral"} <= {path.name for path in tmp_path.iterdir()}
