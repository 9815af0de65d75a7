"""Tables of kinds: experts, routers, losses, splits. One name, one config class, one class.

A new kind in this project is one file and one `@TABLE.register` line. A third party does the same in its own
package, and declares an entry point in the group `moadapt.plugins` (loaded when an unknown name is looked up)
or lists the module under `plugins:` in a run's YAML.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic import ConfigDict as PydanticConfigDict
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError, core_schema
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.per_layer import PerLayer, Site, value_at

T = TypeVar("T")


def closest(name: str, valid: list[str]) -> str:
    """`; did you mean 'x'?` when one of the valid names is close, else a full stop."""
    found = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {found[0]!r}?" if found else "."


class Config(BaseModel):
    """Base of every config: unknown options are refused with the list of the valid ones, all errors at once."""

    model_config = PydanticConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_options(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(data, dict):
            return handler(data)
        valid = [info.alias or name for name, info in cls.model_fields.items()]
        unknown = [key for key in data if key not in valid and key not in cls.model_fields]
        problems: list[InitErrorDetails] = []
        for key in unknown:
            text = f"unknown option{closest(str(key), valid)} Valid options: {', '.join(valid)}"
            problems.append(problem(text, str(key), value=data[key]))
        try:
            result = handler({key: value for key, value in data.items() if key not in unknown})
        except ValidationError as error:
            problems.extend(_as_details(error))
            raise ValidationError.from_exception_data(cls.__name__, problems) from None
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return result


def problem(text: str, *path: str | int, value: Any = None) -> InitErrorDetails:
    """One line of a `pydantic.ValidationError`: where, and what is wrong there."""
    return InitErrorDetails(type=PydanticCustomError("problem", "{text}", {"text": text}), loc=path, input=value)


def _as_details(error: ValidationError) -> list[InitErrorDetails]:
    details = []
    for item in error.errors(include_url=False, include_context=False):
        text = item["msg"].removeprefix("Value error, ")
        kind = PydanticCustomError(item["type"], "{text}", {"text": text})  # type: ignore[arg-type]
        details.append(InitErrorDetails(type=kind, loc=item["loc"], input=item["input"]))
    return details


def config_error(error: ValidationError, source: str = "") -> ConfigError:
    """A `ConfigError` with one line for every problem: path, reason, and the value where it helps."""
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        path = "".join(f"{part}." for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        value = item["input"]
        shown = f" (got {value!r})" if isinstance(value, (str, int, float, bool)) and item["type"] != "missing" else ""
        lines.append(f"  {path[:-1]}: {text}{shown}" if path else f"  {text}{shown}")
    head = f"{source}: " if source else ""
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration"
    return ConfigError(f"{head}{count}\n" + "\n".join(lines))


class KindConfig(Config):
    """Base of the configs in a table of kinds; `kind` is the name in the table."""

    kind: str

    def at_site(self, site: Site, option_prefix: str) -> Self:
        """A copy in which every per-layer value is the one value for `site`.

        Raises:
            ConfigError: a per-layer value that has no entry for this site.
        """
        per_layer = {
            name: value_at(f"{option_prefix}.{name}", getattr(self, name), site)
            for name, info in type(self).model_fields.items()
            if any(isinstance(mark, PerLayer) for mark in info.metadata) and getattr(self, name) is not None
        }
        return self.model_copy(update=per_layer)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One row of a table: the name, the pydantic config class and the class that it configures."""

    name: str
    config: type[KindConfig]
    cls: type[T]


class Registry(Generic[T]):
    """A table of kinds.

    Args:
        what: the singular word for error messages, as "router".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._kinds: dict[str, Kind[T]] = {}

    def register(self, name: str, config: type[KindConfig]) -> Callable[[type[T]], type[T]]:
        """Class decorator that adds a kind.

        Raises:
            ConfigError: the name is taken by another class.
        """

        def add(cls: type[T]) -> type[T]:
            taken = self._kinds.get(name)
            if taken is not None and taken.cls.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{self.what} kind {name!r} is already registered by {taken.cls.__module__}")
            self._kinds[name] = Kind(name, config, cls)
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._kinds)

    def get(self, name: str) -> Kind[T]:
        """The kind of that name.

        Raises:
            ConfigError: no such kind, here or in an installed plugin; lists the valid names.
        """
        if name not in self._kinds:
            load_plugins()
        if name not in self._kinds:
            raise ConfigError(self._unknown(name))
        return self._kinds[name]

    def _unknown(self, name: Any) -> str:
        names = self.names()
        return f"unknown {self.what} kind {name!r}{closest(str(name), names)} Valid kinds: {', '.join(names)}"

    def parse(self, data: Any) -> KindConfig:
        """The config of the kind that `data["kind"]` names (or an instance, returned as it is).

        Raises:
            pydantic.ValidationError: so that an enclosing config reports it with its path.
        """
        if isinstance(data, KindConfig):
            return data
        if isinstance(data, str):
            data = {"kind": data}
        if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
            raise ValueError(f"needs a mapping with `kind`. Valid kinds: {', '.join(self.names())}")
        try:
            kind = self.get(data["kind"])
        except ConfigError as error:
            raise _at("kind", str(error), data["kind"]) from None
        return kind.config.model_validate(data)

    def build(self, config: KindConfig, *args: Any, **kwargs: Any) -> T:
        """Instantiate the class of the config's kind as `cls(config, *args, **kwargs)`."""
        return self.get(config.kind).cls(config, *args, **kwargs)  # type: ignore[call-arg]


def _at(loc: str, text: str, value: Any) -> ValidationError:
    return ValidationError.from_exception_data("kind", [problem(text, loc, value=value)])


class OfKind:
    """Annotation for a field that holds the config of any registered kind: `Annotated[KindConfig, OfKind(EXPERTS)]`."""

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.registry.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.model_dump(mode="json")),
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        kinds = [self.registry.get(name).config for name in self.registry.names()]
        return {"oneOf": [handler(config.__pydantic_core_schema__) for config in kinds]}


_plugins_loaded = False


def load_plugins(modules: list[str] | None = None) -> None:
    """Import the modules given by name, and once per process every installed `moadapt.plugins` entry point.

    Raises:
        ConfigError: a module given by name cannot be imported.
    """
    global _plugins_loaded
    for module in modules or []:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"plugins: cannot import {module!r}: {error}") from error
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in entry_points(group="moadapt.plugins"):
            point.load()


EXPERTS: Registry[Any] = Registry("expert")
ROUTERS: Registry[Any] = Registry("router")
LOSSES: Registry[Any] = Registry("loss")
SPLITS: Registry[Any] = Registry("split")
