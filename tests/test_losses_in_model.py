"""The auxiliary losses inside of `MixtureModel.loss`: values, accumulation, activation checkpointing, evaluation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import reference
import torch
from kinds import DETERMINISTIC, Row
from tiny import batch, gradients, mixture_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt import MixtureModel
from moadapt.errors import ConfigError
from moadapt.losses import AuxiliaryLoss
from moadapt.registry import LOSSES, ROUTERS
from moadapt.routers import TopKRouter
from moadapt.routing import Routing, RoutingContext

LOSS_LIST = [
    {"kind": "load_balance", "coef": 0.5},
    {"kind": "router_z", "coef": 0.1},
    {"kind": "importance", "coef": 0.3},
]
TOP_2 = {"kind": "top_k", "num_experts_per_tok": 2}


def build(scope: Any = "linear", losses: list[dict[str, Any]] | None = None, **more: Any) -> MixtureModel:
    options = {
        "num_experts": 4,
        "expert": {"kind": "lora", "r": 2},
        "router": {**TOP_2, "scope": scope},
        "losses": LOSS_LIST if losses is None else losses,
    }
    return mixture_model(options | more, dtype=torch.float64).train()


def padded(lengths: tuple[int, ...] = (6, 4), seed: int = 3, prompt: int = 2) -> dict[str, Tensor]:
    """A right-padded batch; the first tokens of each row carry no label."""
    inputs = batch(len(lengths), max(lengths), seed)
    inputs["labels"][:, :prompt] = -100
    for row, length in enumerate(lengths):
        inputs["attention_mask"][row, length:] = 0
        inputs["labels"][row, length:] = -100
    return inputs


def test_loss_is_lm_plus_weighted_losses() -> None:
    model, inputs = build(), padded()
    output = model(**inputs)
    parts = model.last_losses
    aux = 0.5 * parts["load_balance"] + 0.1 * parts["router_z"] + 0.3 * parts["importance"]
    reference.close(parts["aux"], aux, 1e-12, "aux")
    reference.close(output.loss, parts["lm"] + aux, 1e-12, "loss")
    reference.close(
        parts["lm"], model.base_model.loss_function(output.logits, inputs["labels"], vocab_size=40), 1e-12, "lm"
    )
    assert set(parts) == {"lm", "load_balance", "router_z", "importance", "aux"}
    assert not any(value.requires_grad for value in parts.values())
    assert output.aux_loss.requires_grad
    reference.close(output.aux_loss, parts["aux"], 1e-12, "aux_loss")


def test_evaluation_returns_the_lm_loss_alone_and_still_reports_the_rest() -> None:
    model = build().eval()
    output = model(**padded())
    assert torch.equal(output.loss.detach(), model.last_losses["lm"])
    assert model.last_losses["load_balance"] > 0


def test_losses_see_real_tokens_of_every_router() -> None:
    """Against the loop, from logits that hooks on the routers capture."""
    model, inputs = build("block"), padded()
    captured: list[Tensor] = []
    for site in model.injection.routers.values():
        site.router.register_forward_hook(lambda module, args, routing: captured.append(routing.logits_TN))
    model(**inputs)
    real = inputs["attention_mask"].bool().reshape(-1).tolist()
    naive = []
    for logits_TN in captured:
        decisions = []
        for logits in logits_TN:
            probs = reference.softmax(list(logits))
            best = sorted(range(4), key=lambda i, probs=probs: -probs[i].item())[:2]
            decisions.append(reference.Decision(probs, [i in best for i in range(4)], list(logits), probs))
        naive.append(reference.Routed(decisions, real, 2))
    assert len(captured) == 2
    for kind in ("load_balance", "router_z", "importance"):
        reference.close(model.last_losses[kind], getattr(reference, kind)(naive), 1e-12, kind)


@pytest.mark.parametrize("call", ["keywords", "positional"])
def test_padding_does_not_count_however_the_mask_is_passed(call: str) -> None:
    model, inputs = build(), padded()
    alone = padded()
    if call == "keywords":
        model(**inputs)
    else:
        model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    masked = model.last_losses["load_balance"]
    junk = {
        key: torch.cat([value, torch.full_like(value, fill)], 1)
        for (key, value), fill in zip(alone.items(), (5, 0, -100), strict=True)
    }
    model(**junk)
    reference.close(model.last_losses["load_balance"], masked, 1e-12, "more padding")
    model(**{key: value for key, value in inputs.items() if key != "attention_mask"})
    assert (model.last_losses["load_balance"] - masked).abs() > 1e-6, "without a mask the padding counts"


@pytest.mark.parametrize("scope", ["linear", "block", ["ffn", "attention"]])
def test_accumulation_adds_up_to_token_weighted_means(scope: Any) -> None:
    """sum over micro-batches of (tokens / all tokens) * (lm + aux), exactly, in value and gradient."""
    model = build(scope)
    micro = [padded((6, 4), 1), padded((3, 6), 2), padded((5, 2), 3)]
    tokens = [int((item["labels"][:, 1:] != -100).sum()) for item in micro]
    total = 0.0
    for item in micro:
        loss = model(**item, num_items_in_batch=torch.tensor(sum(tokens))).loss
        loss.backward()
        total += loss.item()
    accumulated = gradients(model)
    model.zero_grad()
    weighted = sum(count / sum(tokens) * model(**item).loss for item, count in zip(micro, tokens, strict=True))
    weighted.backward()
    # transformers computes the cross-entropy in fp32, also in a float64 model.
    assert total == pytest.approx(weighted.item(), rel=1e-6)
    for name, grad in gradients(model).items():
        reference.close(accumulated[name], grad, 1e-5, name)


def test_accumulated_lm_loss_is_that_of_one_big_batch() -> None:
    model = build(losses=[])
    rows = [padded((6,), 1), padded((6,), 2), padded((6,), 3)]
    rows[0]["labels"][:, :5] = -100
    big = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    count = int((big["labels"][:, 1:] != -100).sum())
    parts = sum(model(**row, num_items_in_batch=count).loss for row in rows)
    reference.close(parts, model(**big).loss, 1e-6, "loss")


def test_a_micro_batch_without_labels_adds_nothing() -> None:
    """Its mean over no token is not a number; its share of the step is zero."""
    model, inputs = build(), padded()
    inputs["labels"][:] = -100
    loss = model(**inputs, num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(grad.isfinite().all() and grad.abs().max() == 0 for grad in gradients(model).values())


def test_no_labels_no_loss() -> None:
    model = build()
    output = model(**{key: value for key, value in padded().items() if key != "labels"})
    assert output.loss is None


def test_tuples_on_request() -> None:
    model, inputs = build(), padded()
    loss, logits, *_ = model(**inputs, return_dict=False)
    output = model(**inputs)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_disabled_adapter_brings_no_auxiliary_loss() -> None:
    model = build()
    with model.disable_adapter():
        output = model(**padded())
    assert torch.equal(output.loss, model.last_losses["lm"])
    assert set(model.last_losses) == {"lm", "aux"}
    assert model.last_losses["aux"] == 0


@pytest.mark.parametrize("count", ["argmax"])
def test_dense_router_learns_from_the_argmax_form(count: str) -> None:
    model = build(
        router={"kind": "softmax"},
        losses=[{"kind": "load_balance", "count": count, "coef": 1.0}],
        expert={"kind": "lora", "r": 2},
    )
    output = model(**padded())
    output.aux_loss.backward()
    routers = [p for name, p in model.adapter_parameters() if model.parameter_role(name) == "router"]
    assert all(p.grad.abs().max() > 0 for p in routers)


# -- activation checkpointing -------------------------------------------------------------------------------------


def test_checkpointing_of_the_base_model_alone_is_refused() -> None:
    model = build()
    model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ConfigError, match="activation_checkpointing_enable"):
        model(**padded())
    model.activation_checkpointing_enable()
    model(**padded()).loss.backward()


@pytest.mark.parametrize("scope", ["linear", "ffn_and_attention"])
def test_a_pass_without_the_adapter_is_recomputed_without_it(scope: str) -> None:
    """The backward pass may come after `disable_adapter` has ended."""
    model = build(["ffn", "attention"] if scope == "ffn_and_attention" else scope, modules_to_save=["lm_head"])
    embedding = model.base_model.get_input_embeddings().weight.requires_grad_(True)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        embedding.grad = None
        with model.disable_adapter():
            loss = model(**padded()).loss
        loss.backward()
        results.append(embedding.grad.clone())
    assert torch.equal(*results)


def test_disabling_in_one_thread_leaves_the_others_alone() -> None:
    model, inputs = build(), padded()
    for name, parameter in model.adapter_parameters():
        if model.parameter_role(name) == "up":
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        want = model(**inputs).logits
        with model.disable_adapter(), ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: model(**inputs).logits).result()
            assert not torch.equal(model(**inputs).logits, want)
    assert torch.equal(other, want)


def step(
    model: MixtureModel, inputs: dict[str, Tensor], seed: int = 5
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    parts = dict(model.last_losses)
    loss.backward()
    return loss.detach(), parts, gradients(model)


@pytest.mark.parametrize("scope", ["linear", "ffn", "block", ["ffn", "attention"]], ids=str)
@pytest.mark.parametrize("row", DETERMINISTIC, ids=lambda row: row.name)
def test_checkpointing_changes_no_number(row: Row, scope: Any) -> None:
    """Bitwise, with dropout, jitter and noise on: the same losses (counted once) and the same gradients."""
    from kinds import targets_of

    selects_all = row.router["kind"] == "softmax" or row.router.get("num_experts_per_tok") == 4
    losses = LOSS_LIST[1:] if selects_all else LOSS_LIST
    expert = {**row.expert, "lora_dropout": 0.3}
    row = Row(row.name, expert, row.router)
    model = mixture_model(row.config(scope, losses=losses, target_modules=targets_of(scope))).train()
    inputs = padded()
    plain = step(model, inputs)
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpointed = step(model, inputs)
    assert torch.equal(plain[0], checkpointed[0])
    assert plain[1] == checkpointed[1]
    for name, grad in plain[2].items():
        assert torch.equal(grad, checkpointed[2][name]), name
    model.gradient_checkpointing_disable()
    assert torch.equal(step(model, inputs)[0], plain[0])


class FlippingRouter(TopKRouter):
    """Reads -x in every second call: recomputation would choose other experts."""

    calls: int = 0
    seen: list[Routing]

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        sign = 1.0 if self.calls % 2 == 0 else -1.0
        self.calls += 1
        routing = super().forward(sign * hidden_states, context)
        self.seen.append(routing)
        return routing


def flipping(model: MixtureModel) -> list[FlippingRouter]:
    routers = [site.router for site in model.injection.routers.values()]
    for router in routers:
        router.__class__ = FlippingRouter
        router.seen = []
    return routers


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("scope", ["linear", ["ffn", "attention"]], ids=str)
def test_recomputation_replays_the_first_decision(scope: Any, enable: str) -> None:
    """Under both names: transformers' Trainer calls the newer one where the model has it."""
    model, inputs = build(scope), padded()
    routers = flipping(model)
    getattr(model, enable)()
    loss = model(**inputs).loss
    recorded = model.last_losses["load_balance"].clone()
    loss.backward()
    assert torch.equal(model.last_losses["load_balance"], recorded)
    for router in routers:
        assert router.calls == 2, "the layer was not recomputed"
        first, second = router.seen
        assert not torch.equal(first.logits_TN, second.logits_TN)
        assert not torch.equal(first.indices_TK, second.logits_TN.topk(2).indices), "this test could not fail"
        assert torch.equal(first.indices_TK, second.indices_TK)
        assert torch.equal(first.selected_TN, second.selected_TN)


