"""Options of the `data` section: where the tasks' rows are, how they become text, and how tasks are sampled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.registry import Config, closest

MetricName = Literal["exact_match", "accuracy", "rouge_l", "token_f1"]
TEXT_SUFFIX = ".txt"
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", TEXT_SUFFIX)


class Problems:
    """Collects the cross-field mistakes of one config, so that all are reported at once."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.details: list[InitErrorDetails] = []

    def add(self, text: str, *loc: str | int, value: object = None) -> None:
        """Note one mistake at the path `loc`."""
        kind = PydanticCustomError("value_error", "{text}", {"text": text})
        self.details.append(InitErrorDetails(type=kind, loc=loc, input=value))

    def raise_if_any(self) -> None:
        """Raise them together.

        Raises:
            pydantic.ValidationError: at least one mistake was noted.
        """
        if self.details:
            raise ValidationError.from_exception_data(self.title, self.details)


class SamplingConfig(Config):
    """How rows of several tasks are mixed.

    `proportional` visits every row once an epoch. The other strategies fix the tasks' shares: `uniform` equal shares,
    `temperature` shares proportional to rows^(1/temperature), `weights` the shares given (they need not sum to 1).
    """

    strategy: Literal["proportional", "uniform", "temperature", "weights"] = "proportional"
    temperature: float | None = Field(default=None, gt=0, description="for strategy temperature; 1 is proportional")
    weights: dict[str, float] | None = Field(default=None, description="for strategy weights: share of each task")
    batching: Literal["mixed", "per_task"] = Field(default="mixed", description="per_task: one task in each batch")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = Problems("SamplingConfig")
        if self.strategy == "temperature" and self.temperature is None:
            problems.add("strategy temperature needs it; 2.0 is a common value", "temperature")
        if self.strategy != "temperature" and self.temperature is not None:
            problems.add(f"read by strategy temperature only, not by {self.strategy}", "temperature")
        if self.weights is not None:
            if self.strategy != "weights":
                problems.add(f"read by strategy weights only, not by {self.strategy}", "weights")
            for name, weight in self.weights.items():
                if not 0 <= weight < float("inf"):
                    problems.add("a weight is a finite number, 0 or more", "weights", name, value=weight)
            if not any(self.weights.values()):
                problems.add("at least one weight must be above 0", "weights")
        problems.raise_if_any()
        return self


_OF_PROMPTS = (
    *("prompt_template", "response_template", "prompt_column", "response_column"),
    *("apply_chat_template", "system_prompt", "choices", "max_new_tokens"),
)


def is_text_file(path: str) -> bool:
    """Whether a path names a file of plain text."""
    return Path(path).suffix.lower() == TEXT_SUFFIX


