"""Parameter counts of modules that are experts, and of routers that decide for prompts or tasks, by hand arithmetic."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from tiny import base_model
from transformers import LlamaConfig, LlamaForCausalLM

from moadapt import get_mixture_model
from moadapt.params import ParameterCounts, ParameterRow, count_parameters

# Llama-2-7B: 32 layers, 4096 -> 11008, no grouped heads. MiLoRA, 2410.18035: r = 32 in all seven maps.
LAYERS, HIDDEN, FFN, RANK = 32, 4096, 11008, 32
ATTENTION_MODULE = RANK * (HIDDEN + HIDDEN)
FFN_MODULE = RANK * (HIDDEN + FFN)
SEVEN = [ATTENTION_MODULE] * 4 + [FFN_MODULE] * 3
ROUTER, POOLER = 7 * HIDDEN, HIDDEN


def _llama_2_7b(**router: Any) -> ParameterCounts:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    return count_parameters(get_mixture_model(model, {"preset": "milora", "router": router}))


def _rows(counts: ParameterCounts) -> dict[str, ParameterRow]:
    return {row.kind: row for row in counts.rows}


def _of_all_choices(k: int) -> list[int]:
    """What the K modules of one layer have together, for every choice of K of the seven."""
    return [sum(choice) for choice in combinations(SEVEN, k)]


def test_tunable_parameters_of_milora_on_llama_2_7b() -> None:
    """The paper's 80.9 M are the modules and W_r; it leaves out W_sa, the pooler's 0.131 M (routers.md 10.6)."""
    counts = _llama_2_7b()
    rows = _rows(counts)
    assert rows["routers"].trainable == LAYERS * ROUTER == 917_504
    assert rows["poolers"].trainable == LAYERS * POOLER == 131_072
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert rows[kind].trainable == LAYERS * ATTENTION_MODULE
        assert rows[kind].modules == LAYERS
    for kind in ("gate_proj", "up_proj", "down_proj"):
        assert rows[kind].trainable == LAYERS * FFN_MODULE
    modules = LAYERS * sum(SEVEN)
    assert counts.total.trainable == modules + LAYERS * (ROUTER + POOLER)
    assert round(modules / 1e6, 1) == 80.0  # what the paper gives for LoRA
    assert round((counts.total.trainable - rows["poolers"].trainable) / 1e6, 1) == 80.9
    assert round(counts.total.trainable / 1e6, 1) == 81.0
    assert counts.granularity == "prompt"


def test_activated_parameters_of_milora_at_k_1() -> None:
    """12.3 M is the mean over the seven modules, 16.4 M the worst case, an FFN module; both without W_sa."""
    counts = _llama_2_7b(num_experts_per_tok=1, norm_topk_prob=False)
    choices = _of_all_choices(1)
    around = LAYERS * (ROUTER + POOLER)
    assert counts.total.active_trainable == pytest.approx(LAYERS * sum(choices) / 7 + around, abs=3.5)  # rounded rows
    assert counts.active_trainable_range == (LAYERS * min(choices) + around, LAYERS * max(choices) + around)
    without_pooler = LAYERS * POOLER
    assert round((counts.total.active_trainable - without_pooler) / 1e6, 1) == 12.3
    assert round((counts.active_trainable_range[1] - without_pooler) / 1e6, 1) == 16.4
    assert not counts.active_is_bound
    frozen = counts.total.frozen
    assert counts.total.active == frozen + counts.total.active_trainable  # the base model works for every prompt


def test_activated_parameters_of_milora_at_k_3() -> None:
    """The paper's 25.2 M is the fewest, three attention modules, without any router; the mean is 34.3 M."""
    counts = _llama_2_7b()
    choices = _of_all_choices(3)
    around = LAYERS * (ROUTER + POOLER)
    mean = LAYERS * sum(choices) / len(choices)
    assert counts.total.active_trainable == pytest.approx(mean + around, abs=3.5)
    assert round(mean / 1e6, 1) == 34.3
    assert counts.active_trainable_range == (LAYERS * min(choices) + around, LAYERS * max(choices) + around)
    assert round((counts.active_trainable_range[0] - around) / 1e6, 1) == 25.2


def _tiny(mixture: dict[str, Any]) -> ParameterCounts:
    return count_parameters(get_mixture_model(base_model("llama"), mixture))


TWO = {"expert_unit": "module", "target_modules": ["q_proj", "down_proj"], "expert": {"kind": "lora", "r": 3}}
BY_PROMPT = {"scope": "block", "granularity": "prompt"}
Q, DOWN = 3 * (16 + 16), 3 * (20 + 16)  # of one layer of two


@pytest.mark.parametrize(
    ("router", "used", "span", "bound"),
    [
        ({"kind": "top_k", "num_experts_per_tok": 1, "combine": "softmax"}, (Q + DOWN) // 2, (Q, DOWN), False),
        ({"kind": "top_k", "num_experts_per_tok": 2, "combine": "softmax"}, Q + DOWN, None, False),
        ({"kind": "softmax"}, Q + DOWN, None, False),
        ({"kind": "relu"}, Q + DOWN, None, True),
    ],
)
def test_what_a_router_uses_of_modules(
    router: dict[str, Any], used: int, span: tuple[int, int] | None, bound: bool
) -> None:
    counts = _tiny({**TWO, "router": {**router, **BY_PROMPT, "pooler": "mean", "activation": "none"}})
    weights = sum(row.trainable for row in counts.rows if row.kind == "routers")
    assert "poolers" not in _rows(counts)
    assert counts.total.active_trainable == 2 * used + weights
    assert counts.active_trainable_range == (None if span is None else tuple(2 * each + weights for each in span))
    assert counts.active_is_bound is bound


def test_a_rational_activation_has_twelve_coefficients() -> None:
    counts = _tiny({**TWO, "router": {"kind": "softmax", **BY_PROMPT, "activation": "rational"}})
    rows = _rows(counts)
    assert rows["activations"].trainable == rows["activations"].active == 2 * (7 + 5)
    assert rows["poolers"].trainable == 2 * 16
    assert rows["routers"].trainable == 2 * 2 * 16


def test_experts_of_one_size_have_no_range() -> None:
    mixture = {
        "num_experts": 4,
        "target_modules": ["q_proj"],
        "expert": {"kind": "lora", "r": 3},
        "router": {"kind": "top_k", "num_experts_per_tok": 2, **BY_PROMPT},
    }
    counts = _tiny(mixture)
    assert counts.active_trainable_range is None
    assert _rows(counts)["q_proj"].active_trainable == 2 * 2 * Q


def test_a_row_uses_its_task_s_logits() -> None:
    mixture = {
        "num_experts": 4,
        "tasks": ["a", "b", "c"],
        "target_modules": ["q_proj"],
        "expert": {"kind": "lora", "r": 3},
        "router": {"kind": "task_table"},
    }
    counts = _tiny(mixture)
    assert counts.granularity == "task"
    assert _rows(counts)["routers"].trainable == 2 * 3 * 4
    assert _rows(counts)["routers"].active == 2 * 4
    assert _rows(counts)["q_proj"].active_trainable == 2 * 4 * Q


def test_mixtures_without_new_options_count_as_before() -> None:
    """A row's use is that of its frozen and of its trained parameters, and the sum that of the rows."""
    counts = _tiny({"num_experts": 4, "router": {"kind": "top_k", "num_experts_per_tok": 2}})
    assert counts.granularity == "token"
    assert counts.active_trainable_range is None
    for row in counts.rows:
        assert row.active == row.frozen + row.active_trainable
    assert counts.total.active_trainable == sum(row.active_trainable for row in counts.rows)
