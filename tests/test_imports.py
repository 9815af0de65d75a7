"""What importing moadapt pulls in, and the floors of its import graph."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import moadapt

PACKAGE = Path(moadapt.__file__).parent
ROOMS = ("experts", "routers", "losses", "splits", "export", "statistics", "report", "train", "cli")
HEAVY = ["deepspeed", "datasets", "plotly", "matplotlib", "pandas", "tensorboard", "bitsandbytes", "peft"]
CORE = "import moadapt; moadapt.get_mixture_model; moadapt.MixtureModel; moadapt.MixtureConfig; moadapt.EXPERTS"


def loaded_after(code: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter that ran the code."""
    script = (
        f"import sys, json\n{code}\nprint('\\n' + json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_bare_import_is_light() -> None:
    loaded = loaded_after("import moadapt")
    assert "moadapt" in loaded
    assert not loaded & {"torch", "transformers", *HEAVY}


def test_the_core_pulls_in_no_heavy_package_of_its_own() -> None:
    """transformers may bring accelerate along; moadapt adds nothing to what the models that it adapts need anyway."""
    loaded = loaded_after(CORE)
    assert not loaded & set(HEAVY)
    if "accelerate" in loaded:
        assert "accelerate" in loaded_after("from transformers import AutoModelForCausalLM, PreTrainedModel")


# -- the import graph ---------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    parts = ("moadapt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package, the rooms behind the links included."""
    files = [path for folder in (PACKAGE, *(PACKAGE / room for room in ROOMS)) for path in folder.glob("*.py")]
    return {module_name(path): ast.parse(path.read_text()) for path in files}


def imports(name: str, *, everywhere: bool) -> set[str]:
    """Names that a module imports; `everywhere` includes those inside functions, never those for type checking only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: imports are absolute"
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            else:
                visit(child)

    visit(sources()[name])
    return found


def own(name: str, *, everywhere: bool = True) -> set[str]:
    """Modules of moadapt that a module imports."""
    return {item for item in imports(name, everywhere=everywhere) if item in sources() and item != name}


CONTRACTS = {
    "moadapt.errors",
    "moadapt.ffn",
    "moadapt.per_layer",
    "moadapt.registry",
    "moadapt.routing",
    "moadapt.turns",
}


def test_all_modules_are_seen() -> None:
    assert {"moadapt.model", "moadapt.experts.lora", "moadapt.routers.top_k", "moadapt.train.trainer"} <= set(sources())
    assert "moadapt.routing" in own("moadapt.layer")


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_floor_1_knows_only_itself(name: str) -> None:
    assert own(name) <= CONTRACTS | {"moadapt"}


def test_floor_2_knows_only_floor_1_and_its_own_room() -> None:
    for name in sources():
        for room in ("moadapt.experts", "moadapt.routers", "moadapt.losses", "moadapt.splits"):
            if name == room or name.startswith(f"{room}."):
                others = {item for item in own(name) if not (item == room or item.startswith(f"{room}."))}
                assert others <= CONTRACTS | {"moadapt"}, f"{name} imports {others - CONTRACTS}"


def test_floor_3_never_imports_training_or_the_command_line() -> None:
    """Run configs and the command line (floor 5) stand above `train`."""
    above = ("moadapt.train", "moadapt.cli")
    core = ["config", "presets", "targets", "layer", "inject", "passes", "model", "saving", "per_layer"]
    core += [
        "objective",
        "blocks",
        "partition",
        "calibration",
        "observing",
        "convert",
        "converted",
        "text_measure",
        "adjust",
        "temporary",
        "kept",
        "generation",
    ]
    rooms = ("moadapt.export", "moadapt.statistics", "moadapt.report")
    in_rooms = [name for name in sources() if name.startswith(rooms)]
    assert {"moadapt.export.stock", "moadapt.statistics.recording", "moadapt.report.render"} <= set(in_rooms)
    for name in [*(f"moadapt.{item}" for item in core), *in_rooms]:
        taken = {item for item in own(name) if item.startswith(above)}
        assert not taken, f"{name} imports {taken}"


@pytest.mark.parametrize("package", ["deepspeed", "accelerate"])
def test_only_train_imports(package: str) -> None:
    for name in sources():
        if name.startswith("moadapt.train"):
            continue
        taken = {item for item in imports(name, everywhere=True) if item.split(".")[0] == package}
        assert not taken, f"{name} imports {taken}"


def test_no_circle_at_import_time() -> None:
    graph = {name: own(name, everywhere=False) - {"moadapt"} for name in sources()}
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"circle: {' -> '.join((*path, name))}"
        if state.get(name) == 2:
            return
        state[name] = 1
        for other in sorted(graph[name]):
            # A package's __init__ imports its members, and each member may import the package's other members.
            if not (other == name.rpartition(".")[0] or name == other):
                visit(other, (*path, name))
        state[name] = 2

    for name in sorted(graph):
        visit(name, ())


def test_public_names_are_there() -> None:
    for name in moadapt.__all__:
        if name != "MultiTaskTrainer":
            assert getattr(moadapt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moadapt.nothing
