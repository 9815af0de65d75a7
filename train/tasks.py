"""Loads the tasks of a `data` section: reads, makes text, holds out evaluation rows, tokenises, counts what is lost."""

from __future__ import annotations

import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from moadapt.errors import DataError
from moadapt.registry import closest
from moadapt.train.data_config import DataConfig, MetricName, RowsConfig, TaskConfig
from moadapt.train.encoding import Encoder, Example
from moadapt.train.metrics import find_choice
from moadapt.train.sources import Table, read_table
from moadapt.train.templates import RowFormatter, TextRow
from moadapt.train.text import split_document, text_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Task", "load_tasks"]

T = TypeVar("T")
_MAX_DERIVED_CHOICES = 100
_SHOW_PROGRESS_FROM = 5000


@dataclass
class Task:
    """A task's tokenised rows.

    Attributes:
        name: as in the config.
        id: index in the list of tasks, and `task_id` of its examples.
        train: training rows; empty when only evaluation was asked for.
        eval: evaluation rows; empty when the config names none.
        metric: key of `moadapt.train.metrics.METRICS`, or None for the loss alone.
        max_new_tokens: length of generated answers, if the config sets it.
        dropped: training rows left out, by reason.
        eval_dropped: evaluation rows left out, by reason.
        truncated: rows, of both kinds, that were cut to `max_length`.
        first_dropped: for each reason, the place of the first such row.
    """

    name: str
    id: int
    train: list[Example] = field(default_factory=list)
    eval: list[Example] = field(default_factory=list)
    metric: MetricName | None = None
    max_new_tokens: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    eval_dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    first_dropped: dict[str, str] = field(default_factory=dict)

    def report(self) -> str:
        """One line: rows used, dropped (by reason, with the first place) and truncated."""
        parts = [f"{self.name}: {len(self.train)} training and {len(self.eval)} evaluation rows"]
        total = self.dropped + self.eval_dropped
        if total:
            reasons = [f"{count} {why} (first: {self.first_dropped[why]})" for why, count in sorted(total.items())]
            parts.append(f"dropped {total.total()}: {', '.join(reasons)}")
        if self.truncated:
            parts.append(f"truncated {self.truncated}")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Rows:
    """Row indices of one table that belong to one task."""

    table: Table
    indices: Sequence[int]


def load_tasks(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_encoder_decoder: bool = False,
    seed: int = 0,
    train: bool = True,
) -> list[Task]:
    """Read and tokenise every task.

    Args:
        config: the `data` section; relative paths start here unless `config.resolve` was called.
        tokenizer: a tokenizer of transformers.
        is_encoder_decoder: make examples for an encoder-decoder model.
        seed: decides which rows `eval_fraction`, `max_samples` and `max_eval_samples` choose. They do not depend on
            the tokenizer.
        train: False leaves `Task.train` empty, for evaluation alone.

    Returns:
        The tasks in the order of the config, or sorted by name when one file holds all; ids count from 0.

    Raises:
        DataError: a file cannot be used, or a task has no row left; names the file and the line.
    """
    encoder = Encoder(tokenizer, config, is_encoder_decoder=is_encoder_decoder)
    sources = _separate_files(config) if config.tasks is not None else _single_file(config)
    return [
        _load(Task(task.name, index, metric=task.metric), task, train_rows, eval_rows, encoder, seed, train)
        for index, (task, train_rows, eval_rows) in enumerate(sources)
    ]


def _separate_files(config: DataConfig) -> Iterable[tuple[TaskConfig, _Rows, _Rows | None]]:
    tables: dict[tuple[str | None, ...], Table] = {}

    def read(task: TaskConfig, path: str, split: str | None, subset: str | None) -> _Rows:
        key = (path, split, subset, task.sample_by)
        if key not in tables:
            tables[key] = read_table(path, split=split, subset=subset, sample_by=task.sample_by)
        return _Rows(tables[key], range(len(tables[key].rows)))

    for task in config.tasks or []:
        inherited = {name: getattr(config, name) for name in ("system_prompt", "max_new_tokens", "apply_chat_template")}
        missing = {name: value for name, value in inherited.items() if name not in task.model_fields_set}
        task = task.model_copy(update=missing)
        rows = read(task, task.path, task.split, task.subset)
        eval_rows = read(task, *_eval_source(task, task.path)) if task.eval_path or task.eval_split else None
        yield task, rows, eval_rows


