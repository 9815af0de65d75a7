"""Per-task evaluation: the loss, and the task's metric on generated answers.

Batches are cut once, for all processes together, and process r takes the batches r, r + W, r + 2W … of W
processes. So every batch has the same rows whatever W is, and the numbers are the same too. Each process runs
equally many forward passes (a surplus one is computed and dropped), because ZeRO-3 needs that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.train.collate import Collator
from moadapt.train.engine import Processes
from moadapt.train.metrics import compute_metric
from moadapt.train.routing_checks import check_prompts
from moadapt.train.task_ids import TaskIds

if TYPE_CHECKING:
    from rich.table import Table

    from moadapt.train.tasks import Task

Progress = Callable[[str, int, int], None]
_COUNTS = ("num_examples", "num_tokens")


@dataclass
class EvaluationResult:
    """Scores by task.

    Attributes:
        tasks: for each task `loss` (nats per response token), `num_examples`, `num_tokens`, and its metric by name.
        predictions: for each task with a metric, the generated answers in the order of its examples.
    """

    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """Means over tasks: `loss`, each metric over the tasks that have it, and `score` over all metrics."""
        values: dict[str, list[float]] = {}
        for scores in self.tasks.values():
            for name, value in scores.items():
                if name not in _COUNTS:
                    values.setdefault(name, []).append(value)
                    if name != "loss":
                        values.setdefault("score", []).append(value)
        return {name: math.fsum(items) / len(items) for name, items in values.items()}

    def value(self, name: str) -> float:
        """One number: a mean by its name, or `task/metric`.

        Raises:
            ConfigError: there is no such number; lists the names.
        """
        means = self.means
        if name in means:
            return means[name]
        task, _, metric = name.rpartition("/")
        if task in self.tasks and metric in self.tasks[task] and metric not in _COUNTS:
            return self.tasks[task][metric]
        raise ConfigError(f"training.metric_for_best_model: {name!r} is not evaluated. Valid names: {self.names()}")

    def names(self) -> str:
        """The names that `value` knows."""
        each = [f"{task}/{metric}" for task, scores in self.tasks.items() for metric in scores if metric not in _COUNTS]
        return ", ".join([*self.means, *each])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: the tasks, and `mean`."""
        return {**{name: dict(scores) for name, scores in self.tasks.items()}, "mean": self.means}

    def flat(self) -> dict[str, float]:
        """For a log: `eval/loss`, `eval/TASK/loss`, `eval/TASK/METRIC`."""
        values = {f"eval/{name}": value for name, value in self.means.items()}
        for task, scores in self.tasks.items():
            values |= {f"eval/{task}/{name}": value for name, value in scores.items() if name not in _COUNTS}
        return values

    def table(self, title: str = "evaluation") -> Table:
        """One line for each task, and their mean."""
        from rich.table import Table

        metrics = sorted({name for scores in self.tasks.values() for name in scores} - {"loss", *_COUNTS})
        table = Table(title=title)
        table.add_column("task")
        for name in ("examples", "loss", *metrics):
            table.add_column(name, justify="right")
        for task, scores in self.tasks.items():
            cells = [f"{scores[name]:.4f}" if name in scores else "–" for name in ("loss", *metrics)]
            table.add_row(task, str(int(scores["num_examples"])), *cells)
        if len(self.tasks) > 1:
            table.add_section()
            examples = sum(int(scores["num_examples"]) for scores in self.tasks.values())
            table.add_row("mean", str(examples), *[f"{self.means[name]:.4f}" for name in ("loss", *metrics)])
        return table


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    collator: Collator,
    *,
    batch_size: int,
    processes: Processes | None = None,
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    synced_gpus: bool = False,
    eos_token: str | int | None = None,
    metrics: bool = True,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Evaluate every task that has evaluation examples. Collective.

    Args:
        model: a `MixtureModel`, or any model of transformers.
        tokenizer: decodes the generated answers.
        tasks: the tasks; those without evaluation examples are left out.
        collator: makes the batches.
        batch_size: rows of one batch.
        processes: share the work among these; None for one process on the model's device.
        computing: makes the context that forward passes run in (autocast).
        synced_gpus: keep generating until all processes are done (ZeRO-3).
        eos_token: a further token that ends an answer (`data.eos_token`).
        metrics: whether to generate; false for the losses alone.
        progress: called with what is done, how much of it, and the total.

    Raises:
        ConfigError: no task has evaluation examples, or the model cannot route one of them: it has no parameters for
            the task, or routes by prompt and a row has none.
    """
    chosen = [task for task in tasks if task.eval]
    if not chosen:
        raise ConfigError("data: no task has evaluation examples; give eval_path, eval_split or eval_fraction")
    check_prompts(model, chosen)
    task_ids = TaskIds(model, chosen)
    processes = processes or Processes(device=next(model.parameters()).device)
    work = [math.ceil(len(task.eval) / batch_size) for task in chosen]
    total = sum(count * (2 if metrics and task.metric else 1) for task, count in zip(chosen, work, strict=True))
    done = 0

    def tick(name: str, batches: int) -> None:
        nonlocal done
        done += batches
        if progress is not None:
            progress(f"evaluating {name}", min(done, total), total)

    ends = end_tokens(tokenizer, model, eos_token)
    result = EvaluationResult()
    with torch.no_grad(), evaluating(model), computing():
        for task in chosen:
            loss, tokens = _loss(model, task, task_ids, collator, batch_size, processes, tick)
            scores: dict[str, float] = {"loss": loss, "num_examples": len(task.eval), "num_tokens": tokens}
            if metrics and task.metric:
                how = (collator, batch_size, processes, synced_gpus, ends, tick)
                answers = _answers(model, tokenizer, task, task_ids, *how)
                references = [example.response_text for example in task.eval]
                choices = [example.choices for example in task.eval]
                scores[task.metric] = compute_metric(task.metric, answers, references, choices)
                result.predictions[task.name] = answers
            result.tasks[task.name] = scores
    return result


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode from before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def count_targets(labels_BS: Tensor, is_encoder_decoder: bool) -> int:
    """Tokens that the loss covers. A causal model never predicts the first position of a row."""
    return int(((labels_BS if is_encoder_decoder else labels_BS[:, 1:]) != -100).sum())


def _batches(lengths: Sequence[int], batch_size: int, processes: Processes) -> Iterator[tuple[int, list[int], bool]]:
    """This process's batches: (number, rows, whether it counts). Rows of like length share a batch."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for first in range(0, len(batches), processes.world_size):
        number = first + processes.rank
        counts = number < len(batches)
        yield (number, batches[number], True) if counts else (len(batches) - 1, batches[-1], counts)


