"""Routers that decide by prompt, in a model: the sign of their gradient, skipped modules, saving, copies, leaving."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from prompts import UNITS, batch_of, calls_counted, decisions_seen, lm_loss, mixture, model_of, of_kind
from tiny import base_model
from torch import Tensor, nn

from moadapt import MixtureModel, passes
from moadapt.errors import AdapterError, ConfigError
from moadapt.routing import Routing, current_context

TOLERANCE = 1e-11


# -- the sign of the router's gradient ----------------------------------------------------------------------------


@contextmanager
def gates_changed(model: MixtureModel, router: str, delta_GN: Tensor) -> Iterator[None]:
    """Add to the gates of one router, those of experts that are not selected included."""

    def hook(module: nn.Module, args: Any, routing: Routing) -> Routing:
        return replace(routing, weights_TN=routing.weights_TN + delta_GN, indices_TK=None)

    handle = model.injection.routers[router].router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["prompt_softmax_mean", "milora_3", "milora_1", "milora_rational_ste"])
def test_the_loss_reaches_the_router_with_the_right_sign(name: str, unit: str) -> None:
    """dL/d gate by finite differences, taken through the equation of the gates by hand, is -1 times what is raised."""
    model = mixture(of_kind(name, unit)).train()
    inputs = batch_of(["uuuaaa", "uuaaaa"])
    labels = inputs["labels"]
    router = model.injection.routers["model.layers.1"]  # the last one: no other decision depends on it

    def loss() -> Tensor:
        return lm_loss(model(**inputs).logits, labels)

    kept: list[Routing] = []
    handle = router.router.register_forward_hook(lambda module, args, output: kept.append(output))
    value = loss()
    handle.remove()
    (routing,) = kept
    (found_GN,) = torch.autograd.grad(value, routing.logits_TN)

    step, slopes = 3e-3, torch.zeros_like(found_GN)
    for place in range(found_GN.numel()):
        delta_GN = torch.zeros_like(found_GN)
        delta_GN.view(-1)[place] = step
        with gates_changed(model, router.name, delta_GN):
            above = loss().detach()
        with gates_changed(model, router.name, -delta_GN):
            below = loss().detach()
        slopes.view(-1)[place] = (above - below) / (2 * step)
    for slope, prob, selected, found in zip(slopes, routing.probs_TN, routing.selected_TN, found_GN, strict=True):
        if name == "milora_3":  # p / sum of the kept p: a softmax over the kept experts
            prob = torch.where(selected, prob, 0.0) / prob[selected].sum()
        elif name == "milora_1":  # only the kept expert's own gate counts
            slope = torch.where(selected, slope, 0.0)
        want = prob * (slope - (prob * slope).sum())
        reference.close(found, want.detach(), 2e-3, "dL/d logit")  # the model's norms are in fp32, so steps are large
        if name == "milora_1":
            (best,) = selected.nonzero().flatten().tolist()
            assert found[best].item() * slope[best].item() > 0, "raised where a larger gate lowers the loss"
            continue
        candidates = selected if name == "milora_3" else torch.ones_like(selected)
        best = int(torch.where(candidates, slope, torch.inf).argmin())
        worst = int(torch.where(candidates, slope, -torch.inf).argmax())
        assert found[best] < 0, "the expert that lowers the loss most has its logit raised"
        assert found[worst] > 0


# -- skipping, saving, copying, leaving ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["milora_3", "milora_1", "milora_rational_ste"])
def test_modules_that_no_row_selected_are_not_computed(name: str) -> None:
    model, inputs = model_of(name), batch_of(["uuua", "puua"])
    with torch.no_grad(), calls_counted(model) as called, decisions_seen(model) as seen:
        got = model(**inputs).logits
    want = {
        f"{router}.{model.expert_names(router)[expert]}"
        for router, routing in seen.items()
        for expert in routing.selected_TN.any(0).nonzero().flatten().tolist()
    }
    assert set(called) == want
    assert 0 < len(called) < len(model.injection.layers)
    with calls_counted(model) as called:  # gradients are asked for, and every expert may have one
        reference.close(model(**inputs).logits, got, TOLERANCE, "logits")
    assert set(called) == set(model.injection.layers)


@pytest.mark.parametrize(("name", "unit"), [("milora_rational_ste", "module"), ("milora_3", "bank")])
def test_save_and_load(name: str, unit: str, tmp_path: Path) -> None:
    model, inputs = model_of(name, unit), batch_of(["uuua", "puua"])
    model.save_pretrained(tmp_path)
    again = MixtureModel.from_pretrained(base_model(dtype=torch.float64), tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.mixture_config == model.mixture_config
    names = [key for key, _ in again.adapter_parameters()]
    assert any(key.endswith("pooler.weight") for key in names)
    assert any(key.endswith("activation.numerator") for key in names) == (name == "milora_rational_ste")


def test_roles_and_names() -> None:
    model = model_of("milora_rational_ste")
    roles = {key: model.parameter_role(key) for key, _ in model.adapter_parameters()}
    for key, role in roles.items():
        end = key.rpartition(".")[-1]
        assert role == {"lora_A": "down", "lora_B": "up", "numerator": "activation", "denominator": "activation"}.get(
            end, "router"
        )
    assert sorted(roles.values()).count("activation") == 4
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert model.expert_names("model.layers.1") == [
        *attention,
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    assert model_of("milora_3", "bank").expert_names("model.layers.1") == ["0", "1", "2", "3"]


def test_a_failing_pass_leaves_nothing_behind() -> None:
    model, inputs = model_of("milora_3"), batch_of(["uuua", "puua"])
    with torch.no_grad():
        want = model(**inputs).logits
        with pytest.raises(ConfigError, match="prompt_mask"):
            model(**{**inputs, "prompt_mask": inputs["prompt_mask"][:, 1:]})
        assert passes._OPEN.get() == ()
        assert passes._REQUEST.get() is None
        assert current_context().shared == {}
        assert torch.equal(model(**inputs).logits, want)


def test_gates_that_are_always_one_can_be_merged_for_good() -> None:
    router = {"kind": "top_k", "num_experts_per_tok": 7, "combine": "unit", "scope": "block", "granularity": "prompt"}
    model, inputs = mixture(UNITS["module"] | {"router": router}), batch_of(["uuua", "puua"])
    with torch.no_grad():
        want = model(**inputs).logits
        inputs.pop("prompt_mask")
        got = model.merge_and_unload()(**inputs).logits
    reference.close(got[inputs["attention_mask"].bool()], want[inputs["attention_mask"].bool()], 1e-6, "logits")
    with pytest.raises(AdapterError, match="its routing depends on the input"):
        copy.deepcopy(model_of("milora_3")).merge_and_unload()


def test_deep_copies_disabling_and_unloading() -> None:
    model, inputs = model_of("milora_3"), batch_of(["uuua", "puua"])
    with torch.no_grad():
        want = model(**inputs).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, want)
        bare = base_model(dtype=torch.float64)(**{key: value for key, value in inputs.items() if key != "prompt_mask"})
        with twin.disable_adapter():
            assert torch.equal(twin(**inputs).logits, bare.logits)
            assert torch.equal(model(**inputs).logits, want), "the copy's switch is its own"
        for _, parameter in twin.adapter_parameters():
            parameter.zero_()
        base = twin.unload()
        assert torch.equal(
            base(input_ids=inputs["input_ids"]).logits,
            base_model(dtype=torch.float64)(input_ids=inputs["input_ids"]).logits,
        )
    modules = list(base.modules())
    assert not any("moadapt" in type(module).__module__ for module in modules)
    hooks = [hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [hook for hook in hooks if "moadapt" in getattr(hook, "__module__", type(hook).__module__)]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)
