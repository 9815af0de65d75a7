"""Counts against loops over full traces; for every kind of router, granularity, scope and unit; padding and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import PROMPT_ROUTERS, ROUTERS, TASK_ROUTERS, targets_of
from prompts import batch_of, ids_of, mixture, of_kind
from slow_counts import (
    Decision,
    Pass,
    assert_counts,
    assert_statistics,
    decisions_of,
    letters,
    same_counts,
    sequences,
    slow_flow,
    turns,
    without_padding,
)
from tiny import VOCAB, base_model

from moadapt import MixtureModel
from moadapt.convert import convert_ffn_to_experts
from moadapt.errors import ConfigError
from moadapt.routing import Routing, RoutingRecord
from moadapt.statistics import RouterCounts, record_routing, streaming
from moadapt.statistics.streaming import Accumulator, PassRows

LORA = {"kind": "lora", "r": 2}
TASKS = ["sums", "names", "dates"]
PASSES = [["uuaap", "puaaa", "uuuua"], ["uap", "uua", "puu"]]
"""Two batches: rows of letters, `u` prompt, `a` answer, `p` padding."""
TURNS = [["uuauapp", "uaaaaaa", "ppuauau"], ["uaua", "uuuu", "puaa"]]
IDS = [[2, 0, 2], [1, 1, 0]]


def run(model: MixtureModel, batches: list[list[str]], **options: Any) -> tuple[Any, list[Pass]]:
    """The statistics of some batches, and what the loops need to know of them."""
    options = {"tasks": TASKS, **options}
    passes = []
    with record_routing(model, **options) as statistics:
        for rows, ids in zip(batches, IDS, strict=True):
            inputs = batch_of(rows)
            with torch.no_grad(), decisions_of(model) as decisions:
                model(**inputs, task_ids=torch.tensor(ids))
            real, answer = letters(rows)
            passes.append(Pass(real, answer, ids, ids=inputs["input_ids"].tolist(), decisions=decisions))
    return statistics, passes


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(name: str) -> None:
    model = mixture({"num_experts": 4, "expert": LORA, "router": {**ROUTERS[name], "scope": "block"}})
    statistics, passes = run(model, PASSES, vocabulary=True)
    assert list(statistics.routers) == ["model.layers.0", "model.layers.1"]
    assert list(statistics.flow) == [("model.layers.0", "model.layers.1")]
    assert_statistics(statistics, passes)


@pytest.mark.parametrize("scope", ["linear", "ffn", "attention", ["ffn", "attention"]], ids=str)
def test_every_scope(scope: Any) -> None:
    router = {"kind": "top_k", "num_experts_per_tok": 2, "scope": scope}
    model = mixture({"num_experts": 4, "expert": LORA, "router": router, "target_modules": targets_of(scope)})
    statistics, passes = run(model, PASSES)
    assert_statistics(statistics, passes)
    modules = {counts.module for counts in statistics.routers.values()}
    linear = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    blocks = {"mlp"} if scope == "ffn" else {"self_attn"} if scope == "attention" else {"mlp", "self_attn"}
    assert modules == (linear if scope == "linear" else blocks)
    assert len(statistics.flow) == len(modules)
    for first, second in statistics.flow:
        assert (statistics.routers[first].layer, statistics.routers[second].layer) == (0, 1)
        assert statistics.routers[first].module == statistics.routers[second].module


def test_layers_with_different_numbers_of_experts() -> None:
    sizes = [3, 5]
    router = {"kind": "top_k", "num_experts_per_tok": 2, "scope": "block"}
    statistics, passes = run(mixture({"num_experts": sizes, "expert": LORA, "router": router}), PASSES)
    assert [counts.num_experts for counts in statistics.routers.values()] == [3, 5]
    assert_statistics(statistics, passes)


@pytest.mark.parametrize("unit", ["bank", "module"])
@pytest.mark.parametrize("name", [*PROMPT_ROUTERS, *TASK_ROUTERS])
def test_decisions_about_prompts_and_tasks(name: str, unit: str) -> None:
    by_task = name in TASK_ROUTERS
    model = mixture(of_kind(name, unit))
    statistics, passes = run(model, TURNS)
    for one, rows in zip(passes, TURNS, strict=True):
        one.real = [[True]] * len(rows) if by_task else turns(rows)
        one.answer = [[False] * len(row) for row in one.real]
    assert_statistics(statistics, passes)
    counts = statistics.routers["model.layers.0"]
    assert counts.granularity == ("task" if by_task else "prompt")
    assert int(counts.rows.sum()) == (6 if by_task else 10)
    expected = ["self_attn.q_proj", "self_attn.k_proj"] if unit == "module" else ["0", "1"]
    assert counts.experts[:2] == expected


def test_converted_feed_forward_blocks() -> None:
    options = {
        "num_experts": 4,
        "expert": {"kind": "ffn_partition"},
        "router": {"kind": "sigmoid_ste", "init_std": 0.5},
    }
    torch.manual_seed(5)
    model = convert_ffn_to_experts(base_model("llama", torch.float64), options)
    statistics, passes = run(model, PASSES)
    assert [counts.module for counts in statistics.routers.values()] == ["mlp", "mlp"]
    assert_statistics(statistics, passes)


def test_encoder_and_decoder() -> None:
    router = {"kind": "top_k", "num_experts_per_tok": 2, "scope": "linear"}
    model = mixture({"num_experts": 3, "expert": LORA, "router": router}, "t5")
    ids, mask = torch.randint(3, VOCAB, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    with record_routing(model, vocabulary=True) as statistics, decisions_of(model) as decisions, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, labels=labels)
    real = [[True] * 4, [True, True, False, False]]
    written = Pass(real, [[False, True, True, True]] * 2, [0, 0], ids=[[0, 5, 6, 7], [0, 8, 2, 0]])
    read = Pass(mask.bool().tolist(), [[False] * 6] * 2, [0, 0], ids=ids.tolist())
    for one in (written, read):
        one.decisions = decisions
    sources = ("EncDecAttention.k", "EncDecAttention.v")
    for name, counts in statistics.routers.items():
        assert_counts(counts, [read if name.startswith("encoder") or name.endswith(sources) else written])
    for (first, second), value in statistics.flow.items():
        assert first.split(".")[0] == second.split(".")[0]
        one = read if first.startswith("encoder") or first.endswith(sources) else written
        assert value.tolist() == slow_flow([one], first, second, (3, 3))
    assert len(statistics.flow) == len(statistics.routers) // 2
    places = {(counts.layer, counts.module) for counts in statistics.routers.values()}
    assert len(places) == len(statistics.routers)  # no two share a cell of the report's maps
    assert {counts.module.split(".")[0] for counts in statistics.routers.values()} == {"encoder", "decoder"}


# -- adversarial decisions ----------------------------------------------------------------------------------------


def routing(weights: Any, selected: Any, probs: Any) -> Routing:
    selected_TN = torch.tensor(selected, dtype=torch.bool)
    weights_TN = torch.tensor(weights, dtype=torch.float32)
    return Routing(weights_TN * selected_TN, selected_TN, weights_TN, torch.tensor(probs, dtype=torch.float32))


def adversarial(rows: int, num_experts: int) -> dict[str, Routing]:
    """Decisions about `rows` rows."""
    generator = torch.Generator().manual_seed(rows * 100 + num_experts)
    uniform, zero = [[1.0 / num_experts] * num_experts] * rows, [[0.0] * num_experts] * rows
    everything, nothing = [[True] * num_experts] * rows, [[False] * num_experts] * rows
    last = [[n == num_experts - 1 for n in range(num_experts)]] * rows
    random = torch.rand(rows, num_experts, generator=generator)
    some = torch.rand(rows, num_experts, generator=generator) < 0.4
    coarse = (random * 3).floor() / 3  # many equal weights
    return {
        "uniform": routing(uniform, everything, uniform),
        "collapsed": routing(last, last, last),
        "nothing": routing(zero, nothing, zero),
        "random": routing(random.tolist(), some.tolist(), random.tolist()),
        "ties": routing(coarse.tolist(), some.tolist(), coarse.tolist()),
    }


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("num_experts", [2, 5])
def test_adversarial(num_experts: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes over routers that decide in these ways; with what is no number at the padding."""
    monkeypatch.setattr(streaming, "_CHUNK", chunk)
    rows = [["uuaaap", "uaaapp", "uppppp"], ["uapp", "aaau", "pppp"]]
    tasks = [[0, 1, 2], [1, 1, 0]]  # one task of one token
    names = list(adversarial(1, num_experts))
    counts = {name: RouterCounts.zeros(name, [str(n) for n in range(num_experts)], TASKS) for name in names}
    accumulator = Accumulator(names, num_experts, TASKS, 4096, None, torch.device("cpu"))
    passes, tops = [], []
    for texts, ids in zip(rows, tasks, strict=True):
        real, answer = letters(texts)
        made = adversarial(len(texts) * len(texts[0]), num_experts)
        passes.append(Pass(real, answer, ids, decisions=[
            Decision(name, one.weights_TN.double().tolist(), one.selected_TN.tolist(), one.probs_TN.double().tolist())
            for name, one in made.items()
        ]))  # fmt: skip
        padding = ~torch.tensor(real).flatten()
        for one in made.values():
            one.weights_TN[padding], one.probs_TN[padding] = float("nan"), float("inf")
        records = [RoutingRecord(name, one, None, len(texts)) for name, one in made.items()]
        facts = PassRows("prefill", torch.tensor(real), torch.tensor(answer), torch.tensor(ids), None, [0.5, 0.1, 0.2])
        tops.append(accumulator.add(records, facts))
    accumulator.settle(counts)
    for one in counts.values():
        if one.name != "nothing":
            assert_counts(one, passes)
    assert int(counts["nothing"].rows.sum()) == int(counts["nothing"].active[0]) == 16
    assert int(counts["nothing"].selections.sum()) == 0
    assert counts["nothing"].sequence_keys.numel() == 0
    assert set(tops[0][names.index("nothing")].tolist()) == {-1}
    assert set(tops[0][names.index("uniform")].tolist()) == {0, -1}


