"""The routing document: everything that was found out about the routers of a model, as plain JSON values.

`moadapt inspect` writes it as `routing.json`, and `moadapt.report.render_report` draws it. Its shape is
`routing_schema()`, and docs/inspecting.md describes it. Counts are exact integers; measures are those of
docs/statistics.md, in full precision; what is not a number is null.

Shapes: N experts, L tasks, P = 2 parts (prompt, answer), F = 2 phases (prefill, decode).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import moadapt
from moadapt.statistics import measures
from moadapt.statistics.counts import ALL, PARTS, PHASES, RouterCounts
from moadapt.statistics.document_schema import SCHEMA_VERSION, routing_schema
from moadapt.statistics.significance import TaskTest, benjamini_hochberg, load_interval
from moadapt.statistics.statistics import RoutingStatistics
from moadapt.statistics.verdicts import Thresholds, task_tests, verdicts

__all__ = ["SCHEMA_VERSION", "build_document", "for_report", "routing_schema"]

Document = dict[str, Any]
Decode = Callable[[int], str]
TOP_TOKENS = 10
"""How many tokens of each expert a document names, where they were counted."""


def build_document(
    statistics: RoutingStatistics,
    *,
    title: str = "Routing",
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    generated: RoutingStatistics | None = None,
    similarity: Mapping[str, Tensor] | None = None,
    texts: Sequence[Mapping[str, Any]] = (),
    training: Sequence[Mapping[str, Any]] | None = None,
    decode: Decode | None = None,
    thresholds: Thresholds | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> Document:
    """Everything about a recording that has ended.

    Args:
        statistics: what `record_routing` yielded.
        title: of the report.
        model: what was recorded: any of `adapter`, `base`, `preset`, `expert`, `router`, `granularity`, `scope` and
            `expert_unit`.
        data: on what: `tasks` (each with `name`, `sequences`, `tokens`), `tokens`, `sequences` and `generated_tokens`.
            None takes the number of rows from the counts.
        generated: a recording of generation on the same data, of which only what was decoded is taken, for shares by
            phase.
        similarity: by router, (N, N) cosines of its experts.
        texts: see `moadapt.statistics.texts`.
        training: for each logged step `step` and by router its measures.
        decode: the text of a token id, for the experts' tokens where the vocabulary was counted.
        thresholds: of verdicts.
        permutations: of the tests of tasks.
        seed: of the permutations.

    Returns:
        Plain JSON values in the shape of `routing_schema()`.

    Raises:
        ConfigError: no permutations.
    """
    limits = Thresholds() if thresholds is None else thresholds
    tests = task_tests(statistics, permutations=permutations, seed=seed)
    routers = [
        _router(counts, tests.get(name), None if generated is None else generated.routers[name], limits, decode)
        for name, counts in statistics.routers.items()
    ]
    found = verdicts(statistics, limits, tests)
    document = {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "created_by": f"moadapt {moadapt.__version__}",
        "model": {name: (model or {}).get(name) for name in _MODEL},
        "data": _data(statistics, data),
        "summary": _summary(routers),
        "verdicts": [{**vars(verdict), "router": verdict.router or None} for verdict in found],
        "routers": routers,
        "flow": [
            {
                "from": first,
                "to": second,
                "share": measures.flow_shares(rows_NN),
                "information": measures.flow_information(rows_NN),
                "rows": rows_NN,
            }
            for (first, second), rows_NN in statistics.flow.items()
        ],
        "training": list(training) if training else None,
        "similarity": dict(similarity) if similarity else None,
        "text": list(texts),
    }
    plain: Document = _plain(document)
    return plain


_MODEL = ("adapter", "base", "preset", "expert", "router", "granularity", "scope", "expert_unit")


def for_report(document: Mapping[str, Any]) -> Document:
    """The same document without what the report does not draw: raw counts, and tokens of the vocabulary."""
    routers = [
        {name: value for name, value in router.items() if name not in ("counts", "vocabulary")}
        for router in document["routers"]
    ]
    flow = [{name: value for name, value in item.items() if name != "rows"} for item in document["flow"]]
    return {**document, "routers": routers, "flow": flow}


def _plain(value: Any) -> Any:
    """Tensors as lists, and None for what is not a finite number."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# -- the whole model -----------------------------------------------------------------------------------------------


def _data(statistics: RoutingStatistics, data: Mapping[str, Any] | None) -> Document:
    given = dict(data or {})
    by_token = [counts for counts in statistics.routers.values() if counts.granularity == "token"]
    tokens = max((int(counts.rows.sum()) for counts in by_token), default=None)
    return {
        "tasks": list(given.get("tasks", ())),
        "tokens": given.get("tokens", tokens),
        "sequences": given.get("sequences"),
        "generated_tokens": given.get("generated_tokens"),
    }


