"""One process against two, ZeRO 0 to 3 against plain torch, and a run that is killed against one that is not.

The runs are made once for the whole file, in three sets of processes; the tests look at what they left behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from trainer_helpers import (
    MIXTURE,
    losses,
    make_base,
    make_converted,
    make_model,
    make_prompt_model,
    make_tasks,
    make_tokenizer,
    options,
    weights,
)

from moadapt.train.callbacks import TrainerCallback
from moadapt.train.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

STEPS = 20
SAVED, KILLED = 8, 16  # a checkpoint is written every 8 steps; the run dies while it writes the second
STAGES = (0, 1, 2, 3)
LOSS, WEIGHT = 2e-6, 1e-5
TIMEOUT = 60


def zero(stage: int) -> dict[str, Any]:
    """Threshold 0, or ZeRO-3 would keep all tensors of so small a model whole."""
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}


def run(
    folder: Path,
    world: int,
    deepspeed: Any,
    callbacks: Any = (),
    resume: Any = None,
    model: Any = None,
    **changes: Any,
) -> Any:
    """A run of 20 steps on the same global batches for every world, with clipping that is always active."""
    from moadapt.train.trainer import MultiTaskTrainer

    settings = options(
        folder,
        max_steps=STEPS,
        gradient_accumulation_steps=4 // world,
        max_grad_norm=0.05,
        router_learning_rate=3e-3,
        loraplus_lr_ratio=4.0,
        eval_strategy="steps",
        eval_steps=STEPS,
        eval_on_start=True,
        ddp_timeout=TIMEOUT,
    )
    trainer = MultiTaskTrainer(
        model or make_model(), make_tokenizer(), make_tasks(), {**settings, **changes}, deepspeed, callbacks
    )
    result = trainer.train(resume_from_checkpoint=resume)
    if trainer.processes.is_main:
        (folder / "history.json").write_text(json.dumps(result.history))
    trainer._engine.close()
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any, state: Any) -> None:
        if trainer.processes.rank == 1 and state.global_step == self.step:
            state.should_stop = True


class PoisonAt(StopAt):
    def on_step_end(self, trainer: Any, state: Any) -> None:
        if trainer.processes.rank == 1 and state.global_step == self.step:
            with torch.no_grad():
                next(trainer.model.adapter_parameters())[1].fill_(float("nan"))


def die_while_saving(folder: Path) -> None:
    """Replace the forcing to disk, which is called when all files are written and before the renaming, by a kill."""
    import moadapt.train.checkpoint as module

    original = module._force_to_disk

    def kill(path: Path) -> None:
        if f"checkpoint-{KILLED}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        original(path)

    module._force_to_disk = kill
    run(folder, 2, zero(1), save_strategy="steps", save_steps=SAVED)


SHORT = {"max_steps": 6, "eval_strategy": "no", "eval_steps": None, "eval_on_start": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "malora": {"expert": {"kind": "malora", "r": 4, "shared_r": 6, "lora_alpha": 8}},
    "block": {"router": {"kind": "top_k", "num_experts_per_tok": 2, "scope": "block"}},
    "soft": {"router": {"kind": "softmax"}, "losses": [{"kind": "importance", "coef": 0.1}]},
    "copies": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
}
STE = {"router": {"kind": "sigmoid_ste", "init_std": 0.5}, "losses": [{"kind": "sparsity", "coef": 0.1}]}
LORA_EXPERTS = {"expert": {"kind": "ffn_partition", "num_shared_experts": 1, "lora": {"r": 2}}, "num_experts": 3}
DISTILLATION = [{"kind": "block_distillation", "coef": 1.0}, {"kind": "logits_distillation", "coef": 1.0}]
CONVERTED: dict[str, dict[str, Any]] = {
    "relu": {},
    "ste_lora": {**STE, **LORA_EXPERTS},
    "distilled": {"losses": DISTILLATION},
    "distilled_lora": {"losses": DISTILLATION, **LORA_EXPERTS},
}


def converted(folder: Path, world: int, deepspeed: Any, name: str, **more: Any) -> None:
    """A short run of a converted model, whose adaptive loss changes its strength after every step."""
    changes = {**SHORT, "loraplus_lr_ratio": None, **more}
    run(folder, world, deepspeed, model=make_converted(**CONVERTED[name]), **changes)


BILEVEL = {**SHORT, "bilevel_activation": True, "activation_learning_rate": 5e-3, "router_learning_rate": 3e-3}


def bilevel(folder: Path, world: int, deepspeed: Any, **more: Any) -> None:
    """A short run whose routers' activation learns from evaluation rows."""
    run(folder, world, deepspeed, model=make_prompt_model(), **{**BILEVEL, **more})


