"""What a row gets from a converted model: not changed by padding, batch mates, later tokens, cache or recomputation.

Every router goes through the same checks, in float64: differences are then either rounding or another routing.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from conversion_helpers import FAMILIES, ROUTERS, UNTRAINED, by_router, converted, inputs_of, mixture_options
from tiny import VOCAB, gradients
from torch import Tensor

from moadapt import MixtureModel

TOLERANCE = 1e-11
LOSSES = [
    {"kind": "router_z", "coef": 0.1},
    {"kind": "block_distillation", "coef": 0.5},
    {"kind": "logits_distillation"},
]
_MODELS: dict[str, MixtureModel] = {}
every_router = pytest.mark.parametrize("name", ROUTERS)


def model_of(name: str) -> MixtureModel:
    """One model per router for all tests of this file; none of them changes it. With shared experts and padding."""
    if name not in _MODELS:
        expert = {"split": {"kind": "random"}, "num_shared_experts": 1, "padding": True, "lora": {"r": 2}}
        model = by_router(name, expert=expert)
        with torch.no_grad():
            for key, parameter in model.adapter_parameters():
                if ".experts." in key:
                    parameter.normal_(std=0.1)
        _MODELS[name] = model
    return _MODELS[name].eval()


def ids_of(*lengths: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str, length: int, fill: int = 0) -> dict[str, Tensor]:
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[number, where], mask[number, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def real_logits(model: MixtureModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    logits = model(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


@every_router
def test_padding_batch_mates_and_order(name: str) -> None:
    model, rows = model_of(name), ids_of(6, 3, 4)
    alone = [real_logits(model, padded([item], "right", len(item)))[0] for item in rows]
    for side in ("left", "right"):
        for length, fill in ((6, 0), (40, 7)):
            for number, got in enumerate(real_logits(model, padded(rows, side, length, fill))):
                reference.close(got, alone[number], TOLERANCE, f"{side} {length} row {number}")
    got = real_logits(model, padded([rows[2], rows[0]], "left", 8))
    reference.close(got[0], alone[2], TOLERANCE, "other order")
    reference.close(got[1], alone[0], TOLERANCE, "other order")
    many = real_logits(model, padded([*rows * 30], "left", 6))
    for number, got_TV in enumerate(many):
        reference.close(got_TV, alone[number % 3], TOLERANCE, f"row {number} of many")


@every_router
def test_later_tokens_do_not_matter(name: str) -> None:
    model = model_of(name)
    (long,), (other,) = ids_of(8), ids_of(8, seed=9)
    want = real_logits(model, padded([long[:5]], "right", 5))[0]
    for item in (long, torch.cat([long[:5], other[5:]])):
        reference.close(real_logits(model, padded([item], "right", 8))[0][:5], want, TOLERANCE, "prefix")


@every_router
def test_cache_gives_the_same_logits_step_by_step(name: str) -> None:
    model = model_of(name)
    everything = padded(ids_of(7, 5), "left", 7)
    prompt = {key: value[:, :4] for key, value in everything.items()}
    with torch.no_grad():
        whole = model(**everything).logits
        output = model(**prompt, use_cache=True)
        steps = [output.logits]
        for position in range(4, 7):
            output = model(
                input_ids=everything["input_ids"][:, position : position + 1],
                attention_mask=everything["attention_mask"][:, : position + 1],
                position_ids=everything["position_ids"][:, position : position + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            steps.append(output.logits)
    real = everything["attention_mask"].bool()
    reference.close(torch.cat(steps, 1)[real], whole[real], TOLERANCE, "logits")


@every_router
def test_generation_with_and_without_cache(name: str) -> None:
    model = model_of(name)
    prompts = padded(ids_of(5, 3), "left", 5)
    prompts.pop("position_ids")
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    outputs = [model.generate(**prompts, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert outputs[0].shape == (2, 9)
    assert torch.equal(*outputs)
    alone = model.generate(input_ids=ids_of(5, 3)[1][None], **options)
    assert torch.equal(outputs[0][1, 5:], alone[0, 3:]), "the batch mate changed the answer"


@every_router
@pytest.mark.parametrize("experts", ["trainable", "lora"])
def test_checkpointing_gives_the_same_gradients(name: str, experts: str) -> None:
    """Bit by bit, with losses on routings, blocks and logits."""
    expert: dict[str, Any] = {"trainable": True} if experts == "trainable" else {"lora": {"r": 2}}
    model = by_router(name, torch.float32, expert={"num_shared_experts": 1, "padding": True, **expert}, losses=LOSSES)
    model.train()
    inputs = inputs_of("llama", 3, 9)
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"][1, 5:] = -100
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        found.append((output.loss.detach(), gradients(model), dict(model.last_losses)))
    assert torch.equal(found[0][0], found[1][0])
    for kind, value in found[0][2].items():
        assert torch.equal(found[1][2][kind], value), kind
    assert found[0][1].keys() == found[1][1].keys()
    for key, gradient in found[0][1].items():
        assert torch.equal(found[1][1][key], gradient), key
    with_gradient = {key for key in found[0][1] if found[0][1][key].any()}
    assert any(".experts." in key for key in with_gradient)
    assert any(".router." in key for key in with_gradient) or name in UNTRAINED


@every_router
def test_gradients_do_not_depend_on_padding(name: str) -> None:
    """Right padding with labels of -100, the losses on: the same gradients."""
    expert = {"trainable": True, "num_shared_experts": 1, "padding": True}
    model = by_router(name, torch.float64, expert=expert, losses=LOSSES).train()
    rows = ids_of(5, 3)
    found = []
    for length, fill in ((5, 0), (30, 7)):
        inputs = padded(rows, "right", length, fill)
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        found.append((loss, gradients(model)))
    reference.close(found[1][0], found[0][0], 1e-6, "loss")  # the cross-entropy is fp32
    for key, gradient in found[0][1].items():
        if gradient.any():
            reference.close(found[1][1][key], gradient, 1e-5, key)
        else:
            assert not found[1][1][key].any(), key


@every_router
def test_deep_copies_are_independent(name: str) -> None:
    model, inputs = model_of(name), inputs_of("llama")
    with torch.no_grad():
        want = model(**inputs).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, want)
        with twin.disable_adapter():
            assert torch.equal(model(**inputs).logits, want)
            dense = twin(**inputs).logits
        for _, parameter in twin.adapter_parameters():
            parameter.zero_()
        base = twin.unload()
        reference.close(base(**inputs).logits, dense, TOLERANCE, "unloaded copy")
        assert torch.equal(model(**inputs).logits, want)
    with pytest.raises(AttributeError):
        _ = base.model.layers[0].mlp.experts


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi3", "t5", "t5_gated"])
@pytest.mark.parametrize("name", ["top_2_renorm", "sigmoid_ste"])
def test_families_with_and_without_cache_and_checkpointing(family: str, name: str) -> None:
    options = mixture_options(4, ROUTERS[name], expert={"trainable": True}, losses=LOSSES)
    model = converted(options, family, torch.float64)
    inputs = inputs_of(family)
    prompts = {key: value for key, value in inputs.items() if key != "labels"}
    prompts["attention_mask"][1, :2] = 0
    generation: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    outputs = [model.generate(**prompts, **generation, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*outputs)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append(gradients(model))
    for key, gradient in found[0].items():
        assert torch.equal(found[1][key], gradient), key
        assert gradient.any(), key


def test_a_pass_in_half_precision_is_near_the_one_in_full() -> None:
    """The same gates of fp32 over bf16 experts: rounding, and no other experts but at near ties."""
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = converted(mixture_options(4, ROUTERS["softmax"]), dtype=dtype)
        with torch.no_grad():
            logits.append(model(**inputs_of("llama")).logits.float())
        router = next(iter(model.injection.routers.values())).router
        assert router.weight.dtype == torch.float32
        assert FAMILIES["llama"].model(dtype).dtype == dtype
    reference.close(logits[1], logits[0], 0.06, "logits")
