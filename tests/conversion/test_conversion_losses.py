"""Losses of a converted model through its `loss`: distillation to the dense model, sparsity, and what they train."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from conversion_helpers import (
    FAMILIES,
    ROUTERS,
    block_function,
    by_router,
    converted,
    inputs_of,
    mixture_options,
    twin,
)
from tiny import gradients
from torch import Tensor

from moadapt import MixtureModel
from moadapt.convert import convert_ffn_to_experts
from moadapt.errors import ConfigError

BLOCKS = {"kind": "block_distillation", "coef": 0.7}
LOGITS = {"kind": "logits_distillation", "coef": 0.3, "temperature": 2.0}
TRAINED = {"trainable": True, "num_shared_experts": 1, "padding": True}


def padded(family: str = "llama") -> dict[str, Tensor]:
    """Right padding in one row, and tokens without a label."""
    inputs = inputs_of(family, 3, 7)
    inputs["attention_mask"][1, 4:] = 0
    if family.startswith("t5"):
        inputs["labels"][2, 3:] = -100
    else:
        inputs["labels"][1, 4:] = -100
        inputs["labels"][2, :3] = -100
    return inputs


def watched(model: MixtureModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Fills with (input, output) of every partition layer in the passes with the adapter on."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def see(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if module.switch.enabled:
                seen[name] = args[0].detach(), output

        return see

    for name, layer in model.injection.layers.items():
        layer.register_forward_hook(hook(name))
    return seen


def naive_blocks(seen: dict[str, tuple[Tensor, Tensor]], dense: Any, family: str, inputs: dict[str, Tensor]) -> Tensor:
    """Mean over blocks and real tokens of ||y - y_dense||² / ||y_dense||², token by token."""
    row = FAMILIES[family]
    means = []
    for owner, name in zip(row.owners, row.names(), strict=True):
        x, y = (value.reshape(-1, value.shape[-1]) for value in seen[name])
        mask = inputs["attention_mask"].flatten().bool()
        if name.startswith("decoder."):
            mask = inputs["labels"].flatten() != -100  # what the decoder reads there is padding
        with torch.no_grad():
            want = block_function(dense, owner, row)(x)
        errors = [((y[t] - want[t]) ** 2).sum() / (want[t] ** 2).sum() for t in range(len(x)) if mask[t]]
        means.append(sum(errors) / len(errors))
    return sum(means) / len(means)


def naive_logits(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, shifted: bool) -> Tensor:
    """temperature² times the mean KL(teacher || student) over positions that predict a label."""
    terms = []
    for b in range(len(labels)):
        for s in range(student.shape[1]):
            label = labels[b, s + 1] if shifted and s + 1 < labels.shape[1] else labels[b, s] if not shifted else -100
            if int(label) == -100:
                continue
            p = torch.softmax(student[b, s].double() / temperature, -1)
            q = torch.softmax(teacher[b, s].double() / temperature, -1)
            terms.append((q * (q.log() - p.log())).sum())
    return temperature**2 * sum(terms) / len(terms)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "t5_gated"])
@pytest.mark.parametrize("router", ["top_2_renorm", "sigmoid_ste"])
def test_distillation_is_to_the_dense_model(family: str, router: str) -> None:
    """Values, the gradients of router and experts, and the sum, against the dense model and a loop over tokens."""
    inputs = padded(family)
    base = FAMILIES[family].model(torch.float64)
    dense = twin(base)
    torch.manual_seed(5)
    options = mixture_options(4, ROUTERS[router], expert=TRAINED, losses=[BLOCKS, LOGITS])
    model = convert_ffn_to_experts(base, options).train()
    seen = watched(model)
    output = model(**inputs)
    with torch.no_grad():
        teacher = dense(**inputs).logits
    blocks = naive_blocks(seen, dense, family, inputs)
    final = naive_logits(output.logits, teacher, inputs["labels"], 2.0, shifted=not family.startswith("t5"))
    reference.close(model.last_losses["block_distillation"], blocks, 1e-11, "block_distillation")
    reference.close(model.last_losses["logits_distillation"], final, 1e-11, "logits_distillation")
    reference.close(output.aux_loss, 0.7 * blocks + 0.3 * final, 1e-6, "aux")
    reference.close(output.loss, model.last_losses["lm"] + 0.7 * blocks + 0.3 * final, 1e-6, "loss")
    # The same graph through the naive values gives the same gradients: the teachers are constants.
    parameters = dict(model.adapter_parameters())
    naive = 0.7 * blocks + 0.3 * final
    wanted = torch.autograd.grad(naive, list(parameters.values()), retain_graph=True)
    got = torch.autograd.grad(output.aux_loss, list(parameters.values()))
    for name, value, want in zip(parameters, got, wanted, strict=True):
        reference.close(value, want, 1e-6, name)
        assert want.any(), name


def test_masked_tokens_do_not_count() -> None:
    """Another filling changes neither the values nor the gradients."""
    model = by_router("top_2_renorm", torch.float64, expert=TRAINED, losses=[BLOCKS, LOGITS]).train()
    found = []
    for fill in (5, 9):
        inputs = padded()
        inputs["input_ids"][1, 4:] = fill
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append((model.last_losses, gradients(model)))
    for kind in ("block_distillation", "logits_distillation"):
        reference.close(found[1][0][kind], found[0][0][kind], 1e-12, kind)
    for name, gradient in found[0][1].items():
        reference.close(found[1][1][name], gradient, 1e-6, name)


def test_a_mixture_that_is_the_dense_model_has_no_distance_to_it() -> None:
    router = {"kind": "top_k", "num_experts_per_tok": 4, "combine": "unit", "init": "normal"}
    options = mixture_options(4, router, expert={"trainable": True}, losses=[BLOCKS, LOGITS])
    model = converted(options, dtype=torch.float64).train()
    model(**padded())
    assert 0.0 <= float(model.last_losses["block_distillation"]) < 1e-25
    assert abs(float(model.last_losses["logits_distillation"])) < 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_teacher_stays_while_the_experts_move(family: str) -> None:
    """Healing: the distance falls, and what it is measured from is the model before the first step."""
    inputs = padded(family)
    base = FAMILIES[family].model(torch.float64)
    dense = twin(base)
    torch.manual_seed(5)
    options = mixture_options(4, ROUTERS["top_2_renorm"], expert=TRAINED, losses=[BLOCKS, LOGITS])
    model = convert_ffn_to_experts(base, options).train()
    seen = watched(model)
    optimizer = torch.optim.AdamW([p for _, p in model.adapter_parameters()], lr=1e-2)
    history = []
    for _ in range(8):
        optimizer.zero_grad()
        model(**inputs).aux_loss.backward()
        history.append(float(model.last_losses["block_distillation"]))
        want = naive_blocks(seen, dense, family, inputs)
        assert history[-1] == pytest.approx(want.item(), rel=1e-9)
        optimizer.step()
    assert history[-1] < 0.8 * history[0]
    with torch.no_grad(), model.eval().disable_adapter():
        reference.close(model(**inputs).logits, dense(**inputs).logits, 1e-11, "the dense model")


@pytest.mark.parametrize("loss", [BLOCKS, LOGITS], ids=lambda loss: loss["kind"])
def test_either_loss_alone_keeps_the_teacher(loss: dict[str, Any]) -> None:
    base = FAMILIES["gpt2"].model(torch.float64)
    dense, inputs = twin(base), padded("gpt2")
    model = convert_ffn_to_experts(
        base, mixture_options(4, ROUTERS["top_2_renorm"], expert=TRAINED, losses=[loss])
    ).train()
    optimizer = torch.optim.SGD([p for _, p in model.adapter_parameters()], lr=0.5)
    model(**inputs).loss.backward()
    optimizer.step()
    with torch.no_grad(), model.eval().disable_adapter():
        reference.close(model(**inputs).logits, dense(**inputs).logits, 1e-11, "the dense model")


def test_the_teacher_has_no_dropout() -> None:
    """T5 drops neurons in training. With gates of 1 the distance is then the student's noise, and 0 without dropout."""
    router = {"kind": "top_k", "num_experts_per_tok": 4, "combine": "unit", "init": "normal"}
    options = mixture_options(4, router, expert={"trainable": True}, losses=[BLOCKS])
    model = converted(options, "t5", torch.float64, dropout_rate=0.5).train()
    layer = model.injection.layers["encoder.block.0.layer.1.DenseReluDense"]
    x_TD = torch.randn(6, 16, dtype=torch.float64)
    still = [layer.experts.dense(x_TD, dropout=False) for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(layer.experts.dense(x_TD), still[0])
    assert not layer._reconstruction(x_TD, still[0]).any()
    model(**inputs_of("t5"))
    assert model.last_losses["block_distillation"] > 0.1


@pytest.mark.parametrize(("family", "changes"), [("t5", {"dropout_rate": 0.5}), ("gpt2", {"resid_pdrop": 0.5})])
def test_the_teacher_of_logits_has_no_dropout_either(family: str, changes: dict[str, float]) -> None:
    """Nor any noise of the routers; the student is in training, and so is the model afterwards."""
    base = FAMILIES[family].model(torch.float64, **changes)
    dense = twin(base)
    options = mixture_options(4, ROUTERS["top_2_renorm"], losses=[LOGITS])
    model = convert_ffn_to_experts(base, options).train()
    seen: list[tuple[bool, Tensor]] = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((module.training, output.logits)), with_kwargs=True
    )
    model(**padded(family))
    assert [training for training, _ in seen] == [True, False]
    with torch.no_grad():
        reference.close(seen[1][1], dense(**padded(family)).logits, 1e-11, "teacher")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["softmax", "top_2", "top_2_renorm", "sigmoid_ste", "sigmoid_min", "relu"])
