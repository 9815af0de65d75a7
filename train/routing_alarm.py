"""An alarm for routers that collapse: their experts are dead, or all rows take the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moadapt.statistics import RouterCounts, measures
from moadapt.statistics.verdicts import router_labels
from moadapt.train.training_config import RoutingAlarmConfig

_ROWS_PER_EXPERT = 20
_NAMED = 3  # routers that a message names


class RoutingAlarm:
    """Judges routers at each log entry, and reports each once until it has recovered.

    A router is judged when 20 rows for each expert have come together, in one log entry or in several. Routers that
    decide by task are not judged: few tasks need few experts.

    Args:
        config: the options.

    Attributes:
        ringing: names of the routers that were collapsed `patience` times in a row, and have not recovered.
    """

    def __init__(self, config: RoutingAlarmConfig) -> None:
        self.config = config
        self.ringing: list[str] = []
        self._times: dict[str, int] = {}
        self._waiting: dict[str, RouterCounts] = {}

    def judge(self, routers: Mapping[str, RouterCounts]) -> str | None:
        """Judge a log entry's counts.

        Args:
            routers: counts by router, all tasks together.

        Returns:
            What there is to report about routers that were not in alarm before, or None.
        """
        new: dict[str, str] = {}
        for name, latest in routers.items():
            if latest.granularity == "task" or latest.num_experts < 2:
                continue
            counts = self._waiting.pop(name, None)
            if counts is None:
                counts = latest
            else:
                counts.merge(latest)
            if int(counts.rows.sum()) < _ROWS_PER_EXPERT * counts.num_experts:
                self._waiting[name] = counts
                continue
            what = collapse(counts, self.config)
            self._times[name] = 0 if what is None else self._times.get(name, 0) + 1
            if what is None and name in self.ringing:
                self.ringing.remove(name)
            elif what is not None and self._times[name] >= self.config.patience and name not in self.ringing:
                self.ringing.append(name)
                new[name] = what
        if not new:
            return None
        labels = router_labels(routers)
        text = "; ".join(f"{labels[name]}: {what}" for name, what in list(new.items())[:_NAMED])
        more = f"; and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
        often = f" ({self.config.patience} times in a row)" if self.config.patience > 1 else ""
        return f"{text}{more}{often}"

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        waiting = [counts.to_dict() for counts in self._waiting.values()]
        return {"ringing": list(self.ringing), "times": dict(self._times), "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` returned."""
        self.ringing, self._times = list(state["ringing"]), dict(state["times"])
        waiting = [RouterCounts.from_dict(values) for values in state["waiting"]]
        self._waiting = {counts.name: counts for counts in waiting}


def collapse(counts: RouterCounts, config: RoutingAlarmConfig) -> str | None:
    """What is wrong with a router, in words; None when nothing is.

    Args:
        counts: all tasks together.
        config: the thresholds.
    """
    rows, num_experts = counts.rows.sum(), counts.num_experts
    selections_N = counts.selections.sum((0, 1, 2))
    selects_all = bool((selections_N == rows).all())
    used_N = measures.usage(selections_N, counts.weights.sum((0, 1, 2)), rows)
    chosen = 1 if selects_all else max(1, round(float(selections_N.sum() / rows)))
    top = measures.load(used_N).topk(min(chosen, num_experts))
    share = float(top.values.sum())
    # Where these are nearly all of the experts, they take that share without any collapse.
    if config.max_share is not None and chosen / num_experts < config.max_share <= share:
        who = ", ".join(counts.experts[expert] for expert in sorted(top.indices.tolist()))
        what = "gate weights" if selects_all else "selections"
        return f"expert{'s' if chosen > 1 else ''} {who} take{'s' if chosen == 1 else ''} {100 * share:.1f} % of {what}"
    dead_N = measures.dead_experts(used_N, used_N.sum() if selects_all else rows)
    if config.dead_fraction is not None and float(dead_N.double().mean()) >= config.dead_fraction:
        return f"{int(dead_N.sum())} of {num_experts} experts are dead"
    return None
