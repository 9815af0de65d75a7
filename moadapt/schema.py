"""JSON Schema of a run's config, for editors, and one-line descriptions of options from docstrings."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel

from moadapt.presets import PRESETS
from moadapt.registry import EXPERTS, LOSSES, ROUTERS, SPLITS, KindConfig, OfKind, Registry
from moadapt.run_config import RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TABLES: tuple[Registry[Any], ...] = (EXPERTS, ROUTERS, LOSSES, SPLITS)
_ENTRY = re.compile(r"^ {4}(\w[\w, ]*): (.*)$")


def summary(cls: type) -> str:
    """The first sentence of a class's docstring, on one line, without its full stop."""
    paragraph = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"\.(?=\s+[A-Z]|\s*$)", paragraph)[0]


def option_docs(config: type[BaseModel]) -> dict[str, str]:
    """Descriptions of a config's options: from `Field(description=...)`, else from the docstring's `Attributes`.

    Options of a base class are described in the base class.
    """
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if cls.__doc__ and "__doc__" in vars(cls):
            docs |= _attributes(cls.__doc__)
    docs |= {name: info.description for name, info in config.model_fields.items() if info.description}
    return {name: docs[name] for name in config.model_fields if name in docs}


def _attributes(docstring: str) -> dict[str, str]:
    """The `Attributes:` section of a Google docstring: name to text. `a, b: text` describes both."""
    _, found, section = inspect.cleandoc(docstring).partition("\nAttributes:\n")
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines() if found else []:
        if line and not line.startswith(" "):
            break
        entry = _ENTRY.match(line)
        if entry:
            names = [name.strip() for name in entry[1].split(",")]
            docs |= dict.fromkeys(names, entry[2])
        else:
            for name in names:
                docs[name] += f" {line.strip()}" if line.strip() else ""
    return docs


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `RunConfig`, with every registered kind as a `oneOf`."""
    schema = RunConfig.model_json_schema()
    roots: list[type[BaseModel]] = [RunConfig]
    roots += [registry.get(name).config for registry in _TABLES for name in registry.names()]
    configs = {cls.__name__: cls for root in roots for cls in _config_classes(root)}
    _describe(schema, configs)
    tables: list[tuple[str, Registry[Any], bool]] = [
        ("expert", EXPERTS, True),
        ("router", ROUTERS, True),
        ("losses", LOSSES, False),
    ]
    properties = schema["$defs"]["MixtureConfig"]["properties"]
    _nested_kinds(schema, configs)
    for option, registry, has_preset in tables:
        place = properties[option] if option != "losses" else properties[option]["items"]
        place["oneOf"] = _kinds(place["oneOf"], registry, has_preset)
        place.pop("default", None)
    properties["preset"] = {**properties["preset"], "anyOf": [{"enum": list(PRESETS)}, {"type": "null"}]}
    report_to = schema["$defs"]["TrainingConfig"]["properties"]["report_to"]
    report_to["anyOf"] = [{"type": report_to.pop("type"), "items": report_to.pop("items")}, {"type": "string"}]
    return {"$schema": DIALECT, "title": "moadapt run", **{key: schema[key] for key in schema if key != "title"}}


def _nested_kinds(node: Any, configs: dict[str, type[BaseModel]]) -> None:
    """Tables of kinds inside the options of a kind, as `expert.split`."""
    if isinstance(node, list):
        for item in node:
            _nested_kinds(item, configs)
    elif isinstance(node, dict):
        cls = configs.get(str(node.get("title")))
        if cls is not None and issubclass(cls, KindConfig) and "properties" in node:
            for name, info in cls.model_fields.items():
                table = next((mark.registry for mark in info.metadata if isinstance(mark, OfKind)), None)
                if table is not None:
                    place = node["properties"][name]
                    place["oneOf"] = _kinds(place["oneOf"], table, False)
                    place.pop("default", None)
        for item in list(node.values()):
            _nested_kinds(item, configs)


def _kinds(variants: list[dict[str, Any]], registry: Registry[Any], has_preset: bool) -> list[dict[str, Any]]:
    """The kinds, each recognised by its `kind`; the bare name; and options alone, over those of a preset."""
    wrapped: list[dict[str, Any]] = [
        {"title": name, "allOf": [variant], "required": ["kind"]}
        for name, variant in zip(registry.names(), variants, strict=True)
    ]
    wrapped.append({"title": "a kind with its defaults", "enum": registry.names()})
    if has_preset:
        wrapped.append({"title": "options over a preset's", "type": "object", "not": {"required": ["kind"]}})
    return wrapped


def _config_classes(config: type[BaseModel]) -> list[type[BaseModel]]:
    """A config class and the ones in its fields' annotations."""
    found, todo = [], [config]
    while todo:
        cls = todo.pop()
        if cls in found:
            continue
        found.append(cls)
        for info in cls.model_fields.values():
            todo += _classes_in(info.annotation)
    return found


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [cls for part in getattr(annotation, "__args__", ()) for cls in _classes_in(part)]


def _describe(node: Any, configs: dict[str, type[BaseModel]]) -> None:
    """Put the options' descriptions into every object schema that a config class made."""
    if isinstance(node, list):
        for item in node:
            _describe(item, configs)
        return
    if not isinstance(node, dict):
        return
    cls = configs.get(str(node.get("title")))
    if cls is not None and "properties" in node:
        node["description"] = summary(cls)
        for name, text in option_docs(cls).items():
            node["properties"][name].setdefault("description", text)
        for option in node["properties"].values():
            option.pop("title", None)  # the option's name again
    for item in node.values():
        _describe(item, configs)
