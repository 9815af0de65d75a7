"""Statistics as values: merging, several processes, dictionaries, tables, traces."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import batch_of, mixture, of_kind
from pyarrow import parquet
from safetensors import safe_open
from slow_counts import decisions_of, letters, same_counts, sequences
from torch import Tensor

from moadapt import MixtureModel
from moadapt.errors import ConfigError
from moadapt.statistics import RoutingStatistics, Trace, record_routing

TASKS = ["sums", "names", "dates"]
TOKENS: dict[str, Any] = {
    "num_experts": 4,
    "expert": {"kind": "lora", "r": 2},
    "router": {"kind": "sigmoid_ste", "scope": "linear"},
    "target_modules": ["q_proj", "down_proj"],
}
BATCHES = [["uuaap", "puaaa"], ["uap", "uua"], ["uuuua", "ppuaa"]]
IDS = [[0, 2], [1, 0], [2, 2]]


def recorded(model: MixtureModel, numbers: list[int], **options: Any) -> RoutingStatistics:
    """Some of the batches."""
    options = {"tasks": TASKS, "vocabulary": True, **options}
    with record_routing(model, **options) as statistics, torch.no_grad():
        for number in numbers:
            task_ids = torch.tensor(IDS[number]) if options["tasks"] is not None else None
            model(**batch_of(BATCHES[number]), task_ids=task_ids)
    return statistics


def same_vocabulary(one: RoutingStatistics, other: RoutingStatistics) -> None:
    for name, counts in one.routers.items():
        assert torch.equal(counts.vocabulary, other.routers[name].vocabulary)


# -- adding up ----------------------------------------------------------------------------------------------------


def test_merging() -> None:
    model = mixture(TOKENS)
    whole, parts = recorded(model, [0, 1, 2]), recorded(model, [0])
    parts.merge(recorded(model, [1, 2], seed=1))
    same_counts(whole, parts)
    same_vocabulary(whole, parts)


def test_merging_finds_tasks_by_their_names() -> None:
    model = mixture(TOKENS)
    one, other = recorded(model, [0]), recorded(model, [0], tasks=["dates", "names", "sums", "more"])
    one.merge(other)
    assert one.tasks == [*TASKS, "more"]
    for counts in one.routers.values():
        assert counts.rows[:, 0, 0].tolist() == [3, 0, 3, 0]
        samples = sorted(counts.sequence_tasks.tolist())
        assert samples == [0, 0, 2, 2]


def test_merging_keeps_the_sample_small() -> None:
    model = mixture(TOKENS)
    one, other = (recorded(model, [0, 1, 2], max_sequences=4, seed=seed) for seed in (0, 1))
    keys = torch.cat([next(iter(item.routers.values())).sequence_keys for item in (one, other)])
    one.merge(other)
    for counts in one.routers.values():
        assert torch.equal(counts.sequence_keys, keys.sort().values[:4])


def test_what_cannot_be_merged() -> None:
    model = mixture(TOKENS)
    one = recorded(model, [0])
    with pytest.raises(ConfigError, match=r"only one of the two has the router model\.layers\.0"):
        one.merge(recorded(mixture({**TOKENS, "router": {"kind": "softmax", "scope": "block"}}), [0]))
    with pytest.raises(ConfigError, match="cannot be added to those of"):
        one.merge(recorded(mixture({**TOKENS, "num_experts": 3}), [0]))
    with record_routing(model) as statistics:
        with pytest.raises(ConfigError, match=r"statistics.merge: recording still goes on"):
            statistics.merge(one)
        with pytest.raises(ConfigError, match=r"statistics.reduce: recording still goes on"):
            statistics.reduce(lambda value: value)


class Processes:
    """Stands for two processes that call their collectives in the same order; each is run in turn, twice.

    The first run of each only notes what it gives; the second gets the results.
    """

    def __init__(self) -> None:
        self.given: list[list[Tensor]] = [[], []]

    def run(self, statistics: list[RoutingStatistics], gather: bool) -> None:
        for rank, item in enumerate(copy.deepcopy(statistics)):
            self._reduce(item, rank, gather, lambda number, value: [value, value])
        for rank, item in enumerate(statistics):
            self._reduce(item, rank, gather, lambda number, value: [given[number] for given in self.given])

    def _reduce(
        self, statistics: RoutingStatistics, rank: int, gather: bool, answer: Callable[[int, Tensor], list[Tensor]]
    ) -> None:
        calls = 0

        def together(value: Tensor) -> list[Tensor]:
            nonlocal calls
            if len(self.given[rank]) <= calls:
                self.given[rank].append(value.clone())
            assert value.dtype in (torch.int64, torch.float64)
            calls += 1
            values = answer(calls - 1, value)
            assert all(other.shape == value.shape for other in values)
            return values

        statistics.reduce(lambda value: torch.stack(together(value)).sum(0), together if gather else None)


@pytest.mark.parametrize("gather", [True, False])
def test_two_processes(gather: bool) -> None:
    model = mixture(TOKENS)
    whole = recorded(model, [0, 1, 2])
    parts = [recorded(model, [0, 2]), recorded(model, [1], seed=1)]
    own = [sequences(next(iter(part.routers.values()))) for part in parts]
    Processes().run(parts, gather)
    for rank, part in enumerate(parts):
        if gather:
            same_counts(whole, part)
        else:
            assert sequences(next(iter(part.routers.values()))) == own[rank]
            for name, counts in part.routers.items():
                assert torch.equal(counts.selections, whole.routers[name].selections)
                torch.testing.assert_close(counts.weights, whole.routers[name].weights, rtol=1e-12, atol=0)
            assert all(torch.equal(value, whole.flow[pair]) for pair, value in part.flow.items())
        same_vocabulary(whole, part)
        assert counts_dtypes(part) == counts_dtypes(whole)


def counts_dtypes(statistics: RoutingStatistics) -> set[tuple[str, torch.dtype]]:
    return {(name, value.dtype) for counts in statistics.routers.values() for name, value in counts.tensors().items()}


def test_a_process_without_data() -> None:
    model = mixture(TOKENS)
    whole, parts = recorded(model, [0, 1]), [recorded(model, [0, 1]), recorded(model, [])]
    Processes().run(parts, gather=True)
    for part in parts:
        same_counts(whole, part)


# -- dictionaries and tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens", "empty", "milora_3"])
def test_dictionary_and_back(name: str) -> None:
    model = mixture(of_kind(name, "module") if name == "milora_3" else TOKENS)
    statistics = recorded(model, [] if name == "empty" else [0, 1], max_sequences=3)
    plain = json.loads(json.dumps(statistics.to_dict()))
    back = RoutingStatistics.from_dict(plain)
    assert back.to_dict() == statistics.to_dict()
    same_counts(statistics, back)
    for router, counts in statistics.routers.items():
        other = back.routers[router]
        for field in ("name", "experts", "granularity", "layer", "module", "tasks", "max_sequences"):
            assert getattr(other, field) == getattr(counts, field)
        tensors = other.tensors()
        assert tensors.keys() == counts.tensors().keys()
        for field, value in counts.tensors().items():
            assert value.dtype == tensors[field].dtype
            assert torch.equal(value, tensors[field]), field


def test_long_table() -> None:
    pytest.importorskip("pandas")
    statistics = recorded(mixture(TOKENS), [0, 1])
    table = statistics.to_pandas()
    assert len(table) == 4 * 3 * 2 * 2 * 4
    counts = statistics.routers["model.layers.1.mlp.down_proj"]
    some = table[(table.router == counts.name) & (table.task == "names") & (table.part == "answer")]
    some = some[some.phase == "prefill"]
    assert some.expert.tolist() == ["0", "1", "2", "3"]
    assert some.selections.tolist() == counts.selections[1, 1, 0].tolist()
    assert some.weight.tolist() == counts.weights[1, 1, 0].tolist()
    assert set(some.rows) == {int(counts.rows[1, 1, 0])}
    assert set(some.layer) == {1}
    assert set(some.module) == {"mlp.down_proj"}
    assert table.selections.sum() == sum(int(item.selections.sum()) for item in statistics.routers.values())


def test_summary() -> None:
    """By hand, from one router's selections: a top-1 router, so that rows and selections are the same."""
    router = {"kind": "top_k", "num_experts_per_tok": 1, "scope": "block"}
    model = mixture({"num_experts": 4, "expert": {"kind": "lora", "r": 2}, "router": router})
    statistics = recorded(model, [0, 1, 2])
    assert recorded(model, []).summary() == {}
    summary = statistics.summary()
    assert list(summary) == ["model.layers.0", "model.layers.1"]
    for name, values in summary.items():
        counts = statistics.routers[name]
        by_task = counts.selections.sum((1, 2)).tolist()
        loads = [sum(task[n] for task in by_task) / 21 for n in range(4)]
        joint = [[count / sum(task) / 3 for count in task] for task in by_task]
        sides = [[sum(task) for task in joint], [sum(task[n] for task in joint) for n in range(4)]]
        both = plain_entropy([share for task in joint for share in task])
        information = sum(map(plain_entropy, sides)) - both
        mean = float(counts.entropy[:, 0].sum()) / 21
        assert values == pytest.approx(
            {
                "rows": 21,
                "max_share": max(loads),
                "max_violation": 4 * max(loads) - 1,
                "effective_experts": math.exp(plain_entropy(loads)),
                "dead": loads.count(0.0),
                "experts_per_row": 1.0,
                "entropy": mean,
                "normalised_entropy": mean / math.log(4),
                "task_information": information / min(map(plain_entropy, sides)),
            }
        )


