"""`moadapt list` and `moadapt config-schema`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from moadapt.cli.console import guarded, note, out
from moadapt.errors import ConfigError
from moadapt.registry import EXPERTS, LOSSES, ROUTERS, SPLITS, Registry, closest, load_plugins

if TYPE_CHECKING:
    from rich.table import Table

_TABLES: dict[str, Registry[Any]] = {"experts": EXPERTS, "routers": ROUTERS, "losses": LOSSES, "splits": SPLITS}
_KINDS = [*_TABLES, "presets", "metrics", "configs"]


@guarded
def list_kinds(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help=f"One of {', '.join(_KINDS)}.", show_default=False)
    ] = None,
    plugins: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="MODULE", help="Import this module first; repeatable.")
    ] = None,
) -> None:
    """List experts, routers, losses, splits, presets, metrics and ready configs.

    Without KIND, everything by name. With one of [bold]experts[/bold], [bold]routers[/bold], [bold]losses[/bold],
    [bold]splits[/bold], their options, defaults and meanings too. Kinds of installed plugins are listed as well.

    [bold]Examples[/bold]

      moadapt list
      moadapt list experts
      moadapt list presets
    """
    import moadapt.config  # noqa: F401  (fills the tables of kinds)

    load_plugins(plugins)
    if kind is not None and kind not in _KINDS:
        # `list expert` means `list experts`.
        plural = next((name for name in _KINDS if name in (f"{kind}s", f"{kind}es")), None)
        if plural is None:
            raise ConfigError(f"no list of {kind!r}{closest(kind, _KINDS)} Valid lists: {', '.join(_KINDS)}")
        kind = plural
    console = out()
    for name in _KINDS if kind is None else [kind]:
        if name in _TABLES and kind is not None:
            for entry in _TABLES[name].names():
                console.print(_options_table(name, entry))
        else:
            rows = _entries(name)
            if rows:
                console.print(_names_table(name, rows))
            if name == "configs" and kind is not None and not rows:
                note("no ready configs beside this installation; they are in configs/ of the repository")
    if kind is None:
        console.print("Options of a kind: moadapt list experts | routers | losses | splits", highlight=False)


def _entries(name: str) -> list[tuple[str, str]]:
    if name in _TABLES:
        return [(entry, _summary(_TABLES[name].get(entry).cls)) for entry in _TABLES[name].names()]
    if name == "presets":
        return preset_entries()
    if name == "metrics":
        from moadapt.train.metrics import METRICS

        return [(entry, _first_sentence(inspect.getdoc(metric) or "")) for entry, metric in METRICS.items()]
    return config_entries()


def preset_entries() -> list[tuple[str, str]]:
    """Presets with their values in words."""
    from moadapt.config import parse_mixture_config
    from moadapt.presets import PRESETS

    entries = []
    for name in PRESETS:
        config = parse_mixture_config({"preset": name})
        number = config.num_experts
        experts = str(number) if isinstance(number, int) else f"{min(number)} to {max(number)}"
        sizes = {key: getattr(config.expert, key, None) for key in ("r", "shared_r", "shared_down")}
        size = ", ".join(key if value is True else f"{key} {value}" for key, value in sizes.items() if value)
        kept = getattr(config.router, "num_experts_per_tok", None)
        router = config.router.kind if kept is None else f"top-{kept}"
        losses = ", ".join(f"{loss.kind} {loss.coef:g}" for loss in config.losses) or "no auxiliary loss"  # type: ignore[attr-defined]
        noun = "expert" if experts == "1" else "experts"
        what = f"{experts} {config.expert.kind} {noun} ({size})" if size else _slices(config.expert, experts)
        entries.append((name, f"{what}, {router}, {losses}"))
    return entries


def _slices(expert: Any, experts: str) -> str:
    """Experts cut from feed-forward blocks, in words."""
    shared = f" and {expert.num_shared_experts} shared" if expert.num_shared_experts else ""
    trained = "trained" if expert.trainable else "frozen"
    return f"blocks cut into {experts}{shared} {trained} experts (split {expert.split.kind})"


def config_entries() -> list[tuple[str, str]]:
    """The configs of the repository that this package runs from, with their first comment line."""
    import moadapt

    folder = Path(moadapt.__file__).resolve().parent.parent / "configs"
    entries = []
    for path in sorted(folder.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        entries.append((_shown(path), first.lstrip("# ") if first.startswith("#") else ""))
    return entries


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _summary(cls: type) -> str:
    """A kind in one sentence: its module's, which names the method, or else its class's."""
    module = inspect.getmodule(cls)
    text = inspect.getdoc(module) if module is not None and cls.__module__.startswith("moadapt.") else None
    kinds = [table.get(entry).cls for table in _TABLES.values() for entry in table.names()]
    alone = [kind.__module__ for kind in kinds].count(cls.__module__) == 1
    return _first_sentence(text if text and alone else inspect.getdoc(cls) or "")


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"\.(?=\s+[A-Z]|\s*$)", paragraph)[0]


def _names_table(title: str, rows: list[tuple[str, str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", no_wrap=title != "configs", overflow="fold")
    table.add_column()
    for name, text in rows:
        table.add_row(name, text)
    return table


def _options_table(table_name: str, entry: str) -> Table:
    from rich import box
    from rich.table import Table

    from moadapt.schema import option_docs

    kind = _TABLES[table_name].get(entry)
    docs = option_docs(kind.config)
    table = Table(
        title=f"[bold]{entry}[/bold]  {_summary(kind.cls)}", title_justify="left", title_style="", box=box.SIMPLE_HEAD
    )
    table.add_column("option", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", min_width=60)
    if set(kind.config.model_fields) == {"kind"}:
        table.add_row("none", "", "")
    for name, info in kind.config.model_fields.items():
        if name != "kind":
            default = info.get_default(call_default_factory=True)
            shown = "required" if info.is_required() else "null" if default is None else _value(default)
            table.add_row(name, shown, docs.get(name, ""))
    return table


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)


@guarded
def config_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file instead of printing.")
    ] = None,
    plugins: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="MODULE", help="Import this module first; repeatable.")
    ] = None,
) -> None:
    """Print the JSON Schema of a run's config, for editors.

    It knows every option with its default and meaning, and every registered kind.

    [bold]Example[/bold]

      moadapt config-schema --output moadapt.schema.json

    With the YAML extension of VS Code, this first line of a config then gives completion and checks:

      # yaml-language-server: $schema=./moadapt.schema.json
    """
    load_plugins(plugins)
    from moadapt.schema import json_schema

    text = json.dumps(json_schema(), indent=2)
    if output is None:
        typer.echo(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
        note(f"wrote {output}")
