"""Another threshold, or another number of experts per token, after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import by_router, converted, inputs_of, mixture_options
from torch import Tensor

from moadapt import MixtureModel
from moadapt.adjust import adjustable
from moadapt.converted import save_converted
from moadapt.errors import ConfigError


def routings(model: MixtureModel) -> list[Any]:
    found: list[Any] = []
    handles = [
        site.router.register_forward_hook(lambda module, args, routing: found.append(routing))
        for site in model.injection.routers.values()
    ]
    with torch.no_grad():
        model(**inputs_of("llama"))
    for handle in handles:
        handle.remove()
    return found


def logits(model: MixtureModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs_of("llama")).logits
    return result


def test_a_higher_threshold_keeps_fewer_experts() -> None:
    model = by_router("sigmoid_ste")
    shares = []
    for threshold in (0.0, 0.2, 0.5, 0.7, 0.99):
        model.set_router_threshold(threshold)
        first = routings(model)[0]
        assert torch.equal(first.selected_TN, torch.sigmoid(first.logits_TN) > threshold)
        shares.append(float(first.selected_TN.double().mean()))
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2] > shares[4]


@pytest.mark.parametrize("name", ["sigmoid_ste", "norm_regression", "norm_cumulative"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_threshold_is_saved(name: str, whole: bool, tmp_path: Path) -> None:
    model = by_router(name, torch.float32)
    before = logits(model)
    model.set_router_threshold(0.9)
    changed = logits(model)
    assert not torch.equal(changed, before)
    assert model.mixture_config.router.threshold == 0.9
    (save_converted if whole else MixtureModel.save_pretrained)(model, tmp_path)  # type: ignore[arg-type]
    base = None if whole else model.unload()
    again = MixtureModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), changed)
    assert adjustable(again)[0] == "threshold"


def test_a_number_of_experts_is_saved(tmp_path: Path) -> None:
    model = by_router("top_2_sigmoid", torch.float32)
    before = logits(model)
    model.set_num_experts_per_tok(3)
    changed = logits(model)
    assert not torch.equal(changed, before)
    first = routings(model)[0]
    assert (first.selected_TN.sum(-1) == 3).all()
    assert first.indices_TK.shape[-1] == 3
    kept = torch.where(first.selected_TN, torch.sigmoid(first.logits_TN), 0.0)
    assert torch.allclose(first.weights_TN, kept * 4 / 3)  # n_over_k with the new k
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MixtureModel.from_pretrained(model.unload(), tmp_path)), changed)


def test_per_layer_numbers_become_one() -> None:
    router = {"kind": "top_k", "num_experts_per_tok": [1, 3], "combine": "softmax", "init": "normal"}
    model = converted(mixture_options(4, router))
    model.set_num_experts_per_tok(2)
    assert [int(routing.selected_TN.sum(-1).max()) for routing in routings(model)] == [2, 2]
    assert model.mixture_config.router.num_experts_per_tok == 2


REFUSED: dict[str, tuple[str, str, float, list[str]]] = {
    "above_one": ("sigmoid_ste", "set_router_threshold", 1.5, ["threshold", "1"]),
    "negative": ("norm_regression", "set_router_threshold", -0.1, ["threshold", "0"]),
    "no_threshold": ("top_2", "set_router_threshold", 0.5, ["top_k has none", "num_experts_per_tok"]),
    "relu": ("relu", "set_router_threshold", 0.5, ["relu has none"]),
    "no_number": ("sigmoid_ste", "set_num_experts_per_tok", 2, ["sigmoid_ste has none", "threshold"]),
    "too_many": ("top_2", "set_num_experts_per_tok", 5, ["5 at model.layers.0.mlp", "4 experts"]),
    "none": ("top_2", "set_num_experts_per_tok", 0, ["num_experts_per_tok"]),
    "always_one": ("top_2_renorm", "set_num_experts_per_tok", 1, ["norm_topk_prob"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str) -> None:
    name, method, value, words = REFUSED[case]
    model = by_router(name)
    before, config = logits(model), model.mixture_config
    with pytest.raises(ConfigError) as caught:
        getattr(model, method)(value)
    for word in words:
        assert word in str(caught.value)
    assert torch.equal(logits(model), before)
    assert model.mixture_config is config