def bilevel_in_one_process(folder: Path) -> None:
    from moadapt.errors import ConfigError

    saving = {"save_strategy": "steps", "save_steps": 3}
    bilevel(folder / "bilevel-plain", 1, None, **saving)
    checkpoint = str(folder / "bilevel-plain" / "checkpoint-3")
    bilevel(folder / "bilevel-resumed-zero2", 1, zero(2), resume=checkpoint)
    bilevel(folder / "bilevel-bf16", 1, zero(1), bf16=True, activation_learning_rate=1e-6, **saving)
    try:
        bilevel(folder / "bilevel-zero3", 1, zero(3))
    except ConfigError as error:
        (folder / "bilevel-zero3.txt").write_text(str(error))


def in_one_process(folder: Path) -> None:
    bilevel_in_one_process(folder)
    for name in CONVERTED:
        converted(folder / f"{name}-plain", 1, None, name)
        converted(folder / f"{name}-world1-zero3", 1, zero(3), name, gradient_checkpointing=True)
    saving = {"save_strategy": "steps", "save_steps": 3}
    converted(folder / "relu-saved", 1, None, "relu", **saving)
    for which, deepspeed in (("plain", None), ("zero2", zero(2))):
        checkpoint = str(folder / "relu-saved" / "checkpoint-3")
        converted(folder / f"relu-resumed-{which}", 1, deepspeed, "relu", resume_from_checkpoint=checkpoint)
    for stage in STAGES:
        run(folder / f"world1-zero{stage}", 1, zero(stage))
    checkpoint = str(folder / "killed" / f"checkpoint-{SAVED}")
    run(folder / "resumed-world1-zero3", 1, zero(3), resume=checkpoint)
    for name, changes in VARIANTS.items():
        run(folder / name / "plain", 1, None, model=make_model(**changes), **SHORT)
        run(folder / name / "zero3", 1, zero(3), model=make_model(**changes), gradient_checkpointing=True, **SHORT)
    saving = {"save_strategy": "steps", "save_steps": 3}
    for stage in (1, 2, 3):
        run(folder / f"bf16-zero{stage}", 1, zero(stage), bf16=True, **{**SHORT, **saving})
        checkpoint = str(folder / f"bf16-zero{stage}" / "checkpoint-3")
        run(folder / f"bf16-resumed-zero{stage}", 1, zero(stage), resume=checkpoint, bf16=True, **SHORT)
    autocast = {**zero(2), "torch_autocast": {"enabled": "auto"}}
    run(folder / "bf16-plain", 1, None, bf16=True, **SHORT)
    run(folder / "bf16-autocast", 1, autocast, bf16=True, **SHORT)
    best = {"max_steps": 6, "eval_steps": 2, "learning_rate": 0.5, "max_grad_norm": 0, "load_best_model_at_end": True}
    run(folder / "best", 1, zero(3), **best)
    load_partitioned(folder)


def load_partitioned(folder: Path) -> None:
    """A base model that ZeRO-3 took apart while it was read."""
    from transformers import LlamaForCausalLM

    from moadapt.model import get_mixture_model
    from moadapt.train.loading import partitioned_loading
    from moadapt.train.training_config import training_config_from_dict

    make_base().save_pretrained(folder / "base")
    settings = training_config_from_dict(options(folder, gradient_accumulation_steps=4, max_grad_norm=0.05))
    with partitioned_loading(zero(3), settings, 16):
        base = LlamaForCausalLM.from_pretrained(folder / "base")
    assert base.lm_head.weight.numel() == 0
    model = get_mixture_model(base, MIXTURE)
    model.load_adapter_state_dict(make_model().adapter_state_dict())
    run(folder / "partitioned", 1, zero(3), model=model, **SHORT)
    run(folder / "whole", 1, None, **SHORT)


