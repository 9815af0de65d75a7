"""What one row gets must not depend on padding, batch mates, their order, later tokens, recomputation or the cache.

Every router under every scope goes through the same checks, in float64: differences are then either rounding (1e-12)
or another routing (1e-2 and more).
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from kinds import DETERMINISTIC, SCOPES, Row, targets_of
from tiny import VOCAB, base_model, batch, gradients, mixture_model
from torch import Tensor

from moadapt import MixtureModel
from moadapt.routing import current_context

TOLERANCE = 1e-11
_MODELS: dict[tuple[str, str], MixtureModel] = {}


def model_of(row: Row, scope: Any) -> MixtureModel:
    """One model per row and scope for all tests of this file; none of them changes it."""
    key = (row.name, str(scope))
    if key not in _MODELS:
        config = row.config(scope, target_modules=targets_of(scope), losses=[{"kind": "router_z"}])
        _MODELS[key] = mixture_model(config, dtype=torch.float64)
    return _MODELS[key].eval()


every_row = pytest.mark.parametrize(
    ("row", "scope"),
    [pytest.param(row, scope, id=f"{row.name}-{scope}") for row in DETERMINISTIC for scope in SCOPES],
)


def ids_of(*lengths: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str, length: int, fill: int = 0) -> dict[str, Tensor]:
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[number, where], mask[number, where] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def real_logits(model: MixtureModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    logits = model(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


@every_row
def test_padding_and_batch_mates(row: Row, scope: Any) -> None:
    """Left or right, little or much, whatever id the padding has; alone or beside others, in any order."""
    model, rows = model_of(row, scope), ids_of(6, 3, 4)
    alone = [real_logits(model, padded([item], "right", len(item)))[0] for item in rows]
    for side in ("left", "right"):
        for length, fill in ((6, 0), (9, 7)):
            for number, got in enumerate(real_logits(model, padded(rows, side, length, fill))):
                reference.close(got, alone[number], TOLERANCE, f"{side} {length} row {number}")
    got = real_logits(model, padded([rows[2], rows[0]], "left", 8))
    reference.close(got[0], alone[2], TOLERANCE, "other order")
    reference.close(got[1], alone[0], TOLERANCE, "other order")


@every_row
def test_later_tokens_do_not_matter(row: Row, scope: Any) -> None:
    model = model_of(row, scope)
    (long,) = ids_of(8)
    (other,) = ids_of(8, seed=9)
    changed = torch.cat([long[:5], other[5:]])
    want = real_logits(model, padded([long[:5]], "right", 5))[0]
    for item in (long, changed):
        reference.close(real_logits(model, padded([item], "right", 8))[0][:5], want, TOLERANCE, "prefix")


@every_row
def test_cache_gives_the_same_logits_step_by_step(row: Row, scope: Any) -> None:
    """Left-padded prompts, then one token at a time with the cache, against one pass over everything."""
    model, rows = model_of(row, scope), ids_of(7, 5)
    everything = padded(rows, "left", 7)
    prompt = {key: value[:, :4] for key, value in everything.items()}
    with torch.no_grad():
        whole = model(**everything).logits
        output = model(**prompt, use_cache=True)
        steps = [output.logits]
        for position in range(4, 7):
            output = model(
                input_ids=everything["input_ids"][:, position : position + 1],
                attention_mask=everything["attention_mask"][:, : position + 1],
                position_ids=everything["position_ids"][:, position : position + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            steps.append(output.logits)
    real = everything["attention_mask"].bool()
    reference.close(torch.cat(steps, 1)[real], whole[real], TOLERANCE, "logits")


@every_row
def test_generation_with_and_without_cache(row: Row, scope: Any) -> None:
    model = model_of(row, scope)
    prompts = padded(ids_of(5, 3), "left", 5)
    prompts.pop("position_ids")
    outputs = [
        model.generate(**prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert outputs[0].shape == (2, 9)
    assert torch.equal(*outputs)
    alone = model.generate(input_ids=ids_of(5, 3)[1][None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(outputs[0][1, 5:], alone[0, 3:]), "the batch mate changed the answer"


@every_row
def test_evaluation_is_deterministic_and_checkpointing_free(row: Row, scope: Any) -> None:
    model, inputs = model_of(row, scope), batch()
    first = model(**inputs)
    model.gradient_checkpointing_enable()
    try:
        second = model(**inputs)
    finally:
        model.gradient_checkpointing_disable()
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.loss, second.loss)


@every_row
def test_save_and_load(row: Row, scope: Any, tmp_path: Path) -> None:
    model, inputs = model_of(row, scope), batch()
    model.save_pretrained(tmp_path)
    again = MixtureModel.from_pretrained(base_model(dtype=torch.float64), tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@every_row
def test_deep_copies_are_independent(row: Row, scope: Any) -> None:
    model, inputs = model_of(row, scope), batch()
    want = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, want)
    with twin.disable_adapter():
        assert torch.equal(model(**inputs).logits, want)
        assert not torch.equal(twin(**inputs).logits, want)
    twin.train()(**inputs).loss.backward()
    assert gradients(twin).keys() == {name for name, _ in model.adapter_parameters()}
    assert not gradients(model)
    with torch.no_grad():
        for _, parameter in twin.adapter_parameters():
            parameter.zero_()
    base = twin.unload()
    hooks = [hook for m in base.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    # (transformers leaves one of its own on the embedding when checkpointing is switched off again)
    assert not [hook for hook in hooks if "moadapt" in getattr(hook, "__module__", type(hook).__module__)]
    assert not model.training
    assert torch.equal(model(**inputs).logits, want)


def test_gradients_do_not_depend_on_padding_either() -> None:
    """Right padding with labels of -100, the auxiliary losses on: the same gradients."""
    row = DETERMINISTIC[2]
    losses = [
        {"kind": "load_balance", "coef": 0.5},
        {"kind": "router_z", "coef": 0.1},
        {"kind": "importance", "coef": 0.2},
    ]
    model = mixture_model(row.config("block", losses=losses), dtype=torch.float64).train()
    rows = ids_of(5, 3)
    found = []
    for length, fill in ((5, 0), (9, 7)):
        inputs = padded(rows, "right", length, fill)
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        found.append((loss, gradients(model)))
    reference.close(found[1][0], found[0][0], 1e-6, "loss")
    for name, grad in found[0][1].items():
        reference.close(found[1][1][name], grad, 1e-5, name)  # the cross-entropy is fp32


@pytest.mark.parametrize("scope", ["linear", "block"])
def test_two_threads_keep_their_passes_apart(scope: str) -> None:
    """Both run the same model at the same time; a barrier inside the forward pass makes them overlap."""
    row = DETERMINISTIC[3]
    losses = [{"kind": "load_balance", "coef": 0.5}, {"kind": "router_z", "coef": 0.1}]
    model = mixture_model(row.config(scope, losses=losses), dtype=torch.float64).train()
    inputs = [batch(2, 6, seed=1), batch(3, 5, seed=2)]
    inputs[1]["attention_mask"][:, 4:] = 0
    want = [model(**item) for item in inputs]
    wanted = [(output.logits.detach(), {k: v.detach() for k, v in output.aux_losses.items()}) for output in want]
    barrier = threading.Barrier(2, timeout=20)

    def meet(module: Any, args: Any) -> None:
        barrier.wait()

    hooks = [
        module.register_forward_pre_hook(meet)
        for module in (model.base_model.model.layers[0].mlp, model.base_model.model.layers[1].self_attn.o_proj)
    ]
    results: dict[int, Any] = {}

    def run(number: int) -> None:
        output = model(**inputs[number])
        results[number] = (output.logits.detach(), {k: v.detach() for k, v in output.aux_losses.items()})

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for hook in hooks:
        hook.remove()
    for number in range(2):
        assert torch.equal(results[number][0], wanted[number][0])
        assert results[number][1] == wanted[number][1]
    assert current_context().shared == {}


def test_a_pass_leaves_no_context_behind_even_if_it_fails() -> None:
    model = model_of(DETERMINISTIC[0], "block")
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), VOCAB + 5))
    context = current_context()
    assert context.records == []
    assert context.shared == {}
    from moadapt import passes

    assert passes._OPEN.get() == ()
    assert passes._REQUEST.get() is None
    assert model(**batch()).loss.isfinite()
