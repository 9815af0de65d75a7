"""Values that may differ from layer to layer: one value, a list, or a map of patterns.

`num_experts: 8`, `num_experts: [2, 4, 6, 8]` (one per layer) or `num_experts: {default: 8, "layers.0.*": 2}`.
Pattern keys are regular expressions that must match the end of the module's name, as peft's `rank_pattern`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema

from moadapt.errors import ConfigError


@dataclass(frozen=True)
class Site:
    """Where an adapter sits.

    Attributes:
        name: the module's name in the base model, as `model.layers.3.self_attn.q_proj`.
        layer: index of the transformer layer that contains it, or None outside of all layers.
        num_layers: how many layers its stack has.
    """

    name: str
    layer: int | None
    num_layers: int


class PerLayer:
    """Marks a config field that `at_site` resolves."""


def _integer(value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        kind = "a positive integer" if minimum == 1 else "an integer from 0 up"
        raise ValueError(f"must be {kind}, not {value!r}")
    return value


def _validate(value: Any, minimum: int = 1) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError("the list of values per layer is empty")
        return [_integer(item, minimum) for item in value]
    if isinstance(value, dict):
        for pattern in value:
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        return {str(pattern): _integer(item, minimum) for pattern, item in value.items()}
    try:
        return _integer(value, minimum)
    except ValueError as error:
        raise ValueError(f"{error} (or a list with one value per layer, or a map of patterns to values)") from None


def _schema(minimum: int) -> dict[str, Any]:
    number = {"type": "integer", "minimum": minimum}
    several: dict[str, Any] = {"type": "array", "items": number, "minItems": 1}
    return {"anyOf": [number, several, {"type": "object", "additionalProperties": number}]}


_SCHEMA = _schema(1)
PerLayerInt: TypeAlias = Annotated[
    int | list[int] | dict[str, int],
    BeforeValidator(_validate),
    WithJsonSchema(_SCHEMA),
    PerLayer(),
]


PerLayerCount: TypeAlias = Annotated[
    int | list[int] | dict[str, int],
    BeforeValidator(lambda value: _validate(value, 0)),
    WithJsonSchema(_schema(0)),
    PerLayer(),
]
"""As `PerLayerInt`, 0 included."""


OptionalPerLayerInt: TypeAlias = Annotated[
    int | list[int] | dict[str, int] | None,
    BeforeValidator(lambda value: None if value is None else _validate(value)),
    WithJsonSchema({"anyOf": [*_SCHEMA["anyOf"], {"type": "null"}]}),
    PerLayer(),
]


def map_values(value: int | list[int] | dict[str, int], function: Callable[[int], int]) -> Any:
    """The same shape of value with `function` applied to every integer in it."""
    if isinstance(value, list):
        return [function(item) for item in value]
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    return function(value)


def value_at(option: str, value: int | list[int] | dict[str, int], site: Site) -> int:
    """The value of a per-layer option at one site.

    Raises:
        ConfigError: a list of the wrong length or for a module outside of the layers; a map without a match.
    """
    if isinstance(value, list):
        if site.layer is None:
            raise ConfigError(f"{option}: a list has one value per layer, but {site.name} is in no layer; use a map")
        if len(value) != site.num_layers:
            raise ConfigError(
                f"{option}: {len(value)} values for {site.num_layers} layers ({site.name}); give one value per layer"
            )
        return value[site.layer]
    if isinstance(value, dict):
        for pattern, item in value.items():
            if pattern != "default" and re.match(rf"(.*\.)?({pattern})$", site.name):
                return item
        if "default" not in value:
            raise ConfigError(f"{option}: no pattern matches {site.name}; add one, or a `default`")
        return value["default"]
    return value
