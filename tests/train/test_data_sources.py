"""Reading files: rows, line numbers, and an error with its place for whatever is broken."""

from __future__ import annotations

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moadapt.errors import DataError
from moadapt.train.sources import _array_items, read_table


def write(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def fails(path, pattern, **options):
    with pytest.raises(DataError, match=pattern) as caught:
        read_table(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_one_object_a_line(tmp_path, name):
    path = write(tmp_path, name, '\ufeff{"a": "1"}\r\n\n  {"b": "2\u2028x"}\n')
    table = read_table(path)
    assert table.rows == [{"a": "1"}, {"b": "2\u2028x"}]
    assert table.columns == ["a", "b"]
    assert [table.where(index) for index in range(2)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_json_list(tmp_path, name):
    path = write(tmp_path, name, '\n[\n  {"a":\n "1"},\n  {"a": "2"}, {"a": "3"}]\n')
    table = read_table(path)
    assert [row["a"] for row in table.rows] == ["1", "2", "3"]
    assert table.lines == [3, 5, 5]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=3)), st.sampled_from([None, 0, 2]))
def test_items_of_a_json_list_equal_those_of_the_json_module(rows, indent):
    text = json.dumps(rows, indent=indent)
    items = list(_array_items(text, None))
    assert [value for _, value in items] == rows
    lines = text.split("\n")
    assert all("{" in lines[number - 1] for number, _ in items)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1}\n{"a": }\n', 2),
        ('{"a": 1}\n\n{"a": 1\n', 3),
        ('[{"a": 1},\n {"a": 1}\n {"a": 1}]', 3),
        ('[{"a": 1},\n {"a": tru}]', 2),
        ('[{"a": 1},\n {"a": 1},\n]', 3),
        ('[{"a": 1}\n', 2),
        ('[{"a": 1}]\n\n[]', 3),
        ("[", 1),
    ],
)
def test_broken_json_names_file_and_line(tmp_path, text, line):
    path = write(tmp_path, "a.json", text)
    fails(path, rf"^{re.escape(path)}:{line}: broken JSON: ")


def test_rows_must_be_objects(tmp_path):
    fails(write(tmp_path, "a.jsonl", '{"a": 1}\n["a"]\n'), r"a\.jsonl:2: a row must be an object.*a list")
    fails(write(tmp_path, "b.json", '[{"a": 1},\n"x"]\n'), r"b\.json:2: a row must be an object.*a string")


def test_csv_values_stay_text_and_quoted_lines_count(tmp_path):
    path = write(tmp_path, "a.csv", 'id,text\n007,"two\nlines, one value"\n\n8,true\n')
    table = read_table(path)
    assert table.columns == ["id", "text"]
    assert table.rows == [{"id": "007", "text": "two\nlines, one value"}, {"id": "8", "text": "true"}]
    assert table.lines == [2, 5]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a,b\n1,2\n1\n", r":3: 1 values, but the header has 2 columns"),
        ("a,a\n1,2\n", r":1: a column name occurs twice"),
        ('a,b\n1,"x\n', r":2: broken CSV"),
    ],
)
def test_broken_csv(tmp_path, text, pattern):
    fails(write(tmp_path, "a.csv", text), pattern)


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    rows = [{"prompt": "x", "n": 1}, {"prompt": "y", "n": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    table = read_table(str(file))
    assert table.rows == rows
    assert table.where(1) == f"{file}, row 2"
    fails(write(tmp_path, "b.parquet", b"no parquet"), r"b\.parquet: broken Parquet")


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "a,b\n")]
)
def test_a_file_without_rows(tmp_path, name, text):
    fails(write(tmp_path, name, text), r"the file is empty")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_missing_file(tmp_path, name):
    fails(str(tmp_path / name), r"no such file")


def test_other_refusals(tmp_path):
    fails(write(tmp_path, "a.md", "x"), r"unknown kind of file '\.md'; use one of \.json")
    fails(write(tmp_path, "a.jsonl", '{"a": "1"}\n{"a": "\xe9"}'.encode("latin-1")), r"a\.jsonl:2: not UTF-8")
    fails(write(tmp_path, "b.jsonl", '{"a": 1}'), r"a file has no split 'test'", split="test")
    fails("a/b/c", r"not the id of a hub data set")


def test_a_folder_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "train.jsonl", '{"prompt": "p", "response": "r"}\n')
    write(folder, "test.jsonl", '{"prompt": "q", "response": "s"}\n{"prompt": "q", "response": "t"}\n')
    assert read_table(str(folder)).rows == [{"prompt": "p", "response": "r"}]
    table = read_table(str(folder), split="test")
    assert [row["response"] for row in table.rows] == ["s", "t"]
    assert table.where(1).endswith("(split test), row 2")
    fails(str(folder), r"\(split dev\): cannot be loaded with `datasets`", split="dev")


def test_a_missing_column_lists_those_found(tmp_path):
    table = read_table(write(tmp_path, "a.jsonl", '{"promt": "1"}\n{"answer": "2"}\n'))
    with pytest.raises(DataError, match=r"no column 'prompt'.*did you mean 'promt'.*Columns found: promt, answer"):
        table.require("prompt", "prompt_column")
