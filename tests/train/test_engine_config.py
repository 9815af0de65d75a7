"""Training options, DeepSpeed's configuration, parameter groups, learning rates, trackers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import make_model

from moadapt.errors import ConfigError
from moadapt.train.deepspeed_config import BUILT_IN, build_deepspeed, read_deepspeed, zero_stage
from moadapt.train.engine import OptimizerState, PlainEngine
from moadapt.train.logging import check_trackers
from moadapt.train.optimizer import LearningRates, build_optimizer, parameter_groups
from moadapt.train.training_config import TrainingConfig, interval, training_config_from_dict

OWN = {
    *("router_learning_rate", "activation_learning_rate", "loraplus_lr_ratio"),
    *("routing_statistics", "routing_alarm"),
    *("bilevel_activation", "bilevel_steps", "early_stopping_patience", "early_stopping_threshold"),
}
FORMER = {"overwrite_output_dir", "warmup_ratio"}  # transformers had them before version 5


def config(**options: Any) -> TrainingConfig:
    return training_config_from_dict(options)


def test_names_are_those_of_training_arguments() -> None:
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TrainingConfig.model_fields) - theirs - OWN - FORMER == set()


def test_defaults_are_those_of_training_arguments() -> None:
    from transformers import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    chosen_otherwise = {"output_dir", "logging_steps", "report_to", "lr_scheduler_type"}
    ours = config()
    for name in set(TrainingConfig.model_fields) & set(theirs) - chosen_otherwise:
        value = getattr(ours, name)
        assert (value or None) == (theirs[name] or None) or str(theirs[name]).endswith(f".{str(value).upper()}"), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1e-3}, "training: 1 problem.*learning_rat: unknown option; did you mean 'learning_rate'"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations; set eval_strategy"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold needs early_stopping_patience"),
        ({"eval_steps": 5}, "eval_steps needs eval_strategy: steps"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model and greater_is_better need"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio exclude"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "constant has no warmup"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "unknown schedule. Valid schedules: linear, cosine"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "needs gradient_checkpointing: true"),
        ({"save_steps": 2.5}, "save_steps: give a whole number of steps, or a ratio below 1"),
        ({"max_steps": 0}, "max_steps: give the number of optimizer steps, or -1"),
        ({"adam_beta1": 1.0, "max_grad_norm": -1}, "2 problems"),
    ],
)
def test_mistakes_in_the_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        config(**options)


def test_lengths() -> None:
    assert config(max_steps=12).total_steps(5.0) == 12
    assert config(num_train_epochs=2).total_steps(3.5) == 7
    assert config(num_train_epochs=0.1).total_steps(3.5) == 1
    assert config(warmup_steps=7).warmup(100) == 7
    assert config(warmup_steps=0.05).warmup(101) == 6
    assert config(warmup_ratio=0.05).warmup(100) == 5
    assert (interval(500, 10), interval(0.1, 1000), interval(0.001, 10), interval(1, 10)) == (500, 100, 1, 1)
    assert config(report_to="none").report_to == []
    assert config(report_to="wandb").report_to == ["wandb"]


@pytest.mark.parametrize(
    ("name", "higher"), [(None, False), ("loss", False), ("eval_loss", False), ("task0/loss", False), ("rouge_l", True)]
)
def test_direction_of_the_best_metric(name: str | None, higher: bool) -> None:
    assert config(metric_for_best_model=name, eval_strategy="epoch").higher_is_better is higher


# -- DeepSpeed's configuration ------------------------------------------------------------------------------------


def build(value: Any, cuda: bool = False, **options: Any) -> dict[str, Any]:
    return build_deepspeed(value, config(**options), world_size=2, hidden_size=100, cuda=cuda)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_files_and_names_are_the_same(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "deepspeed" / f"{name}.json"
    assert json.loads(path.read_text()) == BUILT_IN[name]
    assert build(path) == build(name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_names_are_filled_in(stage: int) -> None:
    settings = build(f"zero{stage}", per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.25)
    assert zero_stage(settings) == stage
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 5
    assert settings["train_batch_size"] == 30
    assert settings["gradient_clipping"] == 0.25
    assert settings["bf16"] == {"enabled": False}
    assert "auto" not in json.dumps(settings)
    if stage == 3:
        assert settings["zero_optimization"]["reduce_bucket_size"] == 10_000
        assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 1_000


def test_clipping_is_always_written() -> None:
    """DeepSpeed clips at 1.0 where the key is missing."""
    assert build({}, max_grad_norm=0)["gradient_clipping"] == 0
    assert build({})["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"gradient_cliping": 1.0}, {}, r"gradient_cliping: unknown key .*did you mean 'gradient_clipping'"),
        ({"gradient_clipping": 0.5}, {}, r"gradient_clipping: 0.5 contradicts training.max_grad_norm, which gives 1.0"),
        ({"train_batch_size": 7}, {}, "train_batch_size: 7 contradicts"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, {}, "bf16.enabled: True contradicts"),
        ("zero0", {"bf16": True}, "bf16: DeepSpeed's half precision does not train right at ZeRO stage 0"),
        ("zero1", {"fp16": True}, "fp16: needs a CUDA device"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler: the schedule is training.lr_scheduler_type"),
        ({"optimizer": {"type": "Lion"}}, {}, "optimizer.type: 'Lion' is not supported"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3.0}}}, {}, "optimizer.params.lr: 3.0 contradicts"),
        ({"activation_checkpointing": {}}, {}, "use training.gradient_checkpointing"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, {}, "zero_optimization.sub_group_size: auto"),
        ({"torch_autocast": {"enabled": True}}, {}, "torch_autocast: needs training.bf16"),
        ("zero9", {}, "no built-in name; did you mean 'zero"),
        ("missing.json", {}, "'missing.json' is no file"),
    ],
)
def test_mistakes_in_deepspeed(settings: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(settings, **options)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="3 problems") as error:
        read_deepspeed({"zero_optimisation": {}, "elasticity": {}, "bf_16": {}})
    assert len(str(error.value).splitlines()) == 4


def test_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"zero\.json is not valid JSON"):
        read_deepspeed(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        read_deepspeed(path)


def test_an_optimizer_section_that_says_the_same_is_accepted() -> None:
    section = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8, "weight_decay": "auto"}}
    assert "optimizer" not in build({"optimizer": section, "zero_optimization": {"stage": 2}})


def test_half_precision() -> None:
    assert build("zero1", bf16=True)["bf16"] == {"enabled": True}
    assert build("zero2", cuda=True, fp16=True)["fp16"] == {"enabled": True}
    autocast = build({"torch_autocast": {"enabled": "auto"}}, bf16=True)
    assert autocast["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert autocast["bf16"] == {"enabled": False}


def test_the_given_mapping_is_not_changed() -> None:
    given = {"zero_optimization": {"stage": 1}}
    build(given)
    assert given == {"zero_optimization": {"stage": 1}}


# -- optimizer ----------------------------------------------------------------------------------------------------


def test_groups_hold_every_tensor_once_with_its_rate() -> None:
    model = make_model(modules_to_save=["norm"])
    groups = parameter_groups(
        model, config(learning_rate=1e-3, router_learning_rate=2e-4, loraplus_lr_ratio=16, weight_decay=0.1)
    )
    rates: dict[str, tuple[float, float]] = {}
    for group in groups:
        for name, _ in group.parameters:
            assert name not in rates
            rates[name] = (group.learning_rate, group.weight_decay)
    assert set(rates) == {name for name, _ in model.adapter_parameters()}
    for name, (rate, decay) in rates.items():
        role = model.parameter_role(name)
        assert rate == pytest.approx({"router": 2e-4, "up": 1.6e-2}.get(role, 1e-3))
        assert decay == (0.0 if "norm" in name else 0.1), name
    assert any("norm" in name for name in rates)


def test_one_group_each_without_the_options() -> None:
    groups = parameter_groups(make_model(), config())
    assert {group.learning_rate for group in groups} == {5e-5}
    settings = build_optimizer(groups, config(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)).param_groups
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in settings)


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ("linear", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 5}),
        ("polynomial", {"lr_end": 1e-5}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
    ],
)
def test_rates_are_a_function_of_the_step(schedule: str, arguments: dict[str, Any]) -> None:
    from transformers import get_scheduler

    settings = config(
        learning_rate=1e-3,
        router_learning_rate=5e-4,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=arguments,
        warmup_steps=4,
    )
    groups = parameter_groups(make_model(), settings)
    rates = LearningRates(groups, settings, 20)
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": group.learning_rate} for group in groups]
    optimizer = torch.optim.SGD(parameters)
    reference = get_scheduler(
        schedule, optimizer, num_warmup_steps=4, num_training_steps=20, scheduler_specific_kwargs=arguments
    )
    expected = []
    for _ in range(20):
        expected.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        reference.step()
    for step in reversed(range(20)):  # in any order
        assert rates.at(step) == pytest.approx(expected[step])


def test_arguments_that_a_schedule_refuses() -> None:
    settings = config(lr_scheduler_kwargs={"num_cycles": 2})
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs: linear"):
        LearningRates(parameter_groups(make_model(), settings), settings, 10)


def test_trackers_are_checked() -> None:
    check_trackers([])
    with pytest.raises(ConfigError, match=r"unknown tracker 'wandbb'\. Valid trackers: .*wandb"):
        check_trackers(["wandbb"])
    with pytest.raises(ConfigError, match="is not installed"):
        check_trackers(["aim"])


# -- the plain engine ---------------------------------------------------------------------------------------------


def test_optimizer_state_goes_out_and_in() -> None:
    states: list[OptimizerState] = []
    for steps in (3, 0):
        settings = config(use_cpu=True)
        model = make_model()
        groups = parameter_groups(model, settings)
        engine = PlainEngine(model, groups, settings)
        for _ in range(steps):
            for _, parameter in model.adapter_parameters():
                parameter.grad = torch.ones_like(parameter) * 0.1
            engine.step([1e-3] * len(groups))
        if states:
            engine.load_optimizer_state(states[0])
        states.append(engine.optimizer_state())
    assert states[0].step == states[1].step == 3
    for name, value in states[0].exp_avg.items():
        assert float(value.abs().max()) > 0
        assert torch.equal(states[1].exp_avg[name], value)
        assert torch.equal(states[1].exp_avg_sq[name], states[0].exp_avg_sq[name])


def test_trainable_tensors_of_half_precision_are_widened() -> None:
    model = make_model()
    for _, parameter in model.adapter_parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    settings = config(use_cpu=True)
    PlainEngine(model, parameter_groups(model, settings), settings)
    assert {parameter.dtype for _, parameter in model.adapter_parameters()} == {torch.float32}


def test_options_without_their_tensors_are_refused() -> None:
    model = make_model()
    for name, parameter in model.adapter_parameters():
        parameter.requires_grad_(model.parameter_role(name) != "router")
    with pytest.raises(ConfigError, match="router_learning_rate: this mixture has no trainable router tensor"):
        parameter_groups(model, config(router_learning_rate=1e-3))