def plain_entropy(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


# -- traces -------------------------------------------------------------------------------------------------------


def traced(model: MixtureModel, trace: Trace) -> tuple[list[dict[str, Any]], RoutingStatistics]:
    """The rows that should be in the file, for all routers and tokens of the first two batches."""
    want = []
    with record_routing(model, TASKS, trace=trace) as statistics, torch.no_grad():
        for number in (0, 1):
            inputs = batch_of(BATCHES[number])
            with decisions_of(model) as decisions:
                model(**inputs, task_ids=torch.tensor(IDS[number]))
            real, answer = letters(BATCHES[number])
            length = len(real[0])
            for decision in decisions:
                for b, task in enumerate(IDS[number]):
                    for s in range(length):
                        if real[b][s]:
                            row = b * length + s
                            chosen = [n for n in range(4) if decision.selected[row][n]]
                            want.append(
                                {
                                    "pass": number,
                                    "sequence": b,
                                    "position": sum(real[b][:s]),
                                    "token": int(inputs["input_ids"][b, s]),
                                    "task": task,
                                    "part": int(answer[b][s]),
                                    "phase": 0,
                                    "router": decision.router,
                                    "experts": chosen,
                                    "weights": pytest.approx([decision.weights[row][n] for n in chosen], rel=1e-6),
                                }
                            )
    return want, statistics


def test_parquet(tmp_path: Path) -> None:
    want, statistics = traced(mixture(TOKENS), Trace(tmp_path / "new" / "trace.parquet"))
    table = parquet.read_table(tmp_path / "new" / "trace.parquet")
    rows = table.to_pylist()
    entropy: dict[str, float] = {}
    for row in rows:
        entropy[row["router"]] = entropy.get(row["router"], 0.0) + row.pop("entropy")
    assert rows == want
    for name, counts in statistics.routers.items():
        assert entropy[name] == pytest.approx(float(counts.entropy[:, 0].sum()))
    metadata = {key: json.loads(value) for key, value in table.schema.metadata.items()}
    assert metadata[b"tasks"] == TASKS
    assert metadata[b"routers"] == list(statistics.routers)
    assert (metadata[b"complete"], metadata[b"limit"]) == (True, 100_000)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    want, statistics = traced(mixture(TOKENS), Trace(path, format="safetensors"))
    with safe_open(path, "pt") as file:
        columns = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
        names = json.loads(file.metadata()["routers"])
    assert names == list(statistics.routers)
    most = max(len(row["experts"]) for row in want)
    for number, row in enumerate(want):
        chosen = len(row["experts"])
        assert names[columns["router"][number]] == row["router"]
        assert columns["experts"][number] == row["experts"] + [-1] * (most - chosen)
        assert columns["weights"][number][:chosen] == row["weights"]
        assert columns["weights"][number][chosen:] == [0.0] * (most - chosen)
        assert [columns[name][number] for name in ("pass", "sequence", "token", "part")] == [
            row[name] for name in ("pass", "sequence", "token", "part")
        ]
    assert {len(column) for column in columns.values()} == {len(want)}


@pytest.mark.parametrize(("limit", "tokens"), [(4, 1), (31, 7), (32, 8), (33, 8), (3, 0)])
def test_the_limit_cuts_between_tokens(tmp_path: Path, limit: int, tokens: int) -> None:
    """Four routers; the first pass has eight tokens and the second five."""
    path = tmp_path / "trace.parquet"
    want, _ = traced(mixture(TOKENS), Trace(path, limit=limit))
    table = parquet.read_table(path)
    rows = table.to_pylist()
    assert len(rows) == 4 * tokens
    per_router = [row for row in want if row["router"] == want[0]["router"]][:tokens]
    have = [row for row in rows if row["router"] == want[0]["router"]]
    assert [(row["pass"], row["sequence"], row["position"]) for row in have] == [
        (row["pass"], row["sequence"], row["position"]) for row in per_router
    ]
    assert json.loads(table.schema.metadata[b"complete"]) is False


def test_rows_without_a_task_have_no_index(tmp_path: Path) -> None:
    """Not the index that the next new task id gets."""
    path = tmp_path / "trace.parquet"
    model = mixture(TOKENS)
    with record_routing(model, trace=Trace(path)), torch.no_grad():
        for ids in ([-1, 0], [1, 1]):
            model(**batch_of(["uu", "uu"]), task_ids=torch.tensor(ids))
    table = parquet.read_table(path)
    assert json.loads(table.schema.metadata[b"tasks"]) == ["0", "1"]
    found = {(row["pass"], row["sequence"]): row["task"] for row in table.to_pylist()}
    assert found == {(0, 0): -1, (0, 1): 0, (1, 0): 1, (1, 1): 1}


def test_a_trace_is_written_after_an_error(tmp_path: Path) -> None:
    model, path = mixture(TOKENS), tmp_path / "trace.parquet"
    with pytest.raises(RuntimeError, match="later"), record_routing(model, TASKS, trace=Trace(path)):  # noqa: PT012
        model(**batch_of(["uua"]), task_ids=torch.tensor([2]))
        raise RuntimeError("later")
    assert parquet.read_table(path).num_rows == 3 * 4


def test_traces_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"trace.format: 'csv' is not known"):
        Trace("trace", format="csv")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"trace.limit: 0 leaves nothing"):
        Trace("trace", limit=0)