def test_what_is_no_number_counts_as_uniform() -> None:
    shares = streaming.shares_of(torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [-1.0, 2.0]]))
    assert shares.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]


# -- what must not change the counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens", "milora_3", "task_table_mean"])
def test_padding_and_batch_size(name: str) -> None:
    tokens: dict[str, Any] = {"num_experts": 4, "expert": LORA, "router": {"kind": "sigmoid_ste", "scope": "block"}}
    model = mixture(tokens if name == "tokens" else of_kind(name))
    rows = ["uua", "uaaaa", "uuuua", "ua"]
    task_ids = torch.tensor([0, 2, 1, 2])
    ids = ids_of(*(len(row) for row in rows))
    padded = batch_of(["uuappp", "puaaaa", "puuuua", "ppppua"], ids)
    wider = batch_of(["ppuua" + "p" * 4, "uaaaa" + "p" * 4, "pppp" + "uuuua", "pppp" + "ua" + "ppp"], ids, fill=7)

    def recorded(batches: list[tuple[Any, Any]]) -> Any:
        with record_routing(model, TASKS) as statistics, torch.no_grad():
            for inputs, ids in batches:
                model(**inputs, task_ids=ids)
        return statistics

    singles = [(item, task_ids[i : i + 1]) for i, item in enumerate(without_padding(padded))]
    assert [item["input_ids"].shape[1] for item, _ in singles] == [len(row) for row in rows]
    together, apart = recorded([(padded, task_ids)]), recorded(singles)
    same_counts(together, apart, leave_out=("violation",))
    same_counts(together, recorded([(wider, task_ids)]))
    keys = [counts.sequence_keys for counts in (together.routers["model.layers.0"], apart.routers["model.layers.0"])]
    assert torch.equal(*keys), "the sample does not depend on the batches"


