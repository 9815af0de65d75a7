"""The routers' activation: its learning rate, and learning its coefficients from evaluation rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_helpers import (
    PROMPT_ROUTER,
    activations,
    losses,
    make_model,
    make_prompt_model,
    make_tasks,
    make_tokenizer,
    options,
    weights,
)

from moadapt.errors import ConfigError
from moadapt.train.callbacks import TrainerCallback
from moadapt.train.data_config import SamplingConfig
from moadapt.train.engine import TrainingError
from moadapt.train.logging import read_metrics
from moadapt.train.sampling import MixtureSampler
from moadapt.train.trainer import MultiTaskTrainer

BILEVEL: dict[str, Any] = {"bilevel_activation": True, "activation_learning_rate": 5e-3, "router_learning_rate": 3e-3}


def make_trainer(folder: Path, model: Any, callbacks: Any = (), tasks: Any = None, **changes: Any) -> Any:
    return MultiTaskTrainer(model, make_tokenizer(), tasks or make_tasks(), options(folder, **changes), None, callbacks)


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    return [
        {name: value for name, value in entry.items() if "time" not in name and "per_second" not in name}
        for entry in read_metrics(folder)
    ]


# -- the learning rate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"activation_learning_rate": 1e-6}, 1e-6), ({"router_learning_rate": 3e-3}, 3e-3), ({}, 1e-2)],
)
def test_coefficients_are_a_group_of_their_own_without_decay(tmp_path: Path, given: Any, expected: float) -> None:
    model = make_prompt_model()
    trainer = make_trainer(tmp_path, model, weight_decay=0.1, **given)
    trainer.train()
    [group] = [group for group in trainer.groups if group.name == "activation"]
    names = {name for name, _ in group.parameters}
    assert names == {name for name in weights(model) if name.endswith(("numerator", "denominator"))}
    assert len(names) == 4  # two layers
    assert (group.learning_rate, group.weight_decay) == (expected, 0.0)
    assert not names & {name for other in trainer.groups if other is not group for name, _ in other.parameters}


def test_one_step_moves_the_coefficients_by_their_learning_rate(tmp_path: Path) -> None:
    """AdamW's first step is lr g / (|g| + eps): lr in the direction of each gradient that is not tiny."""
    model = make_prompt_model()
    before = activations(model)
    make_trainer(tmp_path, model, max_steps=1, activation_learning_rate=1e-3, lr_scheduler_type="constant").train()
    for name, value in activations(model).items():
        step = (value - before[name]).abs()
        assert step.max() <= 1e-3 * 1.001
        assert (step > 0.9e-3).any(), name


# -- two levels ---------------------------------------------------------------------------------------------------


