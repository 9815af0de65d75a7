"""The training loop in one process: what a step computes, against independent arithmetic and transformers' Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import losses, make_model, make_tasks, make_tokenizer, options, weights

from moadapt.errors import ConfigError, DataError
from moadapt.train.callbacks import TrainerCallback
from moadapt.train.engine import TrainingError
from moadapt.train.logging import read_metrics
from moadapt.train.trainer import MultiTaskTrainer


def make_trainer(folder: Path, model: Any = None, callbacks: Any = (), tasks: Any = None, **changes: Any) -> Any:
    return MultiTaskTrainer(
        model or make_model(), make_tokenizer(), tasks or make_tasks(), options(folder, **changes), None, callbacks
    )


class Record(TrainerCallback):
    """Notes the hooks' names, and the adapter's weights after each step."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, trainer: Any, state: Any) -> None:
        self.hooks.append("train_begin")

    def on_step_end(self, trainer: Any, state: Any) -> None:
        self.hooks.append(f"step_end {state.global_step}")
        self.weights.append(weights(trainer.model))

    def on_log(self, trainer: Any, state: Any, values: dict[str, float]) -> None:
        self.hooks.append(f"log {state.global_step}")

    def on_evaluate(self, trainer: Any, state: Any, result: Any) -> None:
        self.hooks.append(f"evaluate {state.global_step}")

    def on_save(self, trainer: Any, state: Any, checkpoint: Path) -> None:
        self.hooks.append(f"save {checkpoint.name}")

    def on_train_end(self, trainer: Any, state: Any) -> None:
        self.hooks.append("train_end")


