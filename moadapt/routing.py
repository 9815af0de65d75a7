"""The contract between routers, experts, losses and the model.

A router turns hidden states into a `Routing`; expert banks and losses read it. What a router may know beyond
the hidden states (padding, prompt, task, prefill or decoding) is in the `RoutingContext`.

Shapes: B batch, S sequence, T = B * S tokens, N experts, K experts per token, D hidden size, J turns of a sequence,
G rows of a routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.turns import Turns, find_turns

Granularity = Literal["token", "prompt", "task"]
Phase = Literal["prefill", "decode"]
Stream = Literal["encoder", "decoder"]
IGNORE_INDEX = -100
"""Label of a token without loss."""


@dataclass(frozen=True)
class Routing:
    """The decision of one router.

    The leading dimension, the rows, is T for granularity `token`. For `prompt` and `task` it is G: one row for each
    sequence, or in a conversation for each of its turns.

    Attributes:
        weights_TN: gate weights, differentiable, zero where an expert is not selected; fp32 (fp64 in a float64 model).
        selected_TN: bool, which experts were selected.
        logits_TN: router scores before any normalisation, same dtype as the weights.
        probs_TN: router probabilities before selection, same dtype as the weights.
        granularity: what one row of these tensors stands for.
        indices_TK: int64 expert ids where the router selects a fixed number K per row, else None. An expert bank
            may use them to touch K instead of N experts' activations.
        straight_through: whether the weights of experts that are not selected carry a gradient: their value is zero,
            but a bank must then give them the gradient <dL/dy, E_i(x)>, which takes the output of every expert.
        rows_T: int64, which row each token of the pass follows; None when the G rows rule equally long runs of tokens
            in order, as they do with one decision for each sequence.
        active: ids, on the host, of the experts that any row selected; None when not known, as in training.
    """

    weights_TN: Tensor
    selected_TN: Tensor
    logits_TN: Tensor
    probs_TN: Tensor
    granularity: Granularity = "token"
    indices_TK: Tensor | None = None
    straight_through: bool = False
    rows_T: Tensor | None = None
    active: tuple[int, ...] | None = None
    _columns: dict[int, Routing] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_experts(self) -> int:
        """N, the number of experts this routing chooses from."""
        return self.weights_TN.shape[-1]

    def per_token(self, num_tokens: int) -> Routing:
        """The same decision with a row for each token.

        Args:
            num_tokens: T of the layer that is ruled.

        Raises:
            ConfigError: the rows do not divide the tokens, as where a router rules a layer that sees others.
        """
        if self.granularity == "token":
            return self
        rows = self.weights_TN.shape[0]
        fits = rows > 0 and num_tokens % rows == 0 if self.rows_T is None else num_tokens == self.rows_T.shape[0]
        if not fits and num_tokens > 0:
            raise ConfigError(f"{rows} routing decisions do not fit the {num_tokens} tokens of this layer")

        def spread(value: Tensor) -> Tensor:
            if self.rows_T is not None:
                return value.index_select(0, self.rows_T)
            return value.repeat_interleave(num_tokens // max(rows, 1), dim=0)

        return replace(self._map(spread), granularity="token", rows_T=None)

    def column(self, expert: int) -> Routing:
        """The decision about one expert, as a routing of N = 1; made once, since a kept one is read at every token."""
        if expert not in self._columns:
            one = replace(self, indices_TK=None)._map(lambda value: value[:, expert : expert + 1])
            if self.active is not None:
                one = replace(one, active=(0,) if expert in self.active else ())
            self._columns[expert] = one
        return self._columns[expert]

    def select(self, rows: Tensor) -> Routing:
        """Some rows, in the given order: int64 indices."""
        return self._map(lambda value: value.index_select(0, rows.to(value.device)))

    def detach(self) -> Routing:
        """Without gradients."""
        return replace(self._map(Tensor.detach), straight_through=False)

    @classmethod
    def concatenate(cls, first: Routing, second: Routing) -> Routing:
        """The rows of both, which come from the same router."""

        def both(name: str) -> Tensor:
            return torch.cat([getattr(first, name), getattr(second, name)])

        with_indices = first.indices_TK is not None and second.indices_TK is not None
        active = None
        if first.active is not None and second.active is not None:
            active = tuple(sorted({*first.active, *second.active}))
        return replace(
            second,
            weights_TN=both("weights_TN"),
            selected_TN=both("selected_TN"),
            logits_TN=both("logits_TN"),
            probs_TN=both("probs_TN"),
            indices_TK=both("indices_TK") if with_indices else None,
            active=active,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Routing:
        return replace(
            self,
            weights_TN=change(self.weights_TN),
            selected_TN=change(self.selected_TN),
            logits_TN=change(self.logits_TN),
            probs_TN=change(self.probs_TN),
            indices_TK=None if self.indices_TK is None else change(self.indices_TK),
        )


@dataclass(frozen=True)
class RoutingRecord:
    """One router's decision in one forward pass, as the losses and statistics see it.

    Attributes:
        name: the router's name: its mixture layer (scope `linear`) or its block, relative to the base model.
        routing: the decision.
        mask_T: bool, True at real tokens (at real rows for granularity `prompt` and `task`), or None when all are.
        batch_size: B, so that T can be split into sequences.
        outputs: what the layer adds where a loss wants it: `reconstruction`, (T,), the squared distance of the
            layer's output to the dense block's over the squared norm of the latter.
    """

    name: str
    routing: Routing
    mask_T: Tensor | None
    batch_size: int
    outputs: dict[str, Tensor] = field(default_factory=dict)


class DecisionTape:
    """Discrete decisions of one checkpointed region, replayed when the region is computed again.

    Recomputation may differ in the last bits, and a near tie would then pick another expert and change what the
    saved tensors mean. So what the first pass decided is what the second computes with.
    """

    def __init__(self) -> None:
        self._decisions: list[Tensor] = []
        self._position: int | None = None  # None while recording

    def rewind(self) -> None:
        """Start a replay from the first decision."""
        self._position = 0

    def decide(self, compute: Callable[[], Tensor]) -> Tensor:
        """Record `compute()` on the first pass, return the recorded value on a replay."""
        if self._position is None:
            self._decisions.append(compute())
            return self._decisions[-1]
        if self._position >= len(self._decisions):
            raise RuntimeError("activation checkpointing recomputed more routing decisions than its first pass made")
        self._position += 1
        return self._decisions[self._position - 1]


@dataclass
class RoutingContext:
    """What one forward pass of the base model knows beyond its hidden states.

    Attributes:
        padding_masks: per stream, bool (B, S), True at real tokens; a missing stream has no padding.
        prompt_masks: per stream, bool (B, S), True at the tokens of prompts (not of answers); in a missing stream all
            tokens are, when nothing is cached in front of them.
        task_ids_B: int64 task of each row, or None when not known.
        phase: `prefill` for a whole sequence (training, evaluation, the first step of generation), `decode` for
            the following tokens of a generation.
        batch_size: B.
        record: whether routings are collected into `records`.
        records: the routings of this pass in the order in which they were made; recomputation adds none.
        wants_reconstruction: whether layers that replace a block compare their output with the block's.
        outputs: what layers found out beside their output, by router name; it becomes `RoutingRecord.outputs`.
        shared: decisions of routers that rule several layers, by router name.
        disabled: adapters that were off when the pass began, and so are off in its recomputation too.
        has_encoder: whether the model is an encoder-decoder. The prompt of its decoder is the start token.
        input_ids: per stream, int64 (B, S), the token ids, where somebody observes the passes and they are known.
        kept: decisions of earlier passes over the same sequences, one row for each, by router name.
        decided: the latest decisions of this pass, to be kept.
        temporary: merged weights of this generation by mixture layer, None for a layer that cannot be merged; None
            when nothing is to be merged.
    """

    padding_masks: dict[Stream, Tensor] = field(default_factory=dict)
    prompt_masks: dict[Stream, Tensor] = field(default_factory=dict)
    task_ids_B: Tensor | None = None
    phase: Phase = "prefill"
    batch_size: int = 1
    record: bool = False
    records: list[RoutingRecord] = field(default_factory=list)
    wants_reconstruction: bool = False
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    disabled: frozenset[int] = field(default_factory=lambda: _DISABLED.get())
    has_encoder: bool = False
    input_ids: dict[Stream, Tensor] = field(default_factory=dict)
    kept: dict[str, Routing] = field(default_factory=dict)
    decided: dict[str, Routing] = field(default_factory=dict)
    temporary: dict[Any, Tensor | None] | None = None
    _turns: dict[Stream, Turns] = field(default_factory=dict, repr=False)
    _tape: DecisionTape | None = field(default=None, repr=False)
    _replaying: bool = field(default=False, repr=False)

    def decide(self, compute: Callable[[], Tensor]) -> Tensor:
        """A discrete decision (indices, a mask): `compute()` once, and the same again under recomputation.

        It runs without gradients. Every router must make its selection through this call, so that activation
        checkpointing never re-routes.
        """
        with torch.no_grad():  # a graph here would save tensors that the replay does not
            return compute() if self._tape is None else self._tape.decide(compute)

    def turns(self, stream: Stream, batch_size: int, length: int, device: torch.device) -> Turns:
        """The turns of this pass's tokens, found once for all routers of a stream.

        Raises:
            ConfigError: a sequence has no prompt token, or an answer in front of it, and nothing was decided before; or
                a prompt mask of another shape than the inputs.
        """
        if stream not in self._turns:
            self._turns[stream] = self._find_turns(stream, batch_size, length, device)
        return self._turns[stream]

    def _find_turns(self, stream: Stream, batch_size: int, length: int, device: torch.device) -> Turns:
        real_BS, prompt_BS = self.padding_masks.get(stream), self.prompt_masks.get(stream)
        if stream == "decoder" and self.has_encoder:
            if self.phase == "decode":
                return Turns(None)
            first_S = torch.arange(length, device=device) == 0
            return Turns(first_S.expand(batch_size, 1, length))
        if prompt_BS is not None:
            shape = tuple(prompt_BS.shape)
            if shape != (batch_size, length):
                raise ConfigError(f"prompt_mask: its shape is {shape}, and that of the inputs {(batch_size, length)}")
            return find_turns(prompt_BS, real_BS, continues=bool(self.kept))
        if self.phase == "decode" and stream == "decoder":
            return Turns(None)
        everything_BS = torch.ones(batch_size, length, dtype=torch.bool, device=device) if real_BS is None else real_BS
        return Turns(everything_BS.unsqueeze(1))

    def add_record(
        self, name: str, routing: Routing, stream: Stream, batch_size: int, exists_G: Tensor | None = None
    ) -> None:
        """Collect one routing, unless nothing is being recorded or the pass is a recomputation.

        Args:
            name: the router's name.
            routing: its decision.
            stream: whose tokens were routed.
            batch_size: B.
            exists_G: for granularity `prompt`, which rows are of turns that there are; None when all are.
        """
        if not self.record or self._replaying:
            return
        mask = self.padding_masks.get(stream) if routing.granularity == "token" else exists_G
        if mask is not None:
            mask = mask.reshape(-1)
            if mask.shape[0] != routing.weights_TN.shape[0]:
                raise RuntimeError(
                    f"router {name}: {routing.weights_TN.shape[0]} tokens were routed but the padding mask covers "
                    f"{mask.shape[0]}"
                )
        self.records.append(RoutingRecord(name, routing, mask, batch_size, self.outputs.setdefault(name, {})))

    def add_output(self, name: str, key: str, value: Tensor) -> None:
        """Leave a tensor beside the record of a router, unless the pass is a recomputation."""
        if not self._replaying:
            self.outputs.setdefault(name, {})[key] = value

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """The (forward, recompute) context managers for one `torch.utils.checkpoint` region."""
        tape = DecisionTape()
        return _CheckpointRegion(self, tape, replay=False), _CheckpointRegion(self, tape, replay=True)

    @contextmanager
    def active(self) -> Iterator[RoutingContext]:
        """Make this the context that mixture layers see, in this thread or task only."""
        token = _CURRENT.set(self)
        try:
            yield self
        finally:
            _CURRENT.reset(token)


class _CheckpointRegion:
    """One pass over a checkpointed region. A graph that is differentiated twice enters its replay twice."""

    def __init__(self, context: RoutingContext, tape: DecisionTape, replay: bool) -> None:
        self._context, self._tape, self._replay = context, tape, replay
        self._entered: list[tuple[Any, DecisionTape | None, bool]] = []

    def __enter__(self) -> None:
        context = self._context
        self._entered.append((_CURRENT.set(context), context._tape, context._replaying))
        if self._replay:
            self._tape.rewind()
        context._tape, context._replaying = self._tape, self._replay

    def __exit__(self, *error: object) -> None:
        token, self._context._tape, self._context._replaying = self._entered.pop()
        _CURRENT.reset(token)


_DISABLED: ContextVar[frozenset[int]] = ContextVar("moadapt_disabled_adapters", default=frozenset())
_CURRENT: ContextVar[RoutingContext | None] = ContextVar("moadapt_routing_context", default=None)


def current_context() -> RoutingContext:
    """The context of the running forward pass; an empty one outside of any."""
    context = _CURRENT.get()
    return RoutingContext() if context is None else context


class AdapterSwitch:
    """Shared by all mixture layers of a model: whether its adapter takes part, in this thread or task."""

    @property
    def enabled(self) -> bool:
        """Whether the adapter takes part in the running pass, or would in one that began now."""
        return id(self) not in current_context().disabled

    @contextmanager
    def off(self) -> Iterator[None]:
        """Passes that begin inside the `with` block run without the adapter."""
        token = _DISABLED.set(_DISABLED.get() | {id(self)})
        try:
            yield
        finally:
            _DISABLED.reset(token)


def checkpoint_context_fn() -> tuple[Any, Any]:
    """The `context_fn` for `torch.utils.checkpoint` (non-reentrant): recomputation repeats the first decisions."""
    return current_context().checkpoint_contexts()


def router_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of all router arithmetic: fp32, or fp64 for float64 hidden states."""
    return torch.promote_types(hidden_states.dtype, torch.float32)
