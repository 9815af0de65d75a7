"""Routing in the log while a run trains: the numbers by loops over every decision."""

from __future__ import annotations

import json
import math
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from routing_helpers import ALARM, STILL, collapsed_model, counts_of, events, make_trainer, routing_of
from trainer_helpers import make_model, make_prompt_model

from moadapt.train.callbacks import TrainerCallback
from moadapt.train.logging import read_metrics
from moadapt.train.routing_alarm import RoutingAlarm
from moadapt.train.routing_monitor import layer_names, over_tasks, summary
from moadapt.train.training_config import RoutingAlarmConfig

TASKS = ("task0", "task1", "task2")


# -- an independent count ------------------------------------------------------------------------------------------


@contextmanager
def watched(model: Any, seen: dict[str, list[Any]]) -> Iterator[None]:
    """Note what every router returns."""
    handles = [
        site.router.register_forward_hook(lambda _, args, output, name=name: seen[name].append(output))
        for name, site in model.injection.routers.items()
    ]
    yield
    for handle in handles:
        handle.remove()


class ByHand:
    """Decisions about single rows, one after the other, as python numbers."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[int, list[bool], list[float], list[float]]]] = defaultdict(list)

    def count(self, trainer: Any, model: Any, micro_batches: int) -> None:
        """Run the model on the first micro-batches of the run."""
        for micro in range(micro_batches):
            chosen = trainer.sampler.batch(micro)
            batch = trainer.collator([trainer.tasks[task].train[row] for task, row in chosen])
            seen: dict[str, list[Any]] = defaultdict(list)
            with watched(model, seen):
                model(**batch)
            for name, [routing] in seen.items():
                lines = zip(
                    routing.selected_TN.tolist(), routing.weights_TN.tolist(), routing.probs_TN.tolist(), strict=True
                )
                length = batch["input_ids"].shape[1]
                for number, (selected, weights, probs) in enumerate(lines):
                    by_token = len(routing.weights_TN) > len(chosen)
                    row, place = divmod(number, length) if by_token else (number, 0)
                    if not by_token or batch["attention_mask"][row, place]:
                        self.rows[name].append((chosen[row][0], selected, weights, probs))

    def numbers(self, dense: bool = False) -> dict[str, float]:
        """The entry of the log that these rows make."""
        sums: dict[str, list[float]] = defaultdict(list)
        for name, rows in self.rows.items():
            size = len(rows[0][1])
            layer = next(part for part in name.split(".") if part.isdigit())
            shares: Counter[int] = Counter()
            by_task: dict[int, Counter[int]] = defaultdict(Counter)
            entropy = 0.0
            for task, selected, weights, probs in rows:
                for expert in range(size):
                    amount = weights[expert] if dense else float(selected[expert])
                    shares[expert] += amount
                    by_task[task][expert] += amount
                entropy -= sum(p / sum(probs) * math.log(p / sum(probs)) for p in probs if p > 0)
            total = sum(shares.values())
            dead = sum(shares[expert] / (total if dense else len(rows)) < 0.01 / size for expert in range(size))
            balance = {
                "entropy": entropy / len(rows) / math.log(size),
                "max_share": max(shares.values()) / total,
                "dead_fraction": dead / size,
                "max_violation": max(shares.values()) / (total / size) - 1,
            }
            for measure, value in balance.items():
                sums[f"routing/{measure}"].append(value)
                sums[f"routing/layer_{layer}/{measure}"].append(value)
            own = {
                task: [counts[expert] / sum(counts.values()) for expert in range(size)]
                for task, counts in by_task.items()
            }
            mean = [sum(share[expert] for share in own.values()) / len(own) for expert in range(size)]
            smaller = min(math.log(len(own)), -sum(p * math.log(p) for p in mean if p > 0))
            parts = []
            for task, share in own.items():
                told = sum(p * math.log(p / q) for p, q in zip(share, mean, strict=True) if p > 0) / smaller
                sums[f"routing/task/{TASKS[task]}/information"].append(told)
                parts.append(told)
            sums["routing/task_information"].append(sum(parts) / len(parts))
        return {name: sum(values) / len(values) for name, values in sums.items()}


@pytest.mark.parametrize("kind", ["top_k", "softmax", "prompt", "block"])
def test_an_entry_is_what_loops_over_its_rows_give(tmp_path: Path, kind: str) -> None:
    """Of two steps with two micro-batches each, padding left out."""

    def make() -> Any:
        if kind == "prompt":
            return make_prompt_model()
        router = {
            "top_k": {"kind": "top_k", "num_experts_per_tok": 2, "init_std": 0.5},
            "softmax": {"kind": "softmax", "init_std": 0.5},
            "block": {"kind": "top_k", "num_experts_per_tok": 1, "scope": "block", "init_std": 0.5},
        }[kind]
        return make_model(router=router, losses=[])

    trainer = make_trainer(tmp_path, make(), max_steps=2, logging_steps=2)
    hand = ByHand()
    hand.count(trainer, make().train(), 4)
    [entry] = trainer.train().history
    expected = hand.numbers(dense=kind == "softmax")
    assert len(hand.rows) == (2 if kind in ("prompt", "block") else 4)
    assert len(expected) == 4 + 2 * 4 + 1 + 3
    assert routing_of(entry) == pytest.approx(expected, abs=2e-6)
    assert len({round(value, 6) for value in expected.values()}) > 6  # the numbers can be told apart
    assert routing_of(read_metrics(tmp_path)[0]) == routing_of(entry)


def test_the_mean_over_tasks_is_the_information_about_the_task(tmp_path: Path) -> None:
    [entry] = make_trainer(tmp_path, max_steps=4, logging_steps=4).train().history
    parts = [entry[f"routing/task/{task}/information"] for task in TASKS]
    assert min(parts) > 0
    assert entry["routing/task_information"] == pytest.approx(sum(parts) / 3, abs=1e-7)


def test_checkpointing_accumulation_and_size_of_batches_change_nothing(tmp_path: Path) -> None:
    """The rows are the same, in micro-batches of two or six: padding and the number of passes differ."""
    changes: dict[str, Any] = {"max_steps": 3, "logging_steps": 3}
    found = []
    for size, accumulation, checkpointing in ((6, 1, False), (2, 3, False), (2, 3, True)):
        folder = tmp_path / f"{size}-{checkpointing}"
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(folder, gradient_checkpointing=checkpointing, **sizes, **changes)
        found.append(routing_of(trainer.train().history[0]))
    assert len(found[0]) == 16
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-7)


class Meddles(TrainerCallback):
    """Uses the model between two steps, as a callback that prints a sample would."""

    def on_step_end(self, trainer: Any, state: Any) -> None:
        with torch.no_grad():
            trainer.model(input_ids=torch.full((3, 5), 4), task_ids=torch.zeros(3, dtype=torch.int64))


def test_nothing_but_training_rows_counts(tmp_path: Path) -> None:
    """Neither evaluations, answers included, nor two levels, nor what callbacks run; and the model is as before."""
    changes: dict[str, Any] = {"max_steps": 4, "logging_steps": 4}
    [alone] = make_trainer(tmp_path / "alone", make_prompt_model(), **changes).train().history
    model = make_prompt_model()
    more = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "bilevel_activation": True}
    trainer = make_trainer(tmp_path / "more", model, [Meddles()], activation_learning_rate=STILL, **more, **changes)
    entries = [routing_of(entry) for entry in trainer.train().history]
    assert [entry for entry in entries if entry] == [routing_of(alone)]
    from moadapt.passes import _OBSERVERS

    assert model.base_model not in _OBSERVERS


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    history = make_trainer(tmp_path, max_steps=2, routing_statistics=False).train().history
    assert len(history) == 2
    assert not any(routing_of(entry) for entry in history)


def test_one_expert_is_nothing_to_watch(tmp_path: Path) -> None:
    model = make_model(num_experts=1, router={"kind": "softmax"}, losses=[])
    trainer = make_trainer(tmp_path, model, max_steps=1, routing_alarm={**ALARM, "patience": 1})
    assert not trainer._routing.watches
    assert not routing_of(trainer.train().history[0])


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    runs = []
    for on in (True, False):
        model = make_model(dropout=0.3)
        history = make_trainer(tmp_path / str(on), model, learning_rate=1e-2, routing_statistics=on).train().history
        runs.append(([entry["train/loss"] for entry in history], model.adapter_state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name])


def test_a_resumed_run_logs_the_same(tmp_path: Path) -> None:
    """Saved in the middle of an entry, of the time between two evaluations, and of an alarm's patience."""
    changes: dict[str, Any] = {
        "max_steps": 8,
        "logging_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "learning_rate": 1e-2,
        "report_to": ["tensorboard"],
        "routing_alarm": {"max_share": 0.6, "patience": 2},
    }
    whole = make_trainer(tmp_path / "whole", **changes).train().history
    trainer = make_trainer(tmp_path / "saved", save_strategy="steps", save_steps=3, **changes)
    trainer.train()
    state = json.loads((tmp_path / "saved" / "checkpoint-3" / "trainer_state.json").read_text())
    assert {"alarm", "window", "drawn"} <= set(state["callbacks"]["RoutingMonitor"])
    resumed = make_trainer(tmp_path / "saved", **changes)
    found = resumed.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-3")).history
    entries = [[routing_of(entry) for entry in run if routing_of(entry)] for run in (whole, found)]
    assert len(entries[0]) == 2
    assert entries[0] == entries[1]
    images = [events(tmp_path / name, 8) for name in ("whole", "saved")]
    assert images[0] == images[1]
    assert resumed._routing.alarm.state_dict() == trainer._routing.alarm.state_dict()


