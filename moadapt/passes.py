"""Opens a `RoutingContext` around every forward pass of a base model.

Hooks do it, so that it does not matter who calls the model: `MixtureModel.forward`, `generate`, a trainer, or the user.

Decisions about prompts are kept with the KV cache that a pass fills (`moadapt/kept.py`), and given to the passes that
continue it. Which tokens of a pass are a prompt's: those of the request's prompt mask; without one, of a pass with
labels those with the label -100, and otherwise all tokens that no cache precedes. The prompt of a decoder with an
encoder is its start token, behind which the encoder's output is known; everything in the encoder is prompt.

Shapes: B batch, S tokens of the pass, P tokens of the request's masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from threading import Lock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from moadapt.kept import find_cache, kept_with, num_cached
from moadapt.routing import _CURRENT, IGNORE_INDEX, RoutingContext, Stream


@dataclass
class PassRequest:
    """What the caller of the base model knows and the base model does not take.

    Attributes:
        prompt_mask_BP: bool, True at prompt tokens.
        task_ids_B: int64 task ids.
        record: collect the routings.
        wants_reconstruction: let layers that replace a block compare their output with the block's.
        context: the context of the last pass that this request covered.
        model: the base model that is meant; others that run inside (a draft model of assisted generation) are not.
        padding_mask_BP: bool, True at real tokens; used where the model is given no mask of that shape.
        generates: the request covers a whole generation, and its masks begin at the first token that is in the cache.
        temporary: with `merge_after_prefill`, the merged weights of this generation, by mixture layer.
        cache: the last one that decisions were kept with.
    """

    prompt_mask_BP: Tensor | None = None
    task_ids_B: Tensor | None = None
    record: bool = False
    wants_reconstruction: bool = False
    context: RoutingContext | None = None
    model: nn.Module | None = None
    padding_mask_BP: Tensor | None = None
    generates: bool = False
    temporary: dict[Any, Tensor | None] | None = None
    cache: Cache | None = None


_REQUEST: ContextVar[PassRequest | None] = ContextVar("moadapt_pass_request", default=None)
_OPEN: ContextVar[tuple[tuple[object, RoutingContext | None], ...]] = ContextVar("moadapt_open_passes", default=())
"""The passes that run, each with the context around it."""
_OBSERVERS: WeakKeyDictionary[nn.Module, tuple[Callable[[RoutingContext], None], ...]] = WeakKeyDictionary()
_OBSERVERS_LOCK = Lock()


@contextmanager
def requesting(request: PassRequest) -> Iterator[PassRequest]:
    """Make the request known to the passes inside the `with` block, in this thread only."""
    token, num_open = _REQUEST.set(request), len(_OPEN.get())
    try:
        yield request
    finally:
        _REQUEST.reset(token)
        _close_passes(num_open)


def _close_passes(num_left: int) -> None:
    """Close the innermost passes, down to so many. After a keyboard interrupt torch calls no hook that would do it."""
    passes = _OPEN.get()
    if len(passes) > num_left:
        _CURRENT.set(passes[num_left][1])
        _OPEN.set(passes[:num_left])


@contextmanager
def observing_passes(model: nn.Module, observer: Callable[[RoutingContext], None]) -> Iterator[None]:
    """Inside the `with` block the passes of a model record their routings, whatever thread they run in.

    Args:
        model: the base model, with the hooks of `install_hooks`.
        observer: called with the context of every pass that has come to its end.
    """
    with _OBSERVERS_LOCK:
        _OBSERVERS[model] = (*_OBSERVERS.get(model, ()), observer)
    try:
        yield
    finally:
        with _OBSERVERS_LOCK:
            left = tuple(other for other in _OBSERVERS[model] if other is not observer)
            if left:
                _OBSERVERS[model] = left
            else:
                del _OBSERVERS[model]


def install_hooks(model: PreTrainedModel, keeps: bool) -> list[RemovableHandle]:
    """Hooks that open and close a context around every pass of the model, and of an encoder that runs alone.

    Args:
        model: the base model.
        keeps: whether it has routers whose decisions are kept with the cache.
    """
    pairs: list[tuple[nn.Module, Literal["encoder", "model"]]] = [(model, "model")]
    if model.config.is_encoder_decoder:
        pairs.append((model.get_encoder(), "encoder"))
    handles = []
    for module, part in pairs:
        hooks = _PassHooks(model, part, keeps)
        handles.append(module.register_forward_pre_hook(hooks.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(hooks.leave, always_call=True))
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


@dataclass
class _PassHooks:
    """The hooks of a base model, or of its encoder."""

    model: PreTrainedModel
    part: Literal["encoder", "model"]
    keeps: bool

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the context. The encoder inside of a whole pass uses that pass's context."""
        for number, (hooks, _) in enumerate(_OPEN.get()):
            if hooks is self:  # of a call of the base model itself that was interrupted
                _close_passes(number)
                break
        outer = _CURRENT.get()
        context = outer if _OPEN.get() and self.part == "encoder" else None
        if context is None:
            context = self._context(named_arguments(module, args, kwargs))
        _CURRENT.set(context)
        _OPEN.set((*_OPEN.get(), (self, outer)))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Close it, and keep what was decided with the cache that the pass has filled."""
        if not _OPEN.get() or _OPEN.get()[-1][0] is not self:
            return  # an error while it was opened
        context = _CURRENT.get()
        _close_passes(len(_OPEN.get()) - 1)
        cache = find_cache(output) if self.keeps and self.part == "model" else None
        if cache is not None and context is not None and (context.decided or context.kept):
            request = _request_for(self.model)
            kept_with(cache).decisions.update(context.decided)
            if request is not None:
                request.cache = cache
        if context is not None and output is not None and _CURRENT.get() is not context:  # a whole pass, without error
            for observer in _OBSERVERS.get(self.model, ()):
                observer(context)

    def _context(self, kwargs: dict[str, Any]) -> RoutingContext:
        request = _request_for(self.model) or PassRequest()
        with_encoder = bool(self.model.config.is_encoder_decoder)
        # A generating encoder-decoder model is given decoder tokens only, after its encoder has run by itself.
        possible = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
        inputs = next((kwargs[key] for key in possible if kwargs.get(key) is not None), None)
        rows, length = (inputs.shape[0], inputs.shape[1]) if inputs is not None else (1, 0)
        masks: dict[Stream, Tensor | None] = {}
        labels = kwargs.get("labels")
        if with_encoder:
            masks["encoder"] = _mask(kwargs.get("attention_mask"), None)
        if self.part == "model" and with_encoder:
            real = labels != IGNORE_INDEX if isinstance(labels, Tensor) else None
            masks["decoder"] = _mask(kwargs.get("decoder_attention_mask"), None, otherwise=real)
        elif not with_encoder:
            masks["decoder"] = _mask(kwargs.get("attention_mask"), length)
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else num_cached(cache)
        context = RoutingContext(
            padding_masks={stream: mask for stream, mask in masks.items() if mask is not None},
            task_ids_B=None if request.task_ids_B is None else _rows(request.task_ids_B, rows),
            phase="decode" if cached > 0 else "prefill",
            batch_size=rows,
            record=request.record or self.model in _OBSERVERS,
            wants_reconstruction=request.wants_reconstruction,
            temporary=request.temporary,
            has_encoder=with_encoder,
        )
        if not with_encoder:
            _find_prompt(context, request, labels, rows, length, cached)
        if self.keeps:
            context.kept = kept_with(cache).decisions if cached > 0 else {}
        if self.model in _OBSERVERS:
            self._tell_observers(context, kwargs)
        request.context = context
        return context

    def _tell_observers(self, context: RoutingContext, kwargs: dict[str, Any]) -> None:
        """What only they want to know: the token ids."""
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
        found: dict[Stream, Any] = {"encoder" if context.has_encoder else "decoder": ids}
        if context.has_encoder and self.part == "model":
            found["decoder"] = kwargs.get("decoder_input_ids")
            if found["decoder"] is None and isinstance(labels, Tensor):
                found["decoder"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        context.input_ids = {stream: value for stream, value in found.items() if isinstance(value, Tensor)}


def _request_for(model: nn.Module) -> PassRequest | None:
    request = _REQUEST.get()
    return request if request is not None and request.model in (None, model) else None


def _find_prompt(
    context: RoutingContext, request: PassRequest, labels: Any, rows: int, length: int, cached: int
) -> None:
    """Set the prompt mask of a causal model's pass, and complete its padding mask."""
    if request.generates:
        if "decoder" not in context.padding_masks:
            context.padding_masks["decoder"] = _window(request.padding_mask_BP, True, rows, length, cached)
        assert request.prompt_mask_BP is not None
        if cached >= request.prompt_mask_BP.shape[1]:
            return
        context.prompt_masks["decoder"] = _window(request.prompt_mask_BP, False, rows, length, cached)
    elif request.prompt_mask_BP is not None:
        mask = _rows(request.prompt_mask_BP, rows).bool()
        # Of the pass's tokens, or of the cached ones as well; any other width is refused where it is read.
        context.prompt_masks["decoder"] = mask[:, cached:] if mask.shape[1] == cached + length else mask
    elif isinstance(labels, Tensor):
        context.prompt_masks["decoder"] = labels == IGNORE_INDEX


def _window(mask_BP: Tensor | None, beyond: bool, rows: int, length: int, cached: int) -> Tensor:
    """The mask at the `length` tokens behind the cached ones; `beyond` its end, all are the same."""
    assert mask_BP is not None
    window_BS = torch.full((rows, length), beyond, device=mask_BP.device)
    part = _rows(mask_BP, rows)[:, cached : cached + length]
    window_BS[:, : part.shape[1]] = part
    return window_BS


def _mask(mask: Any, length: int | None, otherwise: Tensor | None = None) -> Tensor | None:
    """A two-dimensional padding mask as bool, cut to the last `length` tokens (the ones that are not in the cache)."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return otherwise
    first = 0 if length is None else mask.shape[1] - length
    real: Tensor = mask[:, first:].to(torch.bool).contiguous()
    return real


def _rows(value: Tensor, rows: int) -> Tensor:
    """Repeat each row for its beams or samples, as `generate` expands its inputs; what does not fit stays as it is."""
    given = value.shape[0]
    return value if given in (0, rows) or rows % given else value.repeat_interleave(rows // given, dim=0)
