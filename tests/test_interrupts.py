"""A keyboard interrupt inside a pass, after which torch calls no hook, leaves nothing of the pass behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from prompts import BANK, MILORA, ids_of, left_padded, mixture
from torch import nn

from moadapt import MixtureModel, passes
from moadapt.routing import _CURRENT

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@contextmanager
def interrupted(module: nn.Module, call: int) -> Iterator[None]:
    """The block ends with an interrupt inside the given call of the module."""
    calls = []

    def interrupt(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def nothing_is_open() -> bool:
    return passes._OPEN.get() == () and _CURRENT.get() is None and passes._REQUEST.get() is None


@pytest.mark.parametrize("merge", [False, True])
def test_generation(merge: bool) -> None:
    model, inputs = mixture(MILORA), left_padded(ids_of(5, 3))
    want = model.generate(**inputs, **OPTIONS)
    with interrupted(model.base_model.model.layers[1], 3):
        model.generate(**left_padded(ids_of(7)), **OPTIONS, merge_after_prefill=merge)
    assert nothing_is_open(), "with merge, the merged weights would be held"
    assert torch.equal(model.generate(**inputs, **OPTIONS), want)


def test_an_encoder_that_runs_alone_afterwards() -> None:
    """It would take an open pass for the one around it, with that pass's padding and turns."""
    model, inputs = mixture(MILORA, "t5"), left_padded(ids_of(5, 3))
    want = model.generate(**inputs, **OPTIONS)
    with interrupted(model.base_model.decoder.block[1], 1):
        model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]]))
    assert nothing_is_open()
    assert torch.equal(model.generate(**inputs, **OPTIONS), want)


def test_with_the_adapter_off() -> None:
    model, inputs = mixture(BANK), left_padded(ids_of(5, 3))
    with interrupted(model.base_model.model.layers[1], 2), model.disable_adapter():
        model.generate(**inputs, **OPTIONS)
    assert model.injection.switch.enabled
    assert nothing_is_open()


def test_a_call_of_the_base_model_itself() -> None:
    """Nothing is around it that could tidy up, so the next pass does."""
    model: MixtureModel = mixture(BANK)
    inputs = left_padded(ids_of(5, 3))
    want = model(**inputs).logits
    with interrupted(model.base_model.model.layers[1], 1):
        model.base_model(**inputs)
    assert torch.equal(model.base_model(**inputs).logits, want)
    assert nothing_is_open()