# -- names ---------------------------------------------------------------------------------------------------------


def test_layers_of_encoder_and_decoder_are_told_apart() -> None:
    names = ["encoder.block.0.mlp", "decoder.block.0.mlp", "top"]
    routers = [counts_of(name, [3, 1], layer=None if name == "top" else 0) for name in names]
    assert layer_names(routers) == {names[0]: "encoder/layer_0/", names[1]: "decoder/layer_0/", "top": ""}
    assert layer_names(routers[1:]) == {names[1]: "layer_0/", "top": ""}


def test_a_summary_has_no_number_without_rows() -> None:
    never, once = counts_of("layers.0.mlp", [0, 0]), counts_of("layers.1.mlp", [3, 1], layer=1)
    found = summary({"a": never, "b": once})
    assert set(found) == {
        f"routing/{place}{measure}"
        for place in ("", "layer_1/")
        for measure in ("entropy", "max_share", "dead_fraction", "max_violation")
    }
    assert found["routing/max_share"] == 0.75
    assert found["routing/layer_1/max_violation"] == 0.5
    assert found["routing/entropy"] == pytest.approx(0.25 / math.log(2))
    assert summary({"a": never}) == {}


def test_what_is_drawn_and_what_is_logged_are_counted_apart() -> None:
    """Both begin with the same counts where a checkpoint is written first, and each is added to later."""
    logged = counts_of("r", [3, 5])
    drawn = over_tasks(logged)
    for counts in (drawn, logged):
        counts.merge(over_tasks(counts_of("r", [1, 1])))
    for counts in (drawn, logged):
        assert int(counts.entropy_histogram.sum()) == int(counts.rows.sum()) == 10


