"""`RunConfig`: one YAML shape for every command, with `key=value` overrides from the command line.

Sections that a command does not need may be left out. Paths of what is read (the base model, data files, a DeepSpeed
JSON) start at the config file's folder, and if nothing is there, where the command runs. `training.output_dir` starts
where the command runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from moadapt.config import MixtureConfig
from moadapt.convert import conversion_options
from moadapt.errors import ConfigError
from moadapt.overrides import apply_overrides
from moadapt.presets import merge_preset
from moadapt.registry import Config, _as_details, closest, config_error, load_plugins, problem
from moadapt.saving import CONFIG_FILE as ADAPTER_FILE
from moadapt.saving import changed_mixture, read_adapter_config
from moadapt.train.data_config import DataConfig
from moadapt.train.deepspeed_config import read_deepspeed, zero_stage
from moadapt.train.routing_checks import (
    activation_problems,
    bilevel_problems,
    granularity_problems,
    task_problems,
)
from moadapt.train.text import CalibrationConfig
from moadapt.train.training_config import TrainingConfig

CONFIG_FILE = "config.yaml"
_RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class RunConfig(Config):
    """Everything that a command needs to know.

    Attributes:
        model_name_or_path: the base model: a hub id or a local folder. Also the folder of a converted model or of an
            adapter, which `train` then goes on with; `mixture` holds what shall be different from there on.
        revision: branch, tag or commit of the base model on the hub.
        trust_remote_code: run the code that comes with the base model.
        dtype: of the frozen base weights; `auto` takes the checkpoint's. Adapter weights are fp32.
        attn_implementation: as in transformers: `eager`, `sdpa`, `flash_attention_2`.
        load_in_4bit: quantise the base weights to 4 bits (NF4) with bitsandbytes.
        load_in_8bit: quantise the base weights to 8 bits with bitsandbytes.
        mixture: the mixture of adapters.
        compare: further mixtures by name, trained after `mixture` on the same data with the same training options. An
            entry that names a `preset` starts from it, any other from `mixture`; what it says itself wins.
        calibration: text that `convert` reads while it splits.
        data: the tasks.
        training: training options, under the names of `transformers.TrainingArguments`.
        deepspeed: `zero0` to `zero3`, the path of a DeepSpeed JSON file or its contents; null trains in one process.
        plugins: modules to import before the config is checked, so that they can register kinds.
    """

    model_name_or_path: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    mixture: MixtureConfig | None = None
    compare: dict[str, MixtureConfig] = Field(default_factory=dict)
    calibration: CalibrationConfig | None = None
    data: DataConfig | None = None
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    deepspeed: str | dict[str, Any] | None = None
    plugins: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _complete_compared(cls, data: Any) -> Any:
        """Give every entry of `compare` what it takes over from `mixture`."""
        if not isinstance(data, dict) or not isinstance(data.get("compare"), dict):
            return data
        base = data.get("mixture")
        if isinstance(base, MixtureConfig):
            base = base.model_dump(mode="json")
        compared = {
            name: entry
            if not isinstance(entry, dict) or not isinstance(base, dict) or "preset" in entry
            else _without_idle_tasks(merge_preset(base, entry), entry)
            for name, entry in data["compare"].items()
        }
        return {**data, "compare": compared}

    @field_validator("training", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """YAML reads the bare word `no`, which these options take, as false."""
        if not isinstance(value, dict):
            return value
        words = {key: "no" for key in ("eval_strategy", "save_strategy") if value.get(key) is False}
        return {**value, **words}

    @field_validator("compare")
    @classmethod
    def _names_are_folders(cls, value: dict[str, MixtureConfig]) -> dict[str, MixtureConfig]:
        for name in value:
            if not _RUN_NAME.fullmatch(name):
                raise ValueError(f"{name!r} becomes a folder's name; use letters, digits, '.', '_' and '-'")
        return value

    @field_validator("model_name_or_path")
    @classmethod
    def _find_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else _found(value, info)

    @field_validator("deepspeed")
    @classmethod
    def _find_deepspeed(cls, value: str | dict[str, Any] | None, info: ValidationInfo) -> str | dict[str, Any] | None:
        if value is None:
            return None
        if isinstance(value, str):
            value = _found(value, info)
        try:
            read_deepspeed(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("deepspeed: ")) from None
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        problems = [*self._name_tasks(), *self._contradictions()]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    def _mixtures(self) -> Iterator[tuple[tuple[str, ...], MixtureConfig]]:
        """All mixtures with their places."""
        if self.mixture is not None:
            yield ("mixture",), self.mixture
        for name, mixture in self.compare.items():
            yield ("compare", name), mixture

    def _name_tasks(self) -> Iterator[InitErrorDetails]:
        """Give mixtures with parameters for each task the names of the data's tasks, unless they have some."""
        if self.data is None or self.data.tasks is None:
            return
        names = [task.name for task in self.data.tasks]
        for where, mixture in list(self._mixtures()):
            if not mixture.needs_tasks or mixture.tasks is not None:
                continue
            try:
                named = MixtureConfig.model_validate({**mixture.model_dump(mode="json"), "tasks": names})
            except ValidationError as error:
                for item in _as_details(error):
                    item["loc"] = (*where, *item["loc"])
                    yield item
                continue
            # Through __dict__: an ordinary assignment would validate, and so run this again.
            if where == ("mixture",):
                self.__dict__["mixture"] = named
            else:
                self.__dict__["compare"] = {**self.compare, where[1]: named}

    def _contradictions(self) -> Iterator[InitErrorDetails]:
        if self.load_in_4bit and self.load_in_8bit:
            yield problem("load_in_4bit and load_in_8bit exclude each other; set one of them to false")
        if self.quantized and self.zero_stage == 3:
            yield problem(
                "load_in_4bit and load_in_8bit do not go with ZeRO-3, which takes the base weights apart; use "
                "deepspeed: zero1"
            )
        found = dict.fromkeys(bilevel_problems(self.training, self.data, self.zero_stage))
        for where, mixture in self._mixtures():  # compared ones may share a mistake
            found |= dict.fromkeys(activation_problems(self.training, mixture, where))
            if self.data is not None:
                found |= dict.fromkeys(granularity_problems(self.data, mixture, where))
                found |= dict.fromkeys(task_problems(self.data, mixture, where))
        yield from (problem(text, *path) for path, text in found)

    @property
    def quantized(self) -> bool:
        """Whether the base weights are quantised when loaded."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def adapter(self) -> str | None:
        """`model_name_or_path` where that is a folder with a saved mixture, which training goes on with; else None."""
        name = self.model_name_or_path
        return name if name is not None and (Path(name) / ADAPTER_FILE).is_file() else None

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return 0 if self.deepspeed is None else zero_stage(read_deepspeed(self.deepspeed))

    @property
    def name(self) -> str:
        """What the first mixture is called in reports: its preset, or `mixture`."""
        preset = self.mixture.preset if self.mixture is not None else None
        return "mixture" if preset is None or preset in self.compare else preset

    def runs(self) -> dict[str, RunConfig]:
        """One config for each mixture to train: this one's first, then those of `compare`.

        A compared mixture has `output_dir/compare/NAME` as its `output_dir`.
        """
        runs = {self.name: self.model_copy(update={"compare": {}})}
        for name, mixture in self.compare.items():
            folder = str(Path(self.training.output_dir) / "compare" / name)
            training = self.training.model_copy(update={"output_dir": folder})
            runs[name] = self.model_copy(update={"compare": {}, "mixture": mixture, "training": training})
        return runs

    def to_yaml(self) -> str:
        """YAML that gives the same config again, with the values of presets and defaults written out."""
        document = self.model_dump(mode="json", exclude={"data"}, exclude_none=True)
        if self.data is not None:
            # What a task leaves out it takes over from the section, so only what was given is written.
            document["data"] = self.data.model_dump(mode="json", exclude_unset=True)
        for name, value in (("compare", {}), ("plugins", [])):
            if document[name] == value:
                del document[name]
        order = [name for name in type(self).model_fields if name in document]
        return yaml.safe_dump(_escaped({name: document[name] for name in order}), sort_keys=False, allow_unicode=True)


def _without_idle_tasks(mixture: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A compared mixture that does not go by task takes no `tasks` over from the one that it starts from."""
    if "tasks" not in mixture or "tasks" in entry:
        return mixture
    without = {name: value for name, value in mixture.items() if name != "tasks"}
    try:
        return mixture if MixtureConfig.model_validate(without).needs_tasks else without
    except ValidationError:
        return mixture  # its mistakes are reported with the other problems


