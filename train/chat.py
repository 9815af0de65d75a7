"""A conversation → pieces of text, each marked as the assistant's or not, by the tokenizer's chat template.

The template is only rendered, never parsed: the assistant's turns are found by rendering growing beginnings of the
conversation, so any template works that writes a beginning the same way as the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moadapt.errors import DataError
from moadapt.train.templates import Message


@dataclass(slots=True)
class Piece:
    """A stretch of text, and its ids once they are known."""

    text: str
    is_response: bool
    ids: list[int] = field(default_factory=list)


def render(tokenizer: Any, messages: list[Message], where: str, *, add_generation_prompt: bool = False) -> str:
    """The conversation as text.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the tokenizer has no chat template. Use the chat version of the model, set "
            "tokenizer.chat_template, or give prompt and response columns instead"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # templates raise jinja's errors and, from their own code, any other
        raise DataError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from error


def end_marks(tokenizer: Any) -> tuple[str, ...]:
    """Texts of the special tokens, one of which ends an assistant's turn in most templates."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return tuple({token.content for token in added if token.special} | set(tokenizer.all_special_tokens))


def chat_pieces(tokenizer: Any, messages: list[Message], where: str, marks: tuple[str, ...]) -> list[Piece]:
    """Prompt and response pieces in turn, ending with the last assistant turn.

    A response runs to the end of its end-of-turn token; white space behind that is never generated, and belongs to
    the next prompt.

    Args:
        tokenizer: has the chat template.
        messages: begin with another role than the assistant, end with the assistant.
        where: place of the row, for messages.
        marks: `end_marks(tokenizer)`.

    Raises:
        DataError: the template renders a beginning differently from the whole, or fails.
    """
    full = render(tokenizer, messages, where)
    pieces: list[Piece] = []
    cursor = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], where, add_generation_prompt=True)
        after = render(tokenizer, messages[: index + 1], where)
        if not after.startswith(before):
            raise DataError(
                f"{where}: message {index + 1}: the tokenizer's chat template asks for an answer with "
                f"{before[-40:]!r}, which is not how it writes the answer in the conversation (some open a reasoning "
                "block there). Put that text into the message, or use another chat template"
            )
        if not full.startswith(after) or len(before) < cursor:
            raise DataError(
                f"{where}: message {index + 1}: the tokenizer's chat template renders the beginning of this "
                "conversation differently from the whole, so the assistant's tokens cannot be told apart. "
                "Keep one assistant message in each row, or use a chat template that leaves earlier turns alone"
            )
        body = full[len(before) : len(after)].rstrip()
        end = len(before) + len(body) if body.endswith(marks) else len(after)
        pieces += [Piece(full[cursor : len(before)], False), Piece(full[len(before) : end], True)]
        cursor = end
    return pieces
