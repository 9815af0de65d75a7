"""Checkpoints that any ZeRO stage and any number of processes can continue, written whole or not at all.

A checkpoint is an adapter folder (as `save_pretrained` writes it, weights in fp32) with three more files:

    optimizer.safetensors   AdamW's moments, `exp_avg.NAME` and `exp_avg_sq.NAME`, full tensors
    rng.safetensors         random states of python, numpy and torch, one row for each process
    trainer_state.json      the step, the position in the data, the best value, the callbacks' states

There are no pickles in it. It is written into a hidden folder, forced to the disk, and then renamed to
`checkpoint-STEP`: a run that dies while writing leaves the former checkpoint as the newest.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moadapt.errors import AdapterError, ConfigError
from moadapt.train.engine import OptimizerState, Processes

WEIGHTS_FILE = "mixture.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "trainer_state.json"
_FILES = (WEIGHTS_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE)
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = ".unfinished-"
_FORMAT = 1


@dataclass
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        weights: the adapter's tensors.
        optimizer: AdamW's state.
        rng: random states, each with one row for each process; see `rng_state`.
        trainer: `TrainerState` as a dictionary.
        sampler: what the data stream was, to be compared on resume.
        callbacks: the callbacks' states by class name.
        window: the sums of the log entry that was being filled.
    """

    weights: dict[str, Tensor]
    optimizer: OptimizerState
    rng: dict[str, Tensor]
    trainer: dict[str, Any]
    sampler: dict[str, Any]
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    window: dict[str, Any] = field(default_factory=dict)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and all((path / name).is_file() for name in _FILES):
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def find_checkpoint(resume: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, or None for a fresh start.

    Raises:
        ConfigError: there is no complete checkpoint there.
    """
    if resume is None or resume is False:
        return None
    if resume is True or str(resume).lower() == "true":
        found = list_checkpoints(output_dir)
        if not found:
            raise ConfigError(
                f"training.resume_from_checkpoint: there is no complete checkpoint in {output_dir}; leave the option "
                "out to start afresh"
            )
        return found[-1]
    path = Path(resume)
    missing = [name for name in _FILES if not (path / name).is_file()]
    if missing:
        newest = list_checkpoints(path)
        hint = f"; did you mean {newest[-1]}?" if newest else ""
        raise ConfigError(f"training.resume_from_checkpoint: {path} is no checkpoint: no {', '.join(missing)}{hint}")
    return path


def write_checkpoint(final: Path, content: Checkpoint, save_adapter: Callable[[Path], None]) -> None:
    """Write a checkpoint, in one process.

    Args:
        final: the folder `checkpoint-STEP` that it shall be.
        content: what to write; `content.weights` is left to `save_adapter`.
        save_adapter: writes the adapter's own files into the folder that it is given.
    """
    output = final.parent
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob(f"{_HIDDEN}*"):
        shutil.rmtree(stale, ignore_errors=True)
    hidden = output / f"{_HIDDEN}{final.name}"
    hidden.mkdir()
    save_adapter(hidden)
    moments = {f"exp_avg.{name}": value for name, value in content.optimizer.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": value for name, value in content.optimizer.exp_avg_sq.items()}
    save_file({name: value.contiguous() for name, value in moments.items()}, hidden / OPTIMIZER_FILE)
    save_file(content.rng, hidden / RNG_FILE)
    state = {
        "format": _FORMAT,
        "trainer": content.trainer,
        "optimizer_step": content.optimizer.step,
        "bilevel_step": content.optimizer.bilevel_step,
        "sampler": content.sampler,
        "callbacks": content.callbacks,
        "window": content.window,
    }
    (hidden / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for path in (*hidden.rglob("*"), hidden):
        _force_to_disk(path)
    if final.exists():
        replaced = output / f"{_HIDDEN}replaced-{final.name}"
        final.rename(replaced)
        hidden.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        hidden.rename(final)
    _force_to_disk(output)


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        AdapterError: a file is broken, or was written by a newer version.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        weights, moments, rng = (load_file(path / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE, RNG_FILE))
        if state["format"] > _FORMAT:
            raise AdapterError(f"{path}: written by a newer version (format {state['format']}); update this library")
        by_kind: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        for name, value in moments.items():
            kind, _, tensor = name.partition(".")
            by_kind[kind][tensor] = value
        moments_of = by_kind["exp_avg"], by_kind["exp_avg_sq"]
        optimizer = OptimizerState(int(state["optimizer_step"]), *moments_of, state.get("bilevel_step"))
        return Checkpoint(
            weights, optimizer, rng, state["trainer"], state["sampler"], state["callbacks"], state["window"]
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError(f"{path}: the checkpoint cannot be read ({error}); resume from another one") from error


def prune_checkpoints(output_dir: str | Path, limit: int | None, best_step: int | None) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit`, but never the newest and never the best.

    Returns:
        The folders that were deleted.
    """
    found = list_checkpoints(output_dir)
    if limit is None:
        return []
    deletable = [path for path in found[:-1] if step_of(path) != best_step]
    deleted = deletable[: max(0, len(found) - limit)]
    for path in deleted:
        remove_checkpoint(path)
    return deleted


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that no half of it can ever be taken for one."""
    hidden = path.with_name(f"{_HIDDEN}deleted-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The random states of this process as integer and float tensors of fixed shape."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*legacy[1].tolist(), legacy[2], legacy[3]], dtype=torch.int64),
        "gauss": torch.tensor([float("nan") if gauss is None else gauss, float(legacy[4])], dtype=torch.float64),
        "torch": torch.get_rng_state().to(torch.int64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).to(torch.int64)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set what `rng_state` returned."""
    gauss, cached = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *words, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].to(torch.uint8))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].to(torch.uint8), device)


def gather_rng(processes: Processes) -> dict[str, Tensor]:
    """The random states of all processes, one row each. Collective."""
    gathered = {}
    for name, value in rng_state(processes.device).items():
        rows = torch.zeros(processes.world_size, *value.shape, dtype=value.dtype)
        rows[processes.rank] = value
        gathered[name] = processes.all_sum(rows)
    return gathered


def restore_rng(rng: Mapping[str, Tensor], processes: Processes, seed: int) -> None:
    """Continue this process's random stream, or start one from `seed` where the number of processes changed."""
    if len(rng["python"]) == processes.world_size:
        set_rng_state({name: rows[processes.rank] for name, rows in rng.items()}, processes.device)
    else:
        seed_everything(seed + processes.rank)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
