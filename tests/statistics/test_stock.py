"""Stock mixture-of-experts models: the same load table as transformers' own router logits give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompts import batch_of
from slow_counts import Decision, Pass, assert_statistics, letters, same_counts
from tiny import VOCAB
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from moadapt.errors import ConfigError
from moadapt.statistics import describing, record_routing

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = _SIZES | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
CONFIGS: dict[str, Any] = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**_SIZES, num_experts=8, num_experts_per_tok=3),
    "qwen2_moe": Qwen2MoeConfig(**_QWEN, shared_expert_intermediate_size=8),
    "qwen3_moe": Qwen3MoeConfig(**_QWEN, head_dim=4, norm_topk_prob=True),
}
ROWS = ["uuaap", "puaaa", "uuuap"]
IDS = [1, 0, 1]
families = pytest.mark.parametrize("family", CONFIGS)


def stock_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def inputs_of(rows: list[str] = ROWS) -> dict[str, Tensor]:
    inputs = batch_of(rows)
    del inputs["prompt_mask"]
    return inputs


def decisions(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Decision]:
    """From the model's own router logits: softmax, the K best, their weights over their sum where the config says."""
    config, made = model.config, []
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits
    assert len(logits) == 3
    for layer, scores in enumerate(logits):
        probs = scores.float().softmax(-1)
        best = probs.topk(config.num_experts_per_tok, dim=-1).indices
        selected = torch.zeros_like(probs, dtype=torch.bool)
        for row, experts in enumerate(best.tolist()):
            selected[row, experts] = True
        weights = probs * selected
        if getattr(config, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        lists = weights.double().tolist(), selected.tolist(), probs.double().tolist()
        made.append(Decision(f"model.layers.{layer}.mlp.gate", *lists))
    return made


@families
def test_the_table_of_the_models_own_router_logits(family: str) -> None:
    model, inputs = stock_model(family), inputs_of()
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    with torch.no_grad():
        before = model(**inputs).logits
    with record_routing(model, ["a", "b"], vocabulary=True) as statistics, torch.no_grad():
        with describing(task_ids=torch.tensor(IDS)):
            during = model(**inputs).logits
    assert torch.equal(before, during)
    assert [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()] == hooks
    real, answer = letters(ROWS)
    one = Pass(real, answer, IDS, ids=inputs["input_ids"].tolist(), decisions=decisions(model, inputs))
    assert list(statistics.routers) == [f"model.layers.{layer}.mlp.gate" for layer in range(3)]
    assert [(counts.layer, counts.module) for counts in statistics.routers.values()] == [(n, "mlp") for n in range(3)]
    assert len(statistics.flow) == 2
    assert_statistics(statistics, [one], tolerance=1e-5)
    mean_active = statistics.routers["model.layers.0.mlp.gate"].active.tolist()
    assert mean_active[model.config.num_experts_per_tok] == 12


@families
def test_generation_training_and_checkpointing(family: str) -> None:
    model = stock_model(family)
    ids = torch.randint(3, VOCAB, (2, 5))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [0]}
    with record_routing(model) as statistics:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert {str(counts.rows.tolist()) for counts in statistics.routers.values()} == {"[[[10, 0], [0, 6]]]"}
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with record_routing(model) as statistics:
            model(**inputs_of(), use_cache=False).loss.backward()
        found.append(statistics)
    same_counts(*found)
    assert int(found[0].routers["model.layers.1.mlp.gate"].rows.sum()) == 12


def test_nested_recordings() -> None:
    model, inputs = stock_model("olmoe"), inputs_of()
    with record_routing(model) as outer, torch.no_grad():
        model(**inputs)
        with record_routing(model) as inner:
            model(**inputs)
        model(**inputs)
    for statistics, passes in ((outer, 3), (inner, 1)):
        assert {int(counts.rows.sum()) for counts in statistics.routers.values()} == {12 * passes}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_prompts_can_be_told() -> None:
    model, inputs = stock_model("olmoe"), inputs_of()
    prompt_mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    with record_routing(model) as statistics, describing(prompt_mask=prompt_mask):
        model(**inputs)
    assert statistics.routers["model.layers.0.mlp.gate"].rows.tolist() == [[[12, 0], [0, 0]]]


def test_what_a_prompt_goes_on_with_is_answer() -> None:
    """Also where the prompt is told; and rows that have ended do not count then either."""
    model = stock_model("olmoe")
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, 3:]
    model.generation_config.eos_token_id = int(answer[0, 0])  # the first row ends with its first token
    assert int(answer[0, 0]) not in answer[1].tolist()
    with record_routing(model) as statistics, describing(inputs["attention_mask"].bool()):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for counts in statistics.routers.values():
        assert counts.rows.tolist() == [[[5, 0], [0, 3]]]


def test_sigmoid_scores() -> None:
    """A family whose weights are sigmoids of the scores: p is their share, and not a softmax."""
    sizes = _SIZES | {"num_key_value_heads": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**sizes, **heads, **experts)).eval()
    gates = {name: module for name, module in model.named_modules() if name.endswith("mlp.gate")}
    seen: list[Tensor] = []
    for gate in gates.values():
        nn.init.normal_(gate.weight, std=1.0)
        gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    inputs = inputs_of()
    with record_routing(model) as statistics, torch.no_grad():
        model(**inputs)
    assert list(statistics.routers) == list(gates)
    assert len(gates) == 2
    real = inputs["attention_mask"].bool().flatten()
    for scores, counts in zip(seen, statistics.routers.values(), strict=True):
        expected = torch.zeros(6, dtype=torch.float64)
        for row in scores[real].double().tolist():
            values = [1 / (1 + torch.tensor(-score).exp().item()) for score in row]
            expected += torch.tensor([value / sum(values) for value in values], dtype=torch.float64)
        torch.testing.assert_close(counts.probs[0], expected, rtol=1e-5, atol=1e-6)


def test_other_gate_weights_are_refused() -> None:
    model = stock_model("olmoe")

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        return output[0], torch.rand_like(output[1]), output[2]

    model.model.layers[1].mlp.gate.register_forward_hook(spoil)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.gate are neither a softmax nor a sigmoid"):
        with record_routing(model):
            model(**inputs_of())


def test_routers_of_another_manner_are_refused() -> None:
    config = SwitchTransformersConfig(vocab_size=VOCAB, d_model=16, d_ff=20, num_layers=2, num_heads=4, d_kv=4)
    model = SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(ConfigError, match="of encoder-decoder models only mixtures"):
        with record_routing(model):
            pass
    other = stock_model("olmoe")
    other.model.layers[2].mlp.gate.register_forward_hook(lambda module, args, output: output[:2])
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.gate .* does not return scores, weights and experts"):
        with record_routing(other):
            other(**inputs_of())
