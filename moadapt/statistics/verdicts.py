"""What the measures say, in plain words: dead and collapsed experts, balance, and whether tasks get their own.

Verdicts about the whole mixture come first (`router` is empty), then those about single routers, the worst first.

Shapes: N experts, L tasks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moadapt.routing import Granularity
from moadapt.statistics import measures
from moadapt.statistics.counts import RouterCounts
from moadapt.statistics.significance import TaskTest, benjamini_hochberg, task_permutation_test
from moadapt.statistics.statistics import UNKNOWN

Level = Literal["ok", "note", "warning"]
_ORDER: dict[Level, int] = {"warning": 0, "note": 1, "ok": 2}
_ROWS: dict[Granularity, str] = {"token": "tokens", "prompt": "prompts", "task": "sequences"}
_ILL = {
    "load": "collapsed",
    "max_violation": "unbalanced",
    "normalised_entropy": "nearly uniform",
    "token_information": "choosing the same for all that they see",
}
"""What verdicts on single routers by these measures say, for the summary."""


@dataclass(frozen=True)
class Thresholds:
    """When a verdict is given.

    Attributes:
        dead_share: an expert is dead below this part of its fair share, 1 / N.
        collapsed_share: a router is collapsed when as many experts as a row selects take this share of all.
        max_violation: MaxVio from which a router is unbalanced; 1 is twice the fair share.
        uniform_entropy: mean entropy over ln N from which a router is nearly uniform.
        token_information: I(row; expert) over ln N up to which a router chooses the same for every row.
        no_expert: share of rows without any expert from which this is noted.
        task_information: normalised I(task; expert) over the chance baseline from which tasks get their own experts.
        alpha: p-values up to this are significant; over several routers, false discovery rates.
        rows_per_expert: a router with fewer rows for each expert is not judged.
        sequences: fewer sequences than this are noted.
    """

    dead_share: float = measures.DEAD_SHARE
    collapsed_share: float = 0.9
    max_violation: float = 1.0
    uniform_entropy: float = 0.98
    token_information: float = 0.01
    no_expert: float = 0.05
    task_information: float = 0.1
    alpha: float = 0.05
    rows_per_expert: int = 20
    sequences: int = 10


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Attributes:
        level: `ok`, `note` (worth knowing) or `warning` (most likely not wanted).
        router: name of the router, empty for the whole mixture.
        measure: what it was judged by, as in `docs/statistics.md`.
        value: of the measure.
        text: a sentence.
    """

    level: Level
    router: str
    measure: str
    value: float
    text: str


class HasRouters(Protocol):
    """What `verdicts` needs of statistics."""

    @property
    def routers(self) -> Mapping[str, RouterCounts]:
        """Counts by router."""
        ...


def task_tests(statistics: HasRouters, *, permutations: int = 1000, seed: int = 0) -> dict[str, TaskTest]:
    """`task_permutation_test` for every router that has sequences of two tasks or more.

    A router that always selects all of its experts is left out when its counts by sequence are those selections, which
    tell nothing. Sequences of an unknown task are left out too.
    """
    tests = {}
    for name, counts in statistics.routers.items():
        tells = not _used(counts)[2] or bool((counts.sequence_counts != counts.sequence_counts[:, :1]).any())
        known = [task for task, label in enumerate(counts.tasks) if label != UNKNOWN]
        kept_M = torch.isin(counts.sequence_tasks, torch.tensor(known, dtype=torch.int64))
        tasks_M, counts_MN = counts.sequence_tasks[kept_M], counts.sequence_counts[kept_M]
        if tells and len(set(tasks_M.tolist())) >= 2:
            tests[name] = task_permutation_test(
                tasks_M, counts_MN, len(counts.tasks), permutations=permutations, seed=seed
            )
    return tests


def router_labels(routers: Mapping[str, RouterCounts]) -> dict[str, str]:
    """Short names: `layer 3 up_proj`; the whole module, or the router's own name, where two would share one."""
    labels = {name: name for name in routers}
    taken: set[str] = set()
    for shorten in (True, False):
        short = {}
        for name, counts in routers.items():
            if counts.layer is not None and labels[name] == name:
                module = counts.module.rpartition(".")[2] if shorten else counts.module
                short[name] = f"layer {counts.layer} {module}".rstrip()
        uses = Counter(short.values())
        labels |= {name: label for name, label in short.items() if uses[label] == 1 and label not in taken}
        taken = set(labels.values())
    return labels


