"""One row of a table → the text of a prompt and a response, or a conversation.

Columns are found by their usual names when the config names none, in this order: `messages`; `prompt` with `response`
or `completion`; Alpaca's `instruction`, `input` (may be missing) and `output`. Plain text is a column that is named
(`text_column`), or the text of a .txt file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moadapt.errors import DataError
from moadapt.train.data_config import RowsConfig, fill_template, is_text_file, template_fields
from moadapt.train.sources import Row, Table

Message = dict[str, str]
Part = Callable[[int], "str | None"]

NO_PROMPT = "no prompt"
NO_RESPONSE = "no response"
NO_TEXT = "no text"
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


@dataclass(frozen=True, slots=True)
class TextRow:
    """A row as text.

    Attributes:
        row: index in its table.
        prompt: text before the response; of a conversation, empty.
        response: the answer that metrics compare with; of a conversation, the last assistant message; plain text.
        messages: the conversation up to the last assistant message, when the chat template is to be used.
        choices: the possible answers, for metric accuracy.
    """

    row: int
    prompt: str
    response: str
    messages: list[Message] | None
    choices: list[str] | None


class RowFormatter:
    """Turns the rows of one table into text.

    Raises:
        DataError: a column that the config names, or every usual one, is missing; lists those found.
    """

    def __init__(self, config: RowsConfig, table: Table) -> None:
        self.config = config
        self.table = table
        self.messages_column = self._find_messages()
        self.text: Part | None = None
        if config.is_text:
            # A .txt file has one column, whatever that of the other file is called.
            column = "text" if is_text_file(table.source) else config.text_column or "text"
            self.text = self._column(column, "text_column")
        elif self.messages_column is None:
            self.prompt, detected = self._find_prompt()
            self.response = self._find_response(detected)
        if isinstance(config.choices, str):
            table.require(_base(config.choices, table), "choices")

    def __call__(self, index: int) -> TextRow | str:
        """The row's text, or the reason why it is dropped.

        Raises:
            DataError: a value of the wrong type; names file and line.
        """
        if self.text is not None:
            text = self.text(index)
            return TextRow(index, "", text, None, None) if text is not None and text.strip() else NO_TEXT
        if self.messages_column is not None:
            return self._conversation(index, self.messages_column)
        prompt = self.prompt(index)
        if prompt is None or not prompt.strip():
            return NO_PROMPT
        response = self.response(index)
        if response is None or not response.strip():
            return NO_RESPONSE
        system = self.config.system_prompt
        if self.config.apply_chat_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return TextRow(index, "", response, self._with_system(messages), self._choices(index))
        if system is not None:
            prompt = f"{system}\n\n{prompt}"
        return TextRow(index, prompt, response, None, self._choices(index))

    def _find_messages(self) -> str | None:
        config = self.config
        if config.is_text:
            return None
        if config.messages_column is not None:
            self.table.require(config.messages_column, "messages_column")
            return config.messages_column
        named = (config.prompt_template, config.prompt_column, config.response_template, config.response_column)
        return "messages" if "messages" in self.table.columns and not any(named) else None

    def _find_prompt(self) -> tuple[Part, tuple[str, ...]]:
        """How to get the prompt, and the usual response columns that go with it."""
        columns = self.table.columns
        if self.config.prompt_template is not None:
            template = self._template("prompt_template", self.config.prompt_template)
            return template, ("response", "completion", "output")
        if self.config.prompt_column is not None:
            return self._column(self.config.prompt_column, "prompt_column"), ("response", "completion", "output")
        if "prompt" in columns:
            return self._column("prompt", "prompt_column"), ("response", "completion")
        if "instruction" in columns:
            return self._alpaca, ("output",)
        raise DataError(
            f"{self.table.source}: no column for the prompt (looked for messages, prompt, instruction); "
            f"set prompt_template or prompt_column, or text_column for plain text. Columns found: {', '.join(columns)}"
        )

    def _find_response(self, usual: tuple[str, ...]) -> Part:
        if self.config.response_template is not None:
            return self._template("response_template", self.config.response_template)
        if self.config.response_column is not None:
            return self._column(self.config.response_column, "response_column")
        for name in usual:
            if name in self.table.columns:
                return self._column(name, "response_column")
        raise DataError(
            f"{self.table.source}: no column for the response (looked for {', '.join(usual)}); "
            f"set response_template or response_column. Columns found: {', '.join(self.table.columns)}"
        )

    def _column(self, column: str, option: str) -> Part:
        self.table.require(_base(column, self.table), option)

        def part(index: int) -> str | None:
            value = self._value(index, column)
            if value is None or isinstance(value, str):
                return value
            wanted = f'{option.replace("column", "template")}: "{{{column}}}"'
            hint = f"; use {wanted}" if isinstance(value, (int, float)) and option != "text_column" else ""
            raise self._wrong(index, column, value, f"a string{hint}")

        return part

    def _template(self, option: str, template: str) -> Part:
        fields = template_fields(template)
        for field in fields:
            self.table.require(_base(field, self.table), option)

        def part(index: int) -> str | None:
            values = {}
            for field in fields:
                value = self._value(index, field)
                if value is None:
                    return None
                if not isinstance(value, (str, int, float)):
                    raise self._wrong(index, field, value, "a string or a number")
                values[field] = str(value)
            return fill_template(template, values)

        return part

    def _alpaca(self, index: int) -> str | None:
        texts = {}
        for column in ("instruction", "input"):
            value = self._value(index, column)
            if value is not None and not isinstance(value, str):
                raise self._wrong(index, column, value, "a string")
            texts[column] = (value or "").strip()
        instruction, given = texts["instruction"], texts["input"]
        if not instruction:
            return None
        if self.config.apply_chat_template:
            return f"{instruction}\n\n{given}" if given else instruction
        middle = f"### Input:\n{given}\n\n" if given else ""
        return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"

    def _conversation(self, index: int, column: str) -> TextRow | str:
        value = self._value(index, column)
        if value is None:
            return NO_RESPONSE
        if not isinstance(value, list):
            raise self._wrong(index, column, value, "a list of messages, each {role, content}")
        messages: list[Message] = []
        for number, message in enumerate(value, start=1):
            if not isinstance(message, dict):
                raise self._wrong(index, column, message, f"an object {{role, content}} as message {number}")
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise self._wrong(index, f"{column}: {key} of message {number}", message.get(key), "a string")
            messages.append({"role": message["role"], "content": message["content"]})
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages or not messages[-1]["content"].strip():
            return NO_RESPONSE
        messages = self._with_system(messages)
        if messages[0]["role"] == "assistant":
            raise DataError(
                f"{self.table.where(index)}: column {column!r}: the conversation starts with the assistant; "
                "put a user message before it, or set system_prompt"
            )
        return TextRow(index, "", messages[-1]["content"], messages, self._choices(index))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.config.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.config.system_prompt}, *messages]

    def _choices(self, index: int) -> list[str] | None:
        choices = self.config.choices
        if not isinstance(choices, str):
            return choices
        value = self._value(index, choices)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise self._wrong(index, choices, value, "a list of strings (the choices)")
        return value

    def _value(self, index: int, field: str) -> Any:
        """Value of a column, or of `column[key][0]` within it; None where the row has none."""
        row: Row = self.table.rows[index]
        base = _base(field, self.table)
        value = row.get(base)
        for key in re.findall(r"\[([^\[\]]+)\]", field[len(base) :]):
            if value is None:
                return None
            try:
                value = value[int(key)] if isinstance(value, list) else value.get(key)
            except (AttributeError, ValueError, IndexError):
                raise DataError(f"{self.table.where(index)}: {field!r}: there is no [{key}] in the value") from None
        return value

    def _wrong(self, index: int, column: str, value: Any, wanted: str) -> DataError:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        kind = "nothing" if value is None else type(value).__name__
        return DataError(f"{self.table.where(index)}: column {column!r} holds {kind} ({shown}), expected {wanted}")


def _base(field: str, table: Table) -> str:
    """The column of a field: the field itself, or what stands before `[key]`."""
    if field in table.columns:
        return field
    match = _FIELD.fullmatch(field)
    return match.group(1) if match else field
