"""What is kept with a KV cache: how long it lives, whose token comes next, and what there is without one."""

from __future__ import annotations

import gc
import pickle
from typing import Any
from weakref import ref

import pytest
import reference
import torch
from prompts import MILORA, decisions_seen, ids_of, mixture

from moadapt.errors import ConfigError
from moadapt.generation import decisions_of

OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
FULL = {**OPTIONS, "return_dict_in_generate": True}


def test_a_cache_is_free_as_soon_as_nobody_has_it() -> None:
    """Without waiting for Python's collector, which knows nothing of a device's memory."""
    model, (prompt,) = mixture(MILORA), ids_of(5)
    gc.collect()
    gc.disable()
    try:
        cache = model.generate(input_ids=prompt[None], **FULL).past_key_values
        assert decisions_of(cache)
        gone = ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_a_pickled_cache_moves_its_own_decisions() -> None:
    model, prompts = mixture(MILORA), torch.stack(ids_of(5, 5))
    cache = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **FULL).past_key_values
    before, twin = decisions_of(cache), pickle.loads(pickle.dumps(cache))
    twin.reorder_cache(torch.tensor([1, 0]))
    for router, routing in before.items():
        assert torch.equal(decisions_of(twin)[router].weights_TN, routing.weights_TN.flip(0))
        assert torch.equal(decisions_of(cache)[router].weights_TN, routing.weights_TN)


def test_an_answer_that_the_caller_completes_in_the_cache() -> None:
    """All that follows is the next prompt, from its first token on."""
    model, (first, second) = mixture(MILORA), ids_of(6, 4)
    output = model.generate(input_ids=first[None], **FULL)
    cache, ids = output.past_key_values, torch.cat([output.sequences, second[None]], 1)
    with torch.no_grad():
        model(input_ids=output.sequences[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == 9
    mask = torch.ones_like(ids)
    got = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **FULL)
    prompt = torch.tensor([[True] * 6 + [False] * 3 + [True] * 4])
    want = model.generate(input_ids=ids, attention_mask=mask, prompt_mask=prompt, **FULL)
    assert torch.equal(got.sequences, want.sequences)
    for router, routing in decisions_of(want.past_key_values).items():
        reference.close(decisions_of(got.past_key_values)[router].weights_TN, routing.weights_TN, 1e-11, router)


def test_another_question_in_the_place_of_an_answer() -> None:
    """With the answer cut off the cache, the next prompt has no token of it in front."""
    model, (first, second) = mixture(MILORA), ids_of(6, 4)
    cache = model.generate(input_ids=first[None], **FULL).past_key_values
    cache.crop(6 - cache.get_seq_length())
    with torch.no_grad():
        fresh = model(input_ids=first[None], use_cache=True).past_key_values
    ids = torch.cat([first, second])[None]
    for one in (cache, fresh):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=one, **FULL)
    for router, routing in decisions_of(fresh).items():
        reference.close(decisions_of(cache)[router].weights_TN, routing.weights_TN, 1e-11, router)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_that_transformers_infers_is_no_prompt(cache: str) -> None:
    """Without an attention mask, tokens with the padding id are padding; a static cache hides the mask that comes."""
    model, (first, second) = mixture(MILORA), ids_of(6, 8)
    ids = torch.stack([torch.cat([torch.zeros(2).long(), first]), second])
    options = {**OPTIONS, "cache_implementation": cache}
    with decisions_seen(model) as want:
        answers = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **options)
    with decisions_seen(model) as got:
        assert torch.equal(model.generate(input_ids=ids, **options), answers)
    for router, routing in want.items():
        reference.close(got[router].weights_TN, routing.weights_TN, 1e-11, router)


def test_there_are_no_decisions_without_a_cache() -> None:
    model, (prompt,) = mixture(MILORA), ids_of(5)
    output = model.generate(input_ids=prompt[None], use_cache=False, **FULL)
    with pytest.raises(ConfigError, match="no KV cache to read decisions from: leave use_cache: false out"):
        decisions_of(output.past_key_values)