# -- tasks --------------------------------------------------------------------------------------------------------


BLOCK: dict[str, Any] = {"num_experts": 4, "expert": LORA, "router": {"kind": "top_k", "scope": "block"}}


def rows_by_task(batches: list[list[int] | None], tasks: list[str] | None = None, peek: bool = False) -> dict[str, int]:
    model = mixture(BLOCK)
    with record_routing(model, tasks) as statistics, torch.no_grad():
        for ids in batches:
            model(**batch_of(["ua", "uu"]), task_ids=None if ids is None else torch.tensor(ids))
            if peek:
                _ = statistics.routers
    counts = statistics.routers["model.layers.1"]
    assert statistics.tasks == counts.tasks
    return dict(zip(counts.tasks, counts.rows.sum((1, 2)).tolist(), strict=True))


@pytest.mark.parametrize("peek", [False, True])
def test_names_of_tasks(peek: bool) -> None:
    assert rows_by_task([None, None], peek=peek) == {"all": 8}
    assert rows_by_task([[0, 1], [2, 1]], TASKS, peek=peek) == {"sums": 2, "names": 4, "dates": 2}
    assert rows_by_task([[0, 0]], TASKS, peek=peek) == {"sums": 4, "names": 0, "dates": 0}
    assert rows_by_task([[0, 2], [1, 3]], peek=peek) == {"0": 2, "1": 2, "2": 2, "3": 2}
    assert rows_by_task([None, [0, 0], None, [1, 1]], peek=peek) == {"0": 4, "1": 4, "unknown": 8}
    assert rows_by_task([[0, -1], [2, 1]], TASKS, peek=peek) == {"sums": 2, "names": 2, "dates": 2, "unknown": 2}
    assert rows_by_task([[0, -1], None], peek=peek) == {"0": 2, "unknown": 6}
    assert rows_by_task([]) == {"all": 0}
    assert rows_by_task([], TASKS) == {"sums": 0, "names": 0, "dates": 0}


