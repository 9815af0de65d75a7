"""Rows → text: templates, named columns, Alpaca, conversations, and what is refused."""

from __future__ import annotations

import pytest

from moadapt.errors import DataError
from moadapt.train.data_config import RowsConfig
from moadapt.train.sources import Table
from moadapt.train.templates import NO_PROMPT, NO_RESPONSE, RowFormatter


def table(*rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table("data.jsonl", columns, list(rows), list(range(1, len(rows) + 1)))


def text(row, **options):
    return RowFormatter(RowsConfig(**options), table(row))(0)


def pair(row, **options):
    result = text(row, **options)
    return result if isinstance(result, str) else (result.prompt, result.response)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"prompt": "p", "response": "r"}, {}, ("p", "r")),
        ({"prompt": "p", "completion": "r"}, {}, ("p", "r")),
        ({"prompt": "p", "label": "r"}, {"response_column": "label"}, ("p", "r")),
        ({"q": "p", "output": "r"}, {"prompt_column": "q"}, ("p", "r")),
        ({"instruction": "do", "output": "r"}, {}, ("### Instruction:\ndo\n\n### Response:\n", "r")),
        ({"instruction": "do", "input": None, "output": "r"}, {}, ("### Instruction:\ndo\n\n### Response:\n", "r")),
        (
            {"instruction": " do ", "input": "x", "output": "r"},
            {},
            ("### Instruction:\ndo\n\n### Input:\nx\n\n### Response:\n", "r"),
        ),
        (
            {"question": "why", "answer": "so"},
            {"prompt_template": "Question: {question}\nAnswer:", "response_template": " {answer}"},
            ("Question: why\nAnswer:", " so"),
        ),
        (
            {"a": 2, "b": 0.5, "c": True},
            {"prompt_template": "{{{a}}} + {b} =", "response_template": "{c}"},
            ("{2} + 0.5 =", "True"),
        ),
        (
            {"q": {"text": ["w", "x"]}, "a[b]": "y"},
            {"prompt_template": "{q[text][1]}", "response_template": "{a[b]}"},
            ("x", "y"),
        ),
        ({"prompt": "p", "response": "r"}, {"system_prompt": "Be brief."}, ("Be brief.\n\np", "r")),
        ({"prompt": "p", "response": ""}, {}, NO_RESPONSE),
        ({"prompt": "p", "response": " \n"}, {}, NO_RESPONSE),
        ({"prompt": "p", "response": None}, {}, NO_RESPONSE),
        ({"prompt": "", "response": "r"}, {}, NO_PROMPT),
        ({"instruction": "", "input": "x", "output": "r"}, {}, NO_PROMPT),
        ({"q": None, "response": "r"}, {"prompt_template": "Q: {q}"}, NO_PROMPT),
    ],
)
def test_prompt_and_response(row, options, expected):
    assert pair(row, **options) == expected


def test_a_key_missing_in_one_row_is_no_response():
    formatter = RowFormatter(RowsConfig(), table({"prompt": "p", "response": "r"}, {"prompt": "q"}))
    assert formatter(1) == NO_RESPONSE


def test_messages_win_over_other_columns_and_end_with_the_last_answer():
    row = {"prompt": "p", "messages": [user("a"), assistant("b"), user("c")]}
    result = text(row)
    assert result.messages == [user("a"), assistant("b")]
    assert result.response == "b"
    assert text({"chat": [user("a")]}, messages_column="chat") == NO_RESPONSE
    assert text({"messages": None}) == NO_RESPONSE
    assert text({"messages": [user("a"), assistant("")]}) == NO_RESPONSE


def test_system_prompt_in_a_conversation():
    system = {"role": "system", "content": "S"}
    assert text({"messages": [user("a"), assistant("b")]}, system_prompt="S").messages[0] == system
    own = {"role": "system", "content": "own"}
    assert text({"messages": [own, user("a"), assistant("b")]}, system_prompt="S").messages[0] == own


def test_pairs_as_one_chat_turn():
    row = {"instruction": "do", "input": "x", "output": "r"}
    assert text(row, apply_chat_template=True).messages == [user("do\n\nx"), assistant("r")]
    assert text({"prompt": "p", "response": "r"}, apply_chat_template=True, system_prompt="S").messages == [
        {"role": "system", "content": "S"},
        user("p"),
        assistant("r"),
    ]


def test_choices_of_a_row():
    row = {"prompt": "p", "response": "r", "options": ["r", "s"], "c": {"text": ["t"]}}
    assert text(row, choices=["a", "b"]).choices == ["a", "b"]
    assert text(row, choices="options").choices == ["r", "s"]
    assert text(row, choices="c[text]").choices == ["t"]
    with pytest.raises(DataError, match=r"data.jsonl:1: column 'prompt' holds str .*list of strings"):
        text(row, choices="prompt")


@pytest.mark.parametrize(
    ("row", "options", "pattern"),
    [
        ({"a": "x", "b": "y"}, {}, "no column for the prompt.*Columns found: a, b"),
        ({"prompt": "x", "b": "y"}, {}, "no column for the response.*Columns found: prompt, b"),
        ({"instruction": "x", "response": "y"}, {}, "no column for the response.*output"),
        ({"prompt": "x", "response": "y"}, {"prompt_template": "{q}"}, r"no column 'q' \(prompt_template\)"),
        ({"prompt": "x", "response": "y"}, {"response_column": "q"}, r"no column 'q' \(response_column\)"),
        ({"prompt": "x", "response": "y"}, {"messages_column": "q"}, r"no column 'q' \(messages_column\)"),
        ({"prompt": "x", "response": "y"}, {"choices": "q"}, r"no column 'q' \(choices\)"),
        (
            {"prompt": "x", "response": 3},
            {},
            r"data.jsonl:1: column 'response' holds int \(3\), expected a string; use response_template: .\{response\}",
        ),
        ({"prompt": ["x"], "response": "y"}, {}, r"data.jsonl:1: column 'prompt' holds list"),
        ({"a": {"b": 1}, "response": "y"}, {"prompt_template": "{a}"}, "expected a string or a number"),
        ({"a": {"b": 1}, "response": "y"}, {"prompt_template": "{a[b][c]}"}, r"data.jsonl:1: .*there is no \[c\]"),
        ({"a": [1], "response": "y"}, {"prompt_template": "{a[4]}"}, r"data.jsonl:1: .*there is no \[4\]"),
        ({"instruction": 3, "output": "y"}, {}, "column 'instruction' holds int"),
        ({"messages": "hi"}, {}, "expected a list of messages"),
        ({"messages": ["hi"]}, {}, r"expected an object \{role, content\} as message 1"),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, {}, "content of message 2.*nothing"),
        ({"messages": [assistant("a")]}, {}, "starts with the assistant"),
    ],
)
def test_refusals(row, options, pattern):
    with pytest.raises(DataError, match=pattern):
        text(row, **options)
