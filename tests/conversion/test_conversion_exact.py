"""All experts together are the dense block, and the dense model comes back: every family, several splits."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from conversion_helpers import (
    ALL_ON,
    FAMILIES,
    NaiveNeurons,
    block_function,
    inputs_of,
    mixture_options,
    neuron_lists,
    same_snapshot,
    snapshot,
    twin,
)

from moadapt import MixtureModel, get_mixture_model
from moadapt.layer import PartitionLayer

SPLITS: dict[str, Any] = {
    "contiguous": {"kind": "contiguous"},
    "random": {"kind": "random", "seed": 4},
    "kmeans": {"kind": "kmeans"},
}
# routed and shared experts of 20 neurons (GPT-2 and GPT-NeoX: 64), and whether the width has to be filled up
SIZES: dict[str, tuple[int, int, bool]] = {"even": (4, 0, False), "shared": (3, 1, False), "padded": (5, 1, True)}
CASES = [
    pytest.param(family, split, size, id=f"{family}-{split}-{size}")
    for family in FAMILIES
    for split in SPLITS
    for size in SIZES
    if not (split == "kmeans" and size != "even" and SIZES[size][1])  # clusters cannot tell which is shared
]
table = pytest.mark.parametrize(("family", "split", "size"), CASES)


def options(split: str, size: str, **more: Any) -> dict[str, Any]:
    routed, shared, padding = SIZES[size]
    expert = {"split": SPLITS[split], "num_shared_experts": shared, "padding": padding}
    return mixture_options(routed, {**ALL_ON, "num_experts_per_tok": routed}, expert=expert, **more)


@table
def test_ungated_sum_is_the_block(family: str, split: str, size: str) -> None:
    row = FAMILIES[family]
    base = row.model()
    dense = twin(base)
    model = get_mixture_model(base, options(split, size))
    assert list(model.injection.layers) == row.names()
    for owner, name in zip(row.owners, row.names(), strict=True):
        bank = model.injection.layers[name].experts
        x_TD = torch.randn(7, bank.in_features)
        with torch.no_grad():
            want_TD = block_function(dense, owner, row)(x_TD)
            got_TD = bank.stacked()(x_TD)
            got_TD = got_TD if bank.out_bias is None else got_TD + bank.out_bias
            one_by_one = sum(bank.stacked().expert(e, x_TD) for e in range(bank.stacked().num_experts))
        reference.close(got_TD, want_TD, 1e-5, f"{name}: all experts")
        reference.close(bank.dense(x_TD), want_TD, 1e-5, f"{name}: dense()")
        if bank.out_bias is not None:
            one_by_one = one_by_one + bank.out_bias
        reference.close(one_by_one, want_TD, 1e-5, f"{name}: one by one")


@table
def test_model_with_gates_of_one_is_the_dense_model_and_gives_it_back(family: str, split: str, size: str) -> None:
    row, inputs = FAMILIES[family], inputs_of(family)
    base = row.model().train()
    some = next(name for name, _ in base.named_parameters())
    base.get_parameter(some).requires_grad_(False)
    before = snapshot(base)
    base.eval()
    with torch.no_grad():
        want = base(**inputs).logits
    base.train()
    model = get_mixture_model(base, options(split, size))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".router." not in name)
    model.eval()
    with torch.no_grad():
        reference.close(model(**inputs).logits, want, 1e-5, "logits")
        with model.disable_adapter():
            reference.close(model(**inputs).logits, want, 1e-5, "logits with the adapter off")
    model.train()
    assert model.unload() is base
    same_snapshot(base, before)
    assert not any(isinstance(module, PartitionLayer) for module in base.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_the_rows_of_the_dense_layers(family: str) -> None:
    """One expert alone against a loop over its neurons, read from the dense layers."""
    row = FAMILIES[family]
    base = row.model(torch.float64)
    naive = [NaiveNeurons.of(base, owner, row) for owner in row.owners]
    model = get_mixture_model(base, options("random", "padded"))
    for neurons, name in zip(naive, row.names(), strict=True):
        bank = model.injection.layers[name].experts
        lists = neuron_lists(bank.neuron_indices)
        assert sorted(f for part in lists for f in part) == list(range(len(neurons.up_FD)))
        assert max(map(len, lists)) - min(map(len, lists)) <= 1
        x_TD = torch.randn(2, bank.in_features, dtype=torch.float64)
        for e, part in enumerate(lists):
            gates_TE = torch.zeros(2, len(lists), dtype=torch.float64)
            gates_TE[:, e] = 1.0
            want_TD = neurons.mixture(x_TD, gates_TE, lists)
            got_TD = bank.stacked().expert(e, x_TD)
            got_TD = got_TD if bank.out_bias is None else got_TD + bank.out_bias
            reference.close(got_TD, want_TD, 1e-12, f"{name} expert {e} of {len(part)} neurons")


@pytest.mark.parametrize("family", ["llama_bias", "phi3", "gpt2", "t5_gated"])
def test_widths_are_filled_up_to_a_multiple_of_eight(family: str) -> None:
    model = get_mixture_model(FAMILIES[family].model(), options("contiguous", "padded"))
    for layer in model.injection.layers.values():
        bank = layer.experts
        width = bank.neuron_indices.shape[1]
        assert bank.out_proj.shape[1] == width + -width % 8
        real_EM = torch.nn.functional.pad(bank.neuron_indices, (0, -width % 8), value=-1) >= 0
        parts = 2 if bank.gated else 1
        assert not bank.out_proj[~real_EM].any()
        assert not bank.in_proj[~real_EM.repeat(1, parts)].any()
        assert bank.in_bias is None or not bank.in_bias[~real_EM.repeat(1, parts)].any()
        assert bank.out_proj[real_EM].any(-1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str) -> None:
    """In bf16 a block is cut exactly; its sum is rounded in another order."""
    row, inputs = FAMILIES[family], inputs_of(family)
    base = row.model(torch.bfloat16)
    before = snapshot(base)
    with torch.no_grad():
        want = base(**inputs).logits
    model = get_mixture_model(base, options("random", "shared"))
    with torch.no_grad():
        reference.close(model(**inputs).logits, want, 0.06, "logits")
    same_snapshot(model.unload(), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_dropout_is_the_dense_model_s(family: str) -> None:
    """GPT-2 drops outputs, T5 neurons, OPT outputs in its layer: the experts' zeros are as many as the block's."""
    row = FAMILIES[family]
    changes = {"gpt2": {"resid_pdrop": 0.5}, "opt": {"dropout": 0.5}, "t5": {"dropout_rate": 0.5}}.get(family, {})
    base = row.model(**changes)
    dense = twin(base).train()
    model = get_mixture_model(base, options("contiguous", "even")).train()
    name = row.names()[0]
    bank = model.injection.layers[name].experts
    x_TD = torch.randn(2000, bank.in_features)
    with torch.no_grad():
        whole = model.injection.layers[name](x_TD[None])[0]
        block = block_function(dense, row.owners[0], row)(x_TD)
        still = bank.eval().dense(x_TD)
    share = [float((y_TD == 0).double().mean()) for y_TD in (whole, block)]
    assert share[0] == pytest.approx(share[1], abs=0.02)
    noise = [float((y_TD - still).square().mean()) for y_TD in (whole, block)]
    assert noise[0] == pytest.approx(noise[1], rel=0.05, abs=1e-9)
    assert (noise[0] > 1e-3) == (family in ("gpt2", "t5"))


def test_a_second_conversion_of_an_unloaded_model() -> None:
    row, inputs = FAMILIES["llama"], inputs_of("llama")
    base = row.model()
    before = snapshot(base)
    for split in ("contiguous", "kmeans"):
        model = get_mixture_model(base, options(split, "even"))
        assert isinstance(model, MixtureModel)
        model(**inputs)
        same_snapshot(model.unload(), before)