@pytest.mark.parametrize("loss", [BLOCKS, LOGITS], ids=lambda loss: loss["kind"])
def test_distillation_trains_routers_alone(name: str, loss: dict[str, Any]) -> None:
    """Over frozen experts, without the language model's loss."""
    model = by_router(name, torch.float64, losses=[loss]).train()
    model(**padded()).aux_loss.backward()
    found = gradients(model)
    assert set(found) == {key for key, _ in model.adapter_parameters()}
    assert all(".router." in key and gradient.any() for key, gradient in found.items())


def test_evaluation_pays_for_no_teacher() -> None:
    model = by_router("top_2_renorm", expert=TRAINED, losses=[BLOCKS, LOGITS, {"kind": "load_balance"}])
    calls = []
    for layer in model.injection.layers.values():
        layer.register_forward_hook(lambda *_: calls.append(1))
    output = model(**padded())
    assert len(calls) == 2
    assert set(output.aux_losses) == {"load_balance"}
    assert torch.equal(output.loss.detach(), model.last_losses["lm"])
    model.train()
    with model.disable_adapter():
        output = model(**padded())
    assert not output.aux_losses


def test_accumulation_adds_up() -> None:
    """sum over micro-batches of (tokens / all tokens) * loss, in value and gradient."""
    model = by_router(
        "sigmoid_ste", torch.float64, expert=TRAINED, losses=[BLOCKS, LOGITS, {"kind": "sparsity"}]
    ).train()
    micro = [padded(), inputs_of("llama", 2, 5, seed=8)]
    tokens = [int((item["labels"][:, 1:] != -100).sum()) for item in micro]
    for item in micro:
        model(**item, num_items_in_batch=sum(tokens)).loss.backward()
    accumulated = gradients(model)
    model.zero_grad()
    sum(count / sum(tokens) * model(**item).loss for item, count in zip(micro, tokens, strict=True)).backward()
    for name, gradient in gradients(model).items():
        reference.close(accumulated[name], gradient, 1e-5, name)


