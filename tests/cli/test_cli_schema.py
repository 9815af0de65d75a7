"""The JSON Schema against the shipped configs and against mistakes, with a small validator of its own."""

from __future__ import annotations

import json
import re
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import invoke
from omegaconf import OmegaConf

from moadapt.registry import EXPERTS, LOSSES, ROUTERS, SPLITS
from moadapt.run_config import RunConfig
from moadapt.schema import json_schema, option_docs

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_KNOWN = {
    "$defs", "$ref", "$schema", "additionalProperties", "allOf", "anyOf", "const", "default", "description", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "items", "maximum", "minItems", "minLength", "minimum", "not", "oneOf",
    "properties", "required", "title", "type",
}  # fmt: skip


def errors(value: Any, schema: Any, root: dict[str, Any], at: str = "") -> list[str]:
    """What the value breaks; knows the keywords that occur in the schema, and no others."""
    if schema is True:
        return []
    assert set(schema) <= _KNOWN, set(schema) - _KNOWN
    if "$ref" in schema:
        return errors(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    found: list[str] = []
    if "type" in schema:
        right = isinstance(value, _TYPES[schema["type"]])
        if not right or (isinstance(value, bool) and schema["type"] in ("integer", "number")):
            return [f"{at}: not of type {schema['type']}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{at}: not {schema['const']!r}")
    if "enum" in schema and not any(type(value) is type(item) and value == item for item in schema["enum"]):
        found.append(f"{at}: not one of {schema['enum']}")
    if isinstance(value, (int, float)):
        limits = {"minimum": ge, "maximum": le, "exclusiveMinimum": gt, "exclusiveMaximum": lt}
        found += [f"{at}: {key}" for key, holds in limits.items() if key in schema and not holds(value, schema[key])]
    if isinstance(value, (str, list)) and len(value) < schema.get("minLength", schema.get("minItems", 0)):
        found.append(f"{at}: too short")
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += errors(item, schema.get("items", True), root, f"{at}.{index}")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key, item in value.items():
            rest = schema.get("additionalProperties", True)
            if key in properties:
                found += errors(item, properties[key], root, f"{at}.{key}")
            elif rest is False:
                found.append(f"{at}.{key}: unknown")
            else:
                found += errors(item, rest, root, f"{at}.{key}")
        found += [f"{at}: no {key}" for key in schema.get("required", []) if key not in value]
    for part in schema.get("allOf", []):
        found += errors(value, part, root, at)
    if "not" in schema and not errors(value, schema["not"], root, at):
        found.append(f"{at}: matches what it must not")
    for keyword, wanted in (("anyOf", None), ("oneOf", 1)):
        if keyword in schema:
            each = [errors(value, part, root, at) for part in schema[keyword]]
            matching = sum(not problems for problems in each)
            if matching == 0 or (wanted is not None and matching != wanted):
                found.append(f"{at}: {matching} of {keyword} match: {each}")
    return found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    result = invoke("config-schema")
    assert result.exit_code == 0
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_validate(path: Path, schema: dict[str, Any]) -> None:
    document = OmegaConf.to_container(OmegaConf.load(path))
    assert errors(document, schema, schema) == []


VALID = """
mixture:
  preset: malora
  num_experts: {default: 8, "layers.0.*": 2}
  expert: {r: [4, 8]}
  router: softmax
  losses: [{kind: importance, coef: 0.1}, router_z]
training: {report_to: none, learning_rate: 0.001, eval_strategy: "no"}
deepspeed: zero2
"""


@pytest.mark.parametrize(
    ("override", "place"),
    [
        (None, None),
        ("mixture.expert={kind: malora, r: 4, shared_r: 8, beta: 1.25}", None),
        ("mixture.expert={kind: ffn_partition, split: {kind: kmeans, rows: up}, lora: {r: 4}}", None),
        ("mixture.expert={kind: ffn_partition, split: random}", None),
        ("calibration={path: a.txt, max_tokens: 100}", None),
        ("mixture.expert={kind: ffn_partition, split: {kind: nope}}", ".mixture"),
        ("mixture.expert={kind: ffn_partition, split: {rows: up}}", ".mixture"),
        ("mixture.expert={kind: ffn_partition, split: {kind: random, rows: up}}", ".mixture"),
        ("calibration={max_tokens: 100}", ".calibration"),
        ("mixture.expert.kind=nope", ".mixture"),
        ("mixture.expert={kind: lora, shared_r: 8}", ".mixture"),  # an option of another kind
        ("mixture.router.scope=everywhere", ".mixture"),
        ("mixture.losses.0.coef=-1", ".mixture"),
        ("mixture.num_experts=0", ".mixture"),
        ("mixture.preset=molorra", ".mixture"),
        ("training.max_step=3", ".training.max_step"),
        ("training.learning_rate=fast", ".training.learning_rate"),
        ("data={tasks: [{name: a}]}", ".data"),  # no path
        ("dtype=int8", ".dtype"),
        ("training=3", ".training"),
    ],
)
def test_schema_tells_right_from_wrong(override: str | None, place: str | None, schema: dict[str, Any]) -> None:
    from moadapt.overrides import apply_overrides

    document = yaml.safe_load(VALID)
    if override is not None:
        if override.startswith("mixture.router."):
            document["mixture"]["router"] = {"kind": "top_k"}
        document = apply_overrides(document, [override])
    found = errors(document, schema, schema)
    if place is None:
        assert found == []
    else:
        assert found
        assert all(problem.startswith(place) for problem in found)


def test_every_registered_kind_is_an_alternative(schema: dict[str, Any]) -> None:
    properties = schema["$defs"]["MixtureConfig"]["properties"]
    for registry, place in ((EXPERTS, properties["expert"]), (ROUTERS, properties["router"])):
        assert {part["title"] for part in place["oneOf"]} >= set(registry.names())
    assert {part["title"] for part in properties["losses"]["items"]["oneOf"]} >= set(LOSSES.names())
    titled = {part["title"]: part for part in properties["expert"]["oneOf"]}
    split = titled["ffn_partition"]["allOf"][0]["properties"]["split"]
    assert {part["title"] for part in split["oneOf"]} >= set(SPLITS.names())


def test_a_kind_registered_from_outside_is_in_the_schema() -> None:
    from typing import Literal

    from moadapt.experts.lora import LoraBank, LoraExpertConfig

    class OutsideConfig(LoraExpertConfig):
        """Options of a kind from outside.

        Attributes:
            strength: how much of it.
        """

        kind: Literal["outside"] = "outside"  # type: ignore[assignment]
        strength: float = 1.0

    EXPERTS.register("outside", OutsideConfig)(type("OutsideBank", (LoraBank,), {}))
    try:
        schema = json_schema()
        document = {"mixture": {"expert": {"kind": "outside", "strength": 2.0, "r": 4}}}
        assert errors(document, schema, schema) == []
        assert "how much of it" in json.dumps(schema)
    finally:
        EXPERTS._kinds.pop("outside")


def test_options_are_described(schema: dict[str, Any]) -> None:
    for name in ("MixtureConfig", "TrainingConfig"):
        for option, place in schema["$defs"][name]["properties"].items():
            assert place.get("description"), f"{name}.{option}"
    for option, place in schema["properties"].items():
        assert place.get("description"), option
    docs = option_docs(type(RunConfig().training))
    assert docs["adam_beta1"] == docs["adam_beta2"]
    assert not any(re.search(r"\s{2}|\n", text) for text in docs.values())


def test_schema_is_written_to_a_file(tmp_path: Path, schema: dict[str, Any]) -> None:
    result = invoke("config-schema", "--output", tmp_path / "deep" / "schema.json")
    assert result.exit_code == 0
    assert json.loads((tmp_path / "deep" / "schema.json").read_text()) == schema
