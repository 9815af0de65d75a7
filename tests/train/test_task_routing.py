"""Prompt- and task-level routing meet the data: which tasks and rows fit, which ids the model gets, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import (
    PROMPT_ROUTER,
    make_base,
    make_model,
    make_prompt_model,
    make_tasks,
    make_tokenizer,
    options,
    weights,
)

from moadapt.errors import ConfigError
from moadapt.model import MixtureModel
from moadapt.passes import PassRequest, requesting
from moadapt.train.collate import Collator
from moadapt.train.encoding import Example
from moadapt.train.evaluation import evaluate_tasks
from moadapt.train.task_ids import TaskIds
from moadapt.train.tasks import Task
from moadapt.train.trainer import MultiTaskTrainer
from moadapt.usage import ExpertUsage

END = 2
NAMES = ["task2", "other", "task0", "task1"]


def table_model(names: list[str] = NAMES, **router: Any) -> MixtureModel:
    """Routed by task; every task's logits differ much."""
    return make_model(
        router={"kind": "task_table", "scope": "block", "init_std": 2.0, **router}, tasks=names, losses=[]
    )


def make_trainer(folder: Path, model: Any, tasks: Any = None, **changes: Any) -> Any:
    return MultiTaskTrainer(model, make_tokenizer(), tasks or make_tasks(), options(folder, **changes))


def conversation(rng: torch.Generator, row: int, turns: int) -> Example:
    """Prompts of 2 to 4 tokens, each with an answer of 1 to 3."""
    ids, mask = [1], [1]
    start = 1
    for _ in range(turns):
        for is_prompt, low in ((1, 2), (0, 1)):
            length = int(torch.randint(low, low + 3, (), generator=rng))
            start = start if is_prompt else len(ids)
            ids += torch.randint(3, 27, (length,), generator=rng).tolist()
            mask += [is_prompt] * length
    labels = [-100 if mark else token for token, mark in zip(ids, mask, strict=True)]
    return Example(ids, start, 0, row, labels, "", "", mask)


# -- ids ----------------------------------------------------------------------------------------------------------


def test_ids_are_positions_in_the_mixtures_tasks() -> None:
    ids = TaskIds(table_model(), make_tasks(), train=True)
    assert ids(torch.tensor([0, 1, 2, 0])).tolist() == [2, 3, 0, 2]
    assert TaskIds(make_model(), make_tasks())(torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]
    assert TaskIds(make_base(), make_tasks())(torch.tensor([2])).tolist() == [2]


def test_unknown_tasks() -> None:
    known = ["task0", "task1"]
    with pytest.raises(ConfigError, match=r"data: task 'task2' is none of .*'task[01]'\?.*router.unknown_task: mean"):
        TaskIds(table_model(known), make_tasks())
    lenient = table_model(known, unknown_task="mean")
    assert TaskIds(lenient, make_tasks())(torch.tensor([0, 1, 2])).tolist() == [0, 1, -1]
    with pytest.raises(ConfigError, match=r"task 'task2' has training rows but is none of .*for evaluation"):
        TaskIds(lenient, make_tasks(), train=True)
    only_evaluated = make_tasks()
    only_evaluated[2].train = []
    assert TaskIds(lenient, only_evaluated, train=True)(torch.tensor([2])).tolist() == [-1]


def test_training_reaches_the_rows_of_its_tasks(tmp_path: Path) -> None:
    """Only the rows of `mixture.tasks` that have data learn, each from its own task; logs keep the data's names."""
    model = table_model()
    before = weights(model)
    alone = make_tasks()
    for task in (alone[0], alone[2]):
        task.train = []
    history = make_trainer(tmp_path, model, alone, max_steps=2).train().history
    tables = [name for name in before if model.parameter_role(name) == "router"]
    assert tables
    for name in tables:
        changed = (weights(model)[name] != before[name]).any(-1)
        assert changed.tolist() == [False, False, False, True]  # task1 is the last of NAMES
    logged = {name for entry in history for name in entry if name.startswith("train/task")}
    assert logged == {"train/task1/loss"}


def test_evaluation_gives_the_model_its_own_ids() -> None:
    """Loss and answers of each task against single rows with ids looked up here."""
    model, tasks = table_model(), make_tasks(metric="token_f1")
    model.eval()
    result = evaluate_tasks(model, make_tokenizer(), tasks, Collator(0), batch_size=4)
    for task in tasks:
        position = torch.tensor([NAMES.index(task.name)])
        total, count = 0.0, 0
        for number, example in enumerate(task.eval):
            inputs = {"input_ids": torch.tensor([example.input_ids]), "task_ids": position}
            with torch.no_grad():
                log_probs = model(**inputs).logits[0].double().log_softmax(-1)
            pairs = [(at - 1, label) for at, label in enumerate(example.labels) if label != -100]
            total, count = total - sum(float(log_probs[at, label]) for at, label in pairs), count + len(pairs)
            if number < 2:
                longest = max(len(e.labels) - e.prompt_length for e in (*task.train, *task.eval))
                answer = greedy(model, example, longest, task_ids=position)
                assert result.predictions[task.name][number].split() == answer
        assert result.tasks[task.name]["loss"] == pytest.approx(total / count, abs=1e-5)