def _escaped(value: Any) -> Any:
    """Protect `${`, which the reader would take for an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _found(text: str, info: ValidationInfo) -> str:
    """The path where it exists, else the text as it is (a hub id, or a name)."""
    found = _local(text, (info.context or {}).get("folder"))
    return text if found is None else str(found)


def _local(text: str, folder: Path | None) -> Path | None:
    """Where a path is: as it is, under the folder, or where we run; None where nothing is there."""
    path = Path(text).expanduser()
    if path.is_absolute() or text.startswith("~"):
        return path
    places = [base / path for base in (folder, Path.cwd()) if base is not None]
    return next((place.resolve() for place in places if place.exists()), None)


def load_run_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    needs: Iterable[str] = (),
    converts: bool = False,
) -> RunConfig:
    """Read a run's YAML, apply overrides, and check everything at once.

    Args:
        path: the YAML file; None starts from nothing, so that overrides say everything.
        overrides: `key=value` texts, as `training.max_steps=100` or `data.tasks.0.path=rows.jsonl`.
        needs: options that must be given, as `("model_name_or_path", "data")`.
        converts: the mixture splits a dense model: what it leaves out is as in `DEFAULT_CONVERSION`.

    Raises:
        ConfigError: lists every problem of all sections, one per line.
    """
    folder = Path.cwd() if path is None else Path(path).expanduser().resolve().parent
    given = apply_overrides({} if path is None else _read_yaml(Path(path).expanduser()), overrides)
    try:
        data = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(given), resolve=True))
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{path or 'overrides'}: {where}{str(error).splitlines()[0]}") from None
    _import_plugins(data.get("plugins"), folder)
    mixture = data.get("mixture")
    _find_split(mixture, folder)
    if converts and isinstance(mixture, dict | None):
        data["mixture"] = conversion_options(mixture)
    else:
        data = _over_saved_mixture(data, folder)
    problems = [
        InitErrorDetails(type=PydanticCustomError("needed", "missing; this command needs it"), loc=(name,), input=None)
        for name in needs
        if data.get(name) is None
    ]
    try:
        config = RunConfig.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        problems += _without_repeats(_as_details(error))
    if problems:
        everything = ValidationError.from_exception_data("RunConfig", problems)
        raise config_error(everything, "overrides" if path is None else str(path))
    sections: tuple[tuple[str, DataConfig | CalibrationConfig | None], ...] = (
        ("data", config.data),
        ("calibration", config.calibration),
    )
    found = {name: section.resolve(folder) for name, section in sections if section is not None}
    return config.model_copy(update=found)


def _over_saved_mixture(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Where `model_name_or_path` is the folder of a mixture, the mixtures of the config are changes of that one.

    Raises:
        ConfigError: a change that does not fit.
        AdapterError: the folder's files are damaged.
    """
    name = data.get("model_name_or_path")
    saved = _local(name, folder) if isinstance(name, str) else None
    if saved is None or not (saved / ADAPTER_FILE).is_file():
        return data
    before, _ = read_adapter_config(saved)
    given, compare = data.get("mixture"), data.get("compare")
    if not isinstance(given, dict | None) or not isinstance(compare, dict | None):
        return data  # the wrong type is reported with the other problems
    mixture = changed_mixture(before, given or {})
    compared = {
        key: changed_mixture(mixture, entry).model_dump(mode="json") if isinstance(entry, dict) else entry
        for key, entry in (compare or {}).items()
    }
    return {**data, "mixture": mixture.model_dump(mode="json"), **({"compare": compared} if compared else {})}


