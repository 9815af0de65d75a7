"""Plain text as a task: rows whose every token is predicted once, hold-out by document, and batches for measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_tokenizers import ending_tokenizer, plain_tokenizer, space_adding_tokenizer

from moadapt.errors import DataError
from moadapt.train.data_config import DataConfig
from moadapt.train.encoding import IGNORE, Encoder
from moadapt.train.tasks import Task, load_tasks
from moadapt.train.text import CalibrationConfig, text_batches

BOS, EOS = 1, 2
POEM = "one two\nthree\n\nfour five six\n \nseven\n"


def text_task(path: Path, tokenizer: Any = None, *, seed: int = 0, data: Any = None, **options: Any) -> Task:
    config = {"tasks": [{"name": "t", "path": str(path), **options}], "max_length": 16, **(data or {})}
    (task,) = load_tasks(DataConfig.model_validate(config), tokenizer or plain_tokenizer(), seed=seed)
    return task


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(path: Path, texts: list[Any], column: str = "text") -> Path:
    return write(path, "".join(json.dumps({column: text}) + "\n" for text in texts))


def naive_rows(documents: list[list[int]], length: int, packing: bool, bos: bool) -> list[tuple[list[int], list[int]]]:
    """Token after token; a new row, and a new beginning, wherever one is full or a document must not share it."""
    rows: list[tuple[list[int], list[int]]] = []
    for document in documents:
        for position, token in enumerate([*document, EOS]):
            begins, used = position == 0, len(rows[-1][0]) if rows else length
            if used >= length or (begins and (not packing or used + bos >= length)):
                rows.append(([], []))
                begins = True
            if begins and bos:
                rows[-1][0].append(BOS)
                rows[-1][1].append(IGNORE)
            rows[-1][0].append(token)
            rows[-1][1].append(token)
    return [row for row in rows if any(label != IGNORE for label in row[1][1:])]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("packing", [True, False, None])
@pytest.mark.parametrize("length", [8, 11, 50])
def test_rows_are_those_of_a_naive_packer(tmp_path: Path, length: int, packing: bool | None, bos: bool) -> None:
    texts = ["abcdefghij", "x", "klmno pqrst uvwxyz", "12345", "6789ABC", "DE"]
    tokenizer = plain_tokenizer(bos=bos)
    path = write_rows(tmp_path / "a.jsonl", texts)
    task = text_task(path, tokenizer, data={"max_length": length}, text_column="text", packing=packing)
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = naive_rows(documents, length, packing is not False, bos)
    assert [(example.input_ids, example.labels) for example in task.train] == expected
    assert all(len(example.input_ids) <= length for example in task.train)
    assert all(example.prompt_mask == [0] * len(example.input_ids) for example in task.train)
    assert all(example.prompt_length == 0 for example in task.train)
    if bos:  # every token of the text is predicted exactly once, and nothing else but the end tokens
        predicted = [label for example in task.train for label in example.labels[1:] if label != IGNORE]
        assert predicted == [token for document in documents for token in [*document, EOS]]


def test_a_text_file_is_one_document_or_its_paragraphs_or_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", POEM)
    tokenizer = plain_tokenizer()
    decoded = {
        how: [
            "".join(tokenizer.convert_ids_to_tokens([i for i in e.input_ids if i not in (BOS, EOS)]))
            for e in text_task(path, packing=False, sample_by=how, data={"max_length": 64}).train
        ]
        for how in (None, "document", "paragraph", "line")
    }
    assert decoded[None] == decoded["document"] == [POEM]
    assert decoded["paragraph"] == ["one two\nthree", "four five six", "seven"]
    assert decoded["line"] == ["one two", "three", "four five six", "seven"]


def test_hold_out_by_document(tmp_path: Path) -> None:
    texts = [f"document {number} {chr(97 + number) * 30}" for number in range(20)]
    path = write_rows(tmp_path / "a.jsonl", texts)
    task = text_task(path, seed=3, text_column="text", eval_fraction=0.25, packing=False)
    tokenizer = plain_tokenizer()
    numbers = {which: {example.row for example in getattr(task, which)} for which in ("train", "eval")}
    assert len(numbers["eval"]) == 5
    assert numbers["train"] | numbers["eval"] == set(range(20))
    assert not numbers["train"] & numbers["eval"]
    tokens = sum(len(example.input_ids) - 1 for example in (*task.train, *task.eval))
    assert tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    same = text_task(path, seed=3, text_column="text", eval_fraction=0.25, max_samples=4, max_eval_samples=2)
    assert (len(same.train), len(same.eval)) == (4, 2)
    assert {example.row for example in same.eval} <= numbers["eval"]


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(40)]
    path = write(tmp_path / "a.txt", "".join(lines))
    task = text_task(path, eval_fraction=0.25, data={"max_length": 4096})
    tokenizer = plain_tokenizer()
    train, held_out = (
        "".join(tokenizer.convert_ids_to_tokens(example.input_ids[1:-1])) for example in (*task.train, *task.eval)
    )
    assert train + held_out == "".join(lines)
    assert held_out.startswith("line ")
    assert abs(len(held_out) / len(train + held_out) - 0.25) < 0.03
    write(path, "word")
    with pytest.raises(DataError, match="too short for eval_fraction"):
        text_task(path, eval_fraction=0.5)


def test_limits_and_eval_file(tmp_path: Path) -> None:
    path, other = (
        write(tmp_path / "a.txt", "abcdefg " * 40),
        write_rows(tmp_path / "b.jsonl", ["hello", "world"], "story"),
    )
    task = text_task(path, max_samples=3, eval_path=str(other), text_column="story", packing=False)
    assert len(task.train) == 3
    assert [example.row for example in task.eval] == [0, 1]
    assert len(text_task(path, eval_path=str(other), text_column="story", max_eval_samples=1).eval) == 1


def test_a_long_text_is_tokenised_in_parts_as_a_whole(tmp_path: Path) -> None:
    for tokenizer in (plain_tokenizer(), space_adding_tokenizer()):
        encoder = Encoder(tokenizer, DataConfig.model_validate({"tasks": [{"name": "t", "path": "a.txt"}]}))
        text = "".join(f"ab line {number}\n{'a' * (number % 90)}\n\n" for number in range(7000))
        assert len(text) > 3 * 100_000
        assert encoder.encode_text(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        start = encoder.encode_text(text, 10)
        assert 10 <= len(start) < len(text) / 2


def test_empty_and_wrong_values(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["good", "", None, "  ", "better"])
    task = text_task(path, text_column="text")
    assert dict(task.dropped) == {"no text": 3}
    assert task.report().endswith(f"dropped 3: 3 no text (first: {path}:2)")
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'text' holds int \(3\), expected a string$"):
        text_task(write_rows(path, [3]), text_column="text")
    with pytest.raises(DataError, match="no column 'story'"):
        text_task(write_rows(path, ["a"]), text_column="story")
    with pytest.raises(DataError, match="text_column for plain text"):
        text_task(path)
    with pytest.raises(DataError, match="the file is empty"):
        text_task(write(tmp_path / "b.txt", " \n\n "), sample_by="line")
    with pytest.raises(DataError, match="encoder-decoder"):
        load_tasks(
            DataConfig.model_validate({"tasks": [{"name": "t", "path": str(path), "text_column": "text"}]}),
            ending_tokenizer(),
            is_encoder_decoder=True,
        )


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"path": "a.txt", "prompt_column": "p"}, "prompt_column"),
        ({"path": "a.jsonl", "text_column": "t", "response_template": "{r}"}, "response_template"),
        ({"path": "a.jsonl", "text_column": "t", "messages_column": "m"}, "messages_column"),
        ({"path": "a.txt", "apply_chat_template": True}, "apply_chat_template"),
        ({"path": "a.txt", "system_prompt": "s"}, "system_prompt"),
        ({"path": "a.txt", "metric": "rouge_l"}, "metric"),
        ({"path": "a.txt", "max_new_tokens": 4}, "max_new_tokens"),
        ({"path": "a.jsonl", "packing": True}, "packing"),
        ({"path": "a.jsonl", "sample_by": "line"}, "sample_by"),
        ({"path": "a.jsonl", "text_column": "t", "sample_by": "line"}, "sample_by"),
        ({"path": "a.txt", "sample_by": "word"}, "sample_by"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate({"tasks": [{"name": "t", **options}]})
    assert [error["loc"] for error in caught.value.errors()] == [("tasks", 0, place)]


def test_text_in_one_file_with_other_tasks_columns(tmp_path: Path) -> None:
    rows = [{"task": name, "text": f"{name} {number}"} for name in "ba" for number in range(3)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "task_column": "task", "text_column": "text", "packing": False}
    tasks = load_tasks(DataConfig.model_validate(data), plain_tokenizer())
    assert [(task.name, len(task.train)) for task in tasks] == [("a", 3), ("b", 3)]
    for changes, message in (({"metrics": {"a": "rouge_l"}}, "no answers"), ({"path": "a.txt"}, "no columns")):
        with pytest.raises(ValidationError, match=message):
            DataConfig.model_validate({**data, **changes})


# -- batches --------------------------------------------------------------------------------------------------------


def real(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_batches_hold_the_beginning_of_a_file(tmp_path: Path) -> None:
    texts = [chr(97 + number) * (5 + number) for number in range(10)]
    path = write_rows(tmp_path / "a.jsonl", texts)
    whole = text_batches(str(path), plain_tokenizer(), max_length=32, batch_size=4)
    assert [len(batch["input_ids"]) for batch in whole] == [4, 4, 2]
    assert real(whole) == sum(len(plain_tokenizer()(text)["input_ids"]) for text in texts)
    for batch in whole:
        real_BS = batch["attention_mask"].bool()
        predicted_BS = batch["labels"] != IGNORE
        assert torch.equal(batch["labels"][predicted_BS], batch["input_ids"][predicted_BS])
        assert torch.equal(predicted_BS, real_BS & (batch["input_ids"] != BOS))
    part = text_batches(str(path), plain_tokenizer(), max_length=32, batch_size=4, max_tokens=20)
    assert real(part) == 20
    documents = [plain_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = {tuple(row[row > 2].tolist()) for batch in part for row in batch["input_ids"]}
    assert ids <= {tuple(document[:n]) for document in documents for n in range(20)}
    long = text_batches(
        str(write(tmp_path / "b.txt", "word\n" * 500)), plain_tokenizer(), max_length=50, max_tokens=120
    )
    assert real(long) == 120
    assert [row.sum().item() for batch in long for row in batch["attention_mask"]] == [50, 50, 20]


def test_batches_of_prompts_and_responses_are_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "abc", "response": " de"}) + "\n")
    (batch,) = text_batches(str(path), plain_tokenizer())
    expected = plain_tokenizer()("abc de")["input_ids"]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["labels"].tolist() == [expected]
    (batch,) = text_batches(str(path), plain_tokenizer(eos_token=None))
    assert batch["input_ids"].tolist() == [expected]


def test_batches_for_an_encoder_decoder(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["one two three", "this that"])
    batches = text_batches(str(path), ending_tokenizer(), is_encoder_decoder=True, batch_size=2)
    (batch,) = batches
    tokenizer = ending_tokenizer()
    assert batch["input_ids"].tolist()[0] == tokenizer("one two")["input_ids"]
    assert batch["labels"].tolist()[0] == tokenizer("three", add_special_tokens=False)["input_ids"]


def test_batches_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text .*Columns found: story"):
        text_batches(str(write_rows(tmp_path / "a.jsonl", ["a"], "story")), plain_tokenizer())
    assert text_batches(str(tmp_path / "a.jsonl"), plain_tokenizer(), text_column="story")
    with pytest.raises(DataError, match="there is no text in it"):
        text_batches(str(write_rows(tmp_path / "b.jsonl", [" "])), plain_tokenizer())
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        text_batches(str(tmp_path / "gone.txt"), plain_tokenizer())


def test_calibration_path_starts_at_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "text")
    monkeypatch.chdir("/")
    assert CalibrationConfig(path="a.txt").resolve(tmp_path).path == str(tmp_path / "a.txt")
    assert CalibrationConfig(path="owner/name").resolve(tmp_path).path == "owner/name"
