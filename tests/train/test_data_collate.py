"""The collator against a per-row expectation, both padding sides, and encoder-decoder batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from moadapt.train.collate import Collator
from moadapt.train.encoding import Example

PAD = 7


def example(ids, prompt_length, task_id=0, labels=None, mask=None):
    labels = labels if labels is not None else [-100] * prompt_length + ids[prompt_length:]
    mask = mask if mask is not None else [1] * prompt_length + [0] * (len(ids) - prompt_length)
    return Example(ids, prompt_length, task_id, 0, labels, "", "", mask)


@st.composite
def examples(draw):
    rows = []
    for task_id in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.integers(0, 20), min_size=2, max_size=9))
        rows.append(example(ids, draw(st.integers(1, len(ids) - 1)), task_id))
    return rows


@given(examples(), st.sampled_from(["left", "right"]), st.sampled_from([None, 4]))
def test_every_row_survives_padding(rows, side, multiple):
    batch = Collator(PAD, side, pad_to_multiple_of=multiple)(rows)
    longest = max(len(row.input_ids) for row in rows)
    width = longest if multiple is None else (longest + 3) // 4 * 4
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "prompt_mask": torch.bool,
        "labels": torch.int64,
        "task_ids": torch.int64,
    }
    assert batch["task_ids"].tolist() == [row.task_id for row in rows]
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        real = range(width - length, width) if side == "left" else range(length)
        for column in range(width):
            cell = tuple(batch[name][index, column].item() for name in ("input_ids", "attention_mask"))
            marks = tuple(batch[name][index, column].item() for name in ("labels", "prompt_mask"))
            if column in real:
                at = column - real.start
                assert cell == (row.input_ids[at], 1)
                assert marks == (row.labels[at], bool(row.prompt_mask[at]))
            else:
                assert cell == (PAD, 0)
                assert marks == (-100, False)


def test_a_real_token_equal_to_the_pad_token_is_not_masked():
    batch = Collator(PAD)([example([PAD, 3, PAD], 1), example([1, 2, 3, PAD, PAD], 2)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 3, PAD, -100, -100], [-100, -100, 3, PAD, PAD]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_for_generation_are_padded_left(side):
    rows = [example([1, 2, 3, 4], 3, 5), example([8, 9], 1, 6)]
    batch = Collator(PAD, side).collate_prompts(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [PAD, PAD, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["prompt_mask"].tolist() == [[True, True, True], [False, False, True]]
    assert batch["task_ids"].tolist() == [5, 6]
    assert "labels" not in batch


def test_encoder_decoder_labels_are_padded_on_their_own():
    rows = [example([1, 2, 3], 3, labels=[4], mask=[1, 1, 1]), example([5], 1, labels=[6, 7], mask=[1])]
    batch = Collator(PAD, "left", is_encoder_decoder=True)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [PAD, PAD, 5]]
    assert batch["labels"].tolist() == [[4, -100], [6, 7]]
    assert batch["prompt_mask"].tolist() == [[True] * 3, [False, False, True]]
    prompts = Collator(PAD, "right", is_encoder_decoder=True).collate_prompts(rows)
    assert prompts["input_ids"].tolist() == [[1, 2, 3], [PAD, PAD, 5]]


def test_left_and_right_padding_give_learned_positions_the_same_loss():
    torch.manual_seed(0)
    options = {"bos_token_id": 1, "eos_token_id": 2, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, **options)).eval()
    rows = [example([3, 4, 5, 6, 8, 9], 3), example([8, 9, 4], 1)]
    losses = []
    for side in ("left", "right"):
        batch = Collator(PAD, side, position_ids=True)(rows)
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        losses.append(model(**{name: batch[name] for name in names}).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 2, 2, 2]
    assert "position_ids" not in Collator(PAD, is_encoder_decoder=True, position_ids=True)(rows)


def test_refusals():
    with pytest.raises(ValueError, match="padding_side"):
        Collator(PAD, "middle")
    with pytest.raises(ValueError, match="at least one"):
        Collator(PAD)([])