def step_by_hand(trainer: Any, model: Any) -> tuple[float, float, dict[str, float]]:
    """The loss of the first step from token losses: (total, language model alone, language model by task).

    One forward pass a micro-batch, token losses by log_softmax in float64, and the definitions of the docstring of
    `moadapt.train.trainer`.
    """
    model.train()
    lm_sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    aux = []
    for micro in range(trainer.config.gradient_accumulation_steps):
        rows = trainer.sampler.batch(micro)
        batch = trainer.collator([trainer.tasks[task].train[row] for task, row in rows])
        output = model(**batch)
        tokens = 0
        for row, (task, _) in enumerate(rows):
            log_probs = output.logits[row].detach().double().log_softmax(-1)
            for position in range(1, batch["labels"].shape[1]):
                label = int(batch["labels"][row, position])
                if label != -100:
                    lm_sums[task] = lm_sums.get(task, 0.0) - float(log_probs[position - 1, label])
                    counts[task] = counts.get(task, 0) + 1
                    tokens += 1
        parts = model.last_losses
        aux.append((tokens, 0.1 * float(parts["load_balance"]) + 0.01 * float(parts["router_z"])))
    total = sum(counts.values())
    lm = sum(lm_sums.values()) / total
    by_task = {f"task{task}": lm_sums[task] / counts[task] for task in lm_sums}
    return lm + sum(tokens * value for tokens, value in aux) / total, lm, by_task


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, gradient_accumulation_steps=3)
    loss, lm, by_task = step_by_hand(trainer, make_model())
    entry = trainer.train().history[0]
    assert entry["train/loss"] == pytest.approx(loss, abs=2e-6)
    assert entry["train/lm_loss"] == pytest.approx(lm, abs=2e-6)
    assert entry["train/aux_loss"] == pytest.approx(loss - lm, abs=2e-6)
    found = {name: value for name, value in entry.items() if name.startswith("train/task")}
    assert len(by_task) > 1
    assert found == pytest.approx({f"train/{name}/loss": value for name, value in by_task.items()}, abs=2e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Without auxiliary losses (they are not linear in the batch), 6 rows at once and 3 times 2 rows are one step."""
    final = {}
    for size, accumulation in ((6, 1), (2, 3), (1, 6)):
        model = make_model(losses=[])
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        result = make_trainer(tmp_path / str(size), model, max_steps=4, **changes).train()
        final[size] = (losses(result.history), weights(model))
    for size in (2, 1):
        assert final[size][0] == pytest.approx(final[6][0], abs=2e-6)
        for name, value in final[6][1].items():
            torch.testing.assert_close(final[size][1][name], value, atol=1e-5, rtol=0)


def test_one_step_of_adamw_by_hand(tmp_path: Path) -> None:
    """Groups, learning rates, decay and clipping of the first step: w <- w (1 - lr wd) - lr sign-like Adam step."""
    record = Record()
    model = make_model()
    before = weights(model)
    rates = {"router": 3e-3, "up": 4e-2, "down": 1e-2}
    trainer = make_trainer(
        tmp_path,
        model,
        [record],
        max_steps=1,
        lr_scheduler_type="constant",
        router_learning_rate=3e-3,
        loraplus_lr_ratio=4.0,
        weight_decay=0.1,
        max_grad_norm=0.05,
        adam_epsilon=1e-3,
    )
    twin = make_model()
    twin.train()
    total = 0
    batches = [
        trainer.collator([trainer.tasks[task].train[row] for task, row in trainer.sampler.batch(micro)])
        for micro in range(2)
    ]
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        twin(**batch, num_items_in_batch=total).loss.backward()
    gradients = {name: parameter.grad for name, parameter in twin.adapter_parameters()}
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients.values()))
    result = trainer.train()
    assert result.history[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.05
    for name, gradient in gradients.items():
        rate = rates[model.parameter_role(name)]
        clipped = gradient * (0.05 / (norm + 1e-6))
        expected = before[name] * (1 - rate * 0.1) - rate * clipped / (clipped.abs() + 1e-3)
        torch.testing.assert_close(record.weights[0][name], expected, atol=1e-6, rtol=0)


def test_the_schedule_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import get_scheduler

    result = make_trainer(tmp_path, max_steps=6, warmup_ratio=0.3, lr_scheduler_type="cosine").train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6)
    for entry in [entry for entry in result.history if "train/loss" in entry]:
        assert entry["train/learning_rate/router"] == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_transformers_trainer(tmp_path: Path, side: str) -> None:
    """`transformers.Trainer` on the same batches has the same losses and weights, with accumulation and clipping."""
    from transformers import Trainer, TrainingArguments

    ours = make_model()
    trainer = make_trainer(tmp_path / "ours", ours, max_steps=5, max_grad_norm=0.3)
    trainer.collator.padding_side = side
    expected = losses(trainer.train().history)

    stream = [trainer.tasks[task].train[row] for index in range(10) for task, row in trainer.sampler.batch(index)]
    theirs = make_model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=5,
        max_grad_norm=0.3,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    reference = Trainer(theirs, arguments, train_dataset=stream, data_collator=trainer.collator)  # type: ignore[arg-type]
    reference.train()
    found = [entry["loss"] for entry in reference.state.log_history if "loss" in entry]
    assert found == pytest.approx(expected, abs=2e-6)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(value, weights(ours)[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("saved_at", [3, 5])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, saved_at: int) -> None:
    """With dropout and jitter, in the middle of an epoch and of a log entry, evaluations and callbacks in between."""
    changes: dict[str, Any] = {
        "max_steps": 9,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "early_stopping_patience": 50,
        "warmup_steps": 2,
    }
    router = {"kind": "top_k", "num_experts_per_tok": 2, "router_jitter_noise": 0.1}
    whole_model = make_model(dropout=0.3, router=router)
    whole = make_trainer(tmp_path / "whole", whole_model, **changes).train()

    class Crash(TrainerCallback):
        def on_step_end(self, trainer: Any, state: Any) -> None:
            if state.global_step == saved_at + 2:
                raise KeyboardInterrupt

    saving = {"save_strategy": "steps", "save_steps": saved_at}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "two", make_model(dropout=0.3, router=router), [Crash()], **changes, **saving).train()
    torch.manual_seed(999)
    model = make_model(dropout=0.3, router=router)
    resumed = make_trainer(tmp_path / "two", model, **changes, **saving)
    result = resumed.train(resume_from_checkpoint=True)
    assert resumed._checkpoint.trainer["global_step"] == saved_at
    assert result.global_step == 9
    untimed = [
        [
            {name: value for name, value in entry.items() if "time" not in name and "per_second" not in name}
            for entry in run
        ]
        for run in (read_metrics(tmp_path / "two"), read_metrics(tmp_path / "whole"))
    ]
    assert untimed[0] == untimed[1]
    for name, value in weights(whole_model).items():
        assert torch.equal(weights(model)[name], value), name
    assert whole.tokens == result.tokens


def test_dropout_matters_in_the_resume_test(tmp_path: Path) -> None:
    histories = []
    for seed in (1, 2):
        result = make_trainer(tmp_path / str(seed), make_model(dropout=0.3), seed=seed, data_seed=0).train()
        histories.append(losses(result.history))
    assert histories[0] != histories[1]


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps").train()
    trainer = make_trainer(tmp_path, per_device_train_batch_size=3, data_seed=5, resume_from_checkpoint=True)
    with pytest.raises(ConfigError) as error:
        trainer.train()
    assert "per_device_train_batch_size: 2 in the checkpoint, 3 now" in str(error.value)
    assert "data_seed: 42 in the checkpoint, 5 now" in str(error.value)


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        make_trainer(tmp_path).train()
    make_trainer(tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert list(tmp_path.glob("checkpoint-*")) == []
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_epochs(tmp_path: Path) -> None:
    """28 rows are 14 batches: 7 steps of 2 micro-batches an epoch; evaluation and checkpoint at its end."""
    record = Record()
    trainer = make_trainer(
        tmp_path,
        None,
        [record],
        max_steps=-1,
        num_train_epochs=1.5,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=100,
    )
    result = trainer.train()
    assert result.global_step == 11  # 1.5 * 7 = 10.5
    assert [hook for hook in record.hooks if not hook.startswith("step")] == [
        *("train_begin", "evaluate 7", "save checkpoint-7"),
        *("log 11", "evaluate 11", "save checkpoint-11", "train_end"),
    ]
    assert trainer.state.epoch == pytest.approx(22 / 14)


def test_evaluation_does_not_change_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it draws random numbers."""
    import moadapt.train.trainer as module

    original = module.evaluate_tasks

    def draws(*args: Any, **kwargs: Any) -> Any:
        torch.rand(5)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate_tasks", draws)
    plain = make_trainer(tmp_path / "a", make_model(dropout=0.3)).train()
    evaluated = make_trainer(
        tmp_path / "b", make_model(dropout=0.3), eval_strategy="steps", eval_steps=1, eval_on_start=True
    ).train()
    assert losses(plain.history) == losses(evaluated.history)


def test_early_stopping_and_the_best_model(tmp_path: Path) -> None:
    """A learning rate that makes the evaluation loss rise: the run stops, and the best weights are saved."""
    record = Record()
    model = make_model()
    trainer = make_trainer(
        tmp_path,
        model,
        [record],
        max_steps=40,
        learning_rate=0.5,
        max_grad_norm=0,
        eval_strategy="steps",
        eval_steps=2,
        early_stopping_patience=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    result = trainer.train()
    values = [entry["eval/loss"] for entry in result.history if "eval/loss" in entry]
    best = values.index(min(values))
    assert result.global_step < 40
    assert len(values) == best + 3  # two evaluations without a better one, then the end
    assert "early stopping" in str(result.stop_reason)
    assert result.best_value == min(values)
    step = 2 * (best + 1)
    assert result.best_checkpoint == tmp_path / f"checkpoint-{step}"
    for name, value in weights(model).items():
        assert torch.equal(value, record.weights[step - 1][name])
    assert trainer.evaluate(metrics=False).means["loss"] == pytest.approx(min(values), abs=1e-6)


def test_a_broken_loss_stops_before_the_weights(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        """Makes one row's embedding infinite after the second step."""

        def on_step_end(self, trainer: Any, state: Any) -> None:
            if state.global_step == 2:
                self.before = weights(trainer.model)
                with torch.no_grad():
                    trainer.model.base_model.get_output_embeddings().weight.fill_(float("inf"))

    poison, model = Poison(), make_model()
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan, in tasks task\d"):
        make_trainer(tmp_path, model, [poison]).train()
    for name, value in weights(model).items():
        assert torch.equal(value, poison.before[name])


def test_a_broken_gradient_stops_before_the_weights(tmp_path: Path) -> None:
    model = make_model()
    name, parameter = next(model.adapter_parameters())
    before = weights(model)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"step 1 .*gradient's norm is nan"):
        make_trainer(tmp_path, model).train()
    assert torch.equal(weights(model)[name], before[name])


def test_log_entries_are_means_over_their_steps(tmp_path: Path) -> None:
    each = make_trainer(tmp_path / "each", max_steps=5).train().history
    pairs = make_trainer(tmp_path / "pairs", max_steps=5, logging_steps=2, logging_first_step=True).train().history
    assert [entry["step"] for entry in pairs] == [1, 2, 4, 5]
    values = losses(each)
    assert losses(pairs) == pytest.approx([values[0], values[1], (values[2] + values[3]) / 2, values[4]])
    assert json.loads((tmp_path / "pairs" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 5


def test_tensorboard_gets_the_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = make_trainer(tmp_path, max_steps=3, report_to=["tensorboard"], run_name="mine").train().history
    events = EventAccumulator(str(tmp_path / "logs" / "mine"))
    events.Reload()
    found = [item.value for item in events.Scalars("train/loss")]
    assert found == pytest.approx(losses(history))


def test_bf16_keeps_fp32_weights(tmp_path: Path) -> None:
    model = make_model()
    full = losses(make_trainer(tmp_path / "a").train().history)
    half = losses(make_trainer(tmp_path / "b", model, bf16=True).train().history)
    assert half != full
    assert half == pytest.approx(full, abs=0.1)
    assert {parameter.dtype for _, parameter in model.adapter_parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "a").train().history
    saving = make_trainer(tmp_path / "b", gradient_checkpointing=True).train().history
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-6)


def test_the_final_adapter_is_in_the_output_folder(tmp_path: Path) -> None:
    from trainer_helpers import make_base

    from moadapt.model import MixtureModel

    model = make_model()
    make_trainer(tmp_path, model).train()
    loaded = MixtureModel.from_pretrained(make_base(), tmp_path)
    for name, value in weights(loaded).items():
        assert torch.equal(value, weights(model)[name])


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task has evaluation examples"):
        make_trainer(tmp_path, tasks=make_tasks(eval_size=0), eval_strategy="epoch")
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'"):
        make_trainer(tmp_path, report_to=["tensorbord"])
    with pytest.raises(DataError, match="no training row"):
        make_trainer(tmp_path, tasks=make_tasks(sizes=(0, 0)))
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        make_trainer(tmp_path, resume_from_checkpoint=True).train()
    with pytest.raises(ConfigError, match="fp16"):
        make_trainer(tmp_path, fp16=True).train()
    frozen = make_model()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable"):
        make_trainer(tmp_path, frozen).train()
    open_base = make_model()
    open_base.base_model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="outside the adapter"):
        make_trainer(tmp_path, open_base).train()


def test_several_processes_need_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="deepspeed: null trains in one process, but 2 were started"):
        make_trainer(tmp_path)


def test_an_unknown_best_metric_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'bleu' is not evaluated\. Valid names: loss, exact_match, score, task0/loss"
    ):
        make_trainer(tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model="bleu")
    make_trainer(tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model="task1/exact_match")


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("moadapt.train.trainer.write_checkpoint", full)
    with pytest.raises(TrainingError, match=r"checkpoint-6 could not be written: no space left"):
        make_trainer(tmp_path, save_strategy="steps").train()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_base_model_in_bfloat16(tmp_path: Path, bf16: bool) -> None:
    """Its weights stay as they are, the adapter is trained in fp32."""
    from trainer_helpers import MIXTURE, make_base

    from moadapt.model import get_mixture_model

    base = make_base().to(torch.bfloat16)
    frozen = base.lm_head.weight.clone()
    model = get_mixture_model(base, MIXTURE)
    model.load_adapter_state_dict(make_model().adapter_state_dict())
    half = losses(make_trainer(tmp_path / "half", model, bf16=bf16).train().history)
    assert half == pytest.approx(losses(make_trainer(tmp_path / "full").train().history), abs=0.1)
    assert {parameter.dtype for _, parameter in model.adapter_parameters()} == {torch.float32}
    assert torch.equal(base.lm_head.weight, frozen)
