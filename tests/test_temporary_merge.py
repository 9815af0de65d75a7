"""`merge_after_prefill`: the same tokens and logits as without, base weights that nobody touches, clear refusals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import reference
import torch
from prompts import BANK, LORA, MILORA, TASKS, TOKENS, calls_counted, ids_of, left_padded, mixture, of_kind
from tiny import base_model
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from moadapt import MixtureModel, get_mixture_model, passes
from moadapt.errors import ConfigError
from moadapt.routing import Routing, RoutingContext
from moadapt.temporary import merged_weight

NEW = 6
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
# The delta is rounded into W once instead of being added to y. Llama's norms are in fp32 also in a float64 model.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
FACTORS = of_kind("prompt_smear", expert={**LORA, "mixing": "factors"})
ONE_EXPERT: dict[str, Any] = {"num_experts": 1, "expert": LORA, "router": {"kind": "softmax"}}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "milora": (MILORA, "llama"),
    "milora_gpt2": (MILORA, "gpt2"),
    "milora_opt": (MILORA, "opt"),
    "milora_t5": (MILORA, "t5"),
    "bank": (BANK, "llama"),
    "bank_gpt2": (of_kind("prompt_softmax_mean", target_modules="all-linear"), "gpt2"),
    "linear": (of_kind("milora_1", scope="linear"), "llama"),
    "malora": (of_kind("milora_3", expert={"kind": "malora", "r": 3, "shared_r": 5, "lora_dropout": 0.0}), "llama"),
    "shared_down": (of_kind("prompt_softmax_mean", expert={**LORA, "shared_down": True}), "llama"),
    "factors": (FACTORS, "llama"),
    "one_expert": (ONE_EXPERT, "llama"),
}


def prompt_of(length: int = 5, rows: int = 1) -> dict[str, Tensor]:
    return left_padded(ids_of(*[length] * rows))


def equal(got: Any, want: Any, tolerance: float) -> None:
    """The same tokens, and the same logits at each of them."""
    assert torch.equal(got.sequences, want.sequences)
    for step, (one, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        reference.close(one.double(), other.double(), tolerance, f"step {step}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_same_as_unmerged(case: str, dtype: torch.dtype) -> None:
    config, family = CASES[case]
    model, inputs = mixture(config, family, dtype), prompt_of()
    with calls_counted(model) as plain:
        want = model.generate(**inputs, **OPTIONS)
    with calls_counted(model) as merged:
        got = model.generate(**inputs, **OPTIONS, merge_after_prefill=True)
    if dtype == torch.bfloat16:  # a near tie may fall the other way; up to there the logits are near
        same = int((got.sequences == want.sequences)[0, -NEW:].cumprod(0).sum())
        for one, other in list(zip(got.logits, want.logits, strict=True))[: same + 1]:
            reference.close(one, other, TOLERANCE[dtype], "logits")
        assert same >= 1, "the first token is made before the merge"
    else:
        fp32_norms = dtype == torch.float64 and family in ("llama", "t5")
        equal(got, want, 1e-6 if fp32_norms else TOLERANCE[dtype])
    assert set(merged) == set(plain)
    assert set(merged.values()) == {1}, "experts are called for the prompt only"
    assert max(plain.values()) == NEW


def test_autocast_does_not_round_what_is_summed() -> None:
    model = mixture(BANK, dtype=torch.float32)
    layer = next(iter(model.injection.layers.values()))
    gates_GN = torch.tensor([[0.3, 0.7, 0.0, 0.0]])
    routing = Routing(gates_GN, gates_GN > 0, gates_GN, gates_GN, granularity="prompt")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        merged = merged_weight(layer, routing, RoutingContext(temporary={}))
    deltas = [gate * layer.experts.delta_weight(expert).double() for expert, gate in enumerate(gates_GN[0].tolist())]
    reference.close(merged.double(), layer.weight.double() + sum(deltas), 1e-6, "merged")


def test_beams_of_one_prompt() -> None:
    model, inputs = mixture(MILORA), prompt_of()
    options = {**OPTIONS, "num_beams": 3}
    with calls_counted(model) as calls:
        got = model.generate(**inputs, **options, merge_after_prefill=True)
    assert set(calls.values()) == {1}
    equal(got, model.generate(**inputs, **options), 1e-6)


@pytest.mark.parametrize("config", [MILORA, TASKS], ids=["milora", "tasks"])
def test_drafts_are_checked_with_merged_weights(config: dict[str, Any]) -> None:
    model = mixture(config)
    inputs = prompt_of() | ({"task_ids": torch.tensor([1])} if config is TASKS else {})
    draft = base_model(dtype=torch.float64, seed=5)
    with calls_counted(model) as calls:
        got = model.generate(**inputs, **OPTIONS, assistant_model=draft, merge_after_prefill=True)
    assert set(calls.values()) == {1}
    assert torch.equal(got.sequences, model.generate(**inputs, **OPTIONS).sequences)


@pytest.mark.parametrize("expert", [LORA, {"kind": "mtl_lora", "r": 3, "lora_alpha": 6.0}], ids=["lora", "mtl_lora"])
def test_prompts_of_one_task(expert: dict[str, Any]) -> None:
    model, inputs, tasks = mixture({**TASKS, "expert": expert}), left_padded(ids_of(5, 3)), torch.tensor([1, 1])
    with calls_counted(model) as calls:
        got = model.generate(**inputs, **OPTIONS, task_ids=tasks, merge_after_prefill=True)
    assert set(calls.values()) == {1}
    equal(got, model.generate(**inputs, **OPTIONS, task_ids=tasks), 1e-6)


def test_copies_of_one_prompt() -> None:
    model, inputs = mixture(MILORA), prompt_of()
    inputs = {key: value.expand(3, -1) for key, value in inputs.items()}
    with warnings.catch_warnings(), calls_counted(model) as calls:
        warnings.simplefilter("error")
        got = model.generate(**inputs, **OPTIONS, merge_after_prefill=True)
    assert set(calls.values()) == {1}
    equal(got, model.generate(**inputs, **OPTIONS), 1e-6)


@pytest.mark.parametrize(("config", "tasks"), [(MILORA, None), (TASKS, [0, 2])], ids=["prompts", "tasks"])
def test_rows_that_were_routed_differently(config: dict[str, Any], tasks: list[int] | None) -> None:
    model, inputs = mixture(config), left_padded(ids_of(5, 3))
    more = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    with pytest.warns(UserWarning, match="merge_after_prefill: the prompts of this batch were routed differently"):
        got = model.generate(**inputs, **OPTIONS, **more, merge_after_prefill=True)
    equal(got, model.generate(**inputs, **OPTIONS, **more), 1e-12)


def test_a_conversation_merges_its_latest_decision() -> None:
    model, inputs = mixture(MILORA), prompt_of()
    message = torch.stack(ids_of(3, seed=21))
    found = []
    for merge in (False, True):
        first = model.generate(**inputs, **OPTIONS, merge_after_prefill=merge)
        ids = torch.cat([first.sequences, message], 1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        found.append(model.generate(**second, **OPTIONS, merge_after_prefill=merge))
    equal(found[1], found[0], 1e-6)


def test_with_the_adapter_off_nothing_happens() -> None:
    model, inputs = mixture(TOKENS), prompt_of()
    with model.disable_adapter():
        got = model.generate(**inputs, **OPTIONS, merge_after_prefill=True)
    equal(got, base_model(dtype=torch.float64).generate(**inputs, **OPTIONS), 1e-12)


# -- the base weights ---------------------------------------------------------------------------------------------


class AtStep(LogitsProcessor):
    """Does something once the given step has run."""

    def __init__(self, model: MixtureModel, step: int, error: BaseException | None) -> None:
        self.model, self.step, self.error, self.calls = model, step, error, 0
        self.before = {name: value.clone() for name, value in model.named_parameters()}

    def untouched(self) -> None:
        for name, value in self.model.named_parameters():
            assert torch.equal(value, self.before[name]), name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        self.untouched()
        if self.calls == self.step and self.error is not None:
            raise self.error
        return scores


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("error", [None, ValueError("stop"), KeyboardInterrupt()], ids=["none", "error", "interrupt"])
def test_base_weights_are_never_written_to(family: str, error: BaseException | None) -> None:
    model, inputs = mixture(MILORA, family), prompt_of()
    want = model.generate(**inputs, **OPTIONS)
    pointers = {name: value.data_ptr() for name, value in model.named_parameters()}
    watch = AtStep(model, 3, error)
    options = {**OPTIONS, "logits_processor": LogitsProcessorList([watch]), "merge_after_prefill": True}
    if error is None:
        model.generate(**inputs, **options)
        assert watch.calls == NEW
    else:
        with pytest.raises(type(error)):
            model.generate(**inputs, **options)
        assert watch.calls == 3
    watch.untouched()
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == pointers
    assert passes._REQUEST.get() is None
    assert passes._OPEN.get() == ()
    with calls_counted(model) as calls:
        equal(model.generate(**inputs, **OPTIONS), want, 1e-12)
    assert max(calls.values()) == NEW, "nothing stays merged"


# -- refusals -----------------------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """Stands for a quantised layer: a subclass of `nn.Linear` that computes in its own way."""


def refused(model: MixtureModel, message: str, **more: Any) -> None:
    with pytest.raises(ConfigError, match=f"merge_after_prefill: .*{message}"):
        model.generate(**prompt_of(), max_new_tokens=2, merge_after_prefill=True, **more)


def test_refused_for_decisions_about_tokens() -> None:
    refused(mixture(TOKENS), "decides anew for each token .*granularity: token.*leave merge_after_prefill out")


def test_refused_for_quantised_layers() -> None:
    base = base_model(dtype=torch.float64)
    old = base.get_submodule("model.layers.1.mlp.up_proj")
    new = Quantized(old.in_features, old.out_features, bias=False, dtype=torch.float64)
    base.set_submodule("model.layers.1.mlp.up_proj", new)
    model = get_mixture_model(base, MILORA).eval()
    refused(model, r"layers.1.mlp.up_proj is a Quantized .*Load the base model unquantised, or leave")


def test_refused_for_offloaded_weights() -> None:
    model = mixture(MILORA)
    layer = model.injection.layers["model.layers.0.self_attn.q_proj"]
    layer.base_layer.register_forward_pre_hook(lambda module, args: None)
    refused(model, "weight of model.layers.0.self_attn.q_proj is partitioned or offloaded")


def test_refused_for_experts_in_the_place_of_blocks() -> None:
    router = {"kind": "top_k", "granularity": "prompt"}
    config = {"num_experts": 4, "expert": {"kind": "ffn_partition", "split": {"kind": "contiguous"}}, "router": router}
    refused(mixture(config), "taken the place of the block model.layers.0.mlp")


def test_refused_without_a_cache() -> None:
    refused(mixture(MILORA), "needs the KV cache; leave use_cache: false out", use_cache=False)
