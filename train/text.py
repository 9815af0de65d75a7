"""Plain text: documents → rows whose every token is learned, and batches for calibration and perplexity.

A row begins as the tokenizer begins a text (with its beginning token, where it has one); a document that is longer than
a row goes on in the next one, which begins in the same way. So with a beginning token each token of a text is predicted
exactly once, whatever `max_length` is; without one, the first of each row is not. A document ends with the end token.
With `packing` the next document goes on in the same row, and attention sees over the border, as in transformers'
`run_clm`; without it, documents share no row. No token is left out, the last row may be short.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from moadapt.errors import DataError
from moadapt.registry import Config, closest
from moadapt.train.collate import Collator
from moadapt.train.data_config import DataConfig, RowsConfig, TaskConfig, is_text_file, resolved
from moadapt.train.encoding import IGNORE, Encoder, Example
from moadapt.train.sources import Table, read_table
from moadapt.train.templates import RowFormatter, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEARCHED = 2000  # characters behind the wanted place in which a line may end


class CalibrationConfig(Config):
    """Text that a model reads while its feed-forward blocks are split.

    Attributes:
        path: a .txt file, or a file or data set with a column of text, or with prompts and responses.
        text_column: that column; null: `text`, where there are no prompts and responses.
        sample_by: what one document of a .txt file is: all of it (null), a `paragraph`, or a `line`.
        max_length: tokens of one row; longer documents go on in the next row.
        max_tokens: tokens that are read, from the beginning of the file on.
        batch_size: rows at a time.
    """

    path: str = Field(min_length=1)
    text_column: str | None = None
    sample_by: Literal["document", "paragraph", "line"] | None = None
    max_length: int = Field(default=512, ge=8)
    max_tokens: int = Field(default=32768, ge=1)
    batch_size: int = Field(default=8, ge=1)

    def resolve(self, base_dir: str | Path) -> CalibrationConfig:
        """A copy whose path is absolute where it exists: first under `base_dir`, then where we run."""
        return self.model_copy(update={"path": resolved(self.path, Path(base_dir))})


def text_examples(
    documents: Iterable[TextRow], encoder: Encoder, task_id: int, *, packing: bool, max_tokens: int | None = None
) -> Iterator[Example]:
    """Rows of up to `max_length` tokens, all of them labelled but the beginning tokens.

    Args:
        documents: their text is `response`.
        encoder: tokenises, and knows the length and the special tokens.
        task_id: index of the task.
        packing: let documents share rows.
        max_tokens: read about so many tokens of each document, at most.
    """
    limit, before = encoder.config.max_length, encoder.before
    end = [] if encoder.eos_id is None else [encoder.eos_id]
    masks: dict[int, list[int]] = {}
    ids: list[int] = []
    labels: list[int] = []
    row = 0

    def example() -> Iterator[Example]:
        if any(label != IGNORE for label in labels[1:]):  # else there is nothing to predict
            mask = masks.setdefault(len(ids), [0] * len(ids))
            yield Example(ids, 0, task_id, row, labels, "", "", mask)

    for document in documents:
        text = encoder.encode_text(document.response, max_tokens) + end
        done = 0
        while done < len(text):
            if len(ids) + len(before) >= limit or (ids and not packing):
                yield from example()
                ids, labels = [], []
            row = row if ids else document.row
            taken = text[done : done + limit - len(ids) - len(before)]
            done += len(taken)
            ids = [*ids, *before, *taken]
            labels = [*labels, *(IGNORE for _ in before), *taken]
    yield from example()


def split_document(document: TextRow, fraction: float, table: Table) -> tuple[list[TextRow], list[TextRow]]:
    """Of a single text, the end is for evaluation, from the next line (or else word) on.

    Args:
        document: the text.
        fraction: share of its characters for evaluation.
        table: where it is from.

    Raises:
        DataError: one of both is empty.
    """
    text = document.response
    wanted = int(len(text) * (1 - fraction))
    ends = (text.find(mark, wanted, wanted + _SEARCHED) + 1 for mark in ("\n", " "))
    cut = next((end for end in ends if 0 < end < len(text)), 0)
    if not text[:cut].strip() or not text[cut:].strip():
        raise DataError(f"{table.source}: the text is too short for eval_fraction {fraction}; give eval_path")
    first, second = (TextRow(document.row, "", part, None, None) for part in (text[:cut], text[cut:]))
    return [first], [second]


def text_batches(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str | None = None,
    sample_by: str | None = None,
    max_length: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    is_encoder_decoder: bool = False,
) -> list[dict[str, Tensor]]:
    """The beginning of a file as batches for a model, without end tokens: the text alone.

    Args:
        path: a .txt file, or a file or data set with a column of text, or with prompts and responses (which are joined
            as in training).
        tokenizer: the model's.
        text_column: the column of text; None takes `text` where there are no prompts and responses.
        sample_by: what one document of a .txt file is; None means all of it.
        max_length: tokens of a row.
        max_tokens: real tokens in all, at most; None for the whole file.
        batch_size: rows of a batch; rows of like length share one.
        is_encoder_decoder: a document's first half is the encoder's, and the second half the labels.

    Returns:
        `input_ids` and `attention_mask` (B, S) int64, and `labels` with -100 where nothing is predicted.

    Raises:
        DataError: the file cannot be used, or there is no text in it.
    """
    options = {"max_length": max_length, "on_too_long": "truncate", "add_eos": False}
    options["train_on_prompt"] = not is_encoder_decoder
    table = read_table(path, sample_by=sample_by)
    column = _text_column(table, path, text_column)
    given = {"name": "text", "path": path, "text_column": column}
    task = TaskConfig.model_validate(given if sample_by is None else given | {"sample_by": sample_by})
    encoder = Encoder(tokenizer, DataConfig(tasks=[task], **options), is_encoder_decoder=is_encoder_decoder)
    rows = _examples(table, task, encoder, max_tokens)
    if not rows:
        raise DataError(f"{table.source}: there is no text in it")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = Collator(pad or 0, "right", is_encoder_decoder)
    rows = sorted(rows, key=lambda example: -len(example.input_ids))
    batches = [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in batches]


def _text_column(table: Table, path: str, given: str | None) -> str | None:
    """The column of plain text; None where the rows have prompts and responses."""
    if given is not None:
        table.require(given, "text_column")
        return given
    if is_text_file(path) or {"messages", "prompt", "instruction"} & set(table.columns):
        return None
    if "text" in table.columns:
        return "text"
    raise DataError(
        f"{table.source}: no text (looked for the columns text, messages, prompt, instruction); name its column"
        f"{closest('text', table.columns)} Columns found: {', '.join(table.columns)}"
    )


def _examples(table: Table, task: RowsConfig, encoder: Encoder, max_tokens: int | None) -> list[Example]:
    """The first rows, up to the limit; the last one is cut to it."""
    texts = (RowFormatter(task, table)(index) for index in range(len(table.rows)))
    documents = (text for text in texts if isinstance(text, TextRow))
    rows: Iterator[Example]
    if task.is_text and not encoder.is_encoder_decoder:
        rows = text_examples(documents, encoder, 0, packing=False, max_tokens=max_tokens)
    else:
        rows = _encoded(documents, encoder, table, halves=task.is_text)
    kept: list[Example] = []
    left = max_tokens
    for row in rows:
        if left is not None:
            row = _cut(row, left, encoder.is_encoder_decoder)
            left -= len(row.input_ids)
        kept.append(row)
        if left is not None and left <= 1:
            break
    return kept


def _encoded(documents: Iterable[TextRow], encoder: Encoder, table: Table, *, halves: bool) -> Iterator[Example]:
    """Examples with prompt and response; of plain text the two halves."""
    while chunk := list(islice(documents, 64)):
        if halves:
            chunk = [_halves(row, encoder.config.max_length) for row in chunk]
        for result in encoder.encode(chunk, 0, table):
            if not isinstance(result, str):
                yield result[0]


def _halves(row: TextRow, max_length: int) -> TextRow:
    words = row.response.split()[: 2 * max_length]
    middle = (len(words) + 1) // 2
    return TextRow(row.row, " ".join(words[:middle]), " ".join(words[middle:]), None, None)


def _cut(row: Example, length: int, is_encoder_decoder: bool) -> Example:
    labels = row.labels if is_encoder_decoder else row.labels[:length]
    ids, mask = row.input_ids[:length], row.prompt_mask[:length]
    return Example(ids, min(row.prompt_length, length), row.task_id, row.row, labels, "", "", mask)
