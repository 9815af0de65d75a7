"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moadapt.errors import ConfigError
from moadapt.registry import closest

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Options to change, as training.max_steps=100.", show_default=False),
]
AdapterPath = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="A folder that train wrote, or a hub id.", show_default=False)
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model, instead of the one that the adapter names."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of the base weights: auto (the checkpoint's, the default), float32, bfloat16 or float16.",
    ),
]
UseCpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU where a GPU is present.")]


def checked_dtype(dtype: str | None) -> str:
    """The value of `--dtype`.

    Raises:
        ConfigError: an unknown one.
    """
    valid = ["auto", "float32", "bfloat16", "float16"]
    if dtype is not None and dtype not in valid:
        raise ConfigError(f"--dtype: {dtype!r}{closest(dtype, valid)} Valid values: {', '.join(valid)}")
    return dtype or "auto"


def refuse_filled(folder: Path, option: str) -> None:
    """Stop before files of another run are overwritten.

    Raises:
        ConfigError: the folder has something in it, or a file is in its place.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{option}: {folder} is there already and not an empty folder; choose another")