def test_a_router_that_selects_nothing() -> None:
    counts = counts_of("layers.0.mlp", [0, 0])
    counts.rows[0, 0, 0] = 100
    found = summary({"a": counts})
    assert found["routing/dead_fraction"] == 1.0
    assert "routing/max_share" not in found
    assert RoutingAlarm(RoutingAlarmConfig(patience=1, **ALARM)).judge({"a": counts}) is not None


# -- two processes -------------------------------------------------------------------------------------------------


def run_one(folder: Path, world: int, deepspeed: Any, rank: int = 0) -> None:
    """The same global batches for one process and two: an alarm ends the run at step 6, after an evaluation."""
    changes: dict[str, Any] = {
        "gradient_accumulation_steps": 4 // world,
        "max_steps": 10,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "report_to": ["tensorboard"],
        "routing_alarm": {**ALARM, "action": "stop"},
        "ddp_timeout": 60,
    }
    trainer = make_trainer(folder, collapsed_model(), deepspeed=deepspeed, **changes)
    result = trainer.train()
    saved = {"history": result.history, "reason": trainer.state.stop_reason, "step": result.global_step}
    folder.with_name(f"{folder.name}-rank{rank}.json").write_text(json.dumps(saved))
    trainer._engine.close()


def child(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        run_one(Path(folder), 2, {"zero_optimization": {"stage": 0}}, rank)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_process_and_two_log_draw_and_alarm_alike(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_one(tmp_path / "one", 1, None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(child, args=(port, str(tmp_path / "two")), nprocs=2, join=True)
    one, two, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one-rank0", "two-rank0", "two-rank1")
    )
    entries = [[routing_of(entry) for entry in run["history"] if routing_of(entry)] for run in (one, two)]
    assert len(entries[0]) == 3
    for alone, both in zip(*entries, strict=True):
        assert both == pytest.approx(alone, abs=2e-8)
    assert one["step"] == two["step"] == second["step"] == 6
    assert one["reason"] == two["reason"] == second["reason"]
    assert "layer 1 q_proj: experts 0, 3" in one["reason"]
    assert events(tmp_path / "one", 5) == events(tmp_path / "two", 5)
