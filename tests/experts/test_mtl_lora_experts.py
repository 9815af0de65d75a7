"""MTL-LoRA banks: initialisation, sizes, tasks that are unknown, and the loop at token granularity."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from kinds import randomize
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.experts import MtlLoraBank, MtlLoraExpertConfig
from moadapt.routing import Routing, RoutingContext

IN, OUT, N, R, U = 7, 6, 3, 4, 3


def bank(i: int = IN, o: int = OUT, dtype: torch.dtype = torch.float64, **options: Any) -> MtlLoraBank:
    return MtlLoraBank(MtlLoraExpertConfig(**{"r": R, "num_tasks": U, **options}), i, o, N, dtype=dtype)


def filled(**options: Any) -> MtlLoraBank:
    made = bank(**options)
    randomize(made.parameters())
    return made


def by_token(gates: Tensor) -> Routing:
    return Routing(gates, torch.ones_like(gates, dtype=torch.bool), gates, gates)


def run(made: MtlLoraBank, x: Tensor, gates: Tensor, tasks: list[int] | None, base: Any = None) -> Tensor:
    """Gates for each token, or for fewer rows."""
    ids = None if tasks is None else torch.tensor(tasks)
    routing = by_token(gates) if len(gates) == len(x) else replace(by_token(gates), granularity="prompt")
    with RoutingContext(task_ids_B=ids).active():
        return made(x, routing, torch.zeros(len(x), OUT, dtype=x.dtype) if base is None else base)


@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_starts_as_the_zero_map_with_a_neutral_transform(transform: str) -> None:
    made = bank(i=1000, r=64, task_transform=transform)
    assert made.shared_A.abs().max() <= 1000**-0.5
    assert made.shared_A.std().item() == pytest.approx(1 / math.sqrt(3 * 1000), rel=0.02)
    assert made.mtl_B.abs().max() == 0
    want = torch.eye(64) if transform == "full" else torch.ones(64)
    assert all(torch.equal(matrix, want.double()) for matrix in made.mtl_lambda)


@pytest.mark.parametrize(("transform", "size"), [("full", R * R), ("diagonal", R)])
def test_parameter_counts(transform: str, size: int) -> None:
    made = bank(task_transform=transform)
    assert made.num_params() == R * IN + U * size + N * R * OUT
    assert made.num_active_params(2) == R * IN + size + 2 * R * OUT


@pytest.mark.parametrize("tasks", [[2, 0], [1, 1], [-1, 2]])
@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_gates_of_tokens_equal_the_loop(transform: str, tasks: list[int]) -> None:
    """Outputs and all gradients; an unknown task has the mean, and gives its gradient to all transforms."""
    made = filled(task_transform=transform, unknown_task="mean", lora_alpha=6.0)
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(8, IN, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(8, N, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(8, OUT, dtype=torch.float64)
    (run(made, x, gates, tasks, base) * upstream).sum().backward()

    tensors = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    naive_x, naive_gates = (value.detach().clone().requires_grad_() for value in (x, gates))
    decisions = [reference.Decision(list(row), [True] * N, [], []) for row in naive_gates]
    options = {"kind": "mtl_lora", "lora_alpha": 6.0, "task_transform": transform}
    known = [None if task < 0 else task for task in tasks for _ in range(4)]
    want = reference.mixture(naive_x, decisions, options, tensors, base.weight, base.bias, None, known)
    (want * upstream).sum().backward()
    reference.close(run(made, x, gates, tasks, base), want, 1e-11, "output")
    reference.close(x.grad, naive_x.grad, 1e-11, "x")
    reference.close(gates.grad, naive_gates.grad, 1e-11, "gates")
    for name, parameter in made.named_parameters():
        reference.close(parameter.grad, tensors[name].grad, 1e-11, name)


def test_a_sequence_does_not_see_the_tasks_of_the_others() -> None:
    made, gates = filled(), torch.rand(2, N, dtype=torch.float64)
    x = torch.randn(8, IN, dtype=torch.float64)
    both = run(made, x, gates, [2, 0])
    reference.close(both[:4], run(made, x[:4], gates[:1], [2]), 1e-13, "alone")
    reference.close(both[:4], run(made, x, gates, [2, 1])[:4], 1e-13, "another neighbour")
    assert (both[:4] - run(made, x, gates, [1, 0])[:4]).abs().max() > 1e-3


@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_delta_weight_is_what_forward_adds_for_the_task(transform: str) -> None:
    made, x = filled(task_transform=transform), torch.randn(4, IN, dtype=torch.float64)
    for task in range(U):
        with RoutingContext(task_ids_B=torch.tensor([task, task])).active():
            for expert in range(N):
                gates = torch.eye(N, dtype=torch.float64)[expert].expand(4, N)
                added = run(made, x, gates, [task])
                reference.close(added, x @ made.delta_weight(expert).T, 1e-12, "delta")


def test_delta_weight_needs_one_task() -> None:
    made = filled()
    with pytest.raises(ConfigError, match="3 here"):
        made.delta_weight(0)
    with RoutingContext(task_ids_B=torch.tensor([0, 2])).active(), pytest.raises(ConfigError, match="2 here"):
        made.delta_weight(0)
    assert filled(num_tasks=1).delta_weight(0).shape == (OUT, IN)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "none is given"),
        ([0, -1], "row 1 is of no known task"),
        ([0, 3], "row 1 is of task 3"),
        ([0] * 3, "3 ids"),
    ],
)
def test_tasks_that_cannot_be_used(tasks: list[int] | None, message: str) -> None:
    gates, x = torch.rand(2, N, dtype=torch.float64), torch.randn(8, IN, dtype=torch.float64)
    with pytest.raises(ConfigError, match=message):
        run(filled(), x, gates, tasks)
    if tasks == [0, 3]:  # an id past the table is not the mean
        with pytest.raises(ConfigError, match=message):
            run(filled(unknown_task="mean"), x, gates, tasks)


def test_no_ids_with_mean_is_all_unknown() -> None:
    made, gates = filled(unknown_task="mean"), torch.rand(2, N, dtype=torch.float64)
    x = torch.randn(8, IN, dtype=torch.float64)
    assert torch.equal(run(made, x, gates, None), run(made, x, gates, [-1, -1]))


def test_number_of_tasks_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"mixture\.tasks"):
        bank(num_tasks=None)
