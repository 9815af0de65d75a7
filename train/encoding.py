"""Text → token ids, with a mark on every token that belongs to a response.

A row is a sequence of pieces: prompt, response, and for a conversation further prompts and responses. Each piece is
tokenised on its own, so the ids of a prompt never depend on the response, and at generation the model sees exactly
the ids it was trained on. Some tokenizers put a space before every text they are given (Llama 2's, SentencePiece
models). A later piece must not get that space: there it is tokenised behind a short anchor text whose ids are then
cut off, so that the ids of all pieces together spell the pieces' text.

A row always begins with tokens of a prompt: prompt-level routing makes each decision from the prompt tokens before an
answer, and an answer whose prompt is cut off would have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from moadapt.errors import DataError
from moadapt.train.chat import Piece, chat_pieces, end_marks, render
from moadapt.train.data_config import DataConfig
from moadapt.train.sources import Table
from moadapt.train.templates import NO_PROMPT, NO_RESPONSE, Message, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label of a token without loss
TOO_LONG = "longer than max_length"
NO_PROMPT_LEFT = "longer than max_length, and cut to it without any prompt"
_CHUNK = 1000
_PART = 100_000
_LINE_START = re.compile(r"(?<=\n)(?=\S)")
_ANCHORS = ("\n", ":", "=", "|")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: prompt and response; for an encoder-decoder model the prompt alone.
        prompt_length: number of leading tokens that generation starts from: all before the (last) response.
        task_id: index of the task.
        row: index of the row in its file or data set, from 0.
        labels: as long as `input_ids`, -100 where there is no loss; for an encoder-decoder model the response.
        prompt_text: the prompt as text.
        response_text: the reference for metrics.
        prompt_mask: as long as `input_ids`; 1 on prompt tokens, in a conversation on all but the assistant's. A run of
            prompt tokens with the answer behind it is one turn. 0 everywhere for plain text.
        choices: the possible answers, for metric accuracy.
    """

    input_ids: list[int]
    prompt_length: int
    task_id: int
    row: int
    labels: list[int]
    prompt_text: str
    response_text: str
    prompt_mask: list[int]
    choices: list[str] | None = None


