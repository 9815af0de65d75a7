"""Encoder-decoder models: blocks of both stacks, each with the tokens that it sees."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from conversion_helpers import (
    FAMILIES,
    ROUTERS,
    calibration_batches,
    converted,
    inputs_of,
    mixture_options,
    same_snapshot,
    snapshot,
)
from torch import Tensor

from moadapt.convert import convert_ffn_to_experts
from moadapt.errors import DataError

ENCODER = [name for name in FAMILIES["t5"].names() if name.startswith("encoder")]
DECODER = [name for name in FAMILIES["t5"].names() if name.startswith("decoder")]
CHOICES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({}, [*ENCODER, *DECODER]),
    "second_layers": ({"layers_to_transform": [1]}, [ENCODER[1], DECODER[1]]),
    "not_first": ({"expert": {"first_k_dense_replace": 1}}, [ENCODER[1], DECODER[1]]),
    "encoder": ({"target_modules": r"encoder\..*"}, ENCODER),
    "decoder": ({"exclude_modules": r"encoder\..*"}, DECODER),
}


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
@pytest.mark.parametrize("name", CHOICES)
def test_choice_of_stacks(family: str, name: str) -> None:
    more, names = CHOICES[name]
    model = converted(mixture_options(4, ROUTERS["top_2_renorm"], **more), family)
    assert list(model.injection.layers) == names
    assert {site.name: site.stream for site in model.injection.routers.values()} == {
        name: name.split(".")[0] for name in names
    }
    base = FAMILIES[family].model()
    before = snapshot(base)
    with torch.no_grad():
        want = base(**inputs_of(family)).logits
        got = model(**inputs_of(family)).logits
        assert (got - want).abs().max() > 1e-3
        with model.disable_adapter():
            reference.close(model(**inputs_of(family)).logits, want, 1e-5, "dense")
    same_snapshot(model.unload(), before)


def test_lists_per_layer_are_for_each_stack() -> None:
    model = converted(mixture_options([2, 5], {"kind": "top_k", "num_experts_per_tok": [1, 2]}), "t5")
    assert [site.router.num_experts for site in model.injection.routers.values()] == [2, 5, 2, 5]
    patterns = {"default": 2, "encoder.*": 4}
    model = converted(mixture_options(patterns, {"kind": "softmax"}), "t5")
    assert [site.router.num_experts for site in model.injection.routers.values()] == [4, 4, 2, 2]


def padded(rows: list[Tensor], answers: list[Tensor], length: int, answer_length: int, fill: int) -> dict[str, Tensor]:
    """Right-padded questions, and answers whose padding has no label."""
    ids = torch.full((len(rows), length), fill)
    mask, labels = torch.zeros_like(ids), torch.full((len(rows), answer_length), -100)
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
        labels[number, : len(answer)] = answer
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


LOSSES = [
    {"kind": "load_balance", "coef": 0.5},
    {"kind": "block_distillation", "coef": 0.5},
    {"kind": "logits_distillation", "coef": 0.5},
]


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_of_questions_and_answers(name: str) -> None:
    """Values of all losses, and logits at labels, with little and much padding in both stacks."""
    options = mixture_options(
        4, ROUTERS[name], expert={"trainable": True}, losses=LOSSES if name != "softmax" else LOSSES[1:]
    )
    model = converted(options, "t5_gated", torch.float64, calibration_batches(family="t5")).train()
    generator = torch.Generator().manual_seed(3)
    rows, answers = ([torch.randint(3, 40, (n,), generator=generator) for n in lengths] for lengths in ((6, 4), (3, 5)))
    found = []
    for length, answer_length, fill in ((6, 5, 0), (20, 9, 7)):
        inputs = padded(rows, answers, length, answer_length, fill)
        output = model(**inputs)
        found.append((output.logits[inputs["labels"] != -100], dict(model.last_losses)))
    reference.close(found[1][0], found[0][0], 1e-11, "logits")
    for kind, value in found[0][1].items():
        reference.close(found[1][1][kind], value, 1e-6, kind)


@pytest.mark.parametrize("split", ["activation_rate", "gradient", "coactivation"])
def test_calibration_records_each_stack_with_its_own_tokens(split: str) -> None:
    """Padding of either side changes nothing; without answers the decoder would see nothing."""
    options = mixture_options(4, ROUTERS["representative"], expert={"split": {"kind": split}})
    generator = torch.Generator().manual_seed(3)
    rows, answers = (
        [torch.randint(3, 40, (n,), generator=generator) for n in lengths]
        for lengths in ((9, 7, 8, 5, 6, 9), (5, 8, 3, 6, 7, 4))
    )
    tight, wide = (
        [padded(rows[i : i + 2], answers[i : i + 2], *sizes) for i in range(0, 6, 2)]
        for sizes in ((9, 8, 0), (15, 12, 0))
    )
    models = [converted(options, "t5", torch.float64, given) for given in (tight, wide)]
    for name, layer in models[0].injection.layers.items():
        other = models[1].injection.layers[name]
        assert torch.equal(other.experts.neuron_indices, layer.experts.neuron_indices), name
        reference.close(other.router.router.weight, layer.router.router.weight, 1e-6, name)
    base = FAMILIES["t5"].model()
    before = snapshot(base)
    with pytest.raises(DataError, match="labels"):
        convert_ffn_to_experts(base, options, [{k: v for k, v in item.items() if k != "labels"} for item in tight])
    same_snapshot(base, before)


@pytest.mark.parametrize("name", ["top_2_renorm", "sigmoid_ste", "norm_regression"])
def test_generation_with_batch_mates_and_cache(name: str) -> None:
    given = calibration_batches(family="t5")
    model = converted(mixture_options(4, ROUTERS[name]), "t5", torch.float64, given)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 40, (n,), generator=generator) for n in (6, 3)]
    inputs = padded(rows, rows, 6, 6, 0)
    inputs.pop("labels")
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    outputs = [model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*outputs)
    alone = model.generate(input_ids=rows[1][None], **options)
    assert torch.equal(outputs[0][1], alone[0]), "the batch mate changed the answer"
    beams = model.generate(**inputs, **options, num_beams=3)
    assert beams.shape[0] == 2
