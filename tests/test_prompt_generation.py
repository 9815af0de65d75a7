"""Generation with decisions that are kept with the cache: every mode of `generate`, conversations, threads, caches."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from prompts import BANK, MILORA, TASKS, TOKENS, decisions_seen, ids_of, left_padded, mixture
from tiny import base_model
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from moadapt import MixtureModel
from moadapt.errors import ConfigError
from moadapt.generation import decisions_of
from moadapt.routing import current_context

TOLERANCE = 1e-11
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
PARTITION: dict[str, Any] = {
    "num_experts": 4,
    "expert": {"kind": "ffn_partition", "split": {"kind": "contiguous"}},
    "router": {"kind": "top_k", "num_experts_per_tok": 2, "granularity": "prompt"},
}
MTL: dict[str, Any] = {**TASKS, "expert": {"kind": "mtl_lora", "r": 3, "lora_alpha": 6.0}}
CONFIGS = {"milora": MILORA, "bank": BANK, "partition": PARTITION, "tasks": TASKS, "mtl": MTL, "tokens": TOKENS}
BY_PROMPT = ["milora", "bank", "partition"]
by_prompt = pytest.mark.parametrize("name", BY_PROMPT)
_MODELS: dict[str, MixtureModel] = {}


def model_of(name: str) -> MixtureModel:
    """One model for all tests of this file; none of them changes it."""
    if name not in _MODELS:
        _MODELS[name] = mixture(CONFIGS[name])
    return _MODELS[name]


def tasks_for(name: str, rows: int) -> dict[str, Tensor]:
    return {"task_ids": torch.tensor([2, 0, 1][:rows])} if name in ("tasks", "mtl") else {}


# -- modes of `generate` ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("samples", [1, 2])
def test_sampling_with_a_seed(name: str, samples: int) -> None:
    model, inputs = model_of(name), left_padded(ids_of(5, 3))
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(11)
        options = {**GREEDY, "do_sample": True, "num_return_sequences": samples, "use_cache": use_cache}
        outputs.append(model.generate(**inputs, **tasks_for(name, 2), **options))
    assert torch.equal(*outputs)
    assert len({str(row) for row in outputs[0].tolist()}) == 2 * samples


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("draft", ["plain", "milora", "tokens", "lookup"])
def test_assisted_generation(name: str, draft: str) -> None:
    """Drafts are checked many at a time, behind the prompt in its own pass too; wrong ones are cut off the cache."""
    model = model_of(name)
    (prompt,) = ids_of(7)
    prompt[4:] = prompt[:3]  # something to look up
    inputs = {"input_ids": prompt[None], "attention_mask": torch.ones(1, 7).long(), **tasks_for(name, 1)}
    want = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    if draft == "lookup":
        options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    else:
        options = {"assistant_model": base_model(dtype=torch.float64, seed=5) if draft == "plain" else model_of(draft)}
    passes: list[int] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: passes.append(output.logits.shape[1]))
    try:
        got = model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True)
    finally:
        handle.remove()
    assert torch.equal(got.sequences, want.sequences)
    assert max(passes) > 1, "drafts were checked"
    kept = decisions_of(got.past_key_values)
    for router, routing in decisions_of(want.past_key_values).items():
        reference.close(kept[router].weights_TN, routing.weights_TN, TOLERANCE, router)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks(name: str, cache: str) -> None:
    model, inputs = model_of(name), left_padded(ids_of(7, 4)) | tasks_for(name, 2)
    options = {**GREEDY, "cache_implementation": cache, "prefill_chunk_size": 3}
    if name in BY_PROMPT:
        with pytest.raises(ConfigError, match=r"prefill_chunk_size: .*granularity: prompt.*leave prefill_chunk_size"):
            model.generate(**inputs, **options)
        return
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **GREEDY))


@by_prompt
def test_from_embeddings(name: str) -> None:
    model, inputs = model_of(name), left_padded(ids_of(5, 3))
    want = model.generate(**inputs, **GREEDY)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY)
    assert torch.equal(got, want[:, 5:])


@by_prompt
def test_a_prompt_mask_leaves_tokens_out(name: str) -> None:
    """An example answer in front of the question, say: not looked at, but there."""
    model, (ids,) = model_of(name), ids_of(6)
    mask = torch.tensor([[True, True, False, False, True, True]])
    output = model.generate(input_ids=ids[None], prompt_mask=mask, **GREEDY, return_dict_in_generate=True)
    whole = torch.cat([mask, torch.zeros(1, 6).bool()], 1)
    with torch.no_grad():
        logits = model(input_ids=output.sequences, prompt_mask=whole).logits[0, 5:-1]
    logits[:, 2] = -torch.inf
    assert torch.equal(logits.argmax(-1), output.sequences[0, 6:])
    assert torch.equal(
        model.generate(input_ids=ids[None], prompt_mask=mask, use_cache=False, **GREEDY), output.sequences
    )
    with pytest.raises(ConfigError, match=r"prompt_mask: its shape is \(1, 5\), and that of the inputs \(1, 6\)"):
        model.generate(input_ids=ids[None], prompt_mask=mask[:, 1:], **GREEDY)


@by_prompt
def test_a_prompt_is_read_once(name: str) -> None:
    model, calls = model_of(name), []
    handles = [
        site.router.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
        for site in model.injection.routers.values()
    ]
    model.generate(**left_padded(ids_of(5, 3)), **GREEDY)
    for handle in handles:
        handle.remove()
    assert calls == [2, 2], "two routers, two prompts, one pass"


class Collecting(BaseStreamer):
    """Takes the tokens as they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("name", CONFIGS)
