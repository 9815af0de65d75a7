"""`record_routing`: counts what the routers of a model decide in the passes inside a `with` block.

Only real tokens count: not padding, and in generation not what fills up the rows that have ended (tokens in decoding
that are the generation config's end or padding token). Passes that fail, and what activation checkpointing computes
again, do not count. Every row of a pass does: each beam, and also the tokens of a draft that are rejected later.

Which part a token is of: the encoder's are prompt, and so is the decoder's start token behind an encoder; otherwise
those of the prompt mask, or in a pass with labels those with the label -100, are prompt; without either all tokens of a
pass that begins a sequence are prompt, and those of passes that continue one are answer.

Shapes: B sequences, S rows of a sequence, T = B * S, R routers, N experts, L tasks, P pairs of routers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import RLock
from typing import Any, cast

import torch
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.model import MixtureModel
from moadapt.passes import observing_passes
from moadapt.routing import RoutingContext, RoutingRecord, Stream
from moadapt.statistics.counts import ALL, RouterCounts
from moadapt.statistics.statistics import UNKNOWN, RoutingStatistics
from moadapt.statistics.stock import find_stock_routers, hooked, num_experts
from moadapt.statistics.streaming import Accumulator, PassRows
from moadapt.statistics.trace import Trace, TraceWriter
from moadapt.targets import site_of

_MOST_ACCUMULATORS = 32
Group = tuple[list[RoutingRecord], PassRows]


@contextmanager
def record_routing(
    model: nn.Module,
    tasks: Sequence[str] | None = None,
    *,
    vocabulary: bool = False,
    trace: Trace | None = None,
    max_sequences: int = 4096,
    seed: int = 0,
) -> Iterator[RoutingStatistics]:
    """Count what the routers decide inside the `with` block, in any forward pass or generation and in any thread.

    Args:
        model: a mixture, or a transformers model with routers of its own, as Mixtral.
        tasks: their names, by task id; all passes must then be given task ids. None names the tasks by their ids, and
            rows without one `all`, or `unknown` beside others. A row of the id -1 is of the task `unknown`.
        vocabulary: count by input token as well, in V * N numbers for each router.
        trace: write what was decided about each token, too.
        max_sequences: size of the random sample of sequences whose counts are kept, for tests of significance.
        seed: of this sample. In several processes, give each its own.

    Yields:
        The statistics; they can be read inside the block as well.

    Raises:
        ConfigError: a model without routers; in a pass, a task id that has no name, or none where tasks have names.
    """
    with ExitStack() as stack:
        recorder = Recorder(_unwrapped(model), tasks, vocabulary, trace, max_sequences, seed)
        statistics = RoutingStatistics(source=recorder.read)
        stack.callback(statistics.finish)
        if recorder.trace is not None:
            stack.callback(recorder.trace.close, recorder.tasks)
        if not isinstance(recorder.model, MixtureModel):
            stack.enter_context(hooked(recorder.base))
        stack.enter_context(observing_passes(recorder.base, recorder.observe))
        yield statistics


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what data-parallel training and DeepSpeed put around it."""
    inner = getattr(model, "module", None)
    if isinstance(model, MixtureModel) or not isinstance(inner, nn.Module):
        return model
    return _unwrapped(inner)


@dataclass(frozen=True)
class _Place:
    """Whose tokens a router reads, and the stack of layers that it is in."""

    stream: Stream
    stack: str


