"""The JSON Schema of the routing document; its descriptions are the documentation of the fields."""

from __future__ import annotations

from typing import Any

SCHEMA_VERSION = 1
Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": ["number", "null"]}
_SHARE: Schema = {"type": ["number", "null"], "description": "0 to 1, but for rounding"}
_CHANCE: Schema = {"type": ["number", "null"], "minimum": 0, "maximum": 1}


def _list(items: Schema, text: str = "") -> Schema:
    return _about({"type": "array", "items": items}, text)


def _object(properties: dict[str, Schema], text: str = "") -> Schema:
    """All properties are there, and no others."""
    closed = {"type": "object", "required": list(properties), "additionalProperties": False}
    return _about({**closed, "properties": properties}, text)


def _map(values: Schema, text: str = "") -> Schema:
    return _about({"type": "object", "additionalProperties": values}, text)


def _or_null(schema: Schema) -> Schema:
    about = {"description": schema["description"]} if "description" in schema else {}
    return {**about, "anyOf": [{key: value for key, value in schema.items() if key != "description"}, {"type": "null"}]}


def _about(schema: Schema, text: str) -> Schema:
    return {**schema, "description": text} if text else dict(schema)


def _choice(*values: Any, text: str = "") -> Schema:
    return _about({"enum": list(values)}, text)


def _model() -> Schema:
    parts = {
        "adapter": "the folder or hub id; null for a model of transformers",
        "base": "its base model",
        "preset": "the preset that its config started from",
        "expert": "kind of the experts",
        "router": "kind of the routers",
        "granularity": "what the routers decide about",
        "scope": "what one router rules",
        "expert_unit": "bank or module",
    }
    return _object({name: _about({"type": ["string", "null"]}, text) for name, text in parts.items()}, "what was run")


def _data() -> Schema:
    task = {"name": _STRING, "sequences": _WHOLE, "tokens": _WHOLE}
    whole_or_null = {"type": ["integer", "null"], "minimum": 0}
    return _object(
        {
            "tasks": _list(_object(task), "empty where the data names no tasks"),
            "tokens": _about(whole_or_null, "real tokens, padding aside"),
            "sequences": whole_or_null,
            "generated_tokens": _about(whole_or_null, "decoded tokens, with --generate"),
        },
        "what it was run on",
    )


def _summary() -> Schema:
    return _object(
        {
            "num_routers": _WHOLE,
            "num_experts": _about(_WHOLE, "of all routers together"),
            "dead_experts": _WHOLE,
            "mean_max_violation": _about(_NUMBER, "over routers with two experts or more, as all means here"),
            "mean_normalised_entropy": _SHARE,
            "task_information": _about(_SHARE, "mean of by_task.information"),
            "task_information_p": _about(_CHANCE, "that no router goes by task: the least p after Benjamini-Hochberg"),
        }
    )


def _measures() -> Schema:
    return _object(
        {
            "max_violation": _about(_NUMBER, "largest load over the mean load, less 1"),
            "mean_violation": _about(_NUMBER, "the same of single passes, averaged"),
            "cv": _about(_NUMBER, "coefficient of variation of the load"),
            "gini": _SHARE,
            "effective_experts": _about(_NUMBER, "exp of the entropy of the load"),
            "dead": _list(_WHOLE, "indices of experts that are selected in less than 0.01 / N of the rows"),
            "entropy": _about(_NUMBER, "mean over rows of H(p), in nats"),
            "entropy_deviation": _about(_NUMBER, "its standard deviation over rows"),
            "normalised_entropy": _about(_SHARE, "entropy over ln N"),
            "mi_token_expert": _about(_NUMBER, "H(mean p) - mean H(p), in nats"),
            "experts_per_row": _about(_NUMBER, "mean number of selected experts"),
            "active_histogram": _list(_WHOLE, "[N + 1] rows by the number of their experts"),
            "entropy_histogram": _list(_WHOLE, "[32] rows by H(p), in equal bins from 0 to ln N"),
        },
        "as docs/statistics.md defines them",
    )


def _by_task() -> Schema:
    return _object(
        {
            "tasks": _list(_STRING, "those that have rows"),
            "share": _list(_list(_SHARE), "[L][N] P(expert | task)"),
            "significant": _list(_list({"type": "boolean"}), "[L][N] differs from the other tasks, q <= 0.05"),
            "difference": _list(
                _list({"type": ["number", "null"]}),
                "[L][N] mean share in the task's sequences minus that in the others'; null without a test",
            ),
            "information": _about(_SHARE, "I(task; expert) over the smaller entropy; of at most 4096 sequences"),
            "baseline": _about(_SHARE, "the same with permuted tasks; null without a test"),
            "p": _about(_CHANCE, "of the permutation test; null without one"),
        },
        "null where the data names no tasks",
    )


