"""Which passes count, and how often: training, checkpointing, accumulation, generation, threads, nesting, errors."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from prompts import BANK, MILORA, TASKS, batch_of, ids_of, left_padded, mixture, of_kind
from slow_counts import Pass, assert_statistics, decisions_of, letters, same_counts, sequences
from tiny import base_model
from torch import Tensor, nn

from moadapt import MixtureModel, get_mixture_model
from moadapt.passes import _OBSERVERS
from moadapt.statistics import RoutingStatistics, record_routing

TOKENS: dict[str, Any] = {
    "num_experts": 4,
    "expert": {"kind": "lora", "r": 2},
    "router": {"kind": "top_k", "num_experts_per_tok": 2, "scope": "linear"},
    "target_modules": ["q_proj", "down_proj"],
}
ROWS = ["uuaap", "uaaaa", "uuuuu"[:3] + "ap", "uapp" + "p"]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def state(model: nn.Module) -> list[tuple[str, int, int]]:
    """How many hooks there are on each module."""
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]


# -- training -----------------------------------------------------------------------------------------------------


def trained(config: dict[str, Any], rows: list[list[str]], checkpointing: bool = False) -> RoutingStatistics:
    """The counts of forward and backward passes over these micro-batches; the weights stay as they are."""
    model = mixture(config, dtype=torch.float64).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    every = [row for batch in rows for row in batch]
    ids = ids_of(*(len(row.replace("p", "")) for row in every))
    first = 0
    with record_routing(model) as statistics:
        for batch in rows:
            inputs = batch_of(batch, ids[first : first + len(batch)])
            first += len(batch)
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            assert loss.requires_grad
    assert any(parameter.grad is not None and parameter.grad.any() for _, parameter in model.adapter_parameters())
    return statistics


@pytest.mark.parametrize("losses", [[], [{"kind": "load_balance"}]], ids=["plain", "balanced"])
@pytest.mark.parametrize("config", [TOKENS, MILORA], ids=["tokens", "milora"])
def test_checkpointing_and_accumulation(config: dict[str, Any], losses: list[Any]) -> None:
    config = {**config, "losses": losses}
    rows = ROWS[:3] if config["expert"].get("r") == 3 else ROWS
    plain = trained(config, [rows])
    assert sum(int(counts.rows.sum()) for counts in plain.routers.values()) > 0
    same_counts(plain, trained(config, [rows], checkpointing=True))
    same_counts(plain, trained(config, [rows[:1], rows[1:]]), leave_out=("violation",))
    same_counts(plain, trained(config, [rows[:1], rows[1:]], checkpointing=True), leave_out=("violation",))


def test_recording_changes_no_result() -> None:
    model, inputs = mixture({**TOKENS, "losses": [{"kind": "load_balance"}]}).train(), batch_of(ROWS)
    losses, gradients = [], []
    for record in (False, True):
        model.zero_grad()
        if record:
            with record_routing(model, vocabulary=True):
                output = model(**inputs)
        else:
            output = model(**inputs)
        output.loss.backward()
        losses.append((output.loss.item(), output.aux_loss.item()))
        gradients.append([parameter.grad.clone() for _, parameter in model.adapter_parameters()])
    assert losses[0] == losses[1]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("mode", ["autocast", "inference"])
def test_modes_of_the_pass_do_not_reach_the_counts(mode: str) -> None:
    """Sums in bf16 would be off by more than a percent, and tensors of inference mode could not be added to later."""
    model, inputs = mixture(TOKENS, dtype=torch.float32), batch_of(["u" * 7 + "a" * 30] * 9)
    inside = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.inference_mode()
    real, answer = letters(["u" * 7 + "a" * 30] * 9)
    with record_routing(model) as statistics, decisions_of(model) as decisions:
        with inside:
            model(**inputs)
        first = list(decisions)
        model(**inputs)
    seconds = decisions[len(first) :]
    passes = [Pass(real, answer, [0] * 9, decisions=some) for some in (first, seconds)]
    assert_statistics(statistics, passes, tolerance=1e-9)
    statistics.routers["model.layers.0.mlp.down_proj"].weights += 1.0


# -- generation ---------------------------------------------------------------------------------------------------


def test_generation_splits_prefill_and_decoding() -> None:
    model, inputs = mixture(TOKENS), left_padded(ids_of(5, 3))
    with record_routing(model, ["sums", "names"], vocabulary=True) as statistics, decisions_of(model) as decisions:
        written = model.generate(**inputs, task_ids=torch.tensor([1, 0]), **GREEDY)
    mask = inputs["attention_mask"].bool().tolist()
    passes = [Pass(mask, [[False] * 5] * 2, [1, 0], ids=inputs["input_ids"].tolist())]
    for step in range(4):  # the last token is chosen and not read
        ids = written[:, 5 + step : 6 + step].tolist()
        passes.append(Pass([[True]] * 2, [[True]] * 2, [1, 0], decode=True, ids=ids))
    each = len(decisions) // 5
    for number, one in enumerate(passes):
        one.decisions = decisions[number * each : (number + 1) * each]
    assert_statistics(statistics, passes)
    counts = next(iter(statistics.routers.values()))
    assert counts.rows.tolist() == [[[3, 0], [0, 4]], [[5, 0], [0, 4]]]


def test_generation_with_a_prompt_mask_of_token_routers() -> None:
    model, inputs = mixture(TOKENS), left_padded(ids_of(4, 4))
    prompt = torch.tensor([[True, True, False, False]] * 2)
    with record_routing(model) as statistics:
        model.generate(**inputs, prompt_mask=prompt, **GREEDY)
    assert next(iter(statistics.routers.values())).rows.tolist() == [[[4, 0], [4, 8]]]


@pytest.mark.parametrize("config", [MILORA, BANK, TASKS], ids=["milora", "bank", "tasks"])
def test_generation_decides_once(config: dict[str, Any]) -> None:
    model, inputs = mixture(config), left_padded(ids_of(5, 3))
    tasks = {"task_ids": torch.tensor([2, 0])} if config is TASKS else {}
    with record_routing(model) as statistics:
        model.generate(**inputs, **tasks, **GREEDY)
    for counts in statistics.routers.values():
        assert int(counts.rows[:, 0, 0].sum()) == int(counts.rows.sum()) == 2


def test_beams_are_rows() -> None:
    model, inputs = mixture(TOKENS), left_padded(ids_of(5, 3))
    with record_routing(model) as statistics:
        model.generate(**inputs, **GREEDY, num_beams=3, suppress_tokens=[0])  # the padding
    assert next(iter(statistics.routers.values())).rows.tolist() == [[[24, 0], [0, 24]]]


def test_rows_that_have_ended_do_not_count() -> None:
    """Some row of this batch ends before another; each is counted as if it were alone."""
    model = mixture(TOKENS)
    prompts = ids_of(5, 3, 4, 6)
    free = [model.generate(**left_padded([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in prompts]
    model.generation_config.eos_token_id = end = free[0][2]
    lengths = [row.index(end) + 1 if end in row else 5 for row in free]
    assert len(set(lengths)) > 1
    options = {"max_new_tokens": 5, "do_sample": False}
    with record_routing(model) as together:
        model.generate(**left_padded(prompts), **options)
    with record_routing(model) as apart:
        for ids in prompts:
            model.generate(**left_padded([ids]), **options)
    rows = next(iter(together.routers.values())).rows
    assert rows.tolist() == [[[18, 0], [0, sum(lengths) - 4]]]
    for name, counts in together.routers.items():
        assert torch.equal(counts.selections, apart.routers[name].selections)
        assert sequences(counts) == sequences(apart.routers[name])


def test_encoder_decoder_generation() -> None:
    config = {key: value for key, value in TOKENS.items() if key != "target_modules"}
    model = mixture(config, "t5")
    inputs = {"input_ids": torch.randint(3, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    inputs["attention_mask"][1, 4:] = 0
    with record_routing(model) as statistics:
        model.generate(**inputs, **GREEDY)
    rows = {name: counts.rows.tolist() for name, counts in statistics.routers.items()}
    assert rows["encoder.block.0.layer.0.SelfAttention.q"] == [[[10, 0], [0, 0]]]
    assert rows["decoder.block.1.layer.0.SelfAttention.v"] == [[[2, 0], [0, 8]]]
    assert rows["decoder.block.1.layer.1.EncDecAttention.k"] == [[[10, 0], [0, 0]]]


# -- one model, several users -------------------------------------------------------------------------------------


def test_threads() -> None:
    model = mixture(TOKENS)
    batches = [[row] * 3 for row in ("uuaaa", "uaa", "uuuuaaaa", "ua")]

    def work(rows: list[str]) -> None:
        with torch.no_grad():
            for _ in range(5):
                model(**batch_of(rows, ids_of(*(len(row) for row in rows))))

    with record_routing(model) as expected:
        for rows in batches:
            work(rows)
    with record_routing(model) as statistics:
        threads = [threading.Thread(target=work, args=(rows,)) for rows in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    same_counts(expected, statistics)


def test_nested_recordings() -> None:
    model, inputs = mixture(TOKENS), batch_of(ROWS)
    before = state(model)
    with record_routing(model) as outer, torch.no_grad():
        model(**inputs)
        with record_routing(model) as inner:
            model(**inputs)
        model(**inputs)
    twice = copy.deepcopy(inner)
    twice.merge(inner)
    twice.merge(inner)
    for name, counts in outer.routers.items():
        assert torch.equal(counts.selections, twice.routers[name].selections)
    assert state(model) == before
    assert model.base_model not in _OBSERVERS


def test_nothing_stays_behind() -> None:
    model, inputs = mixture(TOKENS), batch_of(ROWS)
    before, attributes = state(model), set(vars(model.base_model))
    with contextlib.suppress(KeyboardInterrupt), record_routing(model) as statistics:
        model(**inputs)
        raise KeyboardInterrupt
    have = statistics.routers
    assert int(next(iter(have.values())).rows.sum()) == 15
    model(**inputs)
    assert statistics.routers is have
    assert int(next(iter(have.values())).rows.sum()) == 15
    assert state(model) == before
    assert set(vars(model.base_model)) == attributes
    assert model.base_model not in _OBSERVERS
    with pytest.raises(RuntimeError, match="in the middle"), record_routing(model) as statistics:
        fail_once(model, inputs)
    assert int(next(iter(statistics.routers.values())).rows.sum()) == 0


def fail_once(model: MixtureModel, inputs: dict[str, Tensor]) -> None:
    """A pass whose second layer raises, when the first has already routed."""

    def stop(*args: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.base_model.model.layers[1].register_forward_pre_hook(stop)
    try:
        model(**inputs)
    finally:
        handle.remove()


def test_a_pass_that_fails_does_not_count() -> None:
    model, inputs = mixture(TOKENS), batch_of(ROWS)
    with record_routing(model) as statistics:
        with pytest.raises(RuntimeError, match="in the middle"):
            fail_once(model, inputs)
        model(**inputs)
    assert {int(counts.rows.sum()) for counts in statistics.routers.values()} == {15}


def test_the_adapter_off_and_a_copy_of_the_model() -> None:
    model, inputs = mixture(TOKENS), batch_of(ROWS)
    with record_routing(model) as statistics:
        with model.disable_adapter():
            model(**inputs)
        copy.deepcopy(model)(**inputs)
    assert {int(counts.rows.sum()) for counts in statistics.routers.values()} == {0}


def test_reading_in_the_middle() -> None:
    model, inputs = mixture(TOKENS), batch_of(ROWS)
    with record_routing(model, vocabulary=True) as statistics, torch.no_grad():
        model(**inputs)
        first = statistics.routers
        kept = copy.deepcopy(first)
        model(**inputs)
    for name, counts in statistics.routers.items():
        assert torch.equal(counts.selections, 2 * kept[name].selections)
        assert torch.equal(counts.vocabulary, 2 * kept[name].vocabulary)
        assert torch.equal(first[name].selections, kept[name].selections), "what was read stays as it was"
        assert len(sequences(counts)) == 2 * len(sequences(kept[name])) == 8


def test_however_the_model_is_wrapped_and_called() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model, inputs = mixture(TOKENS), batch_of(ROWS)
    del inputs["prompt_mask"]
    with record_routing(Wrapper(model)) as wrapped:
        model(**inputs)
    with record_routing(model) as inside:
        model.base_model(**inputs)
    same_counts(wrapped, inside)
    assert next(iter(inside.routers.values())).rows.tolist() == [[[7, 0], [8, 0]]]


def test_many_groups_of_routers_do_not_pile_up() -> None:
    """Layers that run by chance: each pass has other routers."""
    model = get_mixture_model(base_model(num_hidden_layers=7), {**TOKENS, "target_modules": ["q_proj"]}).eval()
    inputs, layers = batch_of(ROWS), model.base_model.model.layers
    whole = list(layers)
    with record_routing(model) as statistics, torch.no_grad():
        for number in range(40):
            model.base_model.model.layers = nn.ModuleList(
                layer for place, layer in enumerate(whole) if not number >> place & 1
            )
            model.base_model.model.config.num_hidden_layers = len(model.base_model.model.layers)
            model(**inputs, use_cache=False)
    ran = [sum(1 for number in range(40) if not number >> place & 1) for place in range(7)]
    assert [int(counts.rows.sum()) for counts in statistics.routers.values()] == [15 * times for times in ran]


def test_task_ids_by_prompt_in_training() -> None:
    model = mixture(of_kind("milora_1")).train()
    with record_routing(model, ["a", "b"]) as statistics:
        model(**batch_of(["uaua", "uaaa"]), task_ids=torch.tensor([1, 0])).loss.backward()
    assert next(iter(statistics.routers.values())).rows[:, 0, 0].tolist() == [1, 2]