def verdicts(
    statistics: HasRouters, thresholds: Thresholds | None = None, tests: Mapping[str, TaskTest] | None = None
) -> list[Verdict]:
    """Judge every router, and all of them together.

    Args:
        statistics: anything with `routers`.
        thresholds: None takes the defaults.
        tests: what `task_tests` returned; None runs it.

    Returns:
        Verdicts about all routers, then about single ones: warnings, notes, and what is in order.
    """
    limits = Thresholds() if thresholds is None else thresholds
    tests = task_tests(statistics) if tests is None else tests
    labels = router_labels(statistics.routers)
    found: list[Verdict] = []
    judged: list[RouterCounts] = []
    for name, counts in statistics.routers.items():
        rows = int(counts.rows.sum())
        if counts.num_experts < 2:
            continue
        if rows < limits.rows_per_expert * counts.num_experts:
            kind = _ROWS[counts.granularity]
            text = f"{labels[name]}: not judged, {rows} {kind} are too few for {counts.num_experts} experts"
            found.append(Verdict("note", name, "rows", rows, text))
            continue
        judged.append(counts)
        found += _of_experts(counts, labels[name], limits)
    names = [counts.name for counts in judged if counts.name in tests and not math.isnan(tests[counts.name].p_value)]
    q = benjamini_hochberg(torch.tensor([tests[name].p_value for name in names], dtype=torch.float64)).tolist()
    tasks = [_of_tasks(tests[name], name, labels[name], rate, limits) for name, rate in zip(names, q, strict=True)]
    found += tasks
    found.sort(key=lambda verdict: _ORDER[verdict.level])
    return _summary(judged, found, tasks, labels, limits) + found


# -- one router ----------------------------------------------------------------------------------------------------


def _of_experts(counts: RouterCounts, label: str, limits: Thresholds) -> list[Verdict]:
    """Dead, collapsed, unbalanced, uniform, blind, or empty."""
    found: list[Verdict] = []
    kind, num_experts, rows = _ROWS[counts.granularity], counts.num_experts, counts.rows.sum()

    def add(level: Level, measure: str, value: Tensor | float, text: str) -> None:
        found.append(Verdict(level, counts.name, measure, float(value), f"{label}: {text}"))

    selections_N, used_N, selects_all = _used(counts)
    empty = float(measures.experts_per_row(counts.active)[1][0])
    if empty >= limits.no_expert:
        add("note", "experts_per_row", empty, f"{_percent(empty)} of {kind} select no expert")
    if not bool(selections_N.any()):
        return found
    load_N = measures.load(used_N)
    dead = _dead(counts, limits)
    if dead:
        text = f"{len(dead)} of {num_experts} experts dead ({', '.join(counts.experts[expert] for expert in dead)})"
        add("warning", "dead_experts", len(dead), text)
    chosen = 1 if selects_all else max(1, round(float(selections_N.sum() / rows)))
    top = load_N.topk(min(chosen, num_experts))
    collapsed = chosen < num_experts and float(top.values.sum()) >= limits.collapsed_share
    if collapsed and chosen == 1:
        share = load_N.max() if selects_all else selections_N.max() / rows
        what = "the gate weight" if selects_all else kind
        who = counts.experts[int(top.indices[0])]
        add("warning", "load", share, f"collapsed: expert {who} takes {_percent(share)} of {what}")
    elif collapsed:
        who = ", ".join(counts.experts[expert] for expert in sorted(top.indices.tolist()))
        share = top.values.sum()
        add("warning", "load", share, f"collapsed: experts {who} take {_percent(share)} of all selections")
    violation = float(measures.max_violation(used_N))
    if violation >= limits.max_violation and not collapsed:
        who = counts.experts[int(load_N.argmax())]
        add(
            "note",
            "max_violation",
            violation,
            f"unbalanced: expert {who} gets {violation + 1:.1f} times its fair share",
        )
    entropy_sum = counts.entropy[:, 0].sum()
    entropy = measures.normalised_entropy(entropy_sum / rows, num_experts)
    information = measures.token_information(counts.probs.sum(0), entropy_sum, rows) / math.log(num_experts)
    if entropy >= limits.uniform_entropy:
        add("note", "normalised_entropy", entropy, f"nearly uniform: entropy {_percent(entropy)} of the maximum")
    elif information <= limits.token_information and not collapsed:
        text = f"the same choice for all {kind}: they explain {_percent(information)} of the maximum"
        add("note", "token_information", information, text)
    return found


