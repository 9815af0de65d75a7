"""Per-task evaluation against one row at a time, without batches, padding or cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from trainer_helpers import MIXTURE, VOCABULARY, losses, make_model, make_tasks, make_tokenizer, options
from transformers import T5Config, T5ForConditionalGeneration

from moadapt.errors import ConfigError
from moadapt.model import MixtureModel, get_mixture_model
from moadapt.train.collate import Collator
from moadapt.train.encoding import Example
from moadapt.train.evaluation import EvaluationResult, evaluate_tasks
from moadapt.train.tasks import Task
from moadapt.train.trainer import MultiTaskTrainer

END = 2


def make_t5() -> MixtureModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=END,
        initializer_factor=2.0,
        dropout_rate=0.0,
    )
    base = T5ForConditionalGeneration(config)
    return get_mixture_model(base, {**MIXTURE, "target_modules": ["q", "wo"]})


def encoder_decoder(tasks: list[Task]) -> list[Task]:
    def convert(example: Example) -> Example:
        prompt = [*example.input_ids[1 : example.prompt_length], END]
        labels = example.input_ids[example.prompt_length :]
        mask = [1] * len(prompt)
        return Example(prompt, len(prompt), example.task_id, example.row, labels, "", example.response_text, mask)

    return [
        Task(task.name, task.id, [convert(e) for e in task.train], [convert(e) for e in task.eval], task.metric)
        for task in tasks
    ]


def loss_of(model: Any, example: Example, is_encoder_decoder: bool) -> tuple[float, int]:
    """Sum of token losses of one row, and their number."""
    inputs = {"input_ids": torch.tensor([example.input_ids])}
    if is_encoder_decoder:
        inputs["labels"] = torch.tensor([example.labels])
    log_probs = model(**inputs).logits[0].double().log_softmax(-1)
    shift = 0 if is_encoder_decoder else 1
    pairs = [(at - shift, label) for at, label in enumerate(example.labels) if label != -100]
    return -sum(float(log_probs[at, label]) for at, label in pairs), len(pairs)


def answer_of(model: Any, example: Example, longest: int, is_encoder_decoder: bool) -> list[int]:
    """Greedy answer to one prompt, the whole sequence anew for each token."""
    prompt = example.input_ids[: example.prompt_length]
    answer: list[int] = []
    while len(answer) < longest:
        if is_encoder_decoder:
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer]])).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_one_row_at_a_time(is_encoder_decoder: bool, side: Any, batch_size: int) -> None:
    tokenizer, tasks = make_tokenizer(), make_tasks(metric="token_f1")
    model: Any = make_t5() if is_encoder_decoder else make_model()
    if is_encoder_decoder:
        tasks = encoder_decoder(tasks)
    tasks[1].metric = None
    tasks[2].max_new_tokens = 2
    model.eval()
    collator = Collator(0, side, is_encoder_decoder)
    result = evaluate_tasks(model, tokenizer, tasks, collator, batch_size=batch_size)
    assert set(result.predictions) == {"task0", "task2"}
    with torch.no_grad():
        for task in tasks:
            rows = [loss_of(model, example, is_encoder_decoder) for example in task.eval]
            tokens = sum(count for _, count in rows)
            scores = result.tasks[task.name]
            assert scores["loss"] == pytest.approx(sum(value for value, _ in rows) / tokens, abs=1e-5)
            assert scores["num_examples"] == 5
            assert scores["num_tokens"] == tokens
            if task.metric is None:
                continue
            longest = 2 if task.id == 2 else max(len(e.labels) - (0 if is_encoder_decoder else e.prompt_length)
                                                 for e in (*task.train, *task.eval))  # fmt: skip
            answers = [answer_of(model, example, longest, is_encoder_decoder) for example in task.eval]
            assert any(answers)
            words = [[f"w{token - 3}" for token in answer if token > 2] for answer in answers]
            assert [text.split() for text in result.predictions[task.name]] == words
            shared = [
                _f1(found, example.response_text.split()) for found, example in zip(words, task.eval, strict=True)
            ]
            assert scores["token_f1"] == pytest.approx(sum(shared) / len(shared))


def _f1(found: list[str], wanted: list[str]) -> float:
    common = sum(min(found.count(word), wanted.count(word)) for word in set(found))
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def test_training_raises_the_score(tmp_path: Path) -> None:
    """The metric path end to end: a model that learns one fixed answer goes from 0 to 1."""
    tasks = make_tasks(sizes=(64,))
    answer = tasks[0].eval[0].input_ids[tasks[0].eval[0].prompt_length :]
    text = tasks[0].eval[0].response_text

    def fixed(example: Example) -> Example:
        prompt = example.input_ids[: example.prompt_length]
        labels = [-100] * len(prompt) + answer
        mask = [1] * len(prompt) + [0] * len(answer)
        return Example(prompt + answer, len(prompt), 0, example.row, labels, "", text, mask)

    task = Task("same", 0, [fixed(e) for e in tasks[0].train], [fixed(e) for e in tasks[0].eval], "exact_match")
    model = make_model(target_modules="all-linear", modules_to_save=["lm_head"])
    trainer = MultiTaskTrainer(
        model,
        make_tokenizer(),
        [task],
        options(tmp_path, max_steps=80, learning_rate=0.02, eval_strategy="steps", eval_steps=80, eval_on_start=True,
                gradient_accumulation_steps=1, per_device_train_batch_size=8,
                metric_for_best_model="exact_match"),
    )  # fmt: skip
    result = trainer.train()
    scores = [entry["eval/exact_match"] for entry in result.history if "eval/exact_match" in entry]
    assert scores == [0.0, 1.0]
    assert result.best_value == 1.0
    assert result.evaluation is not None
    assert set(result.evaluation.predictions["same"]) == {text}


def test_an_encoder_decoder_is_trained(tmp_path: Path) -> None:
    """Its loss is the mean over label tokens, the first one included."""
    tasks, model = encoder_decoder(make_tasks(metric=None)), make_t5()
    trainer = MultiTaskTrainer(model, make_tokenizer(), tasks, options(tmp_path, max_steps=8, learning_rate=0.02))
    rows = [trainer.tasks[task].train[row] for micro in (0, 1) for task, row in trainer.sampler.batch(micro)]
    twin = make_t5()
    twin.train()
    with torch.no_grad():
        pairs = [loss_of(twin, example, True) for example in rows]
    expected = sum(value for value, _ in pairs) / sum(count for _, count in pairs)
    history = trainer.train().history
    assert history[0]["train/lm_loss"] == pytest.approx(expected, abs=1e-5)
    assert losses(history)[-1] < losses(history)[0]


def test_a_task_without_evaluation_rows_is_left_out() -> None:
    tasks = make_tasks()
    tasks[1].eval = []
    model = make_model()
    result = evaluate_tasks(model, make_tokenizer(), tasks, Collator(0), batch_size=2, metrics=False)
    assert set(result.tasks) == {"task0", "task2"}
    assert result.predictions == {}
    assert model.training == model.base_model.training
    with pytest.raises(ConfigError, match="no task has evaluation examples"):
        evaluate_tasks(model, make_tokenizer(), [tasks[1]], Collator(0), batch_size=2)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_comes_back(training: bool) -> None:
    model = make_model()
    model.train(training)
    evaluate_tasks(model, make_tokenizer(), make_tasks(), Collator(0), batch_size=2)
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_names_and_means() -> None:
    result = EvaluationResult(
        {
            "a": {"loss": 1.0, "num_examples": 4, "num_tokens": 9, "rouge_l": 0.5},
            "b": {"loss": 2.0, "num_examples": 2, "num_tokens": 3, "exact_match": 0.25},
            "c": {"loss": 4.5, "num_examples": 2, "num_tokens": 3},
        }
    )
    assert result.means == pytest.approx({"loss": 2.5, "rouge_l": 0.5, "exact_match": 0.25, "score": 0.375})
    assert result.value("b/loss") == 2.0
    assert result.value("a/rouge_l") == 0.5
    assert result.to_dict()["mean"]["score"] == 0.375
    assert result.flat()["eval/b/exact_match"] == 0.25
    assert not any("num_" in name for name in result.flat())
    with pytest.raises(ConfigError, match="Valid names: loss, rouge_l, score, exact_match, a/loss, a/rouge_l"):
        result.value("a/num_examples")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    lines = [line for line in console.export_text().splitlines() if " b " in line]
    assert "2.0000" in lines[0]
    assert "0.2500" in lines[0]
    assert math.isfinite(result.value("score"))
