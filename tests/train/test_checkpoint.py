"""Checkpoints: what is in them, that they are whole or absent, and which one is deleted or resumed from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import moadapt.train.checkpoint as module
from moadapt.errors import AdapterError, ConfigError
from moadapt.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    gather_rng,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    restore_rng,
    seed_everything,
    write_checkpoint,
)
from moadapt.train.engine import OptimizerState, Processes


def content(value: float = 1.0) -> Checkpoint:
    weights = {"a.lora_A": torch.full((2, 3), value)}
    moments = {"a.lora_A": torch.full((2, 3), value / 2)}, {"a.lora_A": torch.full((2, 3), value / 4)}
    return Checkpoint(
        weights,
        OptimizerState(7, *moments),
        gather_rng(Processes()),
        {"global_step": 7, "best_value": None},
        {"data_seed": 3},
        {"EarlyStoppingCallback": {"best": 0.25, "waited": 1}},
        {"sums": {"train/loss": 1.5}, "weights": {"train/loss": 2.0}},
    )


def save(folder: Path, step: int, value: float = 1.0) -> Path:
    path, written = folder / f"checkpoint-{step}", content(value)

    def adapter(target: Path) -> None:
        save_file(written.weights, target / "mixture.safetensors")

    write_checkpoint(path, written, adapter)
    return path


def test_everything_comes_back(tmp_path: Path) -> None:
    found, wanted = read_checkpoint(save(tmp_path, 7)), content()
    assert found.optimizer.step == 7
    for ours, theirs in (
        (found.weights, wanted.weights),
        (found.optimizer.exp_avg, wanted.optimizer.exp_avg),
        (found.optimizer.exp_avg_sq, wanted.optimizer.exp_avg_sq),
        (found.rng, wanted.rng),
    ):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)
    for part in ("trainer", "sampler", "callbacks", "window"):
        assert getattr(found, part) == getattr(wanted, part)


def test_there_is_no_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    names = {item.name for item in path.iterdir()}
    assert names == {"mixture.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer_state.json"}
    json.loads((path / "trainer_state.json").read_text())


@pytest.mark.parametrize("crash_at", ["adapter", "save_file", "_force_to_disk"])
def test_a_crash_while_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    save(tmp_path, 5)

    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def adapter(target: Path) -> None:
        (target / "mixture.safetensors").write_bytes(b"half")
        if crash_at == "adapter":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if crash_at != "adapter":
            patch.setattr(module, crash_at, crash)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path / "checkpoint-10", content(), adapter)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert find_checkpoint(True, tmp_path) == tmp_path / "checkpoint-5"
    read_checkpoint(tmp_path / "checkpoint-5")
    save(tmp_path, 10)  # the next one is written, and clears what the crash left
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10"}


def test_files_are_on_disk_before_the_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    force, rename = module._force_to_disk, Path.rename

    def noted_force(path: Path) -> None:
        events.append(path.name)
        force(path)

    def noted_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(module, "_force_to_disk", noted_force)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"mixture.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer_state.json"} <= set(before)
    assert after == [tmp_path.name]


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 3, 1.0)
    save(tmp_path, 3, 2.0)
    assert float(read_checkpoint(tmp_path / "checkpoint-3").weights["a.lora_A"][0, 0]) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # not complete
    (tmp_path / "checkpoint-old").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (1, 1, [1, 4]),
        (1, 4, [4]),
        (9, 1, [1, 2, 3, 4]),
    ],
)
def test_old_checkpoints_are_deleted_but_never_the_best_or_the_newest(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, limit, best)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_what_cannot_be_resumed_from_is_named(tmp_path: Path) -> None:
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint(False, tmp_path) is None
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        find_checkpoint(True, tmp_path)
    path = save(tmp_path, 2)
    assert find_checkpoint("true", tmp_path) == path
    with pytest.raises(ConfigError, match=r"did you mean .*checkpoint-2\?"):
        find_checkpoint(str(tmp_path), tmp_path)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"is no checkpoint: no optimizer\.safetensors"):
        find_checkpoint(str(path), tmp_path)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer_state.json", "mixture.safetensors"])
def test_a_broken_file_is_an_error_with_its_folder(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 2)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="checkpoint-2: the checkpoint cannot be read"):
        read_checkpoint(path)


def draw() -> tuple[Any, ...]:
    return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.randn(3).tolist()


@pytest.mark.parametrize("warm", [0, 1])
def test_random_states_continue(warm: int) -> None:
    """`warm` draws leave a second Gaussian number waiting in python's and numpy's generators."""
    seed_everything(5)
    for _ in range(warm):
        draw()
    saved = gather_rng(Processes())
    expected = [draw(), draw()]
    seed_everything(6)
    restore_rng(saved, Processes(), seed=0)
    assert [draw(), draw()] == expected


def test_random_states_of_another_number_of_processes_are_not_used() -> None:
    seed_everything(5)
    saved = {name: torch.cat([rows, rows]) for name, rows in gather_rng(Processes()).items()}
    restore_rng(saved, Processes(), seed=11)
    found = draw()
    seed_everything(11)
    assert draw() == found