def _without_repeats(problems: list[InitErrorDetails]) -> list[InitErrorDetails]:
    """Leave out what an entry of `compare` only took over from `mixture`."""
    known = {(item["loc"][1:], str(item["type"])) for item in problems if item["loc"][:1] == ("mixture",)}
    return [
        item
        for item in problems
        if item["loc"][:1] != ("compare",) or (item["loc"][2:], str(item["type"])) not in known
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        node = OmegaConf.load(path)
    except (FileNotFoundError, IsADirectoryError):
        nearby = sorted(item.name for pattern in ("*.yaml", "*.yml") for item in path.parent.glob(pattern))
        hint = closest(path.name, nearby) if nearby else "."
        raise ConfigError(f"{path}: no such file{hint}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    data = OmegaConf.to_container(node, resolve=False)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: needs options as `name: value` at the top")
    return {str(key): value for key, value in data.items()}


def _find_split(mixture: Any, folder: Path) -> None:
    """Index lists of a `file` split start where every path does."""
    expert = mixture.get("expert") if isinstance(mixture, dict) else None
    split = expert.get("split") if isinstance(expert, dict) else None
    if isinstance(split, dict) and isinstance(split.get("path"), str) and (folder / split["path"]).exists():
        split["path"] = str((folder / split["path"]).resolve())


def _import_plugins(modules: Any, folder: Path) -> None:
    """Import the plugins; they may lie beside the config or where the command runs."""
    if not modules or not isinstance(modules, list):  # a wrong type is reported with the other problems
        return
    for place in (str(folder), str(Path.cwd())):
        if place not in sys.path:
            sys.path.append(place)
    load_plugins([str(module) for module in modules])