def test_streaming_from_another_thread(name: str) -> None:
    model, (prompt,), streamer = model_of(name), ids_of(5), Collecting()
    inputs = {"input_ids": prompt[None], **tasks_for(name, 1)}
    thread = threading.Thread(target=lambda: model.generate(**inputs, **GREEDY, streamer=streamer))
    thread.start()
    thread.join(30)
    assert streamer.ended
    assert streamer.tokens == model.generate(**inputs, **GREEDY)[0].tolist()


@pytest.mark.parametrize(
    ("name", "merged"),
    [("milora", False), ("milora", True), ("bank", False), ("bank", True), ("partition", False), ("tokens", False)],
)
def test_two_threads_keep_their_generations_apart(name: str, merged: bool) -> None:
    """Both in the same pass at the same time: a barrier in the first block and one in the last make them overlap."""
    model, prompts = model_of(name), ids_of(5, 4)
    want = [model.generate(input_ids=prompt[None], **GREEDY) for prompt in prompts]
    barrier, results = threading.Barrier(2, timeout=20), {}

    def meet(module: Any, args: Any) -> None:
        barrier.wait()

    handles = [layer.register_forward_pre_hook(meet) for layer in model.base_model.model.layers]

    def run(number: int) -> None:
        options = {**GREEDY, "merge_after_prefill": merged and number == 1}
        results[number] = model.generate(input_ids=prompts[number][None], **options)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for handle in handles:
        handle.remove()
    for number in range(2):
        assert torch.equal(results[number], want[number])
    assert current_context().kept == {}


def test_generation_with_the_adapter_off() -> None:
    model, inputs = model_of("milora"), left_padded(ids_of(5, 3))
    with model.disable_adapter():
        got = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(got.sequences, base_model(dtype=torch.float64).generate(**inputs, **GREEDY))
    assert decisions_of(got.past_key_values) == {}
    assert not torch.equal(got.sequences, model.generate(**inputs, **GREEDY))
    with pytest.raises(ConfigError, match="filled without its decision"), torch.no_grad():
        model(input_ids=got.sequences[:, -1:], past_key_values=got.past_key_values)


# -- conversations ------------------------------------------------------------------------------------------------

ANSWER = 4


