"""The table of commands."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from moadapt.cli.console import settings

app = typer.Typer(
    name="moadapt",
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        import moadapt

        typer.echo(f"moadapt {moadapt.__version__}")
        raise typer.Exit


def moadapt(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the Python traceback of a mistake too, for debugging.")
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True, help="Added by launchers.")
    ] = None,
) -> None:
    """Tune one language model on many tasks with a routed mixture of adapters.

    [bold]Start here[/bold]

      moadapt list presets                        published methods
      moadapt params CONFIG.yaml                  how many parameters it trains
      moadapt train CONFIG.yaml                   train, evaluate, save
      moadapt eval runs/my-run                    scores of the saved adapter
      moadapt generate runs/my-run --prompt "…"   answers
      moadapt inspect runs/my-run                 who is routed where

    Any option of a config can be changed on the command line: [bold]training.learning_rate=1e-4[/bold]. Several
    processes: [bold]torchrun --nproc_per_node 2 -m moadapt train CONFIG.yaml deepspeed=zero2[/bold]
    """
    settings["traceback"] = traceback
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


def _help(command: Callable[..., Any]) -> str:
    """A docstring for the terminal: paragraphs flow, indented lines (examples) stay as they are."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(f"\b\n{text}" if text.startswith(" ") else " ".join(text.splitlines()) for text in paragraphs)


def _register() -> None:
    from moadapt.cli.convert import convert
    from moadapt.cli.evaluate import evaluate
    from moadapt.cli.export import export
    from moadapt.cli.generate import generate
    from moadapt.cli.inspect import inspect as inspect_routing
    from moadapt.cli.listing import config_schema, list_kinds
    from moadapt.cli.merge import merge
    from moadapt.cli.params import params
    from moadapt.cli.sweep import sweep
    from moadapt.cli.train import train

    app.callback(help=_help(moadapt))(moadapt)
    commands: dict[str, Callable[..., Any]] = {
        "train": train,
        "eval": evaluate,
        "generate": generate,
        "merge": merge,
        "convert": convert,
        "sweep": sweep,
        "export": export,
        "inspect": inspect_routing,
        "params": params,
        "list": list_kinds,
        "config-schema": config_schema,
    }
    for name, command in commands.items():
        app.command(name, help=_help(command))(command)


_register()
