"""Where the commands print, and how a mistake ends them."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from moadapt.errors import ConfigError, MoadaptError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
Command = TypeVar("Command", bound=Callable[..., Any])
settings = {"traceback": False}


def out() -> Console:
    """For results: standard output."""
    return Console()


def err() -> Console:
    """For notes, progress and mistakes: standard error."""
    return Console(stderr=True)


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def prepare_terminal() -> None:
    """Keep other libraries' deprecation notes away, and processes other than the first silent."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_main_process():
        warnings.filterwarnings("ignore")
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (lives as long as the process)


def quiet_libraries() -> None:
    """Only errors of transformers; progress bars only in the first process and on a terminal."""
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would announce on standard output what it found

    logging.set_verbosity_error()
    if not is_main_process() or not sys.stderr.isatty():
        logging.disable_progress_bar()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def note(text: str) -> None:
    """A line about what goes on, from the first process only."""
    if is_main_process():
        err().print(Text(text))


def guarded(command: Command) -> Command:
    """Turn mistakes into a message and an exit code: 1 failed, 2 wrong config, 130 interrupted."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except MoadaptError as error:
            if settings["traceback"]:
                traceback.print_exc()
            _print_error(str(error))
            raise typer.Exit(WRONG_USAGE if isinstance(error, ConfigError) else FAILED) from None
        except KeyboardInterrupt:
            if is_main_process():
                err().print("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return run  # type: ignore[return-value]


def _print_error(text: str) -> None:
    rank = "" if is_main_process() else f" (process {os.environ.get('RANK')})"
    console = err()
    console.print(Text(f"error{rank}:", style="bold red"), Text(text), soft_wrap=True)
