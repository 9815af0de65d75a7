"""Opens a `RoutingContext` around every forward pass of a base model.

Hooks do it, so that it does not matter who calls the model: `MixtureModel.forward`, `generate`, a trainer, or the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moadapt.routing import _CURRENT, RoutingContext, Stream


@dataclass
class PassRequest:
    """What the caller of the base model knows and the base model does not take.

    Attributes:
        prompt_mask_BS: bool, True at prompt tokens.
        task_ids_B: int64 task ids.
        record: collect the routings.
        wants_reconstruction: let layers that replace a block compare their output with the block's.
        context: the context of the last pass that this request covered.
    """

    prompt_mask_BS: Tensor | None = None
    task_ids_B: Tensor | None = None
    record: bool = False
    wants_reconstruction: bool = False
    context: RoutingContext | None = None


_REQUEST: ContextVar[PassRequest | None] = ContextVar("moadapt_pass_request", default=None)
_OPEN: ContextVar[tuple[AbstractContextManager[Any], ...]] = ContextVar("moadapt_open_passes", default=())


@contextmanager
def requesting(request: PassRequest) -> Iterator[PassRequest]:
    """Make the request known to the passes inside the `with` block, in this thread only."""
    token = _REQUEST.set(request)
    try:
        yield request
    finally:
        _REQUEST.reset(token)


def install_hooks(model: PreTrainedModel) -> list[RemovableHandle]:
    """Hooks that open and close a context around every pass of the model, and of an encoder that runs alone."""
    modules: list[nn.Module] = [model]
    if model.config.is_encoder_decoder:
        modules.append(model.get_encoder())
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(_enter, with_kwargs=True))
        handles.append(module.register_forward_hook(_leave, always_call=True))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        handles.append(head.register_forward_pre_hook(_contiguous))
    return handles


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Generation reads the last position of every row, a slice.

    On a slice torch multiplies row by row, and copies a frozen weight once for each row (a trainable one it does not).
    For a vocabulary's weight that takes longer than the rest of the model.
    """
    return tuple(item.contiguous() if isinstance(item, Tensor) else item for item in args)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module` by name, the positional ones included."""
    return {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inner = _OPEN.get()
    # The encoder inside of a whole pass uses that pass's context.
    context = _CURRENT.get() if inner else None
    if context is None:
        context = _context_of(module, named_arguments(module, args, kwargs))
    manager = context.active()
    manager.__enter__()
    _OPEN.set((*inner, manager))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    *rest, manager = _OPEN.get()
    _OPEN.set(tuple(rest))
    manager.__exit__(None, None, None)


def _context_of(module: nn.Module, kwargs: dict[str, Any]) -> RoutingContext:
    request = _REQUEST.get() or PassRequest()
    is_encoder_decoder = isinstance(module, PreTrainedModel) and module.config.is_encoder_decoder
    # A generating encoder-decoder model is given decoder tokens only, after its encoder has run by itself.
    possible = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    inputs = next((kwargs[key] for key in possible if kwargs.get(key) is not None), None)
    rows, length = (inputs.shape[0], inputs.shape[1]) if inputs is not None else (1, 0)
    masks: dict[Stream, Tensor | None] = {}
    if is_encoder_decoder:
        masks["encoder"] = _mask(kwargs.get("attention_mask"), None)
        labels = kwargs.get("labels")
        real = labels != -100 if isinstance(labels, Tensor) else None
        masks["decoder"] = _mask(kwargs.get("decoder_attention_mask"), None, otherwise=real)
    else:
        masks["decoder"] = _mask(kwargs.get("attention_mask"), length)
    cache = kwargs.get("past_key_values")
    decoding = cache is not None and bool(cache.get_seq_length() > 0)
    prompt_mask = request.prompt_mask_BS
    context = RoutingContext(
        padding_masks={stream: mask for stream, mask in masks.items() if mask is not None},
        prompt_mask_BS=None if decoding or prompt_mask is None else _rows(prompt_mask, rows),
        task_ids_B=None if request.task_ids_B is None else _rows(request.task_ids_B, rows),
        phase="decode" if decoding else "prefill",
        batch_size=rows,
        record=request.record,
        wants_reconstruction=request.wants_reconstruction,
    )
    request.context = context
    return context


def _mask(mask: Any, length: int | None, otherwise: Tensor | None = None) -> Tensor | None:
    """A two-dimensional padding mask as bool, cut to the last `length` tokens (the ones that are not in the cache)."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return otherwise
    first = 0 if length is None else mask.shape[1] - length
    real: Tensor = mask[:, first:].to(torch.bool).contiguous()
    return real


def _rows(value: Tensor, rows: int) -> Tensor:
    """Repeat each row for its beams or samples, as `generate` expands its inputs."""
    return value if value.shape[0] in (0, rows) else value.repeat_interleave(rows // value.shape[0], dim=0)
