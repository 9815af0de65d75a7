"""Reads JSON, JSONL, CSV, Parquet and text files, folders and hub data sets into rows that know their place."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moadapt.errors import DataError
from moadapt.registry import closest
from moadapt.train.data_config import FILE_SUFFIXES, TEXT_SUFFIX

Row = dict[str, Any]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """The rows of one source.

    Attributes:
        source: the file's path or the data set's id, for messages.
        columns: every column name that occurs, in order of appearance.
        rows: one dict a row; a column may be missing in a row of a JSON file.
        lines: line where each row starts, 1-based; None where the format has no lines.
    """

    source: str
    columns: list[str]
    rows: list[Row]
    lines: list[int] | None = None

    def where(self, index: int) -> str:
        """`file:line` of a row, or `source, row N` (1-based) where there are no lines."""
        return f"{self.source}:{self.lines[index]}" if self.lines else f"{self.source}, row {index + 1}"

    def require(self, column: str, option: str) -> None:
        """Check that a column exists.

        Raises:
            DataError: it does not; lists the columns found.
        """
        if column not in self.columns:
            raise DataError(
                f"{self.source}: no column {column!r} ({option}){closest(column, self.columns)} "
                f"Columns found: {', '.join(self.columns)}"
            )


def read_table(
    path: str, *, split: str | None = None, subset: str | None = None, sample_by: str | None = None
) -> Table:
    """Read a local file by its suffix, a local folder, or a data set of the hub.

    Args:
        path: a .json, .jsonl, .csv, .parquet or .txt file, a folder or hub id that `datasets.load_dataset` takes. A
            .txt file has the column `text`.
        split: split of a folder or hub data set; None means `train`.
        subset: configuration name of a hub data set.
        sample_by: what one row of a .txt file is: the whole `document` (as None), a `paragraph`, or a `line`.

    Raises:
        DataError: missing, empty or broken; names the file and the line where there is one.
    """
    file = Path(path).expanduser()
    if file.is_file() or file.suffix.lower() in FILE_SUFFIXES:
        for name, value in (("split", split), ("subset", subset)):
            if value is not None:
                raise DataError(f"{path}: a file has no {name} {value!r}; leave {name} out, or give a folder or hub id")
        table = _read_file(file, sample_by)
    elif file.is_dir() or _HUB_ID.fullmatch(path):
        table = _read_dataset(path, split or "train", subset)
    else:
        raise DataError(f"{path}: no such file or folder, and not the id of a hub data set (owner/name)")
    if not table.rows:
        raise DataError(f"{table.source}: the file is empty, it has no rows")
    return table


def _read_file(file: Path, sample_by: str | None) -> Table:
    readers: dict[str, Callable[[Path], Table]] = {
        ".jsonl": _read_json,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        TEXT_SUFFIX: lambda file: _read_documents(file, sample_by or "document"),
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file}: unknown kind of file {file.suffix!r}; use one of {', '.join(FILE_SUFFIXES)}")
    try:
        return reader(file)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file (relative paths start at the config's folder, then here)") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert the file") from None


def _read_documents(file: Path, sample_by: str) -> Table:
    """One row for the whole text, for each paragraph, or for each line; those of white space alone are left out."""
    text = _read_text(file).replace("\r\n", "\n")
    pattern = {"document": r"[\s\S]+", "paragraph": r"(?:[^\n]*\S[^\n]*(?:\n|$))+", "line": r"[^\n]+"}[sample_by]
    rows: list[Row] = []
    lines: list[int] = []
    line, counted = 1, 0
    for match in re.finditer(pattern, text):
        document = match.group()
        if not document.strip():
            continue
        line += text.count("\n", counted, match.start())
        counted = match.start()
        rows.append({"text": document if sample_by == "document" else document.rstrip("\n")})
        lines.append(line)
    return Table(str(file), ["text"], rows, lines)


def _read_json(file: Path) -> Table:
    """A list of objects, or one object a line, whatever the suffix."""
    text = _read_text(file)
    parse = _array_items if text.lstrip()[:1] == "[" else _line_items
    rows: list[Row] = []
    lines: list[int] = []
    columns: dict[str, None] = {}
    for line, value in parse(text, file):
        if not isinstance(value, dict):
            raise DataError(f"{file}:{line}: a row must be an object with columns, found {_kind(value)}")
        rows.append(value)
        lines.append(line)
        columns.update(dict.fromkeys(value))
    return Table(str(file), list(columns), rows, lines)


def _line_items(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at column {error.colno}"
                hint = "" if file.suffix.lower() == ".jsonl" else " (expected a list, or one object on each line)"
                raise DataError(f"{file}:{number}: broken JSON: {reason}{hint}") from None


def _array_items(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    """The items of one JSON list, read one by one so that each knows its line."""
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")

    def skip(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    def fail(position: int, reason: str) -> DataError:
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        return DataError(f"{file}:{line}: broken JSON: {reason} at column {column}")

    position = skip(skip(0) + 1)
    line, counted, first = 1, 0, True
    while text[position : position + 1] != "]":
        if not first:
            if text[position : position + 1] != ",":
                raise fail(position, "expected ',' or ']'")
            position = skip(position + 1)
        first = False
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.pos, error.msg) from None
        yield line, value
        position = skip(position)
    rest = skip(position + 1)
    if rest != len(text):
        raise fail(rest, "text after the end of the list")


def _read_csv(file: Path) -> Table:
    """A header and rows; every value stays the text it is, an empty one is an empty string."""
    text = _read_text(file)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    lines: list[int] = []
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f"{file}:{line}: broken CSV: {error}") from None
        if not values:
            continue
        if header is None:
            header = values
            if len(set(header)) != len(header):
                raise DataError(f"{file}:{line}: a column name occurs twice in the header: {', '.join(header)}")
            continue
        if len(values) != len(header):
            raise DataError(f"{file}:{line}: {len(values)} values, but the header has {len(header)} columns")
        rows.append(dict(zip(header, values, strict=True)))
        lines.append(line)
    return Table(str(file), header or [], rows, lines)


def _read_parquet(file: Path) -> Table:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    if not file.is_file():
        raise FileNotFoundError(file)
    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: broken Parquet: {error}") from error
    return Table(str(file), list(table.column_names), table.to_pylist())


def _read_dataset(path: str, split: str, subset: str | None) -> Table:
    """A data set of the hub, or a local folder, through `datasets`."""
    import datasets

    name = f"{path}/{subset}" if subset else path
    try:
        data = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # datasets raises many unrelated types here; all mean the same to the user
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        local = "" if Path(path).is_dir() else "no such file or folder, and "
        raise DataError(f"{name} (split {split}): {local}cannot be loaded with `datasets`: {reason}") from error
    return Table(f"{name} (split {split})", list(data.column_names), list(data))


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
