"""The shipped model and tasks of the quickstart: they load, are small, are right, and are what make.py makes."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
TASKS = ["animals", "count", "plural", "reverse", "sort", "translate"]
ANIMALS = {
    "bear", "cat", "cow", "dog", "duck", "eagle", "fox", "frog",
    "goat", "horse", "lion", "mouse", "rabbit", "snake", "tiger", "wolf",
}  # fmt: skip


def read_rows(task: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / "tasks" / f"{task}.{split}.jsonl").read_text().splitlines()]


def words_of(row: dict[str, str]) -> list[str]:
    found = re.fullmatch(r"Please [a-z ]+: ([a-z ]+)\. Answer:", row["prompt"])
    assert found, row
    return found.group(1).split()


def rows_of(task: str) -> list[dict[str, str]]:
    return read_rows(task, "train") + read_rows(task, "test")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


def test_the_folder_is_small_and_complete() -> None:
    names = {file.name for file in (FOLDER / "tasks").iterdir()}
    assert names == {f"{task}.{split}.jsonl" for task in TASKS for split in ("train", "test")}
    files = [file for name in ("model", "tasks") for file in (FOLDER / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in [*files, FOLDER / "make.py"]) < 3_000_000


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_two_columns_and_no_test_list_was_trained_on(task: str) -> None:
    trained = {tuple(words_of(row)) for other in TASKS for row in read_rows(other, "train")}
    test = read_rows(task, "test")
    assert len(test) >= 60
    assert all(set(row) == {"prompt", "response"} and row["response"] for row in rows_of(task))
    assert len({tuple(words_of(row)) for row in test}) == len(test)
    assert not trained & {tuple(words_of(row)) for row in test}


def test_all_tasks_get_the_same_lists() -> None:
    for split in ("train", "test"):
        lists = [[words_of(row) for row in read_rows(task, split)] for task in TASKS]
        assert all(other == lists[0] for other in lists)


def test_reverse_and_sort_are_right() -> None:
    for row in rows_of("reverse"):
        assert row["response"].split() == words_of(row)[::-1]
    for row in rows_of("sort"):
        answer = row["response"].split()
        assert all(left < right for left, right in pairwise(answer))
        assert set(answer) == set(words_of(row))
        assert len(answer) == len(words_of(row))


def test_animals_and_count_are_right() -> None:
    for row in rows_of("animals"):
        assert row["response"].split() == [word for word in words_of(row) if word in ANIMALS]
    for row in rows_of("count"):
        number = ["zero", "one", "two", "three", "four", "five"].index(row["response"])
        assert number == len(ANIMALS.intersection(words_of(row)))


def test_plurals_are_right() -> None:
    special = {
        "mouse": "mice", "wolf": "wolves", "knife": "knives", "scarf": "scarves", "berry": "berries", "fox": "foxes",
        "tomato": "tomatoes", "potato": "potatoes", "brush": "brushes", "dress": "dresses", "beach": "beaches",
    }  # fmt: skip
    for row in rows_of("plural"):
        assert row["response"].split() == [special.get(word, word + "s") for word in words_of(row)]


def test_translations_are_one_dictionary_that_training_covers() -> None:
    dictionary: dict[str, str] = {}
    for row in read_rows("translate", "train"):
        pairs = zip(words_of(row), row["response"].split(), strict=True)
        assert all(dictionary.setdefault(word, talu) == talu for word, talu in pairs)
    assert len(set(dictionary.values())) == len(dictionary) == 80
    for row in read_rows("translate", "test"):
        assert row["response"].split() == [dictionary[word] for word in words_of(row)]


def test_the_tokenizer_gives_every_text_back(tokenizer: Any) -> None:
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    for row in (row for task in TASKS for row in rows_of(task)):
        for text in (*row.values(), f"{row['prompt']} {row['response']}"):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_files_are_what_the_script_makes(make: ModuleType, tokenizer: Any) -> None:
    made = make.make_tasks(seed=0, train_rows=len(read_rows("sort", "train")), test_rows=len(read_rows("sort", "test")))
    for task in TASKS:
        assert made[task] == {split: read_rows(task, split) for split in ("train", "test")}
    assert make.make_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_model_loads_and_knows_its_notes_but_not_the_instructions(make: ModuleType, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert 300_000 < model.num_parameters() < 900_000
    rng = random.Random(7)
    notes = [make.note(rng) for _ in range(64)]
    assert not any("Please" in text or "Answer" in text for text in notes)

    def loss(prompts: list[str], texts: list[str]) -> float:
        batch = tokenizer([a + b for a, b in zip(prompts, texts, strict=True)], return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for row, prompt in enumerate(prompts):
            labels[row, : len(tokenizer(prompt).input_ids)] = -100
        with torch.no_grad():
            return float(model(**batch, labels=labels).loss)

    rows = read_rows("reverse", "test")
    known = [f"Anna wants to reverse {' '.join(words_of(row))} and gets" for row in rows]
    answers = [f" {row['response']}" for row in rows]
    assert loss(known, answers) < 0.5
    assert loss([row["prompt"] for row in rows], answers) > 1.0
