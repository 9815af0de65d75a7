"""A small checker of JSON Schemas, for the words that moadapt's own schemas use."""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    *("$schema", "title", "description", "type", "properties", "required", "additionalProperties", "items"),
    *("prefixItems", "minItems", "maxItems", "minimum", "maximum", "enum", "const", "anyOf"),
}


def mistakes(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Where a value does not have the shape of a schema; empty where it does."""
    assert set(schema) <= _KNOWN, f"the checker does not know {set(schema) - _KNOWN}"
    found: list[str] = []
    if "anyOf" in schema and all(mistakes(value, option, where) for option in schema["anyOf"]):
        found.append(
            f"{where}: none of the shapes: {min((mistakes(value, o, where) for o in schema['anyOf']), key=len)}"
        )
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{where}: {value!r} is not {schema['const']}")
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [kind for kind in kinds if isinstance(value, _TYPES[kind])]
    if isinstance(value, bool):
        fits = [kind for kind in fits if kind == "boolean"]
    if not fits:
        return [*found, f"{where}: {type(value).__name__} is no {' or '.join(kinds)}"]
    bounded = isinstance(value, (int, float)) and not isinstance(value, bool)
    if bounded and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{where}: {value} is out of bounds")
    if isinstance(value, dict):
        found += _of_object(value, schema, where)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{where}: {len(value)} items")
        first = schema.get("prefixItems", [])
        for place, item in enumerate(value):
            shape = first[place] if place < len(first) else schema.get("items", {})
            found += mistakes(item, shape, f"{where}[{place}]")
    return found


def _of_object(value: dict[str, Any], schema: dict[str, Any], where: str) -> list[str]:
    found = [f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value]
    others = schema.get("additionalProperties", {})
    for name, item in value.items():
        shape = schema.get("properties", {}).get(name, others)
        found += [f"{where}: {name} is unknown"] if shape is False else mistakes(item, shape, f"{where}.{name}")
    return found