class RowsConfig(Config):
    """Where rows come from and how one row becomes a prompt and a response."""

    split: str | None = Field(default=None, description="split of a hub data set or folder; default: train")
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    eval_path: str | None = Field(default=None, description="evaluation rows: a file, a folder or a hub id")
    eval_split: str | None = Field(default=None, description="split of the evaluation rows, of eval_path or else path")
    eval_fraction: float | None = Field(default=None, gt=0, lt=1, description="share of rows held out for evaluation")
    prompt_template: str | None = Field(default=None, description="prompt text with {column} fields")
    response_template: str | None = Field(default=None, description="response text with {column} fields")
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = Field(default=None, description="column with a list of {role, content}")
    text_column: str | None = Field(
        default=None, description="column with plain text, all of which is learned; a .txt file needs none"
    )
    packing: bool | None = Field(
        default=None, description="plain text: documents share rows of max_length; null: true. false: each its own rows"
    )
    sample_by: Literal["document", "paragraph", "line"] | None = Field(
        default=None,
        description="what one document of a .txt file is: all of it (null), up to an empty line, or a line",
    )
    apply_chat_template: bool = Field(
        default=False, description="wrap prompt and response as one chat turn; chat messages always use the template"
    )
    system_prompt: str | None = Field(default=None, description="put before every prompt; in a chat, as system message")
    choices: list[str] | str | None = Field(
        default=None, description="answers for metric accuracy: a list, or the column that holds each row's list"
    )
    max_samples: int | None = Field(default=None, gt=0, description="at most so many training rows of a task")
    max_eval_samples: int | None = Field(default=None, gt=0, description="at most so many evaluation rows of a task")
    max_new_tokens: int | None = Field(default=None, gt=0, description="length of generated answers in evaluation")

    @property
    def is_text(self) -> bool:
        """Whether the rows are plain text, without prompt and response."""
        paths = (getattr(self, "path", None), self.eval_path)
        return self.text_column is not None or any(path is not None and is_text_file(path) for path in paths)

    @property
    def has_eval(self) -> bool:
        """Whether evaluation rows are asked for."""
        return self.eval_path is not None or self.eval_split is not None or self.eval_fraction is not None

    def check_rows(self, problems: Problems) -> None:
        """Note the combinations that contradict each other."""
        if self.eval_fraction is not None:
            for name in ("eval_path", "eval_split"):
                if getattr(self, name) is not None:
                    problems.add(f"give either eval_fraction or {name}, not both", "eval_fraction")
        if self.max_eval_samples is not None and not self.has_eval:
            problems.add("needs eval_path, eval_split or eval_fraction", "max_eval_samples")
        if self.prompt_template is not None and self.prompt_column is not None:
            problems.add("give either prompt_template or prompt_column, not both", "prompt_template")
        if self.response_template is not None and self.response_column is not None:
            problems.add("give either response_template or response_column, not both", "response_template")
        if self.messages_column is not None:
            for name in ("prompt_template", "prompt_column", "response_template", "response_column"):
                if getattr(self, name) is not None:
                    problems.add(f"messages_column holds the whole conversation; remove {name}", name)
        for name in ("prompt_template", "response_template"):
            text = getattr(self, name)
            if text is not None:
                try:
                    fields = template_fields(text)
                except ValueError as error:
                    problems.add(f"{error}; write {{{{ and }}}} for literal braces", name, value=text)
                else:
                    if not fields:
                        problems.add("has no {column} field, so every row would be the same", name, value=text)
        if isinstance(self.choices, list):
            if len(self.choices) < 2 or len(set(self.choices)) != len(self.choices):
                problems.add("needs at least two different answers", "choices")
            if not all(choice.strip() for choice in self.choices):
                problems.add("an answer is empty", "choices")
        self._check_text(problems)

    def _check_text(self, problems: Problems) -> None:
        if not self.is_text:
            if self.packing is not None:
                problems.add("read for plain text only (text_column, or a .txt file)", "packing")
            if self.sample_by is not None:
                problems.add("read for .txt files only", "sample_by")
            return
        for name in (*_OF_PROMPTS, *([] if self.messages_column is None else ["messages_column"])):
            if getattr(self, name) not in (None, False):
                problems.add(f"plain text has neither prompt nor response; remove {name}, or text_column", name)
        paths = [path for path in (getattr(self, "path", None), self.eval_path) if path is not None]
        if self.sample_by is not None and not any(is_text_file(path) for path in paths):
            problems.add("read for .txt files only; a table has one document in each row", "sample_by")


class TaskConfig(RowsConfig):
    """One task: a name, its rows, its metric."""

    name: str = Field(min_length=1)
    path: str = Field(min_length=1, description="a JSON, JSONL, CSV or Parquet file, a folder or a hub data set id")
    metric: MetricName | None = Field(default=None, description="computed on generated answers; null: loss only")
    weight: float | None = Field(default=None, ge=0, description="share under sampling strategy weights")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = Problems("TaskConfig")
        self.check_rows(problems)
        if self.is_text and self.metric is not None:
            problems.add("plain text has no answers to score; leave it out, the loss is always reported", "metric")
        elif self.choices is not None and self.metric != "accuracy":
            problems.add("read by metric accuracy only", "choices")
        problems.raise_if_any()
        return self