def greedy(model: Any, example: Example, longest: int, **more: Any) -> list[str]:
    """The answer to one prompt without a cache, as words."""
    ids, mask = example.input_ids[: example.prompt_length], example.prompt_mask[: example.prompt_length]
    answer: list[int] = []
    while len(answer) < longest:
        marks = torch.tensor([mask + [0] * len(answer)]).bool()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer]), prompt_mask=marks, **more).logits
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        answer.append(token)
    return [f"w{token - 3}" for token in answer if token > 2]


# -- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_routing_is_evaluated_as_one_row_at_a_time(side: Any) -> None:
    """Conversations of one to three turns in one batch: losses, and answers that are generated from left padding."""
    generator = torch.Generator().manual_seed(5)
    rows = [conversation(generator, row, 1 + row % 3) for row in range(7)]
    task = Task("chat", 0, eval=rows, metric="token_f1", max_new_tokens=4)
    model = make_prompt_model()
    model.eval()
    result = evaluate_tasks(model, make_tokenizer(), [task], Collator(0, side), batch_size=4)
    total, count = 0.0, 0
    for number, example in enumerate(rows):
        marks = torch.tensor([example.prompt_mask]).bool()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids]), prompt_mask=marks).logits
        log_probs = logits[0].double().log_softmax(-1)
        pairs = [(at - 1, label) for at, label in enumerate(example.labels) if label != -100]
        total, count = total - sum(float(log_probs[at, label]) for at, label in pairs), count + len(pairs)
        assert result.predictions["chat"][number].split() == greedy(model, example, 4)
    assert result.tasks["chat"]["loss"] == pytest.approx(total / count, abs=1e-5)


def test_usage_counts_turns() -> None:
    """Records have one row for each turn; those of turns that a sequence does not have count nothing."""
    generator = torch.Generator().manual_seed(6)
    rows = [conversation(generator, row, turns) for row, turns in enumerate((1, 3, 2))]
    batch = Collator(0)(rows)
    model, usage = make_prompt_model(), ExpertUsage(["a", "b"])
    model.eval()
    request = PassRequest(batch["prompt_mask"], batch["task_ids"], record=True)
    with torch.no_grad(), requesting(request):
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert request.context is not None
    usage.add(request.context.records, torch.tensor([0, 1, 1]))
    for name in usage.counts:
        assert usage.tokens[name].tolist() == [1, 5]
        assert usage.counts[name].sum(-1).tolist() == [2, 10]  # top-2


def test_rows_without_a_prompt_are_refused(tmp_path: Path) -> None:
    tasks = make_tasks()
    text = Example([1, 5, 6], 0, 1, 17, [-100, 5, 6], "", "", [0, 0, 0])
    tasks[1].train.append(text)
    with pytest.raises(ConfigError, match=r"granularity: prompt .*row 17 of task 'task1'.*granularity: token"):
        make_trainer(tmp_path, make_prompt_model(), tasks)
    make_trainer(tmp_path, make_model(), tasks)
    evaluated = [Task("text", 0, eval=[text])]
    with pytest.raises(ConfigError, match="row 17 of task 'text'"):
        evaluate_tasks(make_prompt_model(), make_tokenizer(), evaluated, Collator(0), batch_size=2)


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_the_router_never_sees_an_answer(train_on_prompt: bool) -> None:
    """Logits of the routers do not change with the answer, whatever the loss covers."""
    tasks = make_tasks()
    decisions = []
    for change in (0, 1):
        examples = []
        for row in tasks[0].train[:4]:
            at = row.prompt_length
            ids = row.input_ids[:at] + [3 + (token + change) % 20 for token in row.input_ids[at:]]
            labels = ids if train_on_prompt else [-100] * at + ids[at:]
            examples.append(Example(ids, at, 0, row.row, labels, "", "", row.prompt_mask))
        batch = Collator(0)(examples)
        model = make_prompt_model(router={**PROMPT_ROUTER, "activation": "gelu"})
        request = PassRequest(batch.pop("prompt_mask"), batch.pop("task_ids"), record=True)
        with torch.no_grad(), requesting(request):
            model.base_model(**batch)
        assert request.context is not None
        decisions.append([record.routing.logits_TN for record in request.context.records])
    assert len(decisions[0]) == 2
    for one, other in zip(*decisions, strict=True):
        assert one.shape == (4, 4)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
