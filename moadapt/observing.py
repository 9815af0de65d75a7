"""Running a dense model without leaving a trace, and looking at what its modules are given.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.errors import DataError
from moadapt.routing import Stream

Batch = dict[str, Tensor]


def prepared(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch on the model's device, with positions that do not count padding on the left."""
    moved = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
    mask = moved.get("attention_mask")
    takes_positions = "position_ids" in signature(model.forward).parameters
    if mask is not None and mask.dim() == 2 and takes_positions and "position_ids" not in moved:
        moved["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return moved


def masks(model: PreTrainedModel, batch: Batch) -> dict[Stream, Tensor]:
    """True at real tokens, (B, S) per stream.

    Raises:
        DataError: an encoder-decoder model without `labels`.
    """
    ids_BS = batch["input_ids"]
    read_BS = batch.get("attention_mask", torch.ones_like(ids_BS)).bool()
    if not model.config.is_encoder_decoder:
        return {"decoder": read_BS}
    if "labels" not in batch:
        raise DataError("calibration: an encoder-decoder model needs texts with an answer (`labels`)")
    written_BS = batch.get("decoder_attention_mask", batch["labels"] != -100).bool()
    return {"encoder": read_BS, "decoder": written_BS}


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the model returns for the batch: (B, S, vocabulary)."""
    arguments = batch if model.config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
    values: Tensor = model(**arguments, use_cache=False).logits
    return values


def run(model: PreTrainedModel, batch: Batch) -> None:
    """A forward pass for what hooks see; logits of the last position only, where the model can leave out the others."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    logits(model, {**batch, **few})  # type: ignore[dict-item]


def loss(model: PreTrainedModel, batch: Batch, masks_BS: Mapping[Stream, Tensor]) -> Tensor:
    """The sum of the token losses: a scalar in fp32."""
    logits_BSV = logits(model, batch).float()
    labels_BS = batch.get("labels", batch["input_ids"]).masked_fill(~masks_BS["decoder"], -100)
    if not model.config.is_encoder_decoder:
        logits_BSV, labels_BS = logits_BSV[:, :-1], labels_BS[:, 1:]
    return nn.functional.cross_entropy(
        logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="sum"
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters; afterwards what was before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in flags:
            parameter.requires_grad_(required)


@contextmanager
def watching(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show the module's first input to `see`, whose result (if any) takes its place."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if args:
            new = see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = next(iter(kwargs))
        new = see(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