def _of_tasks(test: TaskTest, name: str, label: str, rate: float, limits: Thresholds) -> Verdict:
    least = 1 / (test.permutations + 1)
    p = f"p = {test.p_value:.2g}" if test.p_value > least else f"p ≤ {least:.1g}"
    if rate > limits.alpha:
        return Verdict("note", name, "task_p_value", test.p_value, f"{label}: routing ignores the task ({p})")
    share = f"{_percent(test.normalised)} of the possible information ({p})"
    if test.normalised - test.normalised_baseline >= limits.task_information:
        return Verdict(
            "ok", name, "task_information", test.normalised, f"{label}: tasks get their own experts: {share}"
        )
    return Verdict("note", name, "task_information", test.normalised, f"{label}: tasks differ little: {share}")


def _used(counts: RouterCounts) -> tuple[Tensor, Tensor, bool]:
    """Selections (N,), what loads are made of (N,), and whether every row selects every expert."""
    selections_N, rows = counts.selections.sum((0, 1, 2)), counts.rows.sum()
    used_N = measures.usage(selections_N, counts.weights.sum((0, 1, 2)), rows)
    return selections_N, used_N, bool((selections_N == rows).all())


def _dead(counts: RouterCounts, limits: Thresholds) -> list[int]:
    selections_N, used_N, selects_all = _used(counts)
    used_N, of = (used_N, used_N.sum()) if selects_all else (selections_N, counts.rows.sum())
    return [int(expert) for expert in measures.dead_experts(used_N, of, limits.dead_share).nonzero()]


# -- all routers ---------------------------------------------------------------------------------------------------


def _summary(
    judged: list[RouterCounts], found: list[Verdict], tasks: list[Verdict], labels: dict[str, str], limits: Thresholds
) -> list[Verdict]:
    if not judged:
        return [
            Verdict("note", "", "rows", 0.0, "no router was judged: there are too few rows, or single experts only")
        ]
    summary: list[Verdict] = []
    dead = {verdict.router: int(verdict.value) for verdict in found if verdict.measure == "dead_experts"}
    experts = sum(counts.num_experts for counts in judged)
    where = _some([labels[name] for name in dead])
    summary.append(
        Verdict(
            "warning",
            "",
            "dead_experts",
            sum(dead.values()),
            f"{sum(dead.values())} of {experts} experts dead: {where}",
        )
        if dead
        else Verdict("ok", "", "dead_experts", 0.0, f"no dead experts, of {experts} in {_routers(len(judged))}")
    )
    for measure, ill in _ILL.items():
        names = [labels[verdict.router] for verdict in found if verdict.measure == measure]
        if names:
            level: Level = "warning" if measure == "load" else "note"
            text = f"{len(names)} of {_routers(len(judged))} {ill}: {_some(names)}"
            summary.append(Verdict(level, "", measure, len(names), text))
        elif measure == "load":
            summary.append(Verdict("ok", "", measure, 0.0, "no router collapsed"))
    if tasks:
        summary.append(_task_summary(tasks, labels))
    sequences = max(len(counts.sequence_tasks) for counts in judged)
    if 0 < sequences < limits.sequences:
        text = f"only {sequences} sequences were recorded: this is about their text, and may be another with more"
        summary.append(Verdict("note", "", "sequences", sequences, text))
    return summary


def _task_summary(tasks: list[Verdict], labels: dict[str, str]) -> Verdict:
    own = [verdict for verdict in tasks if verdict.level == "ok"]
    little = [verdict for verdict in tasks if verdict.level == "note" and verdict.measure == "task_information"]
    if not own and not little:
        least = min(verdict.value for verdict in tasks)
        return Verdict("note", "", "task_p_value", least, f"routing ignores the task in {_all(len(tasks))}")
    best = max(own or little, key=lambda verdict: verdict.value)
    most = f"most in {labels[best.router]}, {_percent(best.value)} of the possible information"
    if own:
        text = f"tasks get their own experts in {len(own)} of {_routers(len(tasks))}, {most}"
        return Verdict("ok", "", "task_information", len(own), text)
    text = f"tasks differ little: in {len(little)} of {_routers(len(tasks))}, {most}"
    return Verdict("note", "", "task_information", len(little), text)


def _routers(count: int) -> str:
    return f"{count} router{'' if count == 1 else 's'}"


def _all(count: int) -> str:
    return "the only router" if count == 1 else f"all {count} routers"


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _percent(share: Tensor | float) -> str:
    """`93 %`; above 99 and below 1 not rounded to the end of the scale that it does not reach."""
    percent = 100 * float(share)
    rounded = round(percent)
    if rounded in (0, 100) and abs(percent - rounded) > 1e-9:
        return f"{min(max(percent, 0.1), 99.9):.1f} %"
    return f"{rounded} %"
