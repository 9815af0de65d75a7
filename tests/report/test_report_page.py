"""The report as a file: packing, sizes, escaping, and that it asks for nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from itertools import pairwise
from typing import Any

import pytest
from report_documents import HOSTILE, embedded, minimal_document, simulate, small_document

from moadapt.errors import DataError
from moadapt.report import render_report
from moadapt.report.packing import ALPHABET, pack_gates, pack_text, rounded


def unpacked(packed: dict[str, Any]) -> list[list[tuple[int, float]]]:
    """Reads what packing.py describes, one character at a time."""
    stream = iter(packed["pairs"])

    def read(length: int) -> int:
        value = 0
        for _ in range(length):
            value = value * 64 + ALPHABET.index(next(stream))
        return value

    counts, step = packed["counts"], packed["digits"] + 3
    if isinstance(counts, int):
        counts = [counts] * (len(packed["pairs"]) // (step * counts))
    entries = []
    for count in counts:
        pairs = [(read(packed["digits"]), (read(3) - 131072) / 131071 * packed["scale"]) for _ in range(count)]
        entries.append(pairs)
    assert next(stream, None) is None
    runs = packed["runs"] or [1] * len(entries)
    return [entry for entry, run in zip(entries, runs, strict=True) for _ in range(run)]


def assert_same(found: list[list[tuple[int, float]]], tokens: list[list[tuple[int, float]]]) -> None:
    scale = max((abs(weight) for pairs in tokens for _, weight in pairs), default=0.0)
    assert len(found) == len(tokens)
    for got, pairs in zip(found, tokens, strict=True):
        assert sorted(expert for expert, _ in got) == sorted(expert for expert, _ in pairs)
        assert all(weight == pytest.approx(dict(pairs)[expert], abs=4e-6 * scale) for expert, weight in got)
        sizes = [abs(weight) for _, weight in got]
        assert all(a >= b - 8e-6 * scale for a, b in pairwise(sizes))


@pytest.mark.parametrize("experts", [2, 64, 65, 4096])
@pytest.mark.parametrize("fixed", [True, False])
def test_gates_survive_packing(experts: int, fixed: bool) -> None:
    draw = random.Random(0)
    tokens = []
    for _ in range(50):
        chosen = draw.sample(range(experts), 2 if fixed else draw.randrange(0, min(experts, 7)))
        tokens.append([(expert, draw.uniform(-3, 3)) for expert in chosen])
    tokens[0] = [(experts - 1, 3.0), (0, -3.0)]
    packed = pack_gates(tokens)
    assert packed["digits"] == (1 if experts <= 64 else 2)
    assert_same(unpacked(packed), tokens)


def test_one_decision_for_a_whole_text_is_packed_once() -> None:
    tokens = [[(1, 0.75), (0, 0.25)]] * 30 + [[(2, 1.0)]] * 10
    packed = pack_gates(tokens)
    assert packed["runs"] == [30, 10]
    assert len(packed["pairs"]) == 3 * 4
    assert_same(unpacked(packed), tokens)


@pytest.mark.parametrize("tokens", [[], [[]], [[], [], []], [[], [(3, 0.0)], [(1, 0.5)]]])
def test_tokens_without_an_expert_survive_packing(tokens: list[list[tuple[int, float]]]) -> None:
    assert_same(unpacked(pack_gates(tokens)), tokens)


def test_gates_that_cannot_be_shown_are_refused() -> None:
    with pytest.raises(ValueError, match="4096"):
        pack_gates([[(4096, 1.0)]])
    with pytest.raises(ValueError, match="not finite"):
        pack_gates([[(0, math.nan)]])


def test_a_text_is_cut_around_its_answer() -> None:
    text = {
        "task": "a",
        "tokens": [str(at) for at in range(100)],
        "part": [int(at >= 60) for at in range(100)],
        "routers": {"r": {"expert": [at % 4 for at in range(100)], "weight": [1.0] * 100}},
    }
    packed = pack_text(text, 20)
    assert (packed["start"], packed["total"]) == (50, 100)
    assert packed["tokens"] == [str(at) for at in range(50, 70)]
    assert packed["part"] == [0] * 10 + [1] * 10
    assert [pairs[0][0] for pairs in unpacked(packed["routers"]["r"])] == [at % 4 for at in range(50, 70)]
    assert pack_text(text, 100)["tokens"] == text["tokens"]
    only_prompt = pack_text(text | {"part": [0] * 100}, 20)
    assert only_prompt["tokens"] == [str(at) for at in range(80, 100)]
    again = pack_text(text | {"start": 300, "total": 900}, 20)  # the document had cut it already
    assert (again["start"], again["total"]) == (350, 900)


def test_numbers_keep_five_digits_and_integers_all() -> None:
    found = rounded({"a": [0.123456789, 12345678901, True], "b": (math.nan, math.inf, 1e-9 / 3), "c": None, "d": "x"})
    assert found == {"a": [0.12346, 12345678901, True], "b": [None, None, 3.3333e-10], "c": None, "d": "x"}
    assert found["a"][2] is True


def test_text_from_outside_stays_text() -> None:
    document = small_document()
    page = render_report(document)
    assert HOSTILE not in page
    assert page.count("</script>") == 2, "the data block and the script, and nothing that ends them early"
    assert page.count("<script") == 2
    assert "<title>Routing &lt;/script&gt;" in page
    page.encode()  # a lone surrogate in a token must not stop the file from being written
    data = embedded(page)
    assert data["title"] == document["title"]
    assert data["text"][0]["tokens"] == document["text"][0]["tokens"]


def test_the_page_lets_only_itself_run() -> None:
    page = render_report(small_document())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    for tag in ("style", "script"):
        code = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert code is not None
        digest = base64.b64encode(hashlib.sha256(code[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", page.split("<script type")[0])
    assert set(re.findall(r"https?://[^\s'\"]+", page)) == {"http://www.w3.org/2000/svg"}


def test_everything_but_the_text_is_kept_as_it_was() -> None:
    document = small_document()
    data = embedded(render_report(document))
    assert data["left_out"] == []
    for name in ("model", "data", "verdicts"):
        assert data[name] == document[name]
    for kept, router in zip(data["routers"], document["routers"], strict=True):
        assert kept["rows"] == router["rows"]
        assert kept["measures"]["entropy_histogram"] == router["measures"]["entropy_histogram"]
        assert kept["by_task"]["significant"] == router["by_task"]["significant"]
        assert kept["load"]["share"] == pytest.approx(router["load"]["share"], rel=5e-5)
        for row, true in zip(kept["task_distance"], router["task_distance"], strict=True):
            assert row == pytest.approx(true, rel=5e-5)
    for text, packed in zip(document["text"], data["text"], strict=True):
        for name, gates in text["routers"].items():
            assert_same(unpacked(packed["routers"][name]), gates["all"])


def test_a_small_limit_cuts_texts_first_and_pictures_then() -> None:
    document = small_document()
    whole = render_report(document)
    bare = len(render_report(document | {"text": []}).encode())
    limit = (len(whole.encode()) + bare) // 2
    page = render_report(document, max_bytes=limit)
    data = embedded(page)
    assert 0.8 * limit < len(page.encode()) <= limit
    assert data["left_out"] == []
    assert len({len(text["tokens"]) for text in data["text"]}) == 1
    assert 10 < len(data["text"][0]["tokens"]) < 40

    page = render_report(document, max_bytes=bare - 1)
    data = embedded(page)
    assert len(page.encode()) < bare
    assert data["left_out"] == ["expert similarity"] or data["left_out"] == ["expert similarity", "texts"]
    assert data["similarity"] is None
    assert data["flow"]

    data = embedded(render_report(document, max_bytes=1000))
    assert data["left_out"] == [
        "expert similarity", "flow between layers", "co-activation", "distances between tasks", "texts",
    ]  # fmt: skip
    assert all(router["coactivation"] is None and router["by_task"]["share"] for router in data["routers"])


def test_a_document_that_cannot_be_shown_is_refused() -> None:
    document = minimal_document()
    with pytest.raises(DataError, match=r"schema_version: 2 is not .*\(1\)"):
        render_report(document | {"schema_version": 2})
    with pytest.raises(DataError, match="has none"):
        render_report(document | {"routers": []})
    del document["verdicts"]
    with pytest.raises(DataError, match="verdicts missing"):
        render_report(document)


@pytest.mark.slow
def test_the_large_case_stays_under_8_mb() -> None:
    document = simulate(layers=32, modules=7, experts=8, tasks=20, tokens=130)
    page = render_report(document)
    data = embedded(page)
    assert len(page.encode()) < 8_000_000
    assert data["left_out"] == []
    assert len(data["routers"]) == 224
    assert min(len(text["tokens"]) for text in data["text"]) > 50
    assert len(json.dumps(document)) > 8_000_000, "the case must need packing to be one"
