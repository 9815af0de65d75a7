"""Fixtures of the command line's tests: one tiny project for all, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import invoke, save_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny project; do not train into its own output folder."""
    return save_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def trained(project: Path) -> Path:
    """The output folder of a run with one compared LoRA."""
    output = project.parent / "trained"
    result = invoke(
        "train",
        project,
        f"training.output_dir={output}",
        "compare={lora: {preset: lora, target_modules: [q_proj, down_proj], expert: {r: 3}}}",
    )
    assert result.exit_code == 0, result.output
    (output / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    return output