def _loss(
    model: Any,
    task: Task,
    task_ids: TaskIds,
    collator: Collator,
    batch_size: int,
    processes: Processes,
    tick: Callable[[str, int], None],
) -> tuple[float, int]:
    """Mean loss of a task's response tokens, and their number."""
    lengths = [len(example.input_ids) for example in task.eval]
    sums_N2 = torch.zeros(math.ceil(len(lengths) / batch_size), 2, dtype=torch.float64)
    for number, rows, counts in _batches(lengths, batch_size, processes):
        batch = collator([task.eval[row] for row in rows])
        tokens = count_targets(batch["labels"], collator.is_encoder_decoder)
        output = model(**dict(task_ids.for_model(batch, processes.device)))
        if counts and tokens:
            sums_N2[number] = torch.tensor([float(output.loss) * tokens, tokens], dtype=torch.float64)
        tick(task.name, processes.world_size)
    losses, counts_N = processes.all_sum(sums_N2).unbind(1)
    tokens = int(counts_N.sum())
    return math.fsum(losses.tolist()) / max(tokens, 1), tokens


def _answers(
    model: Any,
    tokenizer: Any,
    task: Task,
    task_ids: TaskIds,
    collator: Collator,
    batch_size: int,
    processes: Processes,
    synced_gpus: bool,
    ends: list[int],
    tick: Callable[[str, int], None],
) -> list[str]:
    """The model's greedy answers to a task's prompts, in the order of its examples."""
    longest = answer_length(task, collator.is_encoder_decoder)
    tokens_NS = torch.zeros(len(task.eval), longest, dtype=torch.int64)  # token + 1; 0 is "nothing here"
    lengths = [example.prompt_length for example in task.eval]
    for _, rows, counts in _batches(lengths, batch_size, processes):
        prompts = collator.collate_prompts([task.eval[row] for row in rows])
        output_BS = model.generate(
            **dict(task_ids.for_model(prompts, processes.device)),
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=ends or None,
            pad_token_id=collator.pad_token_id,
            synced_gpus=synced_gpus,
        )
        new_BS = output_BS[:, 1 if collator.is_encoder_decoder else prompts["input_ids"].shape[1] :].cpu()
        if counts:
            for row, answer_S in zip(rows, new_BS, strict=True):
                kept = _until(answer_S.tolist(), ends)[:longest]
                tokens_NS[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64) + 1
        tick(task.name, processes.world_size)
    gathered_NS = processes.all_sum(tokens_NS)
    answers = [[token - 1 for token in row if token > 0] for row in gathered_NS.tolist()]
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[:position]
    return tokens


def end_tokens(tokenizer: Any, model: Any, eos_token: str | int | None = None) -> list[int]:
    """The tokens that end an answer: the tokenizer's, the model's own, and the one that `data.eos_token` names."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if eos_token is not None:
        ends.add(eos_token if isinstance(eos_token, int) else tokenizer.convert_tokens_to_ids(eos_token))
    return sorted(ends - {None})


def answer_length(task: Task, is_encoder_decoder: bool) -> int:
    """Most tokens to generate for one answer: the task's `max_new_tokens`, or else its longest known answer."""
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    examples = (*task.train, *task.eval)
    if is_encoder_decoder:
        return max(len(example.labels) for example in examples)
    return max(1, max(len(example.input_ids) - example.prompt_length for example in examples))