def loss_on(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """The definition in the docstring of `moadapt.train.step`: token mean, auxiliary losses weighted by tokens."""
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = torch.zeros(())
    for batch, count in zip(batches, counts, strict=True):
        total = total + model(**batch).loss * (count / sum(counts))
    return total


class ByHand:
    """AdamW of the paper, one tensor at a time, in float64."""

    def __init__(self) -> None:
        self.state: dict[str, list[Any]] = {}

    def step(self, name: str, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        count, first, second = self.state.get(name, [0, 0.0, 0.0])
        gradient = gradient.double()
        count, first, second = count + 1, 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        self.state[name] = [count, first, second]
        move = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        with torch.no_grad():
            parameter.sub_((rate * move).to(parameter.dtype))


@pytest.mark.parametrize("every", [1, 2])
def test_equals_an_alternation_by_hand(tmp_path: Path, every: int) -> None:
    steps, rates = 6, {"activation": 5e-3, "router": 3e-3}
    ours, theirs = make_prompt_model(), make_prompt_model()
    trainer = make_trainer(tmp_path, ours, max_steps=steps, max_grad_norm=0.05, bilevel_steps=every, **BILEVEL)
    history = trainer.train().history

    theirs.train()
    tasks, adam = make_tasks(), ByHand()
    named = dict(theirs.adapter_parameters())
    coefficients = {name: named[name] for name in activations(theirs)}
    others = {name: value for name, value in named.items() if name not in coefficients}
    samplers = [MixtureSampler(sizes, 2, SamplingConfig(), 42) for sizes in ([13, 9, 6], [5, 5, 5])]
    expected = []
    for step in range(steps):
        factor = 1 - step / steps
        rows = [samplers[0].batch(2 * step + micro) for micro in range(2)]
        loss = loss_on(theirs, [trainer.collator([tasks[t].train[row] for t, row in batch]) for batch in rows])
        gradients = torch.autograd.grad(loss, list(others.values()))
        scale = 0.05 / float(torch.cat([g.flatten() for g in gradients]).double().norm())
        assert scale < 1
        for (name, parameter), gradient in zip(others.items(), gradients, strict=True):
            adam.step(name, parameter, gradient * scale, rates.get(theirs.parameter_role(name), 1e-2) * factor)
        if (step + 1) % every:
            continue
        update = (step + 1) // every - 1
        rows = [samplers[1].batch(2 * update + micro) for micro in range(2)]
        loss = loss_on(theirs, [trainer.collator([tasks[t].eval[row] for t, row in batch]) for batch in rows])
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, list(coefficients.values()))
        for (name, parameter), gradient in zip(coefficients.items(), gradients, strict=True):
            adam.step(name, parameter, gradient, rates["activation"] * factor)

    assert [entry["train/bilevel_loss"] for entry in history if "train/bilevel_loss" in entry] == pytest.approx(
        expected, abs=1e-5
    )
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, named[name].detach(), atol=2e-5, rtol=0, msg=name)
    moved = [
        float((value - activations(make_prompt_model())[name]).abs().max()) for name, value in activations(ours).items()
    ]
    assert min(moved) > 1e-3


def test_the_training_loss_cannot_reach_the_coefficients(tmp_path: Path) -> None:
    """Without a step of their own they stay, while everything else learns; as one group they would move."""
    before = make_prompt_model()
    model, plain = make_prompt_model(), make_prompt_model()
    changes: dict[str, Any] = {"max_steps": 3, "gradient_checkpointing": True}
    make_trainer(tmp_path / "a", model, bilevel_steps=4, **BILEVEL, **changes).train()
    make_trainer(tmp_path / "b", plain, activation_learning_rate=5e-3, **changes).train()
    for name, value in weights(before).items():
        is_coefficient = name in activations(before)
        assert torch.equal(weights(model)[name], value) == is_coefficient, name
        assert not torch.equal(weights(plain)[name], value), name
    assert all(parameter.requires_grad for _, parameter in model.adapter_parameters())


def test_evaluation_rows_reach_the_coefficients_and_nothing_else(tmp_path: Path) -> None:
    """After one step, other evaluation rows have changed the coefficients alone."""
    models = []
    for number in range(2):
        tasks = make_tasks()
        if number:
            for task in tasks:
                task.eval = [task.train[row] for row in (3, 1, 4)]
        models.append(make_prompt_model())
        make_trainer(tmp_path / str(number), models[-1], tasks=tasks, max_steps=1, **BILEVEL).train()
    first, second = (weights(model) for model in models)
    for name, value in first.items():
        assert torch.equal(second[name], value) == (name not in activations(models[0])), name