def in_one_pass(model: MixtureModel, ids: Tensor, mask: Tensor, prompt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(what the model puts behind every token, the gates behind the last token by router)."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), decisions_seen(model) as seen:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, prompt_mask=prompt).logits
    logits[..., 2] = -torch.inf  # min_new_tokens forbids it
    gates = {
        name: routing.per_token(ids.numel()).weights_TN.unflatten(0, ids.shape)[:, -1] for name, routing in seen.items()
    }
    return logits.argmax(-1), gates


@pytest.mark.parametrize("given", ["everything", "the new tokens"])
@by_prompt
def test_a_conversation_goes_on_with_its_cache(name: str, given: str) -> None:
    """Three turns of two users at once: as one pass over the whole conversation, and as without any cache."""
    model = model_of(name)
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
    inputs = left_padded(ids_of(5, 3))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt = mask.bool()
    cache = None
    turns: list[dict[str, Tensor]] = []
    for turn in range(3):
        if turn > 0:
            message = torch.stack(ids_of(3, 3, seed=20 + turn))
            ids = torch.cat([ids, message], 1)
            mask = torch.cat([mask, torch.ones_like(message)], 1)
            prompt = torch.cat([prompt, torch.ones_like(message).bool()], 1)
        first = cache.get_seq_length() if cache is not None and given == "the new tokens" else 0
        output = model.generate(
            input_ids=ids[:, first:],
            attention_mask=mask,
            prompt_mask=prompt[:, first:],
            past_key_values=cache,
            **options,
            return_dict_in_generate=True,
        )
        cache = output.past_key_values
        without = model.generate(input_ids=ids, attention_mask=mask, prompt_mask=prompt, use_cache=False, **options)
        assert torch.equal(output.sequences[:, -ANSWER:], without[:, -ANSWER:])
        ids = without
        mask = torch.cat([mask, torch.ones(2, ANSWER).long()], 1)
        prompt = torch.cat([prompt, torch.zeros(2, ANSWER).bool()], 1)
        tokens, gates = in_one_pass(model, ids, mask, prompt)
        assert torch.equal(tokens[:, -ANSWER - 1 : -1], ids[:, -ANSWER:])
        kept = decisions_of(cache)
        for router, value in gates.items():
            reference.close(kept[router].weights_TN, value, TOLERANCE, f"turn {turn} {router}")
        turns.append(gates)
    changes = [max((turns[0][router] - turns[t][router]).abs().max() for router in turns[0]) for t in (1, 2)]
    assert min(changes) > 1e-3, "every message was routed by itself"


@pytest.mark.parametrize("given", ["everything", "the new tokens"])
@by_prompt
def test_a_conversation_without_masks(name: str, given: str) -> None:
    """The first token that is not in the cache is the answer's last one; all behind it is the next prompt."""
    model, (first, second) = model_of(name), ids_of(5, 3)
    options = {**GREEDY, "suppress_tokens": [0]}  # transformers takes that id for padding when it is given no mask
    before = model.generate(input_ids=first[None], **options, return_dict_in_generate=True)
    ids = torch.cat([before.sequences, second[None]], 1)
    prompt = torch.tensor([[True] * 5 + [False] * 6 + [True] * 3])
    want = model.generate(input_ids=ids, prompt_mask=prompt, use_cache=False, **options)
    new = ids if given == "everything" else ids[:, before.past_key_values.get_seq_length() :]
    assert new.shape[1] in (4, 14)
    cache, mask = copy.deepcopy(before.past_key_values), torch.ones_like(ids)
    got = model.generate(input_ids=new, past_key_values=cache, attention_mask=mask, **options)
    assert torch.equal(got[:, -6:], want[:, -6:])
    if given == "everything":  # transformers cannot tell the other case without a mask
        got = model.generate(input_ids=new, past_key_values=before.past_key_values, **options)
        assert torch.equal(got[:, -6:], want[:, -6:])


# -- what may be done to a cache ----------------------------------------------------------------------------------


def prefilled(model: MixtureModel, prompts: list[Tensor]) -> tuple[Any, Tensor]:
    """(the cache, the padding mask with a place for the next token)."""
    inputs = left_padded(prompts)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
    return cache, torch.cat([inputs["attention_mask"], torch.ones(len(prompts), 1).long()], 1)


def next_logits(model: MixtureModel, cache: Any, mask: Tensor) -> Tensor:
    positions = mask.sum(-1, keepdim=True) - 1
    with torch.no_grad():
        output = model(
            input_ids=torch.full((len(mask), 1), 9), attention_mask=mask, position_ids=positions, past_key_values=cache
        )
    return output.logits[:, -1]


MOVES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    "a mask of rows": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("move", MOVES)
@by_prompt
def test_decisions_follow_the_rows_of_the_cache(name: str, move: str) -> None:
    model, prompts = model_of(name), ids_of(5, 3, 4)
    change, rows = MOVES[move]
    cache, mask = prefilled(model, prompts)
    before = decisions_of(cache)
    twin = copy.deepcopy(cache)
    change(twin)
    after = decisions_of(twin)
    for router, routing in before.items():
        assert torch.equal(after[router].weights_TN, routing.weights_TN[rows])
        assert torch.equal(decisions_of(cache)[router].weights_TN, routing.weights_TN), "the copy is another cache"
    alone = [next_logits(model, *prefilled(model, [prompt]))[0] for prompt in prompts]
    for got, row in zip(next_logits(model, twin, mask[rows]), rows, strict=True):
        reference.close(got, alone[row], TOLERANCE, f"row {row}")
    for got, want in zip(next_logits(model, cache, mask), alone, strict=True):
        reference.close(got, want, TOLERANCE, "the cache that was copied")


@pytest.mark.parametrize("how", ["reset", "crop", "static"])
@by_prompt
def test_an_emptied_cache_is_decided_anew(name: str, how: str) -> None:
    model, (first, second) = model_of(name), ids_of(5, 4)
    if how == "static":
        cache: Any = StaticCache(config=model.config, max_cache_len=16)
    else:
        cache = DynamicCache(config=model.config)
    want = [
        model.generate(input_ids=prompt[None], **GREEDY, return_dict_in_generate=True) for prompt in (first, second)
    ]
    for prompt, expected in zip((first, second), want, strict=True):
        output = model.generate(input_ids=prompt[None], past_key_values=cache, **GREEDY)
        assert torch.equal(output, expected.sequences)
        kept = decisions_of(cache)
        for router, routing in decisions_of(expected.past_key_values).items():
            reference.close(kept[router].weights_TN, routing.weights_TN, TOLERANCE, router)
        if how == "crop":
            cache.crop(-cache.get_seq_length())
        else:
            cache.reset()
        assert cache.get_seq_length() == 0


@by_prompt
def test_a_cropped_cache_keeps_its_decision(name: str) -> None:
    model, (prompt,) = model_of(name), ids_of(5)
    output = model.generate(input_ids=prompt[None], **GREEDY, return_dict_in_generate=True)
    cache = output.past_key_values
    before = decisions_of(cache)
    cache.crop(7 - cache.get_seq_length())
    mask = torch.zeros(1, 11).bool()
    mask[:, :5] = True
    with torch.no_grad():
        rest = model(input_ids=output.sequences[:, 7:], past_key_values=cache).logits
        whole = model(input_ids=output.sequences, prompt_mask=mask).logits[:, 7:]
    reference.close(rest, whole, TOLERANCE, "logits")
    assert decisions_of(cache) == before


def test_tasks_are_kept_with_the_cache() -> None:
    """The ids are needed for the first pass only."""
    model, inputs = model_of("tasks"), left_padded(ids_of(5, 5))
    with torch.no_grad():
        cache = model(**inputs, task_ids=torch.tensor([2, 0]), use_cache=True).past_key_values
        got = model(input_ids=torch.full((2, 1), 9), past_key_values=cache).logits
        ids = torch.cat([inputs["input_ids"], torch.full((2, 1), 9)], 1)
        want = model(input_ids=ids, task_ids=torch.tensor([2, 0])).logits[:, -1:]
    reference.close(got, want, TOLERANCE, "logits")
