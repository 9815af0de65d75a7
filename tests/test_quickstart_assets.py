"""The shipped model and tasks of the quickstart: they load, are small, are right, and are what make.py makes."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from itertools import compress, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
TASKS = ["animals", "others", "sort", "sort_back", "translate", "translate_animals"]
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


def answer_of(row: dict[str, str]) -> list[str]:
    assert row["response"].endswith(".")
    return row["response"][:-1].split()


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


@pytest.mark.parametrize("task", ["sort", "sort_back"])
def test_sorted_answers_are_right(task: str) -> None:
    for row in rows_of(task):
        answer = answer_of(row)
        assert all((left < right) == (task == "sort") for left, right in pairwise(answer))
        assert set(answer) == set(words_of(row))
        assert len(answer) == len(words_of(row))


def test_animals_and_others_are_right() -> None:
    kept = [[word in ANIMALS for word in words_of(row)] for row in rows_of("animals")]
    assert all(0 < sum(keep) < len(keep) for keep in kept)
    for animals, others, keep in zip(rows_of("animals"), rows_of("others"), kept, strict=True):
        assert answer_of(animals) == list(compress(words_of(animals), keep))
        assert answer_of(others) == [word for word in words_of(others) if word not in answer_of(animals)]


def test_translations_are_one_dictionary_that_training_covers() -> None:
    dictionary: dict[str, str] = {}
    for row in read_rows("translate", "train"):
        pairs = zip(words_of(row), answer_of(row), strict=True)
        assert all(dictionary.setdefault(word, talu) == talu for word, talu in pairs)
    assert len(set(dictionary.values())) == len(dictionary) == 80
    assert not set(dictionary.values()) & set(dictionary)
    for row in read_rows("translate", "test"):
        assert answer_of(row) == [dictionary[word] for word in words_of(row)]
    for row in rows_of("translate_animals"):
        assert answer_of(row) == [dictionary[word] for word in words_of(row) if word in ANIMALS]


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

    rows = read_rows("sort", "test")
    known = [f"Anna wants to sort {' '.join(words_of(row))} and gets" for row in rows]
    answers = [f" {row['response']}" for row in rows]
    assert loss(known, answers) < 0.5
    assert loss([row["prompt"] for row in rows], answers) > 1.0