class Recorder:
    """Counts passes; see `record_routing`."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str] | None,
        vocabulary: bool,
        trace: Trace | None,
        max_sequences: int,
        seed: int,
    ) -> None:
        self.model = model
        self.base = cast("Any", model.base_model if isinstance(model, MixtureModel) else model)
        self.named = bool(tasks)
        self.tasks = list(tasks or ())  # without names: the ids that were seen, as names
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks: the names must differ, and {self.tasks} has one twice")
        if max_sequences < 0:
            raise ConfigError(f"max_sequences: {max_sequences} is less than none; use 0 to keep none")
        self.max_sequences = max_sequences
        self.vocabulary_size = int(self.base.get_input_embeddings().weight.shape[0]) if vocabulary else None
        self.counts: dict[str, RouterCounts] = {}
        self.places: dict[str, _Place] = {}
        self._find_routers()
        self._tell_stacks_apart()
        self.flow = {
            pair: torch.zeros(*(self.counts[name].num_experts for name in pair), dtype=torch.int64)
            for pair in self._pairs()
        }
        self.trace = None if trace is None else TraceWriter(trace, list(self.counts))
        self._random = random.Random(seed)
        self._ends = self._end_tokens()
        self._lock = RLock()
        self._accumulators: dict[Any, Accumulator] = {}
        self._flows: dict[Any, Tensor] = {}

    def _find_routers(self) -> None:
        modules = dict(self.base.named_modules())
        if isinstance(self.model, MixtureModel):
            for name, site in self.model.injection.routers.items():
                self._add_router(name, self.model.expert_names(name), site.granularity, site.stream, name, modules)
            return
        for name, router in find_stock_routers(self.base).items():
            experts = [str(number) for number in range(num_experts(router))]
            self._add_router(name, experts, "token", "decoder", name.rpartition(".")[0], modules)

    def _add_router(
        self, name: str, experts: list[str], granularity: Any, stream: Stream, ruled: str, modules: dict[str, nn.Module]
    ) -> None:
        layer = site_of(name, modules).layer
        parts = ruled.split(".")
        depth = len(parts) if layer is None else parts.index(str(layer))
        self.places[name] = _Place(stream, ".".join(parts[:depth]))
        self.counts[name] = RouterCounts.zeros(
            name,
            experts,
            self.tasks or [ALL],
            granularity=granularity,
            layer=layer,
            module=".".join(parts[depth + 1 :]) if layer is not None else ruled,
            max_sequences=self.max_sequences,
            vocabulary_size=self.vocabulary_size if granularity == "token" else None,
        )

    def _tell_stacks_apart(self) -> None:
        """Where several stacks have layers, as encoder and decoder, begin the modules' names with their stack's."""
        inside = {name: self.places[name].stack for name, counts in self.counts.items() if counts.layer is not None}
        if len(set(inside.values())) < 2:
            return
        for name, stack in inside.items():
            short = next((part for part in stack.split(".") if part in ("encoder", "decoder")), stack)
            self.counts[name].module = f"{short}.{self.counts[name].module}".rstrip(".")

    def _pairs(self) -> list[tuple[str, str]]:
        """Routers of the same module and rows in layers that follow each other."""
        alike: dict[Any, list[str]] = {}
        for name, counts in self.counts.items():
            if counts.layer is not None:
                alike.setdefault((self.places[name], counts.module, counts.granularity), []).append(name)
        pairs = []
        for names in alike.values():
            names.sort(key=lambda name: self.counts[name].layer or 0)
            pairs += list(pairwise(names))
        return pairs

    def _end_tokens(self) -> list[int]:
        settings = getattr(self.base, "generation_config", None)
        found = [getattr(settings, f"{kind}_token_id", None) for kind in ("eos", "pad")]
        return [token for item in found if item is not None for token in ([item] if isinstance(item, int) else item)]

    # -- one pass -------------------------------------------------------------------------------------------------

    def observe(self, context: RoutingContext) -> None:
        """Count a pass that has ended."""
        if not context.records:
            return
        # Neither inference mode nor autocast of the pass may reach the counts.
        kind = context.records[0].routing.weights_TN.device.type
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            tasks_B, labels = self._tasks(context)
            groups = self._groups(context, tasks_B)
            tops: dict[str, Tensor] = {}
            for records, rows in groups:
                names = tuple(record.name for record in records)
                tops |= dict(zip(names, self._accumulator(records, names, labels).add(records, rows), strict=True))
            self._add_flow(tops)
            if self.trace is not None:
                self.trace.add(groups, len(self.tasks))
            if len(self._accumulators) > _MOST_ACCUMULATORS:
                self._settle()

    def _tasks(self, context: RoutingContext) -> tuple[Tensor | None, list[str]]:
        """(B,) index of each sequence's task, and the names that it stands for."""
        ids_B = context.task_ids_B
        if ids_B is None:
            if self.named:
                raise ConfigError(
                    "record_routing: tasks were named, but a pass was given no task ids; pass task_ids, or leave "
                    "tasks out"
                )
            return None, [ALL]
        if ids_B.shape[0] != context.batch_size:
            raise ConfigError(f"task_ids: {ids_B.shape[0]} ids were given for {context.batch_size} rows")
        low, high = torch.stack([ids_B.min(), ids_B.max()]).tolist()
        if low < -1 or (self.named and high >= len(self.tasks)):
            known = f"there are {len(self.tasks)} tasks" if self.named else "ids count from 0"
            raise ConfigError(f"task_ids: a pass was given the id {low if low < -1 else high}, but {known}")
        if not self.named:
            self.tasks += [str(number) for number in range(len(self.tasks), high + 1)]
        if low == -1:  # a task that the mixture does not know
            nameless = UNKNOWN if self.named else ALL
            return torch.where(ids_B < 0, len(self.tasks), ids_B), [*self.tasks, nameless]
        return ids_B, self.tasks

    def _groups(self, context: RoutingContext, tasks_B: Tensor | None) -> list[Group]:
        """The records, put together where they are about the same rows and as many experts."""
        begins = context.phase == "prefill"
        keys_B = [self._random.random() for _ in range(context.batch_size)] if begins else None
        groups: dict[Any, Group] = {}
        for record in context.records:
            routing = record.routing
            if routing.granularity == "task" and not begins:
                continue  # the decision of the prefill once more
            stream = self.places[record.name].stream
            key = (routing.granularity, stream, routing.weights_TN.shape, routing.weights_TN.device)
            if key not in groups:
                groups[key] = ([], self._rows(context, record, stream, tasks_B, keys_B))
            groups[key][0].append(record)
        return list(groups.values())

    def _rows(
        self,
        context: RoutingContext,
        record: RoutingRecord,
        stream: Stream,
        tasks_B: Tensor | None,
        keys_B: list[float] | None,
    ) -> PassRows:
        num_rows, device = record.routing.weights_TN.shape[0], record.routing.weights_TN.device
        batch_size = record.batch_size
        if batch_size != context.batch_size or num_rows % batch_size != 0:
            raise ConfigError(
                f"record_routing: the router {record.name} decided about {num_rows} rows, which cannot be told apart "
                f"into the {context.batch_size} sequences of the pass; exclude its module from the mixture"
            )
        shape = (batch_size, num_rows // batch_size)
        everything_BS = torch.ones(shape, dtype=torch.bool, device=device)
        real_BS = everything_BS if record.mask_T is None else record.mask_T.to(device).view(shape)
        padding_BS = context.padding_masks.get(stream)
        answer_BS, ids_BS = ~everything_BS, None
        if record.routing.granularity == "token":
            ids_BS = context.input_ids.get(stream)
            ids_BS = None if ids_BS is None or ids_BS.shape != shape else ids_BS.to(device)
            answer_BS = self._answers(context, stream, everything_BS)
            if self._ends and context.phase == "decode" and shape[1] == 1 and ids_BS is not None:
                real_BS = real_BS & ~(answer_BS & torch.isin(ids_BS, torch.tensor(self._ends).to(device)))
        elif padding_BS is not None:
            real_BS = real_BS & padding_BS.to(device).any(-1, keepdim=True)
        tasks_B = None if tasks_B is None else tasks_B.to(device)
        return PassRows(context.phase, real_BS, answer_BS, tasks_B, ids_BS, keys_B)

    def _answers(self, context: RoutingContext, stream: Stream, everything_BS: Tensor) -> Tensor:
        """(B, S) which tokens are of answers, padding aside."""
        begins, prompt_BS = context.phase == "prefill", context.prompt_masks.get(stream)
        if stream == "encoder":
            return ~everything_BS
        if context.has_encoder:
            first_S = torch.arange(everything_BS.shape[1], device=everything_BS.device) == 0
            return everything_BS & ~first_S if begins else everything_BS
        if prompt_BS is None:
            return ~everything_BS if begins else everything_BS
        prompt_BS = prompt_BS[:, : everything_BS.shape[1]]
        if prompt_BS.shape != everything_BS.shape:
            raise ConfigError(
                f"prompt_mask: its shape is {tuple(prompt_BS.shape)}, and that of the pass {tuple(everything_BS.shape)}"
            )
        return ~prompt_BS.to(everything_BS.device)

    def _accumulator(self, records: list[RoutingRecord], names: tuple[str, ...], labels: list[str]) -> Accumulator:
        weights_TN = records[0].routing.weights_TN
        key = (names, tuple(labels), weights_TN.device)
        if key not in self._accumulators:
            by_token = records[0].routing.granularity == "token"
            made = Accumulator(
                names,
                weights_TN.shape[-1],
                labels,
                self.max_sequences,
                self.vocabulary_size if by_token else None,
                weights_TN.device,
            )
            self._accumulators[key] = made
        return self._accumulators[key]

    def _add_flow(self, tops: dict[str, Tensor]) -> None:
        """Where the rows of one layer's top experts go in the next layer."""
        groups: dict[Any, list[tuple[str, str]]] = {}
        for first, second in self.flow:
            if first in tops and second in tops and tops[first].shape == tops[second].shape:
                sizes = self.counts[first].num_experts, self.counts[second].num_experts
                groups.setdefault((*sizes, tops[first].device, len(tops[first])), []).append((first, second))
        for (_, width, device, _), pairs in groups.items():
            from_PT = torch.stack([tops[first].to(device) for first, _ in pairs])
            to_PT = torch.stack([tops[second].to(device) for _, second in pairs])
            key = (tuple(pairs), device)
            if key not in self._flows:
                size = self.flow[pairs[0]].numel()
                self._flows[key] = torch.zeros(len(pairs), size, dtype=torch.int64, device=device)
            both_PT = (from_PT >= 0) & (to_PT >= 0)
            self._flows[key].scatter_add_(1, (from_PT * width + to_PT).clamp(min=0), both_PT.long())

    # -- reading --------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Add what is on the devices to the counts on the host."""
        for accumulator in self._accumulators.values():
            accumulator.settle(self.counts)
        for (pairs, _), counts in self._flows.items():
            for pair, value in zip(pairs, counts.cpu(), strict=True):
                self.flow[pair] += value.view(self.flow[pair].shape)
        self._accumulators.clear()
        self._flows.clear()

    def read(self) -> tuple[dict[str, RouterCounts], dict[tuple[str, str], Tensor]]:
        """Copies of the counts and of the flow as they are now."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._settle()
            anonymous = any(ALL in counts.tasks and counts.of_task(ALL) for counts in self.counts.values())
            labels = [*self.tasks, *([ALL] if not self.tasks or (anonymous and not self.named) else [])]
            if any(UNKNOWN in counts.tasks and counts.of_task(UNKNOWN) for counts in self.counts.values()):
                labels += [UNKNOWN] if UNKNOWN not in labels else []
            shown = {}
            for name, counts in self.counts.items():
                counts.with_tasks(labels)
                shown[name] = counts.copy()
                if self.tasks and not self.named:
                    shown[name].tasks = [UNKNOWN if label == ALL else label for label in labels]
            return shown, {pair: value.clone() for pair, value in self.flow.items()}
