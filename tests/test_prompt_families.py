"""Generation of mixtures that decide by prompt, on every model family: the decision is made once and then kept.

Whatever the cache, the padding, the batch mates and the beams: the tokens are the argmax of one pass over prompt and
answer, with the decision that this pass makes from the prompt.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import reference
import torch
from prompts import decisions_seen, ids_of, left_padded, mixture, of_kind
from tiny import FAMILIES
from torch import Tensor

from moadapt import MixtureModel
from moadapt.generation import decisions_of
from moadapt.routing import Routing

TOLERANCE = 1e-11
NEW = 4
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
LENGTHS = (5, 3)
MIXTURES: dict[str, tuple[str, str, Any]] = {
    "milora": ("milora_3", "module", "block"),
    "threshold": ("prompt_sigmoid_last", "bank", ["ffn", "attention"]),
    "linear": ("milora_1", "bank", "linear"),
    "tasks": ("task_table_softmax", "bank", "block"),
}
TASK_IDS = [2, 0]
_MODELS: dict[str, MixtureModel] = {}


def model_of(family: str, name: str) -> MixtureModel:
    """One model for all tests of this file; none of them changes it."""
    key = f"{family}-{name}"
    if key not in _MODELS:
        kind, unit, scope = MIXTURES[name]
        _MODELS[key] = mixture(of_kind(kind, unit, scope, target_modules="all-linear"), family)
    return _MODELS[key]


table = pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in FAMILIES for name in MIXTURES],
    ids=json.dumps,
)


@torch.no_grad()
def one_pass(model: MixtureModel, prompt: Tensor, answer: Tensor, task: int) -> tuple[Tensor, dict[str, Routing]]:
    """(the token that the model puts behind the prompt and each token of the answer, the decisions) of a row alone."""
    tasks = torch.tensor([task])
    with decisions_seen(model) as seen:
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            decoder = torch.cat([start, answer[None, :-1]], 1)
            logits = model(input_ids=prompt[None], decoder_input_ids=decoder, task_ids=tasks).logits[0]
        else:
            ids = torch.cat([prompt, answer])[None]
            mask = torch.arange(ids.shape[1])[None] < len(prompt)
            logits = model(input_ids=ids, prompt_mask=mask, task_ids=tasks).logits[0, len(prompt) - 1 : -1]
    logits[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
    two = logits.topk(2).values
    assert (two[:, 0] - two[:, 1]).min() > 1e-6, "near tie"
    return logits.argmax(-1), seen


def check(model: MixtureModel, prompts: list[Tensor], output: Any, per_prompt: int = 1) -> None:
    """Compare decisions, and without beams the tokens, with one pass over each row."""
    kept = decisions_of(output.past_key_values)
    for number, prompt in enumerate(prompts):
        answer = output.sequences[number, -NEW:]
        tokens, seen = one_pass(model, prompt, answer, TASK_IDS[number])
        if per_prompt == 1:
            assert torch.equal(answer, tokens)
        decoder = {name for name in seen if not name.startswith("encoder")}
        assert decoder <= set(kept)
        for name in decoder:
            for beam in range(per_prompt):
                got = kept[name].weights_TN[number * per_prompt + beam]
                reference.close(got, seen[name].weights_TN[0], TOLERANCE, f"{name} row {number}")
            assert kept[name].weights_TN.shape[0] == len(prompts) * per_prompt


@table
def test_greedy_with_each_cache(family: str, name: str) -> None:
    model, prompts = model_of(family, name), ids_of(*LENGTHS)
    inputs = left_padded(prompts) | {"task_ids": torch.tensor(TASK_IDS)}
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    check(model, prompts, output)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), output.sequences)
    static = model.generate(**inputs, **GREEDY, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(static.sequences, output.sequences)
    check(model, prompts, static)


@table
def test_beams(family: str, name: str) -> None:
    """The beams of a prompt keep its decision wherever the search moves them, as in a search of that prompt alone."""
    model, prompts = model_of(family, name), ids_of(*LENGTHS)
    options = {**GREEDY, "num_beams": 3, "return_dict_in_generate": True}
    inputs = left_padded(prompts) | {"task_ids": torch.tensor(TASK_IDS)}
    output = model.generate(**inputs, **options)
    check(model, prompts, output, per_prompt=3)
    for number, prompt in enumerate(prompts):
        one = left_padded([prompt]) | {"task_ids": torch.tensor(TASK_IDS[number : number + 1])}
        alone = model.generate(**one, **options)
        assert torch.equal(alone.sequences[0, -NEW:], output.sequences[number, -NEW:])
    without = model.generate(**inputs, **{**options, "use_cache": False})
    assert torch.equal(without.sequences, output.sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompts_are_routed_differently(family: str) -> None:
    """Or the tests above would show nothing."""
    model, prompts = model_of(family, "milora"), ids_of(*LENGTHS)
    output = model.generate(**left_padded(prompts), **GREEDY, return_dict_in_generate=True)
    gates = [routing.weights_TN for routing in decisions_of(output.past_key_values).values()]
    assert max(float((gate[0] - gate[1]).abs().max()) for gate in gates) > 1e-3