def test_without_checkpointing_the_flipping_router_decides_anew() -> None:
    model, inputs = build(), padded()
    routers = flipping(model)
    model(**inputs)
    model(**inputs)
    assert any(not torch.equal(router.seen[0].indices_TK, router.seen[1].indices_TK) for router in routers)


@pytest.mark.parametrize("scope", ["linear", "block", ["ffn", "attention"]], ids=str)
def test_two_forwards_before_one_backward(scope: Any) -> None:
    model = build(scope)
    one, two = padded((6, 4), 1), padded((3, 5), 2)
    separate: dict[str, Tensor] = {}
    for inputs in (one, two):
        for name, grad in step(model, inputs)[2].items():
            separate[name] = separate.get(name, 0) + grad
    model.gradient_checkpointing_enable()
    model.zero_grad()
    (model(**one).loss + model(**two).loss).backward()
    for name, grad in gradients(model).items():
        reference.close(grad, separate[name], 1e-12, name)


def test_backward_twice_through_one_graph() -> None:
    """Two losses of one pass, one gradient each, as multi-task gradient surgery asks for: recomputed twice."""
    model, inputs = build(), padded()
    want = step(model, inputs)[2]
    model.gradient_checkpointing_enable()
    model.zero_grad()
    output = model(**inputs)
    lm_loss = output.loss - output.aux_loss
    lm_loss.backward(retain_graph=True)
    output.aux_loss.backward()
    for name, grad in gradients(model).items():
        reference.close(grad, want[name], 1e-5, name)