def _single_file(config: DataConfig) -> Iterable[tuple[TaskConfig, _Rows, _Rows | None]]:
    assert config.path is not None  # checked by DataConfig
    table = read_table(config.path, split=config.split, subset=config.subset)
    groups = _by_task(config, table)
    names = sorted(groups)
    for name in (*config.metrics, *(config.sampling.weights or {})):
        if name not in groups:
            option = "data.metrics" if name in config.metrics else "data.sampling.weights"
            raise DataError(f"{option}: {table.source} has no task {name!r}{closest(name, names)} Tasks: {names}")
    eval_table, eval_groups = None, {}
    if config.eval_path or config.eval_split:
        path, split, subset = _eval_source(config, config.path)
        eval_table = read_table(path, split=split, subset=subset)
        eval_groups = _by_task(config, eval_table)
        for name, indices in eval_groups.items():
            if name not in groups:
                raise DataError(
                    f"{eval_table.where(indices[0])}: task {name!r} does not occur in {table.source}"
                    f"{closest(name, names)} Tasks: {', '.join(names)}"
                )
    common = {key: getattr(config, key) for key in RowsConfig.model_fields}
    for name in names:
        metric = config.metrics.get(name)
        choices = config.choices if metric == "accuracy" else None
        task = TaskConfig.model_validate(
            {**common, "name": name, "path": config.path, "metric": metric, "choices": choices}
        )
        eval_rows = _Rows(eval_table, eval_groups[name]) if eval_table and name in eval_groups else None
        yield task, _Rows(table, groups[name]), eval_rows


def _eval_source(config: RowsConfig, path: str) -> tuple[str, str | None, str | None]:
    if config.eval_path is not None:
        return config.eval_path, config.eval_split, config.subset if config.eval_path == path else None
    return path, config.eval_split, config.subset


def _by_task(config: DataConfig, table: Table) -> dict[str, list[int]]:
    column = str(config.task_column)
    table.require(column, "task_column")
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(table.rows):
        name = row.get(column)
        if not isinstance(name, str) or not name:
            raise DataError(f"{table.where(index)}: column {column!r} must hold the task's name, found {name!r}")
        groups.setdefault(name, []).append(index)
    return groups


def _load(
    task: Task, config: TaskConfig, rows: _Rows, eval_rows: _Rows | None, encoder: Encoder, seed: int, train: bool
) -> Task:
    task.max_new_tokens = config.max_new_tokens
    table = rows.table
    texts = _texts(task, config, rows, task.dropped)
    _require_rows(texts, task, table, task.dropped)
    eval_table = table
    eval_texts: list[TextRow] = []
    generator = np.random.default_rng([seed, zlib.crc32(config.name.encode())])
    if config.eval_fraction is not None:
        texts, eval_texts = _split(texts, config.eval_fraction, generator, config, table)
    elif eval_rows is not None:
        eval_table = eval_rows.table
        eval_texts = _texts(task, config, eval_rows, task.eval_dropped)
        _require_rows(eval_texts, task, eval_table, task.eval_dropped)
    if config.is_text:
        _load_text(task, config, (texts, table), (eval_texts, eval_table), encoder, generator, train)
        return task
    choices = _answers(config, [*texts, *eval_texts], table)
    texts = _subset(texts, config.max_samples, generator)
    had_eval = bool(eval_texts)
    eval_texts = _subset(eval_texts, config.max_eval_samples, generator)
    if config.metric == "accuracy":
        eval_texts = [_with_choices(row, choices, eval_table) for row in eval_texts]
    if train:
        task.train = _encode(task, texts, table, encoder, task.dropped)
        _require_rows(task.train, task, table, task.dropped)
    task.eval = _encode(task, eval_texts, eval_table, encoder, task.eval_dropped)
    if had_eval:
        _require_rows(task.eval, task, eval_table, task.eval_dropped)
    return task