def _summary(routers: Sequence[Document]) -> Document:
    """Means over the routers with two experts or more, and one p-value for all of them.

    That p-value is Simes': the smallest false discovery rate at which any router goes by task.
    """
    choosing = [router for router in routers if len(router["experts"]) > 1]
    tables = [router["by_task"] for router in choosing if router["by_task"] is not None]
    p = torch.tensor([table["p"] for table in tables if not math.isnan(table["p"])], dtype=torch.float64)
    return {
        "num_routers": len(routers),
        "num_experts": sum(len(router["experts"]) for router in routers),
        "dead_experts": sum(len(router["measures"]["dead"]) for router in routers),
        "mean_max_violation": _mean([router["measures"]["max_violation"] for router in choosing]),
        "mean_normalised_entropy": _mean([router["measures"]["normalised_entropy"] for router in choosing]),
        "task_information": _mean([table["information"] for table in tables]),
        "task_information_p": float(benjamini_hochberg(p).min()) if len(p) else math.nan,
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


# -- one router ----------------------------------------------------------------------------------------------------


def _router(
    counts: RouterCounts,
    test: TaskTest | None,
    generated: RouterCounts | None,
    limits: Thresholds,
    decode: Decode | None,
) -> Document:
    used_LPFN, selects_all = _used(counts)
    used_N = used_LPFN.sum((0, 1, 2))
    nothing = [math.nan] * counts.num_experts
    # Counts by sequence are selections: they say nothing about the gate weights of a router that selects all.
    low, high = (nothing, nothing) if selects_all else load_interval(used_N, counts.sequence_counts)
    by_part = dict(zip(PARTS, measures.load(used_LPFN.sum((0, 2))), strict=True))
    by_phase = dict(zip(PHASES, measures.load(used_LPFN.sum((0, 1))), strict=True))
    if generated is not None:
        by_phase["decode"] = measures.load(_used(generated)[0][:, :, 1].sum((0, 1)))
    return {
        "name": counts.name,
        "layer": counts.layer,
        "module": counts.module,
        "experts": counts.experts,
        "granularity": counts.granularity,
        "rows": counts.rows.sum(),
        "load": {"of": "weights" if selects_all else "selections", "share": measures.load(used_N)}
        | {"low": low, "high": high},
        "measures": _measures(counts, used_N, selects_all, limits),
        "by_task": _by_task(counts, used_LPFN.sum((1, 2)), test, limits),
        "task_distance": _task_distance(counts, used_LPFN.sum((1, 2))),
        "by_part": {name: _or_none(share_N) for name, share_N in by_part.items()},
        "by_phase": {name: _or_none(share_N) for name, share_N in by_phase.items()},
        "coactivation": measures.coactivation(counts.pairs),
        "vocabulary": _vocabulary(counts, decode),
        "counts": {
            "tasks": counts.tasks,
            "rows": counts.rows,
            "selections": counts.selections,
            "weights": counts.weights,
            "top": counts.top,
            "pairs": counts.pairs,
        },
    }


def _used(counts: RouterCounts) -> tuple[Tensor, bool]:
    """(L, P, F, N): what loads are made of, gate weights where every row selects every expert; and whether it does."""
    selects_all = bool((counts.selections == counts.rows.unsqueeze(-1)).all())
    return (counts.weights if selects_all else counts.selections).double(), selects_all


def _or_none(share_N: Tensor) -> Tensor | None:
    """Shares of rows that there are."""
    return None if bool(share_N.isnan().any()) else share_N


def _measures(counts: RouterCounts, used_N: Tensor, selects_all: bool, limits: Thresholds) -> Document:
    rows, entropies_2 = counts.rows.sum(), counts.entropy.sum(0)
    entropy, spread = measures.token_entropy(entropies_2, rows)
    mean_active, _ = measures.experts_per_row(counts.active)
    dead_N = measures.dead_experts(used_N, used_N.sum() if selects_all else rows, limits.dead_share)
    return {
        "max_violation": float(measures.max_violation(used_N)),
        "mean_violation": float(measures.mean_violation(counts.violation)),
        "cv": float(measures.coefficient_of_variation(used_N)),
        "gini": float(measures.gini(used_N)),
        "effective_experts": float(measures.effective_experts(used_N)) if float(used_N.sum()) else math.nan,
        "dead": dead_N.nonzero().flatten().tolist(),
        "entropy": float(entropy),
        "entropy_deviation": float(spread),
        "normalised_entropy": float(measures.normalised_entropy(entropy, counts.num_experts)),
        "mi_token_expert": float(measures.token_information(counts.probs.sum(0), entropies_2[0], rows)),
        "experts_per_row": float(mean_active),
        "active_histogram": counts.active,
        "entropy_histogram": counts.entropy_histogram,
    }


def _known(counts: RouterCounts) -> list[int]:
    """Indices of the tasks that have a name and rows."""
    rows_L = counts.rows.sum((1, 2))
    return [task for task, name in enumerate(counts.tasks) if name != ALL and int(rows_L[task]) > 0]


def _by_task(counts: RouterCounts, used_LN: Tensor, test: TaskTest | None, limits: Thresholds) -> Document | None:
    known = _known(counts)
    if not known:
        return None
    tested = test is not None and not math.isnan(test.p_value)
    information = float(measures.task_information(used_LN[known])[1]) if len(known) > 1 else math.nan
    significant_LN = torch.zeros_like(used_LN, dtype=torch.bool) if test is None else test.significant(limits.alpha)
    return {
        "tasks": [counts.tasks[task] for task in known],
        "share": measures.task_table(used_LN[known]),
        "significant": significant_LN[known],
        "difference": used_LN[known].double() * math.nan if test is None else test.difference_LN[known],
        "information": test.normalised if test is not None and tested else information,
        "baseline": test.normalised_baseline if test is not None and tested else math.nan,
        "p": test.p_value if test is not None and tested else math.nan,
    }


def _task_distance(counts: RouterCounts, used_LN: Tensor) -> Tensor | None:
    known = _known(counts)
    return measures.task_distance(used_LN[known]) if len(known) > 1 else None


def _vocabulary(counts: RouterCounts, decode: Decode | None) -> Document | None:
    if counts.vocabulary is None:
        return None
    return {
        "specialisation": float(measures.vocabulary_specialisation(counts.vocabulary)),
        "tokens": [
            [
                {"id": token, "text": None if decode is None else decode(token), "share": share, "occurrences": number}
                for token, share, number in tokens
            ]
            for tokens in measures.top_tokens(counts.vocabulary, TOP_TOKENS)
        ],
    }
