"""Perplexity, active shares and reconstruction errors against a naive count, one row at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import base_model, batch, mixture_model
from torch import Tensor

from moadapt import MixtureModel, get_mixture_model
from moadapt.adjust import adjustable
from moadapt.errors import ConfigError, DataError
from moadapt.layer import PartitionLayer
from moadapt.text_measure import measure

WIDTHS = {"gpt2": "n_inner", "opt": "ffn_dim", "t5": "d_ff"}


def converted(
    family: str = "llama", width: int = 48, dtype: torch.dtype = torch.float64, **mixture: Any
) -> MixtureModel:
    options = {
        "num_experts": 3,
        "expert": {"kind": "ffn_partition", "num_shared_experts": 1, "padding": True},
        "router": {"kind": "sigmoid_ste", "init_std": 0.5},
        **mixture,
    }
    base = base_model(family, dtype, **{WIDTHS.get(family, "intermediate_size"): width})
    return get_mixture_model(base, options).eval()


def padded(side: str = "right") -> dict[str, Tensor]:
    """Three rows of 6, 4 and 2 real tokens."""
    made = batch(3, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": made["input_ids"] * mask, "attention_mask": mask}


def rows_of(given: dict[str, Tensor]) -> list[Tensor]:
    return [ids[mask.bool()] for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]


def naive(model: MixtureModel, rows: list[Tensor]) -> tuple[float, int, dict[str, list[Any]]]:
    """(sum of losses, tokens, for each block: (selected, error) of each token), by hooks on routers and layers."""
    seen: dict[str, list[Any]] = {}
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.injection.layers.items():
        assert isinstance(layer, PartitionLayer)

        def see(module: PartitionLayer, args: Any, output: Tensor, name: str = name) -> None:
            x_TD = args[0].reshape(-1, args[0].shape[-1])
            inputs[name] = x_TD
            scores_TN = torch.sigmoid(x_TD.double() @ module.router.router.weight.double().T)
            want_TD = module.experts.feed_forward()(x_TD)
            errors_T = (output.reshape(x_TD.shape) - want_TD).square().sum(1) / want_TD.square().sum(1)
            seen.setdefault(name, []).extend(zip((scores_TN > 0.5).tolist(), errors_T.tolist(), strict=True))

        handles.append(layer.register_forward_hook(see))
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model.base_model(row[None]).logits[0].double()
        for position in range(len(row) - 1):
            total -= float(logits[position].log_softmax(-1)[row[position + 1]])
            tokens += 1
    for handle in handles:
        handle.remove()
    return total, tokens, seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("width", [48, 50])
def test_everything_is_what_a_naive_count_says(family: str, width: int) -> None:
    """Width 50 as four experts: two of 13 neurons and two of 12."""
    model = converted(family, width)
    batches = [padded(), {name: value[:1] for name, value in batch(1, 5, seed=9).items() if name != "labels"}]
    result = measure(model, batches, reconstruction=True)
    total, tokens, seen = naive(model, [*rows_of(batches[0]), batches[1]["input_ids"][0]])
    assert result.tokens == tokens == 5 + 3 + 1 + 4
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)
    assert [block.name for block in result.blocks] == list(seen)
    sizes = [width // 4 + (expert < width % 4) for expert in range(4)]
    matrices, biases, output = (3, 0, 0) if family == "llama" else (2, 1, 16)
    per_neuron = matrices * 16 + biases
    active = 0.0
    for block in result.blocks:
        rows = seen[block.name]
        assert block.tokens == len(rows) == 17
        assert block.selections == [sum(selected[expert] for selected, _ in rows) for expert in range(3)]
        assert 0 < sum(block.selections) < 3 * 17
        assert block.tokens_without_expert == sum(not any(selected) for selected, _ in rows)
        assert block.reconstruction == pytest.approx(sum(error for _, error in rows) / 17, rel=1e-6)
        neurons = [sizes[0] + sum(sizes[1 + e] for e in range(3) if selected[e]) for selected, _ in rows]
        assert block.parameters == width * per_neuron + output
        assert block.active_parameters == pytest.approx(sum(neurons) / 17 * per_neuron + output)
        active += block.active_parameters
    dense = sum(p.numel() for p in base_model(family, **{WIDTHS.get(family, "intermediate_size"): width}).parameters())
    inactive = sum(block.parameters for block in result.blocks) - active
    assert result.model_share == pytest.approx((dense - inactive) / dense)
    assert result.ffn_share == pytest.approx(active / (active + inactive))
    assert result.active_share == pytest.approx(sum(sum(block.selections) for block in result.blocks) / (2 * 3 * 17))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = converted()
    together = measure(model, [padded(side)])
    alone = measure(model, [{"input_ids": row[None]} for row in rows_of(padded(side))])
    assert together.tokens == alone.tokens == 9
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)
    assert [block.selections for block in together.blocks] == [block.selections for block in alone.blocks]


def test_the_adapter_off_is_the_dense_model() -> None:
    model, dense = converted(), base_model("llama", torch.float64, intermediate_size=48)
    plain = measure(dense, [padded()])
    with model.disable_adapter():
        off = measure(model, [padded()])
    assert off.loss == pytest.approx(plain.loss, abs=1e-9)
    assert plain.blocks == off.blocks == []
    assert plain.ffn_share is plain.model_share is plain.active_share is None
    assert measure(model, [padded()]).loss != pytest.approx(plain.loss, abs=1e-3)


def test_labels_say_what_counts_and_modes_are_kept() -> None:
    model = converted().train()
    given = padded()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[0, :5] = -100
    calls: list[Any] = []
    result = measure(model, [{**given, "labels": labels}], progress=lambda *seen: calls.append(seen))
    assert result.tokens == 1 + 3 + 1
    assert calls == [("reading", 1, 1)]
    assert model.training
    assert model.base_model.training
    with pytest.raises(DataError, match="no token to predict"):
        measure(model, [{"input_ids": torch.ones(3, 1, dtype=torch.int64)}])


def test_encoder_decoder_and_other_mixtures() -> None:
    model = converted("t5", router={"kind": "relu", "init_std": 0.5})
    given = batch(2, 6, family="t5")
    result = measure(model, [given])
    with torch.no_grad():
        want = model.base_model(**given).loss
    assert result.loss == pytest.approx(float(want), rel=1e-5)
    assert len(result.blocks) == 4
    assert [block.tokens for block in result.blocks] == [12, 12, 8, 8]
    lora = mixture_model({"num_experts": 2, "router": {"kind": "softmax"}})
    assert measure(lora, [padded()]).blocks == []


def test_numbers_as_json_and_as_a_table() -> None:
    result = measure(converted(), [padded()], reconstruction=True)
    document = result.to_dict()
    assert document["perplexity"] == result.perplexity
    assert document["blocks"][1]["selections"] == result.blocks[1].selections
    assert document["blocks"][1]["active_share"] == result.blocks[1].active_share
    assert result.table().row_count == 3
    assert set(measure(base_model(), [padded()]).to_dict()) == {"loss", "perplexity", "tokens"}


def test_table_4_of_dsmoe() -> None:
    """2.8 of 8 experts at work in Llama-2-7B are 3.93 of its 6.74 billion parameters (2502.12455, table 1)."""
    from moadapt.text_measure import BlockActivity, TextResult

    block = 3 * 4096 * 11008
    others = 6_738_415_616 - 32 * block
    blocks = [
        BlockActivity(str(layer), 10, 8, 0, [7, 7, 7, 7, 0, 0, 0, 0], 0, block, block * 2.8 / 8) for layer in range(32)
    ]
    result = TextResult(1.0, 10, blocks, others)
    assert result.mean_active == pytest.approx(2.8)
    assert result.model_share == pytest.approx(3.93 / 6.74, abs=2e-3)


# -- other thresholds -------------------------------------------------------------------------------------------------


def test_threshold_is_changed_everywhere_and_saved(tmp_path: Any) -> None:
    model = converted(dtype=torch.float32)
    assert adjustable(model) == ["threshold"]
    shares = []
    for threshold in (0.1, 0.5, 0.9):
        model.set_router_threshold(threshold)
        shares.append(measure(model, [padded()]).active_share)
    assert shares[0] > shares[1] > shares[2]
    assert model.mixture_config.router.threshold == 0.9  # type: ignore[attr-defined]
    model.base_model.save_pretrained(tmp_path / "base", state_dict=base_model(intermediate_size=48).state_dict())
    model.save_pretrained(tmp_path / "adapter")
    base = base_model(intermediate_size=48)
    again = MixtureModel.from_pretrained(base, tmp_path / "adapter")
    assert {site.router.threshold for site in again.injection.routers.values()} == {0.9}
    for bad in (1.0, -0.1):
        with pytest.raises(ConfigError, match=r"router\.threshold"):
            model.set_router_threshold(bad)
    assert {site.router.threshold for site in model.injection.routers.values()} == {0.9}


def test_number_of_experts_is_changed_and_checked() -> None:
    model = converted(router={"kind": "top_k", "num_experts_per_tok": 2}, num_experts=3)
    assert adjustable(model) == ["num_experts_per_tok"]
    for number in (1, 2, 3):
        model.set_num_experts_per_tok(number)
        assert measure(model, [padded()]).mean_active == number
    with pytest.raises(ConfigError, match="which has 3 experts"):
        model.set_num_experts_per_tok(4)
    with pytest.raises(ConfigError, match="the router top_k has none; it has num_experts_per_tok"):
        model.set_router_threshold(0.5)
    renormalised = converted(router={"kind": "top_k", "num_experts_per_tok": 2, "norm_topk_prob": True})
    with pytest.raises(ConfigError, match="norm_topk_prob"):
        renormalised.set_num_experts_per_tok(1)
    assert measure(renormalised, [padded()]).mean_active == 2
