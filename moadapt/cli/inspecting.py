"""Work of `moadapt inspect`: what is inspected, and on which rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moadapt.cli.adapters import adapter_config, load_for_inference, saved_config
from moadapt.errors import AdapterError, ConfigError, DataError
from moadapt.registry import closest
from moadapt.run_config import RunConfig, load_run_config
from moadapt.saving import CONFIG_FILE as ADAPTER_FILE
from moadapt.saving import read_adapter_config

if TYPE_CHECKING:
    from moadapt.config import MixtureConfig
    from moadapt.statistics import RoutingStatistics
    from moadapt.train.data_config import DataConfig
    from moadapt.train.encoding import Example

TASK_COLUMN = "task"


@dataclass(frozen=True)
class Subject:
    """What is inspected, before it is loaded.

    Attributes:
        name: as it was given.
        config: how to load its base model, and the saved run's data.
        mixture: None for a model of transformers with routers of its own.
    """

    name: str
    config: RunConfig
    mixture: MixtureConfig | None

    def load(self) -> Any:
        """The model on this process's device, in evaluation mode."""
        from moadapt.pretrained import load_base
        from moadapt.train.engine import pick_device, place

        if self.mixture is not None:
            return load_for_inference(self.config, self.name).eval()
        model = load_base(self.config)
        place(model, pick_device(self.config.training.use_cpu))
        return model.eval()

    def describe(self) -> dict[str, Any]:
        """The part `model` of a routing document."""
        base = self.config.model_name_or_path
        if self.mixture is None:
            return {"adapter": None, "base": base, "router": "of the model itself", "granularity": "token"}
        router = self.mixture.router
        scope = getattr(router, "scope", None)
        return {
            "adapter": self.name,
            "base": base,
            "preset": self.mixture.preset,
            "expert": self.mixture.expert.kind,
            "router": router.kind,
            "granularity": getattr(router, "granularity", "token"),
            "scope": " + ".join(scope) if isinstance(scope, list) else scope,
            "expert_unit": self.mixture.expert_unit,
        }


def find_subject(name: str, base: str | None, dtype: str | None, cpu: bool) -> Subject:
    """An adapter or converted model, or else a model of transformers.

    Raises:
        AdapterError: neither is there.
        ConfigError: `--base` for a model that is no adapter, or a mistake in a saved config.
    """
    folder = Path(name)
    stock = folder.is_dir() and not (folder / ADAPTER_FILE).is_file() and (folder / "config.json").is_file()
    if not stock:
        try:
            mixture, _ = read_adapter_config(name)
            return Subject(name, adapter_config(name, base, dtype, cpu), mixture)
        except AdapterError:
            if folder.is_dir() or not _is_model(name):
                raise
    if base is not None:
        raise ConfigError(f"--base: {name} is a whole model, no adapter; leave --base out")
    config = RunConfig(model_name_or_path=name)
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if cpu:
        changes["training"] = config.training.model_copy(update={"use_cpu": True})
    return Subject(name, config.model_copy(update=changes), None)


def _is_model(name: str) -> bool:
    """Whether a hub id is that of a model of transformers."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return False
    return True


# -- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What the passes read.

    Attributes:
        examples: tokenised rows by task; one entry without a name where the data names no tasks.
        data: the options that they were tokenised with.
        source: where they come from, for messages.
        has_encoder: whether the model reads prompt and response apart.
        notes: what was left out.
    """

    examples: dict[str | None, list[Example]]
    data: DataConfig
    source: str
    has_encoder: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def named(self) -> bool:
        """Whether the data names tasks."""
        return None not in self.examples

    def length(self, example: Example) -> int:
        """Tokens that the model reads."""
        return len(example.input_ids) + (len(example.labels) if self.has_encoder else 0)

    def document(self) -> dict[str, Any]:
        """The part `data` of a routing document."""
        lengths = {name: sum(map(self.length, examples)) for name, examples in self.examples.items()}
        tasks = [
            {"name": name, "sequences": len(examples), "tokens": lengths[name]}
            for name, examples in self.examples.items()
            if name is not None
        ]
        sequences = sum(len(examples) for examples in self.examples.values())
        return {"tasks": tasks, "tokens": sum(lengths.values()), "sequences": sequences}


@dataclass(frozen=True)
class Data:
    """Where rows come from.

    Attributes:
        config: files, and the options of the text.
        source: for messages.
        named: whether they name tasks.
        is_file: whether it is a file of rows, all of which are read; of a config's tasks only those held out are.
        seed: by which a config holds rows out.
    """

    config: DataConfig
    source: str
    named: bool
    is_file: bool
    seed: int