class DataConfig(RowsConfig):
    """The `data` section: either `tasks`, or one file for all tasks with `path` and `task_column`."""

    tasks: list[TaskConfig] | None = None
    path: str | None = Field(default=None, min_length=1, description="one file for all tasks")
    task_column: str | None = Field(default=None, description="column of that file with the task's name")
    metrics: dict[str, MetricName | None] = Field(default_factory=dict, description="metric of each task of that file")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    max_length: int = Field(
        default=1024, ge=8, description="tokens of prompt and response together (of each, for an encoder-decoder)"
    )
    on_too_long: Literal["drop", "truncate"] = Field(default="drop", description="what to do beyond max_length")
    train_on_prompt: bool = Field(default=False, description="the loss covers the prompt too")
    padding_side: Literal["left", "right"] = Field(default="right", description="side of the padding in training")
    add_bos: bool | None = Field(default=None, description="first token of a prompt; null: as the tokenizer does")
    add_eos: bool = Field(default=True, description="end every response with the end token")
    eos_token: str | int | None = Field(default=None, description="end token or its id; null: the tokenizer's")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = Problems("DataConfig")
        if self.tasks is None and self.path is None:
            problems.add("give a list of tasks, or path and task_column for one file with all tasks", "tasks")
        if self.tasks is not None:
            self._check_tasks(self.tasks, problems)
        else:
            self._check_single_file(problems)
        if self.eos_token is not None and not self.add_eos:
            problems.add("has no effect with add_eos: false", "eos_token")
        problems.raise_if_any()
        return self

    def _check_single_file(self, problems: Problems) -> None:
        self.check_rows(problems)
        if self.path is not None and self.task_column is None:
            problems.add("path needs task_column, the column that names each row's task", "task_column")
        if any(path is not None and is_text_file(path) for path in (self.path, self.eval_path)):
            problems.add("a .txt file has no columns, so no task_column either; list it under tasks", "path")
        elif self.is_text and any(self.metrics.values()):
            problems.add("plain text has no answers to score; leave them out", "metrics")
        elif self.choices is not None and "accuracy" not in self.metrics.values():
            problems.add("read by metric accuracy only", "choices")
        if self.sampling.strategy == "weights" and self.sampling.weights is None:
            problems.add("strategy weights needs them: {task: weight}", "sampling", "weights")

    def _check_tasks(self, tasks: list[TaskConfig], problems: Problems) -> None:
        shared = {"apply_chat_template", "system_prompt", "max_new_tokens"}
        for name in (*sorted(set(RowsConfig.model_fields) - shared), "path", "task_column", "metrics"):
            if name in self.model_fields_set and getattr(self, name) not in (None, {}):
                problems.add("belongs to the single-file form; with tasks, set it on each task", name)
        if not tasks:
            problems.add("the list is empty", "tasks")
        names = [task.name for task in tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                problems.add("this name is taken by an earlier task", "tasks", index, "name", value=name)
        weights = self.sampling.weights or {}
        for name in weights:
            if name not in names:
                problems.add(f"no such task{closest(name, names)}", "sampling", "weights", name)
        for index, task in enumerate(tasks):
            if task.weight is not None and self.sampling.strategy != "weights":
                problems.add("read by sampling strategy weights only", "tasks", index, "weight")
            if task.weight is not None and task.name in weights:
                problems.add("given here and in sampling.weights; keep one", "tasks", index, "weight")
            if self.sampling.strategy == "weights" and task.weight is None and task.name not in weights:
                problems.add(
                    f"strategy weights needs a weight for task {task.name!r}, here or in sampling.weights",
                    *("tasks", index, "weight"),
                )

    def sampling_weights(self, names: list[str]) -> list[float] | None:
        """The tasks' weights in the order of `names`, or None when the strategy is not `weights`.

        Raises:
            ConfigError: a task without weight, or a weight without task.
        """
        if self.sampling.strategy != "weights":
            return None
        weights = {task.name: task.weight for task in self.tasks or [] if task.weight is not None}
        weights.update(self.sampling.weights or {})
        missing = [name for name in names if name not in weights]
        unknown = [name for name in weights if name not in names]
        if missing or unknown:
            parts = [f"no weight for {missing}"] if missing else []
            parts += [f"no such task: {unknown}"] if unknown else []
            raise ConfigError(f"sampling.weights: {'; '.join(parts)}. Tasks: {', '.join(names)}")
        return [weights[name] for name in names]

    def resolve(self, base_dir: str | Path) -> DataConfig:
        """A copy whose relative paths are absolute where they exist: first under `base_dir`, then where we run.

        A path found in neither place stays as it is: it may be a hub id. `load_tasks` reports what it cannot find.
        """
        data = self.model_dump(exclude_unset=True)
        for entry in (data, *(data.get("tasks") or [])):
            for key in ("path", "eval_path"):
                if entry.get(key) is not None:
                    entry[key] = resolved(entry[key], Path(base_dir))
        return DataConfig.model_validate(data)


def resolved(text: str, base_dir: Path) -> str:
    """A path as it is found: under `base_dir`, else where we run; what is in neither place may be a hub id."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return str(path)
    for folder in (base_dir, Path.cwd()):
        if (folder / path).exists():
            return str((folder / path).resolve())
    if path.suffix.lower() in FILE_SUFFIXES:
        return str((base_dir / path).resolve())
    return text


_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def template_fields(template: str) -> list[str]:
    """The `{column}` fields of a template, in order; `{{` and `}}` are literal braces.

    Raises:
        ValueError: a brace without its partner, or an empty field.
    """
    fields = []
    for match in _FIELD.finditer(template):
        if match.group() in ("{{", "}}"):
            continue
        if match.group(1) is None:
            raise ValueError(f"a single {match.group()!r} at character {match.start() + 1}")
        if not match.group(1).strip():
            raise ValueError(f"an empty field at character {match.start() + 1}")
        fields.append(match.group(1))
    return fields


def fill_template(template: str, values: dict[str, str]) -> str:
    """The template with every field replaced by its value."""

    def replace(match: re.Match[str]) -> str:
        return match.group()[0] if match.group(1) is None else values[match.group(1)]

    return _FIELD.sub(replace, template)
