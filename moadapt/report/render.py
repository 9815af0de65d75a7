"""The routing document (routing.json) as one HTML page that opens offline.

The page's parts lie in `assets/`: a template, a style sheet and a few scripts, which are joined into one file together
with the document. Nothing is fetched, and a content security policy in the page forbids it: only the page's own style
and script, named by their hashes, may run. Text from outside (names, tokens) reaches the page as JSON in a data block
and is written as text, never as markup.

Sizes: everything but the texts is kept whole as long as it fits; texts are cut around the start of their answers to
what is left of `max_bytes`. The page says what was cut or left out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from moadapt.errors import DataError
from moadapt.report.packing import pack_text, rounded

SCHEMA_VERSION = 1
SCRIPTS = ("data.js", "draw.js", "charts.js", "overview.js", "detail.js", "compare.js", "text.js", "page.js")
_NEEDED = ("title", "model", "data", "summary", "verdicts", "routers")
_PROBE = 64  # tokens of a text by which its size per token is estimated
# What goes first when a page without any text is still too large: (name for the reader, field, of each router?).
_DISPENSABLE = (
    ("expert similarity", "similarity", False),
    ("flow between layers", "flow", False),
    ("co-activation", "coactivation", True),
    ("distances between tasks", "task_distance", True),
)


@cache
def _asset(name: str) -> str:
    return (files("moadapt.report") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end its script element: ASCII only, and no `<`, `>` or `&` in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(code: str) -> str:
    """The hash by which the content security policy lets an inline style or script through."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def _page(data: Mapping[str, Any]) -> str:
    style = "\n" + _asset("page.css")
    script = "\n(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    policy = f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; base-uri 'none'"
    parts = {
        "policy": policy,
        "title": escape(str(data["title"])),
        "style": style,
        "script": script,
        "data": _json(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], _asset("page.html"))


def _check(document: Mapping[str, Any]) -> None:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"schema_version: {version!r} is not the version of routing.json that this report reads "
            f"({SCHEMA_VERSION}); write the file anew with `moadapt inspect`"
        )
    missing = [name for name in _NEEDED if name not in document]
    if missing:
        raise DataError(f"routing document: {', '.join(missing)} missing; write the file anew with `moadapt inspect`")
    if not document["routers"]:
        raise DataError("routers: the routing document has none, so there is nothing to show")


def _fit_texts(texts: list[Mapping[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The texts packed and cut to one common number of tokens, about the largest whose JSON fits into the budget."""
    lengths = [len(text["tokens"]) for text in texts]
    probe = [
        len(_json(pack_text(text, _PROBE))) / max(min(length, _PROBE), 1)
        for text, length in zip(texts, lengths, strict=True)
    ]
    cap = max(lengths, default=0)
    while cap > 0 and sum(min(length, cap) * rate for length, rate in zip(lengths, probe, strict=True)) > budget:
        cap = cap * 49 // 50
    while cap > 0:
        packed = [pack_text(text, cap) for text in texts]
        if len(_json(packed)) <= budget:
            return packed
        cap = cap * 49 // 50
    return []


def render_report(document: Mapping[str, Any], *, max_bytes: int = 8_000_000) -> str:
    """One self-contained HTML page.

    Args:
        document: the content of routing.json, schema version 1. `flow` holds P(expert of the later layer | expert of
            the earlier one); `training` a list of {"step": int, router name: {measure: value}}; `flow`, `training`,
            `similarity`, `compare` and `text` may be missing or null, as may any measure.
        max_bytes: the size that the page keeps to by cutting texts, and after them whole pictures (the page names
            what is gone). The measures themselves are never left out, so a very large model may take more.

    Returns:
        HTML as ASCII text, except for the template's own characters: encode it as UTF-8.

    Raises:
        DataError: another schema version, or a document without its needed parts.
    """
    _check(document)
    texts = list(document.get("text") or [])
    data: dict[str, Any] = rounded({key: value for key, value in document.items() if key != "text"})
    data |= {"text": [], "left_out": []}
    size = len(_page(data).encode())
    for name, field, of_router in _DISPENSABLE:
        if size <= max_bytes:
            break
        for holder in data["routers"] if of_router else [data]:
            holder[field] = None
        data["left_out"].append(name)
        size = len(_page(data).encode())
    data["text"] = _fit_texts(texts, max_bytes - size - 200)
    if texts and not data["text"]:
        data["left_out"].append("texts")
    return _page(data)