def in_two_processes(folder: Path) -> None:
    from moadapt.train.engine import TrainingError
    from moadapt.train.gradient_guard import GradientOrderGuard

    for stage in (0, 1, 2):
        bilevel(folder / f"bilevel-world2-zero{stage}", 2, zero(stage))
    for stage in STAGES:
        run(folder / f"world2-zero{stage}", 2, zero(stage))
    for stage in (1, 2, 3):
        for name in CONVERTED:
            converted(folder / f"{name}-world2-zero{stage}", 2, zero(stage), name)
    checkpoint = str(folder / "killed" / f"checkpoint-{SAVED}")
    run(folder / "resumed-world2-zero1", 2, zero(1), resume=checkpoint)
    run(folder / "resumed-world2-zero2", 2, zero(2), resume=checkpoint)

    quiet = {"eval_strategy": "no", "eval_steps": None, "eval_on_start": False}
    stopped = run(folder / "stopped", 2, zero(1), [StopAt(3)], report_to=["tensorboard"], **quiet)
    report: dict[str, Any] = {"stopped": stopped.state.global_step, "reason": stopped.state.stop_reason}
    try:
        run(folder / "poisoned", 2, zero(0), [PoisonAt(2)], **quiet)
    except TrainingError as error:
        report["poisoned"] = str(error)

    rank = stopped.processes.rank
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    named = [("first", first.weight), ("second", second.weight)]
    for order in ("same", "other", "skipped"):
        guard = GradientOrderGuard(named, stopped.processes, 1)
        x = torch.ones(1, 2)
        if order == "skipped" and rank == 1:
            y = first(x)
        else:
            y = first(second(x)) if order == "other" and rank == 1 else second(first(x))
        y.sum().backward()
        try:
            guard.check()
            report[order] = "passed"
        except TrainingError as error:
            report[order] = str(error)
    (folder / f"report{rank}.json").write_text(json.dumps(report))


JOBS = {"die_while_saving": die_while_saving, "in_one_process": in_one_process, "in_two_processes": in_two_processes}


def child(rank: int, world: int, port: int, job: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        JOBS[job](Path(folder))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def spawn(world: int, job: str, folder: Path) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return mp.spawn(child, args=(world, port, job, str(folder)), nprocs=world, join=False)


def wait(context: Any) -> None:
    while not context.join():
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trainer = run(folder / "plain", 1, None)
    save_file(weights(trainer.model), folder / "plain" / "weights.safetensors")

    context = spawn(2, "die_while_saving", folder / "killed")
    with pytest.raises(mp.ProcessExitedException):  # SIGKILL of the first process; the second goes with it
        wait(context)
    for world, job in ((2, "in_two_processes"), (1, "in_one_process")):
        wait(spawn(world, job, folder))
    return folder


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "history.json").read_text())


def assert_same_run(folder: Path, reference: Path, steps: int = STEPS) -> None:
    expected = losses(history(reference))[-steps:]
    found = losses(history(folder))
    assert len(found) == steps
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= LOSS
    final, wanted = load_file(folder / "mixture.safetensors"), load_file(reference / "weights.safetensors")
    assert final.keys() == wanted.keys()
    assert max(float((final[name] - wanted[name]).abs().max()) for name in wanted) <= WEIGHT


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_equals_plain_torch(runs: Path, world: int, stage: int) -> None:
    assert_same_run(runs / f"world{world}-zero{stage}", runs / "plain")


def test_the_comparison_can_fail(runs: Path, tmp_path: Path) -> None:
    """Clipping is active at every step, and a run without it is another run."""
    entries = history(runs / "plain")
    assert all(entry["train/grad_norm"] > 0.05 for entry in entries if "train/grad_norm" in entry)
    run(tmp_path, 1, None, max_grad_norm=0.0)
    unclipped, clipped = losses(history(tmp_path)), losses(history(runs / "plain"))
    assert max(abs(a - b) for a, b in zip(unclipped, clipped, strict=True)) > 100 * LOSS


