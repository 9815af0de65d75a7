"""Decisions about prompts, kept with the KV cache that the prompt has filled.

They live and die with the cache, so that two generations on one model, whatever threads they run in, never meet, and a
conversation goes on wherever its cache is given. Whoever reorders, repeats or picks rows of the cache, as beam search
does, moves the decisions along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

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
        answered: how many tokens the cache held at the end of the last generation; the one that this ended with comes
            behind them. None where no generation has come to its end.
    """

    decisions: dict[str, Routing] = field(default_factory=dict)
    answered: int | None = None

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
        for method in _MOVES:
            setattr(cache, method, _Moves(cache, method))
    return kept


class _Moves:
    """Takes the place of a cache's method that reorders, picks or repeats rows, and moves the decisions along.

    The cache is held weakly: in a circle its memory would not be free before Python looks for circles.

    Args:
        cache: whose method it is.
        method: its name.
    """

    def __init__(self, cache: Cache, method: str) -> None:
        self._cache, self._method = ref(cache), method

    def __call__(self, change: Any) -> None:
        """What the method does, for the decisions as well."""
        cache = self._cache()
        assert cache is not None
        getattr(type(cache), self._method)(cache, change)
        getattr(cache, _ATTRIBUTE).move(lambda rows: _MOVES[self._method](rows, change))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the cache is a whole one: its methods are its own."""
        return _Moves, (self._cache(), self._method)


_MOVES: dict[str, Callable[[int, Any], Tensor]] = {
    "reorder_cache": lambda rows, beam_idx: beam_idx,
    "batch_select_indices": lambda rows, indices: torch.arange(rows, device=indices.device)[indices],
    "batch_repeat_interleave": lambda rows, repeats: torch.arange(rows).repeat_interleave(repeats),
}
"""By method of a cache, given the number of sequences and the method's argument: which of them stand where then."""