class Encoder:
    """Tokenises rows by the options of the `data` section.

    Raises:
        DataError: the tokenizer has no end or beginning token where one is asked for.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, is_encoder_decoder: bool = False
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.config = config
        self.is_encoder_decoder = is_encoder_decoder
        if is_encoder_decoder and config.train_on_prompt:
            raise DataError("data.train_on_prompt: an encoder-decoder model has no loss on its prompt; remove it")
        self.bos_id: int | None = self.tokenizer.bos_token_id
        self.eos_id = end_token_id(tokenizer, config)
        self.before, self.after = self._special_tokens()
        first = self.tokenizer.convert_ids_to_tokens(self._plain(["x"])[0][:1])
        self.adds_space = bool(first) and first[0][:1] in ("▁", "Ġ")
        self.end_marks = end_marks(tokenizer)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt on its own, as training sees them: for generation from new prompts."""
        ids = self._start(self._plain([text])[0])
        return ids + self.after if self.is_encoder_decoder else ids

    def encode_messages(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation that waits for the assistant's answer.

        Raises:
            DataError: the tokenizer has no chat template, or it refuses these messages.
        """
        text = render(self.tokenizer, messages, "messages", add_generation_prompt=True)
        ids = self._plain([text])[0]
        return self._add_bos(ids) + (self.after if self.is_encoder_decoder else [])

    def encode_text(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Ids of plain text without special tokens; a long text goes through the tokenizer in parts, at line ends.

        Args:
            text: any length.
            max_tokens: stop behind the part in which so many are reached.
        """
        ids: list[int] = []
        for number, part in enumerate(_parts(text)):
            ids += self._plain([part])[0] if number == 0 else self._continued([part])[0]
            if max_tokens is not None and len(ids) >= max_tokens:
                break
        n = len(self.before)
        return ids[n:] if n and ids[:n] == self.before else ids

    def encode(self, rows: Sequence[TextRow], task_id: int, table: Table) -> Iterator[tuple[Example, bool] | str]:
        """For every row its example and whether it was truncated, or the reason why it is dropped."""
        iterator = iter(rows)
        while chunk := list(islice(iterator, _CHUNK)):
            pieces = [self._pieces(row, table) for row in chunk]
            if self.is_encoder_decoder:
                pieces = [_prompt_and_response(row_pieces) for row_pieces in pieces]
            self._tokenise(pieces)
            for row, row_pieces in zip(chunk, pieces, strict=True):
                yield self._example(row, row_pieces, task_id)

    def _pieces(self, row: TextRow, table: Table) -> list[Piece]:
        if row.messages is None:
            return [Piece(row.prompt, False), Piece(row.response, True)]
        return chat_pieces(self.tokenizer, row.messages, table.where(row.row), self.end_marks)

    def _tokenise(self, rows: list[list[Piece]]) -> None:
        first = [row[0] for row in rows]
        for piece, ids in zip(first, self._plain([piece.text for piece in first]), strict=True):
            piece.ids = ids
        later = [piece for row in rows for piece in row[1:]]
        texts = [piece.text for piece in later]
        encoded = self._plain(texts) if self.is_encoder_decoder else self._continued(texts)
        for piece, ids in zip(later, encoded, strict=True):
            piece.ids = ids

    def _plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _continued(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that follow other text, without the space that some tokenizers put before a text."""
        if not self.adds_space:
            return self._plain(texts)
        result: list[list[int] | None] = [None] * len(texts)
        for anchor in _ANCHORS:
            open_rows = [index for index, ids in enumerate(result) if ids is None]
            if not open_rows:
                break
            head = self._plain([anchor])[0]
            for index, ids in zip(open_rows, self._plain([anchor + texts[i] for i in open_rows]), strict=True):
                if head and ids[: len(head)] == head:  # the text's beginning did not merge with the anchor
                    result[index] = ids[len(head) :]
        return [ids if ids is not None else self._plain([text])[0] for ids, text in zip(result, texts, strict=True)]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after a text."""
        plain = self._plain(["x"])[0]
        full = list(self.tokenizer(["x"], return_attention_mask=False)["input_ids"][0])
        start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
        if start is None:
            raise DataError(
                "the tokenizer gives a text other ids once it adds its special tokens; that is not supported"
            )
        before, after = full[:start], full[start + len(plain) :]
        if self.config.add_bos is None:
            return before, after
        if self.config.add_bos and self.bos_id is None:
            raise DataError("data.add_bos: the tokenizer has no beginning token; remove the option")
        return [self.bos_id] if self.config.add_bos and self.bos_id is not None else [], after

    def _start(self, ids: list[int]) -> list[int]:
        """The ids behind the tokenizer's leading special tokens, unless the text itself begins with them."""
        n = len(self.before)
        return ids if n and ids[:n] == self.before else self.before + ids

    def _add_bos(self, ids: list[int]) -> list[int]:
        """A rendered conversation: the template rules over the beginning token, unless `add_bos` is set."""
        if self.config.add_bos is None:
            return ids
        if self.config.add_bos:
            return self._start(ids)
        return ids[1:] if ids[:1] == [self.bos_id] else ids

    def _example(self, row: TextRow, pieces: list[Piece], task_id: int) -> tuple[Example, bool] | str:
        last = pieces[-1]
        for piece, reason in ((last, NO_RESPONSE), (pieces[0], NO_PROMPT)):
            if not piece.ids:
                return reason  # the tokenizer knows none of its characters
        pieces[0].ids = self._start(pieces[0].ids) if row.messages is None else self._add_bos(pieces[0].ids)
        if self.is_encoder_decoder:
            pieces[0].ids = pieces[0].ids + self.after
            last.ids = self._start(last.ids)
        ended = row.messages is not None and last.text.endswith(self.end_marks)
        if self.eos_id is not None and not ended and last.ids[-1:] != [self.eos_id]:
            last.ids = [*last.ids, self.eos_id]
        prompt_text = row.prompt if row.messages is None else "".join(piece.text for piece in pieces[:-1])
        if self.is_encoder_decoder:
            return self._encoder_decoder_example(row, prompt_text, pieces, task_id)
        ids = [token for piece in pieces for token in piece.ids]
        mask = [int(not piece.is_response) for piece in pieces for _ in piece.ids]
        prompt_length = len(ids) - len(last.ids)
        too_long = len(ids) > self.config.max_length
        if too_long:
            if self.config.on_too_long == "drop":
                return TOO_LONG
            keep = _kept(ids, mask, prompt_length, self.config.max_length, self.bos_id)
            if not keep:
                return NO_PROMPT_LEFT
            prompt_length = sum(index < prompt_length for index in keep)
            ids, mask = [ids[index] for index in keep], [mask[index] for index in keep]
        if self.config.train_on_prompt:
            labels = list(ids)
        else:
            labels = [IGNORE if is_prompt else token for token, is_prompt in zip(ids, mask, strict=True)]
        example = Example(ids, prompt_length, task_id, row.row, labels, prompt_text, row.response, mask, row.choices)
        return example, too_long

    def _encoder_decoder_example(
        self, row: TextRow, prompt_text: str, pieces: list[Piece], task_id: int
    ) -> tuple[Example, bool] | str:
        prompt, response = pieces[0].ids, pieces[-1].ids
        limit = self.config.max_length
        too_long = len(prompt) > limit or len(response) > limit
        if too_long and self.config.on_too_long == "drop":
            return TOO_LONG
        prompt, response = prompt[-limit:], response[:limit]
        example = Example(
            prompt, len(prompt), task_id, row.row, response, prompt_text, row.response, [1] * len(prompt), row.choices
        )
        return example, too_long


def end_token_id(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> int | None:
    """Id of the token that ends every response, for training and to stop generation; None with `add_eos: false`.

    Raises:
        DataError: `eos_token` is not in the vocabulary, or none is given and the tokenizer has none.
    """
    if not config.add_eos:
        return None
    token = config.eos_token
    if token is None:
        if tokenizer.eos_token_id is None:
            raise DataError("data.eos_token: the tokenizer has no end token; name one, or set add_eos: false")
        return int(tokenizer.eos_token_id)
    if isinstance(token, int):
        if not 0 <= token < len(tokenizer):
            raise DataError(f"data.eos_token: id {token} is outside the vocabulary of {len(tokenizer)} tokens")
        return token
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise DataError(f"data.eos_token: {token!r} is not a token of the vocabulary")
    return int(vocabulary[token])


def _parts(text: str) -> Iterator[str]:
    """Parts of some 100,000 characters that begin with a line which does not begin with white space.

    Few tokenizers join such a line's beginning with what stands before it, and the text is the same in any case.
    """
    start = 0
    while len(text) - start > _PART:
        match = _LINE_START.search(text, start + _PART)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _prompt_and_response(pieces: list[Piece]) -> list[Piece]:
    """All pieces before the last as one prompt: an encoder-decoder learns the last response only."""
    return [Piece("".join(piece.text for piece in pieces[:-1]), False), pieces[-1]]


def _kept(ids: list[int], mask: list[int], prompt_length: int, limit: int, bos_id: int | None) -> list[int]:
    """Positions that stay when a row is cut to `limit` tokens.

    All before the last response loses tokens on its left (its beginning token stays) down to half of `limit`. Where
    that ends within an earlier answer, the rest of this answer goes too, so that the row begins with a prompt. Then the
    last response loses tokens on its right.

    Returns:
        The positions; none where no token of a prompt would be left.
    """
    excess = len(ids) - limit
    first = int(bool(ids) and ids[0] == bos_id and prompt_length > 0)
    cut = first + min(excess, max(prompt_length - limit // 2, 0))
    start = next((index for index in range(cut, prompt_length) if mask[index]), None)
    return [] if start is None else [*range(first), *range(start, len(ids))][:limit]