def _load_text(
    task: Task,
    config: TaskConfig,
    given: tuple[list[TextRow], Table],
    given_eval: tuple[list[TextRow], Table],
    encoder: Encoder,
    generator: np.random.Generator,
    train: bool,
) -> None:
    """Documents become rows of up to `max_length` tokens, and the limits count those."""
    if encoder.is_encoder_decoder:
        raise DataError(
            f"{given[1].source}: task {task.name!r} is plain text, which an encoder-decoder model has no prompt for; "
            "give prompt and response, or a causal model"
        )
    packing = config.packing is not False
    for_train, for_eval = generator.spawn(2)
    if train:
        documents, table = given
        rows = list(text_examples(documents, encoder, task.id, packing=packing))
        task.train = _subset(rows, config.max_samples, for_train)
        _require_rows(task.train, task, table, task.dropped)
    documents, table = given_eval
    rows = list(text_examples(documents, encoder, task.id, packing=packing))
    task.eval = _subset(rows, config.max_eval_samples, for_eval)
    if documents:
        _require_rows(task.eval, task, table, task.eval_dropped)


def _texts(task: Task, config: TaskConfig, rows: _Rows, dropped: Counter[str]) -> list[TextRow]:
    formatter = RowFormatter(config, rows.table)
    texts = []
    for index in rows.indices:
        text = formatter(index)
        if isinstance(text, str):
            _drop(task, text, rows.table, index, dropped)
        else:
            texts.append(text)
    return texts


def _drop(task: Task, reason: str, table: Table, index: int, dropped: Counter[str]) -> None:
    dropped[reason] += 1
    task.first_dropped.setdefault(reason, table.where(index))


def _require_rows(rows: Sequence[object], task: Task, table: Table, dropped: Counter[str]) -> None:
    if not rows:
        reasons = ", ".join(f"{count} {why} (first: {task.first_dropped[why]})" for why, count in dropped.items())
        raise DataError(f"{table.source}: task {task.name!r}: no row is left; dropped: {reasons or 'none'}")


def _split(
    rows: list[TextRow], fraction: float, generator: np.random.Generator, config: TaskConfig, table: Table
) -> tuple[list[TextRow], list[TextRow]]:
    """Training and evaluation rows, each in the file's order."""
    if config.is_text and len(rows) == 1:
        return split_document(rows[0], fraction, table)
    count = int(len(rows) * fraction + 0.5)
    if not 0 < count < len(rows):
        kind = "evaluation" if count == 0 else "training"
        raise DataError(
            f"{table.source}: task {config.name!r}: eval_fraction {fraction} of {len(rows)} rows leaves no "
            f"{kind} row; change it, or give eval_path"
        )
    chosen = set(generator.permutation(len(rows))[:count].tolist())
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [row for index, row in enumerate(rows) if index in chosen]


def _subset(rows: list[T], limit: int | None, generator: np.random.Generator) -> list[T]:
    """At most `limit` rows, chosen at random, in the file's order."""
    order = generator.permutation(len(rows))
    return rows if limit is None else [rows[index] for index in sorted(order[:limit].tolist())]


def _answers(config: TaskConfig, rows: list[TextRow], table: Table) -> list[str] | None:
    """The choices of metric accuracy when the config gives none: the task's different responses."""
    if config.metric != "accuracy" or config.choices is not None:
        return None
    answers = sorted({row.response.strip() for row in rows})
    if len(answers) > _MAX_DERIVED_CHOICES:
        raise DataError(
            f"{table.source}: task {config.name!r}: metric accuracy finds {len(answers)} different responses; "
            "give `choices`, or use metric exact_match"
        )
    return answers


def _with_choices(row: TextRow, answers: list[str] | None, table: Table) -> TextRow:
    choices = row.choices if answers is None else answers
    if find_choice(row.response, choices or []) is None:
        raise DataError(f"{table.where(row.row)}: the response {row.response!r} is none of the choices {choices}")
    return TextRow(row.row, row.prompt, row.response, row.messages, choices)


def _encode(task: Task, rows: list[TextRow], table: Table, encoder: Encoder, dropped: Counter[str]) -> list[Example]:
    from rich.console import Console
    from rich.progress import track

    examples = []
    quiet = len(rows) < _SHOW_PROGRESS_FROM or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    encoded = track(
        encoder.encode(rows, task.id, table),
        description=f"Tokenising {task.name}",
        total=len(rows),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )
    for row, result in zip(rows, encoded, strict=True):
        if isinstance(result, str):
            _drop(task, result, table, row.row, dropped)
            continue
        example, truncated = result
        task.truncated += truncated
        examples.append(example)
    return examples