def _router() -> Schema:
    by_part = {name: _or_null(_list(_SHARE)) for name in ("prompt", "answer")}
    by_phase = {name: _or_null(_list(_SHARE)) for name in ("prefill", "decode")}
    token = {"id": _WHOLE, "text": {"type": ["string", "null"]}, "share": _SHARE, "occurrences": _WHOLE}
    vocabulary = {
        "specialisation": _about(_SHARE, "mean share of the most frequent expert of a token"),
        "tokens": _list(_list(_object(token)), "[N] lists of the tokens that an expert takes most of"),
    }
    whole4 = _list(_list(_list(_list(_WHOLE))))
    counts = {
        "tasks": _list(_STRING, "all of them, also those without rows; `all` where the data names none"),
        "rows": _list(_list(_list(_WHOLE)), "[L][part][phase]"),
        "selections": _about(whole4, "[L][part][phase][N] rows that selected the expert"),
        "weights": _list(_list(_list(_list(_NUMBER))), "[L][part][phase][N] sums of gate weights"),
        "top": _list(_list(_WHOLE), "[L][N] rows by the expert with the largest weight"),
        "pairs": _list(_list(_WHOLE), "[N][N] rows that selected both"),
    }
    load = {
        "of": _choice("selections", "weights", text="weights where every row selects every expert"),
        "share": _list(_SHARE, "[N]"),
        "low": _list(_SHARE, "[N] ends of the 95 % interval; null for shares of weights"),
        "high": _list(_SHARE),
    }
    return _object(
        {
            "name": _STRING,
            "layer": {"type": ["integer", "null"], "minimum": 0},
            "module": _about(_STRING, "what it rules inside the layer; empty for the whole of it"),
            "experts": _list(_STRING, "their names"),
            "granularity": _choice("token", "prompt", "task"),
            "rows": _about(_WHOLE, "real tokens, or decisions about prompts or sequences"),
            "load": _object(load),
            "measures": _measures(),
            "by_task": _or_null(_by_task()),
            "task_distance": _or_null(_list(_list(_SHARE), "[L][L] Jensen-Shannon distances; null for one task")),
            "by_part": _object(by_part, "shares; null where there are no rows"),
            "by_phase": _object(by_phase, "shares; null where there are no rows"),
            "coactivation": _list(_list(_SHARE), "[N][N] P(j selected | i selected)"),
            "vocabulary": _or_null(_object(vocabulary, "with --vocabulary")),
            "counts": _object(counts, "exact counts; part: prompt, answer; phase: prefill, decode"),
        }
    )


def _text() -> Schema:
    pair = {"type": "array", "prefixItems": [_WHOLE, {"type": "number"}], "minItems": 2, "maxItems": 2}
    return _object(
        {
            "task": _STRING,
            "tokens": _list(_STRING, "[T] pieces of text"),
            "part": _list(_choice(0, 1), "[T] 0 prompt, 1 answer"),
            "start": _about(_WHOLE, "how many tokens before these were cut"),
            "total": _about(_WHOLE, "tokens of the whole text"),
            "routers": _map(_object({"all": _list(_list(pair), "[T] lists of (expert, gate weight)")}), "by router"),
        }
    )


def _compare() -> Schema:
    side = {
        "max_violation": _NUMBER,
        "normalised_entropy": _SHARE,
        "dead": _WHOLE,
        "task_information": _SHARE,
        "p": _CHANCE,
    }
    router = {
        "name": _STRING,
        "layer": {"type": ["integer", "null"], "minimum": 0},
        "module": _STRING,
        "load_distance": _about(_SHARE, "Jensen-Shannon distance of the loads; null for other numbers of experts"),
        "first": _object(side),
        "second": _object(side),
        "saturation": _about(_SHARE, "part of the second's selections that the first made for the same rows"),
        "chance_saturation": _about(_SHARE, "the same for independent selections with these loads"),
        "saturation_rows": _about({"type": ["integer", "null"], "minimum": 0}, "over so many rows"),
    }
    return _object(
        {
            "other": _model(),
            "other_title": _STRING,
            "other_summary": _summary(),
            "routers": _list(_object(router), "routers that both have"),
            "only_first": _list(_STRING, "routers that only this one has"),
            "only_second": _list(_STRING, "routers that only the other one has"),
        },
        "with --compare: this model (first) beside another (second)",
    )


def routing_schema() -> Schema:
    """The JSON Schema (2020-12) of `routing.json`."""
    verdict = {
        "level": _choice("ok", "note", "warning"),
        "router": _about({"type": ["string", "null"]}, "null: about all of them"),
        "measure": _STRING,
        "value": _NUMBER,
        "text": _STRING,
    }
    flow = {
        "from": _STRING,
        "to": _STRING,
        "share": _list(_list(_SHARE), "[N][N'] P(top expert of the later | of the earlier)"),
        "information": _about(_SHARE, "mutual information over the smaller entropy"),
        "rows": _list(_list(_WHOLE), "[N][N'] counts"),
    }
    step = _map({"anyOf": [_WHOLE, _map(_NUMBER)]}, "`step`, and by router its measures")
    whole = _object(
        {
            "schema_version": {"const": SCHEMA_VERSION},
            "title": _STRING,
            "created_by": _STRING,
            "model": _model(),
            "data": _data(),
            "summary": _summary(),
            "verdicts": _list(_object(verdict), "the worst first"),
            "routers": _list(_router()),
            "flow": _list(_object(flow), "between routers of the same module in consecutive layers"),
            "training": _or_null(_list({**step, "required": ["step"]}, "what the run logged")),
            "similarity": _or_null(_map(_list(_list(_NUMBER)), "by router, [N][N] cosines of the experts' deltas")),
            "text": _list(_text(), "texts with the gates of their tokens"),
        }
    )
    whole["properties"]["compare"] = _compare()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "routing.json",
        "description": "What the routers of a model did, as moadapt inspect writes it.",
        **whole,
    }
