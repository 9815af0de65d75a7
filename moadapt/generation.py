"""What `MixtureModel.generate` tells the passes of one generation, and what can be read from its cache afterwards.

Shapes: B prompts, P tokens of the prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.kept import kept_with, num_cached
from moadapt.passes import PassRequest, requesting
from moadapt.routing import Routing
from moadapt.temporary import check_mergeable, nothing_merged

if TYPE_CHECKING:
    from moadapt.model import MixtureModel


def decisions_of(cache: Any) -> dict[str, Routing]:
    """The decisions that a KV cache carries, by router name, with one row for each of its sequences.

    Args:
        cache: as `generate(..., return_dict_in_generate=True).past_key_values`. With beams, a prompt's beams are rows
            next to each other.

    Raises:
        ConfigError: there is no cache.
    """
    if cache is None:
        raise ConfigError("there is no KV cache to read decisions from: leave use_cache: false out, or set it to true")
    return dict(kept_with(cache).decisions)


@contextmanager
def generating(
    model: MixtureModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prompt_mask: Tensor | None,
    task_ids: Tensor | None,
    merge_after_prefill: bool,
) -> Iterator[None]:
    """One call of `generate`: its passes know the prompts, the tasks and whether to merge.

    Args:
        model: the mixture.
        args: positional arguments of the base model's `generate`.
        kwargs: its keyword arguments.
        prompt_mask: (B, P) bool, True at prompt tokens.
        task_ids: (B,) int64.
        merge_after_prefill: see `moadapt/temporary.py`.

    Raises:
        ConfigError: a prompt mask of another shape than the inputs, or a merge that cannot be done.
    """
    request = PassRequest(prompt_mask, task_ids, model=model.base_model)
    active = model.injection.switch.enabled
    settings = kwargs.get("generation_config") or model.base_model.generation_config
    if active and not model.base_model.config.is_encoder_decoder:
        by_prompt = any(site.granularity == "prompt" for site in model.injection.routers.values())
        if by_prompt and kwargs.get("prefill_chunk_size", settings.prefill_chunk_size) is not None:
            raise ConfigError(
                "prefill_chunk_size: with router.granularity: prompt every layer's router reads the whole prompt "
                "before that layer runs, so a prompt cannot be given in chunks; leave prefill_chunk_size out"
            )
        _set_masks(request, args, kwargs, settings)
    if merge_after_prefill and active:
        if kwargs.get("use_cache", settings.use_cache) is False:
            raise ConfigError("merge_after_prefill: needs the KV cache; leave use_cache: false out")
        check_mergeable(model.injection)
        request.temporary = {}
    with requesting(request):
        yield
    if request.cache is not None:
        kept_with(request.cache).answered = num_cached(request.cache)
    if request.temporary is not None and nothing_merged(request.temporary):
        warnings.warn(
            "merge_after_prefill: the prompts of this batch were routed differently, so nothing was merged; it helps "
            "with one prompt at a time, or with prompts of one task",
            stacklevel=3,
        )


def _set_masks(request: PassRequest, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Any) -> None:
    """Prompt and padding masks from the first token in the cache on."""
    given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
    inputs = next((value for value in given if isinstance(value, Tensor)), None)
    shape = (1, 1) if inputs is None else tuple(inputs.shape[:2])  # without inputs, generate begins with one token
    prompt_BP, padding_BP = request.prompt_mask_BP, kwargs.get("attention_mask")
    device = None if inputs is None else inputs.device
    given_mask = prompt_BP is not None
    if prompt_BP is not None and tuple(prompt_BP.shape) != shape:
        raise ConfigError(f"prompt_mask: its shape is {tuple(prompt_BP.shape)}, and that of the inputs {shape}")
    prompt_BP = torch.ones(shape, dtype=torch.bool, device=device) if prompt_BP is None else prompt_BP.bool()
    cache = kwargs.get("past_key_values")
    cached = 0 if cache is None else num_cached(cache)
    # Inputs are the whole conversation, or only what is not in the cache; transformers tells by the same sign.
    only_new = cached > 0 and (shape[1] <= cached if padding_BP is None else padding_BP.shape[1] != shape[1])
    if only_new:
        prompt_BP = torch.cat([prompt_BP.new_zeros(shape[0], cached), prompt_BP], dim=1)
    if cached > 0 and not given_mask and kept_with(cache).answered == cached:
        prompt_BP[:, cached] = False  # what the last generation ended with is of its answer
    if padding_BP is None and inputs is not None and not only_new:
        padding_BP = _inferred_padding(inputs, kwargs, settings)
    request.generates = True
    request.prompt_mask_BP = prompt_BP
    request.padding_mask_BP = torch.ones_like(prompt_BP) if padding_BP is None else padding_BP.bool()


def _inferred_padding(inputs: Tensor, kwargs: dict[str, Any], settings: Any) -> Tensor | None:
    """The padding mask that transformers infers where none is given: (B, P) bool, or None where it infers none."""
    pad, ends = (kwargs.get(name, getattr(settings, name)) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or inputs.dim() != 2 or (ends is not None and pad in torch.as_tensor(ends).flatten().tolist()):
        return None
    real_BP: Tensor = inputs != pad
    return real_BP