def test_sparsity_is_over_real_tokens() -> None:
    """DSMoE's: mean over routers, experts and tokens of the gates above the threshold; only these are pushed."""
    model = by_router("sigmoid_ste", torch.float64, losses=[{"kind": "sparsity", "coef": 2.0}]).train()
    inputs = padded()
    captured: list[Tensor] = []
    for site in model.injection.routers.values():
        site.router.register_forward_hook(lambda module, args, routing: captured.append(routing.logits_TN))
    output = model(**inputs)
    real = inputs["attention_mask"].flatten().bool()
    gates = [torch.sigmoid(logits_TN[real]) for logits_TN in captured]
    want = sum(torch.where(gate_TN > 0.5, gate_TN, 0.0).mean() for gate_TN in gates) / len(gates)
    reference.close(model.last_losses["sparsity"], want, 1e-12, "sparsity")
    reference.close(output.aux_loss, 2.0 * want, 1e-6, "aux")
    assert 0.1 < want.item() < 0.9


def test_target_sparsity_is_driven_by_the_share_of_a_step() -> None:
    """ReMoE's coefficient rises while more experts are on than wanted."""
    model = by_router(
        "relu", torch.float64, losses=[{"kind": "target_sparsity", "target": 0.25, "initial_strength": 1e-3}]
    )
    model.train()
    inputs, strength = padded(), 1e-3
    real = inputs["attention_mask"].flatten().bool()
    for _ in range(3):
        captured: list[Tensor] = []
        handles = [
            site.router.register_forward_hook(lambda m, a, routing: captured.append(routing.logits_TN))  # noqa: B023
            for site in model.injection.routers.values()
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        on = [(logits_TN[real] > 0).double() for logits_TN in captured]
        share = sum(float(value.mean()) for value in on) / len(on)
        assert float(model.last_losses["target_sparsity/active_share"]) == pytest.approx(share)
        # lambda / (target T²) sum_i c_i sum_t G_ti
        tokens = int(real.sum())
        value = sum(
            (on_TN.sum(0) * logits_TN[real].clamp(min=0).sum(0)).sum().item() / (0.25 * tokens**2)
            for on_TN, logits_TN in zip(on, captured, strict=True)
        )
        assert float(model.last_losses["target_sparsity"]) == pytest.approx(strength * value / len(on), rel=1e-6)
        model.end_step({name: float(number) for name, number in model.last_losses.items()})
        strength *= 1.2 if share > 0.25 else 1 / 1.2
        assert float(model.objective.states()["losses.target_sparsity.strength"]) == pytest.approx(strength)
    fresh = by_router("relu", torch.float64, losses=[{"kind": "target_sparsity", "target": 0.25}])
    fresh.objective.load_states(model.objective.states())
    assert fresh.objective.states() == model.objective.states()


def test_block_distillation_needs_blocks() -> None:
    from moadapt import get_mixture_model

    model = get_mixture_model(FAMILIES["llama"].model(), {"num_experts": 2, "losses": [BLOCKS]}).train()
    with pytest.raises(ConfigError, match="ffn_partition"):
        model(**padded())


def test_healing_brings_the_model_nearer_to_the_dense_one() -> None:
    """The chain as a user runs it: convert, train routers and LoRA on the dense model's logits, evaluate."""
    inputs = padded()
    base = FAMILIES["llama"].model()
    dense = twin(base)
    torch.manual_seed(5)
    options = mixture_options(4, ROUTERS["top_2_renorm"], expert={"lora": {"r": 4}}, losses=[LOGITS, BLOCKS])
    model = convert_ffn_to_experts(base, options)

    def distance() -> float:
        with torch.no_grad():
            return float((model.eval()(**inputs).logits - dense(**inputs).logits).square().mean())

    before = distance()
    optimizer = torch.optim.AdamW([p for _, p in model.adapter_parameters()], lr=1e-2)
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        model(**inputs).aux_loss.backward()
        optimizer.step()
    assert distance() < 0.7 * before
