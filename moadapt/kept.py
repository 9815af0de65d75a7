"""Decisions about prompts, kept with the KV cache that the prompt has filled.

They live and die with the cache, so that two generations on one model, whatever threads they run in, never meet, and a
conversation goes on wherever its cache is given. Whoever reorders, repeats or picks rows of the cache, as beam search
does, moves the decisions along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moadapt.routing import Routing

_ATTRIBUTE = "_moadapt_kept"


@dataclass
class KeptDecisions:
    """The latest decision of each router about each sequence of a cache.

    Attributes:
        decisions: routings with one row for each sequence, by router name.
        generated: whether a generation made them; the token that it ended with is then not in the cache.
    """

    decisions: dict[str, Routing] = field(default_factory=dict)
    generated: bool = False

    def move(self, rows: Callable[[int], Tensor]) -> None:
        """Follow the cache.

        Args:
            rows: given the number of sequences, the int64 indices of those that stand where now.
        """
        for name, routing in self.decisions.items():
            self.decisions[name] = routing.select(rows(routing.weights_TN.shape[0]))


def find_cache(output: Any) -> Cache | None:
    """The cache in a model's output, which may be a tuple."""
    cache = getattr(output, "past_key_values", None)
    values = output if isinstance(output, tuple) else (cache,)
    return next((value for value in values if isinstance(value, Cache)), None)


def num_cached(cache: Any) -> int:
    """How many tokens a cache holds for each sequence."""
    return int(cache.get_seq_length())


def kept_with(cache: Any) -> KeptDecisions:
    """The decisions kept with a cache, to be read and written."""
    kept: KeptDecisions | None = getattr(cache, _ATTRIBUTE, None)
    if kept is None:
        kept = KeptDecisions()
        setattr(cache, _ATTRIBUTE, kept)
        # On the instance, and as partials of functions of this module, so that a copy of the cache is a whole one.
        cache.reorder_cache = partial(_reorder, cache)
        cache.batch_select_indices = partial(_select, cache)
        cache.batch_repeat_interleave = partial(_repeat, cache)
    return kept


def _reorder(cache: Cache, beam_idx: Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    getattr(cache, _ATTRIBUTE).move(lambda _: beam_idx)


def _select(cache: Cache, indices: Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    getattr(cache, _ATTRIBUTE).move(lambda rows: torch.arange(rows, device=indices.device)[indices])


def _repeat(cache: Cache, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    getattr(cache, _ATTRIBUTE).move(lambda rows: torch.arange(rows).repeat_interleave(repeats))
