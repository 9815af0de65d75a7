"""Examples → one padded batch.

Shapes: B batch, S longest row. Padding is given by the attention mask, never guessed from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moadapt.train.encoding import IGNORE, Example


class Collator:
    """Pads examples into a batch.

    Args:
        pad_token_id: fills `input_ids`; masked everywhere.
        padding_side: side of the padding of `input_ids` in training. Prompts for generation are always padded left.
        is_encoder_decoder: `input_ids` are the encoder's; `labels` are padded right on their own.
        pad_to_multiple_of: pad lengths up to a multiple of this.
        position_ids: add `position_ids` to training batches, counted from each row's first real token. Set it for
            causal models whose forward takes them: with left padding, models with learned positions (GPT-2) count
            from the padding otherwise. `generate` counts by itself.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_side: Literal["left", "right"] = "right",
        is_encoder_decoder: bool = False,
        pad_to_multiple_of: int | None = None,
        position_ids: bool = False,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be left or right (got {padding_side!r})")
        self.pad_token_id = pad_token_id
        self.padding_side: Literal["left", "right"] = padding_side
        self.is_encoder_decoder = is_encoder_decoder
        self.pad_to_multiple_of = pad_to_multiple_of
        self.position_ids = position_ids and not is_encoder_decoder

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A training batch.

        Returns:
            `input_ids`, `attention_mask` (B, S) int64; `labels` int64, (B, S) or for an encoder-decoder (B, longest
            response), -100 where there is no loss; `prompt_mask` (B, S) bool, True on real prompt tokens;
            `task_ids` (B,) int64. With the option, `position_ids` (B, S) int64, 0 on padding before a row.
        """
        batch = self._inputs(examples, [len(example.input_ids) for example in examples], self.padding_side)
        label_side = "right" if self.is_encoder_decoder else self.padding_side
        batch["labels"] = self._pad([example.labels for example in examples], IGNORE, label_side)
        if self.position_ids:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch

    def collate_prompts(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The prompts alone, padded left, for generation.

        Returns:
            `input_ids`, `attention_mask` (B, S) int64; `prompt_mask` (B, S) bool; `task_ids` (B,) int64.
        """
        return self._inputs(examples, [example.prompt_length for example in examples], "left")

    def _inputs(self, examples: Sequence[Example], lengths: list[int], side: str) -> dict[str, Tensor]:
        if not examples:
            raise ValueError("a batch needs at least one example")
        rows = list(zip(examples, lengths, strict=True))
        return {
            "input_ids": self._pad([example.input_ids[:n] for example, n in rows], self.pad_token_id, side),
            "attention_mask": self._pad([[1] * n for n in lengths], 0, side),
            "prompt_mask": self._pad([example.prompt_mask[:n] for example, n in rows], 0, side).bool(),
            "task_ids": torch.tensor([example.task_id for example in examples], dtype=torch.int64),
        }

    def _pad(self, rows: list[list[int]], value: int, side: str) -> Tensor:
        width = max(len(row) for row in rows)
        if self.pad_to_multiple_of is not None:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(rows), width), value, dtype=torch.int64)
        for padded_S, row in zip(padded, rows, strict=True):
            start = width - len(row) if side == "left" else 0
            padded_S[start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        return padded