def test_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """With dropout, where the coefficients have done fewer steps than the rest."""
    changes: dict[str, Any] = {"max_steps": 8, "bilevel_steps": 2, "logging_steps": 3, **BILEVEL}
    whole = make_prompt_model(dropout=0.3)
    make_trainer(tmp_path / "whole", whole, **changes).train()

    class Crash(TrainerCallback):
        def on_step_end(self, trainer: Any, state: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    saving = {"save_strategy": "steps", "save_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "two", make_prompt_model(dropout=0.3), [Crash()], **changes, **saving).train()
    checkpoint = tmp_path / "two" / "checkpoint-5"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["bilevel_step"] == 2
    torch.manual_seed(999)
    model = make_prompt_model(dropout=0.3)
    resumed = make_trainer(tmp_path / "two", model, **changes, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert untimed(tmp_path / "two") == untimed(tmp_path / "whole")
    for name, value in weights(whole).items():
        assert torch.equal(weights(model)[name], value), name


def test_the_option_may_change_at_a_checkpoint(tmp_path: Path) -> None:
    """Moments stay, under the name of their tensor, whoever steps."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    for name, before, after in (("on", {}, BILEVEL), ("off", BILEVEL, {})):
        folder, rest = tmp_path / name, {"max_steps": 4}
        make_trainer(folder, make_prompt_model(), **{**rest, **saving, **before, "max_steps": 2}).train()
        moments = load_file(folder / "checkpoint-2" / "optimizer.safetensors")
        model = make_prompt_model()
        kept = [moments[f"exp_avg.{key}"] for key in activations(model)]
        assert all(bool((value != 0).any()) for value in kept)
        resumed = make_trainer(folder, model, **rest, **after)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        at_two = load_file(folder / "checkpoint-2" / "mixture.safetensors")
        assert all(not torch.equal(value, at_two[key]) for key, value in activations(model).items())


def test_the_best_weights_come_back_with_their_coefficients(tmp_path: Path) -> None:
    model = make_prompt_model()
    changes = {"learning_rate": 1.0, "activation_learning_rate": 0.3, "bilevel_activation": True}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_strategy": "steps"}
    trainer = make_trainer(tmp_path, model, max_steps=5, lr_scheduler_type="constant", **changes, **evaluated)
    result = trainer.train()
    assert result.best_checkpoint is not None
    assert trainer.state.best_step < 5
    saved = load_file(result.best_checkpoint / "mixture.safetensors")
    for name, value in weights(model).items():
        assert torch.equal(value, saved[name]), name


def test_bf16_learns_coefficients_in_fp32(tmp_path: Path) -> None:
    """Steps of 1e-6 vanish in bfloat16."""
    model = make_prompt_model().to(torch.bfloat16)
    before = activations(model)
    changes = {**BILEVEL, "activation_learning_rate": 1e-6}
    result = make_trainer(tmp_path, model, bf16=True, lr_scheduler_type="constant", **changes).train()
    assert all(loss > 0 for loss in losses(result.history))
    for name, value in activations(model).items():
        assert value.dtype == torch.float32
        assert 0 < float((value - before[name]).abs().max()) < 1e-5


def test_tasks_without_evaluation_rows_take_no_part(tmp_path: Path) -> None:
    tasks = make_tasks()
    tasks[0].eval = []
    seen: list[int] = []
    trainer = make_trainer(tmp_path, make_prompt_model(), tasks=tasks, **BILEVEL)
    trainer.evaluate(metrics=False)
    sampler = trainer._bilevel._sampler
    seen = [task for index in range(8) for task, _ in sampler.batch(index)]
    assert set(seen) == {1, 2}


def test_a_broken_loss_leaves_the_coefficients(tmp_path: Path) -> None:
    model = make_prompt_model()

    class Poison(TrainerCallback):
        def on_train_begin(self, trainer: Any, state: Any) -> None:
            original = trainer._bilevel._loss_and_gradient
            trainer._bilevel._loss_and_gradient = lambda *args: [value * torch.nan for value in original(*args)]

    before = activations(model)
    with pytest.raises(TrainingError, match="step 1: bilevel_activation: the loss on evaluation rows is nan"):
        make_trainer(tmp_path, model, [Poison()], **BILEVEL).train()
    assert all(torch.equal(value, before[name]) for name, value in activations(model).items())


def test_refusals(tmp_path: Path) -> None:
    gelu = make_model(router={**PROMPT_ROUTER, "activation": "gelu"})
    for option in ({"bilevel_activation": True}, {"activation_learning_rate": 1e-6}):
        with pytest.raises(ConfigError, match=f"{next(iter(option))}: .*no trainable activation.*activation: rational"):
            make_trainer(tmp_path, gelu, **option).train()
    with pytest.raises(ConfigError, match=r"bilevel_activation: learns from evaluation rows.*eval_fraction"):
        make_trainer(tmp_path, make_prompt_model(), tasks=make_tasks(eval_size=0), **BILEVEL).train()
    with pytest.raises(ConfigError, match="bilevel_steps needs bilevel_activation"):
        make_trainer(tmp_path, gelu, bilevel_steps=3)
    with pytest.raises(ConfigError, match=r"bilevel_activation has no loss scaling.*bf16"):
        make_trainer(tmp_path, gelu, fp16=True, bilevel_activation=True)
