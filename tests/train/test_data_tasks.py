"""Loading whole tasks from files: splits, counts, reports and the errors of a whole file."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tiny_tokenizers import plain_tokenizer

from moadapt.errors import DataError
from moadapt.train.data_config import DataConfig
from moadapt.train.tasks import load_tasks

TOKENIZER = plain_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count, **extra):
    return [{"prompt": f"p{index}:", "response": f" r{index}", **extra} for index in range(count)]


def load(data, tokenizer=TOKENIZER, **options):
    return load_tasks(DataConfig.model_validate(data), tokenizer, **options)


def numbers(examples):
    return [example.row for example in examples]


def test_tasks_of_separate_files(tmp_path):
    tasks = load(
        {
            "tasks": [
                {
                    "name": "b",
                    "path": write(tmp_path / "b.jsonl", rows(3)),
                    "eval_path": write(tmp_path / "e.jsonl", rows(2)),
                    "metric": "rouge_l",
                    "max_new_tokens": 5,
                },
                {"name": "a", "path": write(tmp_path / "a.jsonl", rows(4))},
            ],
            "max_new_tokens": 9,
        }
    )
    assert [(task.name, task.id, task.metric, task.max_new_tokens) for task in tasks] == [
        ("b", 0, "rouge_l", 5),
        ("a", 1, None, 9),
    ]
    assert [(numbers(task.train), numbers(task.eval)) for task in tasks] == [([0, 1, 2], [0, 1]), ([0, 1, 2, 3], [])]
    assert {example.task_id for example in tasks[1].train} == {1}
    assert tasks[0].report() == "b: 3 training and 2 evaluation rows"


def test_one_file_for_all_tasks(tmp_path):
    train = [*rows(2, task="z"), *rows(3, task="m"), *rows(1, task="z")]
    test = [*rows(1, task="m"), *rows(2, task="z")]
    tasks = load(
        {
            "path": write(tmp_path / "t.jsonl", train),
            "eval_path": write(tmp_path / "e.jsonl", test),
            "task_column": "task",
            "metrics": {"z": "token_f1"},
        }
    )
    assert [(task.name, task.id, task.metric) for task in tasks] == [("m", 0, None), ("z", 1, "token_f1")]
    assert [numbers(task.train) for task in tasks] == [[2, 3, 4], [0, 1, 5]]
    assert [numbers(task.eval) for task in tasks] == [[0], [1, 2]]


def test_eval_fraction_splits_without_overlap_and_by_the_seed_alone(tmp_path):
    data = {"tasks": [{"name": "a", "path": write(tmp_path / "a.jsonl", rows(40)), "eval_fraction": 0.25}]}
    (task,) = load(data, seed=5)
    assert len(task.eval) == 10
    assert sorted(numbers(task.train) + numbers(task.eval)) == list(range(40))
    assert numbers(task.train) == sorted(numbers(task.train))
    assert numbers(load(data, seed=5)[0].eval) == numbers(task.eval)
    assert numbers(load(data, plain_tokenizer(bos=False), seed=5)[0].eval) == numbers(task.eval)
    assert numbers(load(data, seed=6)[0].eval) != numbers(task.eval)
    only_eval = load(data, seed=5, train=False)[0]
    assert (only_eval.train, numbers(only_eval.eval)) == ([], numbers(task.eval))


def test_max_samples_choose_rows_by_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(40))
    options = {"eval_fraction": 0.5, "max_samples": 7, "max_eval_samples": 4}
    (task,) = load({"tasks": [{"name": "a", "path": path, **options}]}, seed=1)
    assert (len(task.train), len(task.eval)) == (7, 4)
    assert not set(numbers(task.train)) & set(numbers(task.eval))
    assert numbers(task.train) != list(range(7))
    (everything,) = load({"tasks": [{"name": "a", "path": path, "eval_fraction": 0.5}]}, seed=1)
    assert set(numbers(task.train)) < set(numbers(everything.train))
    assert set(numbers(task.eval)) < set(numbers(everything.eval))


def test_dropped_rows_are_counted_by_reason_with_their_first_place(tmp_path):
    train = [*rows(2), {"prompt": "p", "response": ""}, {"prompt": "p" * 30, "response": "r"}, {"prompt": "p"}]
    test = [*rows(1), {"prompt": " ", "response": "r"}]
    paths = {"path": write(tmp_path / "a.jsonl", train), "eval_path": write(tmp_path / "e.jsonl", test)}
    (task,) = load({"tasks": [{"name": "a", **paths}], "max_length": 20})
    assert task.dropped == Counter({"no response": 2, "longer than max_length": 1})
    assert task.eval_dropped == Counter({"no prompt": 1})
    assert task.report() == (
        f"a: 2 training and 1 evaluation rows; dropped 4: 1 longer than max_length (first: {paths['path']}:4), "
        f"1 no prompt (first: {paths['eval_path']}:2), 2 no response (first: {paths['path']}:3)"
    )
    (task,) = load({"tasks": [{"name": "a", **paths}], "max_length": 20, "on_too_long": "truncate"})
    assert task.dropped == Counter({"no response": 2})
    assert task.truncated == 1
    assert task.report().endswith("; truncated 1")


@pytest.mark.parametrize(
    ("train", "options", "pattern"),
    [
        (
            [{"prompt": "p", "response": ""}] * 2,
            {},
            r"task 'a': no row is left; dropped: 2 no response \(first: .*:1\)",
        ),
        (rows(3), {"max_length": 8, "system_prompt": "x" * 9}, "no row is left; dropped: 3 longer than max_length"),
        (rows(1), {"eval_fraction": 0.5}, "eval_fraction 0.5 of 1 rows leaves no training row"),
        (rows(4), {"eval_fraction": 0.1}, "eval_fraction 0.1 of 4 rows leaves no evaluation row"),
    ],
)
def test_a_task_without_rows_is_an_error(tmp_path, train, options, pattern):
    length = {"max_length": options.pop("max_length")} if "max_length" in options else {}
    path = write(tmp_path / "a.jsonl", train)
    with pytest.raises(DataError, match=pattern):
        load({"tasks": [{"name": "a", "path": path, **options}], **length})


def test_evaluation_rows_that_all_drop_are_an_error(tmp_path):
    paths = {
        "path": write(tmp_path / "a.jsonl", rows(2)),
        "eval_path": write(tmp_path / "e.jsonl", [{"prompt": "p", "response": " "}]),
    }
    with pytest.raises(DataError, match=r"e\.jsonl: task 'a': no row is left"):
        load({"tasks": [{"name": "a", **paths}]})


@pytest.mark.parametrize(
    ("train", "test", "options", "pattern"),
    [
        (rows(2, task="a"), rows(1, task="b"), {}, r"e\.jsonl:1: task 'b' does not occur in .*Tasks: a"),
        (rows(2, task="a"), rows(1, task=3), {}, r"e\.jsonl:1: column 'task' must hold the task's name, found 3"),
        (rows(2, task="a"), rows(1), {}, r"e\.jsonl: no column 'task' \(task_column\)"),
        ([*rows(2, task="a"), *rows(1)], rows(1, task="a"), {}, r"t\.jsonl:3: column 'task' must hold .* None"),
        (
            rows(2, task="boolq"),
            rows(1, task="boolq"),
            {"metrics": {"bolq": "rouge_l"}},
            r"data\.metrics: .*no task 'bolq'; did you mean 'boolq'",
        ),
        (
            rows(2, task="a"),
            rows(1, task="a"),
            {"sampling": {"strategy": "weights", "weights": {"a": 1, "b": 1}}},
            r"data\.sampling\.weights: .*no task 'b'",
        ),
    ],
)
def test_single_file_refusals(tmp_path, train, test, options, pattern):
    data = {"path": write(tmp_path / "t.jsonl", train), "eval_path": write(tmp_path / "e.jsonl", test)}
    with pytest.raises(DataError, match=pattern):
        load({**data, "task_column": "task", **options})


def test_choices_of_metric_accuracy(tmp_path):
    def label(answer, **extra):
        return {"prompt": "p", "response": answer, **extra}

    path = write(tmp_path / "a.jsonl", [label(" yes"), label(" no"), label(" yes", options=["yes", "maybe"])])
    test = write(tmp_path / "e.jsonl", [label(" yes", options=["yes", "maybe"])])
    common = {"name": "a", "path": path, "eval_path": test, "metric": "accuracy"}
    assert load({"tasks": [common]})[0].eval[0].choices == ["no", "yes"]
    assert load({"tasks": [{**common, "choices": ["yes", "no", "so"]}]})[0].eval[0].choices == ["yes", "no", "so"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'options' holds nothing"):
        load({"tasks": [{**common, "choices": "options"}]})
    per_row = {**common, "path": test, "choices": "options"}
    assert load({"tasks": [per_row]})[0].eval[0].choices == ["yes", "maybe"]
    with pytest.raises(DataError, match=r"e\.jsonl:1: the response ' yes' is none of the choices \['no', 'so'\]"):
        load({"tasks": [{**common, "choices": ["no", "so"]}]})
    many = write(tmp_path / "m.jsonl", rows(101))
    with pytest.raises(DataError, match="finds 101 different responses; give `choices`"):
        load({"tasks": [{"name": "a", "path": many, "eval_fraction": 0.1, "metric": "accuracy"}]})


def test_csv_and_options_shared_by_all_tasks(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\ndo it,,42\n")
    (task,) = load({"tasks": [{"name": "a", "path": str(tmp_path / "a.csv")}], "system_prompt": "Be brief."})
    assert task.train[0].prompt_text == "Be brief.\n\n### Instruction:\ndo it\n\n### Response:\n"
    assert task.train[0].response_text == "42"
    own = {"name": "a", "path": str(tmp_path / "a.csv"), "system_prompt": None}
    (task,) = load({"tasks": [own], "system_prompt": "Be brief."})
    assert task.train[0].prompt_text.startswith("### Instruction")


def test_two_splits_of_a_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", rows(3))
    write(folder / "test.jsonl", rows(2))
    (task,) = load({"tasks": [{"name": "a", "path": str(folder), "eval_split": "test"}]})
    assert (len(task.train), len(task.eval)) == (3, 2)