def find_data(subject: Subject, tokenizer: Any, data: str | None) -> Data:
    """What `--data` names, or else the tasks of the run that made the adapter.

    Args:
        subject: gives that run's tasks, and the options of the text.
        tokenizer: of its base model.
        data: what `--data` says: a file, or a YAML config.

    Raises:
        ConfigError: there is no data, or a mistake in the config.
        DataError: a file that cannot be used.
    """
    from moadapt.train.data_config import DataConfig
    from moadapt.train.sources import read_table

    saved, seed = subject.config.data, subject.config.training.seed
    if data is None:
        path = None if subject.mixture is None else saved_config(subject.name)
        if saved is None or path is None:
            raise ConfigError(f"--data: {subject.name} has no tasks of its own; give rows with --data FILE")
        return Data(saved, str(path), True, False, seed)
    if Path(data).suffix.lower() in (".yaml", ".yml"):
        config = load_run_config(Path(data), needs=("data",))
        assert config.data is not None
        return Data(config.data, data, True, False, config.training.seed)
    table = read_table(data)
    text = saved if saved is not None else DataConfig.model_construct()
    names = ("max_length", "on_too_long", "add_bos", "eos_token", "apply_chat_template", "system_prompt")
    options: dict[str, Any] = {name: getattr(text, name) for name in names}
    options["add_eos"] = text.add_eos and (text.eos_token is not None or tokenizer.eos_token_id is not None)
    named = TASK_COLUMN in table.columns
    rows = {"tasks": [{"name": Path(data).stem, "path": data}]}
    options |= {"path": data, "task_column": TASK_COLUMN} if named else rows
    return Data(DataConfig.model_validate(options), data, named, True, seed)


def read_rows(data: Data, subject: Subject, tokenizer: Any, max_samples: int) -> Rows:
    """The rows of a file, or the held-out ones of a config's tasks (those of training where none are held out).

    Args:
        data: where they are.
        subject: the model that reads them.
        tokenizer: of its base model.
        max_samples: most rows of a task, chosen at random.

    Raises:
        DataError: rows that cannot be used.
    """
    from moadapt.pretrained import empty_base
    from moadapt.train.tasks import load_tasks

    config = data.config
    held_out = not data.is_file and any(part.has_eval for part in _parts(config))
    option = "max_eval_samples" if held_out else "max_samples"
    if config.tasks is None:
        config = config.model_copy(update=_least(config, option, max_samples))
    else:
        limited = [task.model_copy(update=_least(task, option, max_samples)) for task in config.tasks]
        config = config.model_copy(update={"tasks": limited})
    has_encoder = bool(empty_base(subject.config).config.is_encoder_decoder)
    tasks = load_tasks(config, tokenizer, is_encoder_decoder=has_encoder, seed=data.seed, train=not held_out)
    kept = {task.name if data.named else None: task.eval if held_out else task.train for task in tasks}
    notes = [task.report() for task in tasks if task.dropped or task.eval_dropped or task.truncated]
    notes += [f"{name}: no held-out rows, left out" for name, examples in kept.items() if not examples]
    if not data.is_file and not held_out:
        notes.append("the config holds no rows out; these are rows of training")
    rows = {name: examples for name, examples in kept.items() if examples}
    return Rows(rows, config, data.source, has_encoder, notes)


def _parts(config: DataConfig) -> list[Any]:
    return list(config.tasks) if config.tasks is not None else [config]


def _least(part: Any, option: str, limit: int) -> dict[str, int]:
    """The option's new value, where it may have a smaller one already."""
    known = getattr(part, option)
    return {option: limit if known is None else min(known, limit)}


def task_ids(subject: Subject, rows: Rows) -> tuple[list[str] | None, dict[str | None, int] | None]:
    """Names of the tasks by id, as recording takes them, and each task's id; None where there are no tasks.

    Raises:
        DataError: a model that goes by task, and rows without one, or of one that it does not know.
    """
    mixture = subject.mixture
    if mixture is None or not mixture.needs_tasks:
        if not rows.named:
            return None, None
        return [str(name) for name in rows.examples], {name: index for index, name in enumerate(rows.examples)}
    numbers = [getattr(part, "num_tasks", None) or 0 for part in (mixture.router, mixture.expert)]
    known = mixture.tasks or [str(number) for number in range(max(numbers))]
    listed = f"Tasks of {subject.name}: {', '.join(known)}"
    if not rows.named:
        raise DataError(
            f"{rows.source}: {subject.name} goes by task, and the file names none; add a column {TASK_COLUMN!r}. "
            f"{listed}"
        )
    for name in rows.examples:
        if name not in known:
            hint = closest(str(name), known)
            raise DataError(f"{rows.source}: {subject.name} has no task {name!r}{hint} {listed}")
    return known, {name: known.index(str(name)) for name in rows.examples}


def training_curves(name: str, statistics: RoutingStatistics) -> list[dict[str, Any]]:
    """What the run that made an adapter logged about its routers, from the `metrics.jsonl` beside `config.yaml`.

    The run logs means over the routers of a layer; each router is given those of its layer.
    """
    from moadapt.train.logging import read_metrics
    from moadapt.train.routing_monitor import layer_names

    config = saved_config(name)
    if config is None:
        return []
    places = layer_names(list(statistics.routers.values()))
    measures = ("entropy", "max_share", "dead_fraction", "max_violation")
    curves = []
    for logged in read_metrics(config.parent):
        row: dict[str, Any] = {}
        for router, place in places.items():
            keys = {f"layer_mean_{measure}": f"routing/{place}{measure}" for measure in measures}
            values = {measure: logged[key] for measure, key in keys.items() if key in logged}
            if values:
                row[router] = values
        if row and "step" in logged:
            curves.append({"step": int(logged["step"]), **row})
    return curves
