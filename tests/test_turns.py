"""Turns of a batch against a loop over its tokens, and the spreading of decisions over the tokens that follow them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.routing import Routing
from moadapt.turns import Turns, find_turns

PAD, PROMPT, ANSWER = "p", "u", "a"


@dataclass
class NaiveTurns:
    """One sequence: which turn each token is in (-1: an earlier pass's; None: padding), and each turn's prompt."""

    turn: list[int | None] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)


def naive(row: str) -> NaiveTurns:
    """Token by token: the first prompt token behind an answer (or behind nothing) opens a turn."""
    found, answered = NaiveTurns(), True
    for place, token in enumerate(row):
        if token == PAD:
            found.turn.append(None)
            continue
        if token == PROMPT:
            if answered or not found.prompts:
                found.prompts.append([])
            found.prompts[-1].append(place)
        answered = token == ANSWER
        found.turn.append(len(found.prompts) - 1)
    return found


def masks(rows: list[str]) -> tuple[Tensor, Tensor]:
    """(prompt, real)."""
    prompt, real = (torch.tensor([[test(token) for token in row] for row in rows]) for test in (is_prompt, is_real))
    return prompt, real


def is_prompt(token: str) -> bool:
    return token == PROMPT


def is_real(token: str) -> bool:
    return token != PAD


def check(rows: list[str], turns: Turns) -> None:
    """Compare with the loop. What padding follows is nobody's business, but it has to be a turn that there is."""
    wanted = [naive(row) for row in rows]
    most, length = max(len(item.prompts) for item in wanted), len(rows[0])
    if most == 0:
        assert turns == Turns(None)
        return
    assert turns.mask_BJS is not None
    assert turns.mask_BJS.shape == (len(rows), most, length)
    for number, item in enumerate(wanted):
        for turn in range(most):
            prompt = item.prompts[turn] if turn < len(item.prompts) else []
            assert turns.mask_BJS[number, turn].nonzero().flatten().tolist() == prompt
    if turns.turn_BS is None:
        assert turns.exists_BJ is None
        assert turns.last_B is None
        assert all(turn in (0, None) for item in wanted for turn in item.turn)
        assert most == 1
        return
    assert turns.last_B is not None
    assert turns.last_B.tolist() == [len(item.prompts) - 1 for item in wanted]
    exists = [[turn < len(item.prompts) for turn in range(most)] for item in wanted]
    assert exists == (torch.ones(len(rows), most).bool() if turns.exists_BJ is None else turns.exists_BJ).tolist()
    early = any(turn == -1 for item in wanted for turn in item.turn)
    for got, item in zip(turns.turn_BS.tolist(), wanted, strict=True):
        for turn, want in zip(got, item.turn, strict=True):
            assert turn == want if want is not None else (-1 if early else 0) <= turn < max(1, len(item.prompts))


CASES = {
    "one prompt": ["uuu", "uuu"],
    "instructions": ["uuaa", "uaaa"],
    "padding on the right": ["uuaap", "uaapp"],
    "padding on the left": ["puuaa", "pppua"],
    "padding in between": ["uppua", "upuaa"],
    "a conversation": ["uuauaa", "uauaua"],
    "other numbers of turns": ["uaauuaua", "uuuuaaaa", "ppuuauau"],
    "one token": ["u"],
}
CONTINUED = {
    "only answers": ["aa", "ap"],
    "the rest of an answer": ["aauu", "auua"],
    "an answer beside a prompt": ["pppa", "uuaa"],
    "an answer beside a conversation": ["aaaaaa", "uauaua", "ppauuu"],
    "nothing but padding": ["ppp", "uua"],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
@pytest.mark.parametrize("continues", [False, True])
def test_cases(rows: list[str], continues: bool) -> None:
    check(rows, find_turns(*masks(rows), continues=continues))


@pytest.mark.parametrize("rows", CONTINUED.values(), ids=CONTINUED)
def test_continued_cases(rows: list[str]) -> None:
    check(rows, find_turns(*masks(rows), continues=True))
    with pytest.raises(ConfigError, match="granularity"):
        find_turns(*masks(rows), continues=False)


@pytest.mark.parametrize("letters", [PROMPT + ANSWER, PROMPT + ANSWER + PAD], ids=["full", "padded"])
def test_random_batches(letters: str) -> None:
    chance = random.Random(5)
    refused = 0
    for _ in range(300):
        rows = ["".join(chance.choices(letters, k=7)) for _ in range(3)]
        prompt, real = masks(rows)
        check(rows, find_turns(prompt, real if PAD in letters else None, continues=True))
        if any(not naive(row).prompts or -1 in naive(row).turn for row in rows):
            refused += 1
            with pytest.raises(ConfigError):
                find_turns(prompt, real, continues=False)
        else:
            check(rows, find_turns(prompt, real, continues=False))
    assert 50 < refused < 290, "both sorts of batches have to be among them"


def test_one_turn_for_each_row_needs_no_ids() -> None:
    """The usual batch: rows rule runs of equal length, nothing is gathered."""
    for rows in (["uuaap", "uaapp"], ["puuaa", "pppua"], ["uuu", "uuu"]):
        turns = find_turns(*masks(rows), continues=False)
        assert turns.turn_BS is None
        assert turns.last_B is None


def test_padding_is_never_a_prompt() -> None:
    prompt = torch.tensor([[True, True, True, False]])
    real = torch.tensor([[False, True, True, True]])
    turns = find_turns(prompt, real, continues=False)
    assert turns.mask_BJS is not None
    assert turns.mask_BJS.tolist() == [[[False, True, True, False]]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["ua", "aa"], r"row 1 of the batch has no prompt token.*prompt_mask, or labels of -100.*granularity: token"),
        (["ua", "pa"], "row 1 of the batch has no prompt token"),
        (["aua", "uaa"], "row 0 of the batch has an answer in front of its first prompt token"),
    ],
)
def test_what_nothing_can_be_decided_from(rows: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_turns(*masks(rows), continues=False)


# -- routings with a row for each sequence or turn ----------------------------------------------------------------


def routing(rows: int, **more: object) -> Routing:
    """Row g has the weights 10 g + e."""
    weights_GN = torch.arange(3.0) + 10 * torch.arange(rows).unsqueeze(1)
    indices_GK = (torch.arange(rows).unsqueeze(1) + torch.arange(2)) % 3
    selected_GN = torch.zeros(rows, 3).bool().scatter(1, indices_GK, True)
    values = {"granularity": "prompt", "indices_TK": indices_GK} | more
    return Routing(weights_GN, selected_GN, weights_GN + 100, weights_GN + 200, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows_T", [None, [0, 0, 1, 1, 1, 0]])
def test_a_row_for_each_token(rows_T: list[int] | None) -> None:
    decision = routing(2, rows_T=None if rows_T is None else torch.tensor(rows_T))
    spread = decision.per_token(6)
    assert spread.granularity == "token"
    assert spread.rows_T is None
    for token, row in enumerate(rows_T or [0, 0, 0, 1, 1, 1]):
        for name in ("weights_TN", "selected_TN", "logits_TN", "probs_TN", "indices_TK"):
            assert torch.equal(getattr(spread, name)[token], getattr(decision, name)[row]), name
    with pytest.raises(ConfigError, match="2 routing decisions do not fit the 7 tokens"):
        decision.per_token(7)


def test_one_expert_of_a_decision() -> None:
    decision = routing(2, active=(0, 2))
    for expert, active in ((0, (0,)), (1, ()), (2, (0,))):
        one = decision.column(expert)
        assert one.num_experts == 1
        assert one.active == active
        assert one.indices_TK is None
        assert torch.equal(one.weights_TN, decision.weights_TN[:, expert : expert + 1])
        assert torch.equal(one.selected_TN, decision.selected_TN[:, expert : expert + 1])
    assert routing(2).column(1).active is None


def test_rows_of_two_decisions() -> None:
    both = Routing.concatenate(routing(1, active=(1,)), routing(2, active=(0, 1)))
    assert torch.equal(both.weights_TN, torch.cat([routing(1).weights_TN, routing(2).weights_TN]))
    assert both.active == (0, 1)
    assert Routing.concatenate(routing(1), routing(2, active=(0,))).active is None
    assert Routing.concatenate(routing(1, indices_TK=None), routing(2)).indices_TK is None
    picked = both.select(torch.tensor([2, 0]))
    assert torch.equal(picked.weights_TN, both.weights_TN[[2, 0]])
    assert picked.indices_TK is not None
    assert both.indices_TK is not None
    assert torch.equal(picked.indices_TK, both.indices_TK[[2, 0]])
