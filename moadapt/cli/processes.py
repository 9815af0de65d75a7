"""Several processes, precision and progress, for commands that run a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moadapt.cli.console import err, is_main_process

if TYPE_CHECKING:
    from moadapt.train.engine import Processes
    from moadapt.train.training_config import TrainingConfig


@contextmanager
def joined_processes(training: TrainingConfig) -> Iterator[Processes]:
    """The processes that a launcher started, joined while this is open; one process needs nothing."""
    import torch
    import torch.distributed as dist

    from moadapt.train.engine import Processes, pick_device

    device = pick_device(training.use_cpu)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=training.ddp_timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield Processes(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()


def computing(training: TrainingConfig, processes: Processes) -> AbstractContextManager[Any]:
    """bfloat16 autocast with `training.bf16`, as in training."""
    import torch

    return torch.autocast(processes.device.type, dtype=torch.bfloat16) if training.bf16 else nullcontext()


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal; yields what moves it: (what is done, done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = err()
    hidden = not (is_main_process() and console.is_terminal)
    # What is printed meanwhile must go where it was sent: no redirection of standard output.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False, disable=hidden
    ) as progress:
        bar = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(bar, description=what, completed=done, total=total)