def test_every_logged_value_is_the_same_for_one_and_two_processes(runs: Path) -> None:
    skipped = ("time", "train/tokens_per_second", "eval/")
    for stage in STAGES:
        for one, two in zip(history(runs / "plain"), history(runs / f"world2-zero{stage}"), strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                if not name.startswith(skipped):
                    assert two[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (stage, name)


def test_evaluation_is_the_same_for_one_and_two_processes(runs: Path) -> None:
    """To the last bit, before training: 5 examples a task in batches of 3, so the second process has a surplus."""
    expected = history(runs / "plain")[0]
    scores = {name: value for name, value in expected.items() if name.startswith("eval/")}
    assert len(scores) == 9
    for folder in ("world1-zero0", "world2-zero0", "world2-zero1", "world2-zero2", "world2-zero3"):
        entry = history(runs / folder)[0]
        assert {name: entry[name] for name in scores} == scores, folder


def test_a_kill_while_saving_leaves_the_checkpoint_before(runs: Path) -> None:
    killed = runs / "killed"
    assert [path.name for path in list_checkpoints(killed)] == [f"checkpoint-{SAVED}"]
    assert any(path.name.startswith(".unfinished") for path in killed.iterdir())
    assert not (killed / "history.json").exists()


@pytest.mark.parametrize("name", ["resumed-world2-zero1", "resumed-world2-zero2", "resumed-world1-zero3"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs: Path, name: str) -> None:
    """At the same and at another stage and number of processes than those it was killed at (zero1, 2)."""
    assert_same_run(runs / name, runs / "plain", STEPS - SAVED)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_zero3_with_activation_checkpointing_equals_plain_torch(runs: Path, name: str) -> None:
    """For every way in which weights and routings travel through a model."""
    plain, partitioned = (runs / name / which for which in ("plain", "zero3"))
    assert losses(history(partitioned)) == pytest.approx(losses(history(plain)), abs=LOSS)
    ours, theirs = (load_file(folder / "mixture.safetensors") for folder in (partitioned, plain))
    for tensor, value in theirs.items():
        torch.testing.assert_close(ours[tensor], value, atol=WEIGHT, rtol=0)


@pytest.mark.parametrize("how", ["world1-zero3", "world2-zero1", "world2-zero2", "world2-zero3"])
@pytest.mark.parametrize("name", list(CONVERTED))
def test_converted_models_equal_plain_torch(runs: Path, name: str, how: str) -> None:
    plain, other = runs / f"{name}-plain", runs / f"{name}-{how}"
    assert losses(history(other)) == pytest.approx(losses(history(plain)), abs=LOSS)
    ours, theirs = (load_file(folder / "mixture.safetensors") for folder in (other, plain))
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        torch.testing.assert_close(ours[tensor], value, atol=WEIGHT, rtol=0)


def test_the_adaptive_loss_adapts_alike_and_goes_on_after_a_resume(runs: Path) -> None:
    key = "losses.target_sparsity.strength"
    strength = {
        name: float(load_file(runs / name / "mixture.safetensors")[key])
        for name in ("relu-plain", "relu-world2-zero1", "relu-world2-zero3", "relu-resumed-plain", "relu-resumed-zero2")
    }
    shares = [e["train/aux/target_sparsity/active_share"] for e in history(runs / "relu-plain") if "train/loss" in e]
    expected = 0.05
    for share in shares:
        expected *= 1.5 if share > 0.3 else 1 / 1.5
    assert strength == pytest.approx(dict.fromkeys(strength, expected), rel=1e-6)
    assert expected != pytest.approx(0.05)
    for which in ("plain", "zero2"):
        resumed = losses(history(runs / f"relu-resumed-{which}"))
        assert resumed == pytest.approx(losses(history(runs / "relu-plain"))[3:], abs=LOSS)


def test_a_base_model_that_was_read_in_parts(runs: Path) -> None:
    assert losses(history(runs / "partitioned")) == pytest.approx(losses(history(runs / "whole")), abs=LOSS)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16(runs: Path, stage: int) -> None:
    """Near to the plain engine's autocast, saved in fp32, and resumed without losing the fp32 weights."""
    whole, resumed = runs / f"bf16-zero{stage}", runs / f"bf16-resumed-zero{stage}"
    assert losses(history(whole)) == pytest.approx(losses(history(runs / "bf16-plain")), abs=0.02)
    assert losses(history(resumed)) == losses(history(whole))[3:]
    for tensor, value in load_file(whole / "mixture.safetensors").items():
        assert value.dtype == torch.float32
        assert torch.equal(load_file(resumed / "mixture.safetensors")[tensor], value)


def test_autocast_is_that_of_plain_torch(runs: Path) -> None:
    assert losses(history(runs / "bf16-autocast")) == losses(history(runs / "bf16-plain"))


def test_the_best_weights_come_back_under_zero3(runs: Path) -> None:
    values = {entry["step"]: entry["eval/loss"] for entry in history(runs / "best") if "eval/loss" in entry}
    best = min(values, key=lambda step: values[step])
    assert best not in (0, 6)
    saved = load_file(runs / "best" / f"checkpoint-{best}" / "mixture.safetensors")
    final = load_file(runs / "best" / "mixture.safetensors")
    for tensor, value in saved.items():
        assert torch.equal(final[tensor], value)


def test_only_the_first_process_reports(runs: Path) -> None:
    assert len(list((runs / "stopped" / "logs" / "stopped").glob("events.*"))) == 1


def test_one_process_can_stop_or_break_the_run_for_all(runs: Path) -> None:
    for rank in (0, 1):
        report = json.loads((runs / f"report{rank}.json").read_text())
        assert report["stopped"] == 3
        assert "step 3" in report["poisoned"]
        assert "task" in report["poisoned"]
        assert report["reason"] == "a callback ended the run"


def test_gradients_in_another_order_are_found(runs: Path) -> None:
    for rank in (0, 1):
        report = json.loads((runs / f"report{rank}.json").read_text())
        assert report["same"] == "passed"
        assert "another order" in report["other"]
        assert "another order" in report["skipped"]
    assert "second" in json.loads((runs / "report1.json").read_text())["skipped"]


def test_two_levels_are_the_same_for_one_and_two_processes(runs: Path) -> None:
    """The coefficients of the routers' activation, which stay outside of DeepSpeed, included."""
    wanted, entries = load_file(runs / "bilevel-plain" / "mixture.safetensors"), history(runs / "bilevel-plain")
    first = make_prompt_model()
    coefficients = [name for name in wanted if name.endswith(("numerator", "denominator"))]
    start = weights(first)
    assert all(float((wanted[name] - start[name]).abs().max()) > 100 * WEIGHT for name in coefficients)
    for name in (*(f"bilevel-world2-zero{stage}" for stage in (0, 1, 2)), "bilevel-resumed-zero2"):
        found = load_file(runs / name / "mixture.safetensors")
        assert max(float((found[key] - value).abs().max()) for key, value in wanted.items()) <= WEIGHT, name
        logged = history(runs / name)
        for key in ("train/loss", "train/bilevel_loss"):
            ours, theirs = ([entry[key] for entry in run if key in entry] for run in (logged, entries))
            assert ours == pytest.approx(theirs[-len(ours) :], abs=LOSS), (name, key)
            assert len(ours) == (3 if "resumed" in name else 6)


def test_two_levels_under_deepspeed_bf16_keep_fp32_coefficients(runs: Path) -> None:
    """Steps of at most 1e-6 vanish in bfloat16, and the start is not a bfloat16 number."""
    start, saved = weights(make_prompt_model()), load_file(runs / "bilevel-bf16" / "mixture.safetensors")
    names = [name for name in saved if name.endswith(("numerator", "denominator"))]
    assert len(names) == 4
    for name in names:
        assert saved[name].dtype == torch.float32
        assert 0 < float((saved[name] - start[name]).abs().max()) < 1e-5


def test_two_levels_refuse_zero3(runs: Path) -> None:
    assert "deepspeed: zero1 or zero2" in (runs / "bilevel-zero3.txt").read_text()