def test_records_of_a_pass_that_is_never_differentiated_are_dropped() -> None:
    model, inputs = build(), padded()
    model.gradient_checkpointing_enable()
    first = step(model, inputs)
    model(**inputs)  # forward only
    second = step(model, inputs)
    assert torch.equal(first[0], second[0])


def test_checkpointing_that_was_on_before_is_kept_and_made_safe() -> None:
    from tiny import base_model, randomize_adapter

    from moadapt import get_mixture_model

    base: PreTrainedModel = base_model(dtype=torch.float64).train()
    base.gradient_checkpointing_enable()
    options = {"num_experts": 4, "expert": {"kind": "lora", "r": 2}, "router": TOP_2, "losses": LOSS_LIST}
    model = get_mixture_model(base, options)
    randomize_adapter(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert model.training
    routers = flipping(model)
    model(**padded()).loss.backward()
    assert all(router.calls == 2 for router in routers)
    assert all(torch.equal(router.seen[0].indices_TK, router.seen[1].indices_TK) for router in routers)


def test_reentrant_checkpointing_is_refused() -> None:
    from moadapt.errors import ConfigError

    model = build()
    with pytest.raises(ConfigError, match=r"use_reentrant: true loses .* set it to false"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})


# -- regularization, and losses without a table entry -------------------------------------------------------------


def test_all_losses_are_documented_subclasses() -> None:
    for name in LOSSES.names():
        kind = LOSSES.get(name)
        assert issubclass(kind.cls, AuxiliaryLoss)
        assert kind.cls.__doc__
        assert kind.config.model_fields["kind"].default == name
    for name in ROUTERS.names():
        assert issubclass(ROUTERS.get(name).cls, nn.Module)
