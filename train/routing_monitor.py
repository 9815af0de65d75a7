"""What a run says about its routers while it trains: a few numbers at each log entry, pictures at each evaluation.

Counted are the micro-batches of training alone, those of a log entry together, and added up over the processes as whole
numbers before anything is divided. Neither evaluations nor what callbacks run is among them.

Shapes: R routers, N experts, L tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moadapt.passes import observing_passes
from moadapt.statistics import RouterCounts, RoutingStatistics, measures
from moadapt.statistics.counts import ALL
from moadapt.statistics.recording import Recorder
from moadapt.train.callbacks import TrainerCallback, TrainerState
from moadapt.train.engine import Processes
from moadapt.train.routing_alarm import RoutingAlarm
from moadapt.train.training_config import TrainingConfig

if TYPE_CHECKING:
    from moadapt.train.evaluation import EvaluationResult
    from moadapt.train.logging import RunLogger
    from moadapt.train.trainer import MultiTaskTrainer

_DIGITS = 8  # of the logged numbers: sums of floats end in noise, which depends on where they were interrupted


class RoutingMonitor(TrainerCallback):
    """Watches the routers of a run. With `routing_statistics: false`, or without routers to watch, it does nothing.

    Args:
        model: the mixture.
        config: the training options.
        tasks: names of the tasks, by the ids that the model is given.
        processes: the processes of the run.
    """

    def __init__(self, model: Any, config: TrainingConfig, tasks: Sequence[str], processes: Processes) -> None:
        self.model = model
        self.tasks = list(tasks)
        self.processes = processes
        self.logger: RunLogger | None = None
        routers = getattr(getattr(model, "injection", None), "routers", {})
        self.watches = config.routing_statistics and any(len(model.expert_names(name)) > 1 for name in routers)
        self.alarm = None if config.routing_alarm is None else RoutingAlarm(config.routing_alarm)
        evaluates = config.eval_strategy != "no"
        self._draws = evaluates and "tensorboard" in config.report_to
        self._recorder: Recorder | None = None
        self._window: RoutingStatistics | None = None
        self._drawn: RoutingStatistics | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count what the routers decide inside the `with` block, an optimizer step."""
        if not self.watches:
            yield
            return
        if self._recorder is None:
            self._recorder = Recorder(self.model, self.tasks, False, None, max_sequences=0, seed=0)
        with observing_passes(self._recorder.base, self._recorder.observe):
            yield

    def gather(self) -> None:
        """Add what all processes have counted since the last time to the log entry and to the pictures. Collective."""
        if self._recorder is None:
            return
        counts, _ = self._recorder.read()
        self._recorder = None
        counted = RoutingStatistics({name: item for name, item in counts.items() if item.num_experts > 1})
        if self.processes.world_size > 1:
            counted.reduce(self.processes.all_sum)
        if self._draws:
            together = RoutingStatistics({name: over_tasks(item) for name, item in counted.routers.items()})
            self._drawn = _joined(self._drawn, together)
        self._window = _joined(self._window, counted)

    def entry(self, state: TrainerState) -> dict[str, float]:
        """The numbers for a log entry about the steps since the last one; a router in alarm is reported. Collective.

        Args:
            state: of the run, which an alarm with `action: stop` ends.
        """
        self.gather()
        if self._window is None:
            return {}
        routers, self._window = self._window.routers, None
        values = summary(routers)
        if self.alarm is not None:
            text = self.alarm.judge({name: over_tasks(counts) for name, counts in routers.items()})
            values["routing/alarms"] = float(len(self.alarm.ringing))
            if text and self.alarm.config.action == "stop":
                state.should_stop, state.stop_reason = True, f"routing alarm: {text}"
            elif text and self.logger is not None:
                self.logger.warn(f"step {state.global_step}: routing alarm: {text}")
        return {name: round(value, _DIGITS) for name, value in values.items()}

    def on_evaluate(self, trainer: MultiTaskTrainer, state: TrainerState, result: EvaluationResult) -> None:
        """Draw what was counted since the last evaluation."""
        self.gather()
        drawn, self._drawn = self._drawn, None
        if drawn is None or self.logger is None or not self.logger.is_main:
            return
        from moadapt.train.routing_pictures import heat_maps, histograms

        self.logger.log_pictures(heat_maps(drawn.routers), histograms(drawn.routers), state.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What was gathered for the next log entry and the next pictures, and the state of the alarm."""
        found: dict[str, Any] = {} if self.alarm is None else {"alarm": self.alarm.state_dict()}
        for name, counted in (("window", self._window), ("drawn", self._drawn)):
            if counted is not None:  # thousands of numbers, which would be a line each in the state's file
                found[name] = json.dumps(counted.to_dict(), separators=(",", ":"))
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was written."""
        if not self.watches:
            return
        if self.alarm is not None and "alarm" in state:
            self.alarm.load_state_dict(state["alarm"])
        if "window" in state:
            self._window = RoutingStatistics.from_dict(json.loads(state["window"]))
        if self._draws and "drawn" in state:
            self._drawn = RoutingStatistics.from_dict(json.loads(state["drawn"]))


def over_tasks(counts: RouterCounts) -> RouterCounts:
    """The same counts, all tasks together. They share no tensor: either may be merged with others."""
    names = ("rows", "selections", "weights", "probs", "entropy", "top")
    summed = {name: getattr(counts, name).sum(0, keepdim=True) for name in names}
    sequence_tasks = torch.zeros_like(counts.sequence_tasks)
    return replace(counts.copy(), tasks=[ALL], sequence_tasks=sequence_tasks, **summed)


def summary(routers: Mapping[str, RouterCounts]) -> dict[str, float]:
    """The bounded summary: means over routers, in all and by layer, and what the experts tell about each task.

    Args:
        routers: counts by router, with the same tasks. Routers without rows are left out.

    Returns:
        `routing/entropy`, `routing/max_share`, `routing/dead_fraction` and `routing/max_violation`; the same by layer
        as `routing/layer_3/entropy`; `routing/task_information` and `routing/task/NAME/information`. A number that no
        router has is left out.
    """
    seen = [counts for counts in routers.values() if counts.num_experts > 1 and bool(counts.rows.any())]
    by_size: dict[int, list[RouterCounts]] = {}
    for counts in seen:
        by_size.setdefault(counts.num_experts, []).append(counts)
    places = layer_names(seen)
    sums: dict[str, list[float]] = {}
    for same in by_size.values():
        for measure, values_R in _balance(same).items():
            for counts, value in zip(same, values_R.tolist(), strict=True):
                for place in ("", places[counts.name]):
                    sums.setdefault(f"routing/{place}{measure}", []).append(value)
        shares_RL, information_R = _about_tasks(same)
        sums.setdefault("routing/task_information", []).extend(information_R.tolist())
        for task, shares_R in zip(same[0].tasks, shares_RL.unbind(1), strict=True):
            sums.setdefault(f"routing/task/{task}/information", []).extend(shares_R.tolist())
    numbers = {name: [value for value in values if not math.isnan(value)] for name, values in sums.items()}
    return {name: sum(values) / len(values) for name, values in numbers.items() if values}


def layer_names(routers: Sequence[RouterCounts]) -> dict[str, str]:
    """By router `layer_3/`; behind `encoder/` or `decoder/` where both have layers, and empty outside of any."""
    stacks = {}
    for counts in routers:
        if counts.layer is not None:
            parts = counts.name.split(".")
            stacks[counts.name] = parts[: parts.index(str(counts.layer))]
    several = len({tuple(stack) for stack in stacks.values()}) > 1
    names = {}
    for counts in routers:
        stack = stacks.get(counts.name, [])
        which = next((part for part in stack if part in ("encoder", "decoder")), ".".join(stack))
        prefix = f"{which}/" if several and which else ""
        names[counts.name] = "" if counts.layer is None else f"{prefix}layer_{counts.layer}/"
    return names


def _balance(routers: Sequence[RouterCounts]) -> dict[str, Tensor]:
    """Measures of routers with N experts each: (R,)."""
    rows_R = torch.stack([counts.rows.sum() for counts in routers])
    used_RN, selected_R = used(routers)
    entropy_R = torch.stack([counts.entropy[:, 0].sum() for counts in routers]) / rows_R
    of_R = torch.where(selected_R, used_RN.sum(-1), rows_R.double())
    return {
        "entropy": measures.normalised_entropy(entropy_R, routers[0].num_experts),
        "max_share": measures.load(used_RN).amax(-1),
        "dead_fraction": measures.dead_experts(used_RN, of_R.unsqueeze(-1)).double().mean(-1),
        "max_violation": measures.max_violation(used_RN),
    }


def used(routers: Sequence[RouterCounts]) -> tuple[Tensor, Tensor]:
    """What loads are made of, (R, N), and for which routers this is gate weights: those whose rows select all, (R,)."""
    selections_RN = torch.stack([counts.selections.sum((0, 1, 2)) for counts in routers])
    weights_RN = torch.stack([counts.weights.sum((0, 1, 2)) for counts in routers])
    rows_R = torch.stack([counts.rows.sum() for counts in routers])
    all_R = (selections_RN == rows_R.unsqueeze(-1)).all(-1)
    return torch.where(all_R.unsqueeze(-1), weights_RN, selections_RN.double()), all_R


def _about_tasks(routers: Sequence[RouterCounts]) -> tuple[Tensor, Tensor]:
    """What the experts tell about single tasks, (R, L), and about the task, (R,), the mean over tasks of the former.

    With p(e | t) the share of a task's selections, and all tasks alike, the information about a task is the divergence
    KL(p(e | t) || p(e)). Both are divided by min(H(task), H(expert)). NaN for a task without rows, and where there are
    less than two.
    """
    tables = []
    for counts in routers:
        selections_LN, weights_LN = counts.selections.sum((1, 2)), counts.weights.sum((1, 2))
        tables.append(measures.usage(selections_LN, weights_LN, counts.rows.sum((1, 2))))
    table_RLN = torch.stack(tables)
    _, information_R = measures.task_information(table_RLN)
    there_RL = table_RLN.sum(-1) > 0
    tasks_R = there_RL.sum(-1)
    share_RLN = measures.load(table_RLN).masked_fill(~there_RL.unsqueeze(-1), 0.0)
    mean_RN = share_RLN.sum(1) / tasks_R.unsqueeze(-1)
    smaller_R = torch.minimum(tasks_R.double().log(), measures.entropy(mean_RN))
    crossed_RL = -torch.xlogy(share_RLN, mean_RN.unsqueeze(1)).sum(-1)
    divergence_RL = (crossed_RL - measures.entropy(share_RLN)).clamp(min=0.0)
    normalised_RL = torch.where(smaller_R > 1e-12, 1.0 / smaller_R, 0.0).unsqueeze(-1) * divergence_RL
    several_R = tasks_R > 1
    normalised_RL = normalised_RL.masked_fill(~(there_RL & several_R.unsqueeze(-1)), torch.nan)
    return normalised_RL, information_R.masked_fill(~several_R, torch.nan)


def _joined(first: RoutingStatistics | None, second: RoutingStatistics) -> RoutingStatistics:
    if first is None:
        return second
    first.merge(second)
    return first