@pytest.mark.parametrize(
    ("ids", "tasks", "message"),
    [
        ([0, 3], TASKS, "was given the id 3, but there are 3 tasks"),
        ([-2, 0], TASKS, "was given the id -2, but there are 3 tasks"),
        ([-2, 0], None, "was given the id -2, but ids count from 0"),
        (None, TASKS, "tasks were named, but a pass was given no task ids"),
        ([0, 0, 0], None, "3 ids were given for 2 rows"),
    ],
)
def test_ids_that_do_not_fit(ids: list[int] | None, tasks: list[str] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows_by_task([ids], tasks)


def test_names_must_differ() -> None:
    with pytest.raises(ConfigError, match="the names must differ"), record_routing(mixture(BLOCK), ["a", "a"]):
        pass


def test_a_model_without_routers() -> None:
    with pytest.raises(ConfigError, match="has no routers; pass a mixture"), record_routing(base_model()):
        pass


# -- the sample of sequences --------------------------------------------------------------------------------------


def test_the_sample_has_a_limit_and_a_seed() -> None:
    model = mixture(BLOCK)
    rows = ["u" * length for length in range(1, 13)]

    def sample(size: int, batch: int, seed: int = 0) -> list[tuple[int, list[int]]]:
        with record_routing(model, max_sequences=size, seed=seed) as statistics, torch.no_grad():
            for first in range(0, 12, batch):
                some = rows[first : first + batch]
                model(**batch_of([row + "p" * (12 - len(row)) for row in some]))
        one, other = statistics.routers.values()
        assert one.sequence_counts.sum(-1).tolist() == other.sequence_counts.sum(-1).tolist(), "the same sequences"
        assert one.sequence_counts.dtype == torch.int32
        return sequences(one)

    lengths = {seed: sorted(sum(counts) for _, counts in sample(5, 4, seed)) for seed in (0, 1)}
    assert [len(value) for value in lengths.values()] == [5, 5]
    assert lengths[0] != lengths[1]
    assert sample(5, 4) == sample(5, 4)
    assert sorted(sum(counts) for _, counts in sample(5, 3)) == lengths[0]
    assert sorted(sum(counts) for _, counts in sample(100, 4)) == [2 * length for length in range(1, 13)]
    assert sample(0, 4) == []
    with pytest.raises(ConfigError, match="max_sequences: -1"):
        sample(-1, 4)


def test_every_sequence_is_as_likely_to_stay() -> None:
    """Of 20 sequences in batches of 3, 5 stay: each in a quarter of 2000 draws (four standard deviations: 0.04)."""
    import random

    stayed = [0] * 20
    for seed in range(2000):
        draw, kept = random.Random(seed), streaming._Sample(5)
        where: dict[int, int] = {}
        for first in range(0, 20, 3):
            keys = [draw.random() for _ in range(first, min(first + 3, 20))]
            where |= {slot: first + index for slot, index in kept.offer(keys).items()}
        for sequence in where.values():
            stayed[sequence] += 1
    assert sum(stayed) == 5 * 2000
    assert all(abs(count / 2000 - 0.25) < 0.04 for count in stayed)
