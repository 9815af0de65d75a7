"""The `task_table` router: gates, gradients, unknown tasks, parity with peft's Poly router."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.registry import ROUTERS
from moadapt.routers import TaskTableRouter
from moadapt.routing import Routing, RoutingContext

D, N, TASKS = 6, 4, 3
KNOWN = torch.tensor([2, 0, 0, 1])
SOME_UNKNOWN = torch.tensor([2, -1, 0, -1, 1])


def make(**options: Any) -> TaskTableRouter:
    router: TaskTableRouter = ROUTERS.build(ROUTERS.parse({"kind": "task_table", "num_tasks": TASKS, **options}), D, N)
    torch.nn.init.normal_(router.weight)
    return router.double()


def route(router: TaskTableRouter, ids_B: Tensor | None, rows: int | None = None) -> Routing:
    hidden = torch.randn(len(ids_B) if rows is None else rows, D, dtype=torch.float64)
    routing: Routing = router(hidden, RoutingContext(task_ids_B=ids_B))
    return routing


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unknown", ["error", "mean"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.1}, {"gate": "bernoulli"}, {"gate": "bernoulli", "temperature": 0.5}]
)
def test_gates_and_gradients_equal_the_loop(options: dict[str, Any], unknown: str, training: bool) -> None:
    router = make(unknown_task=unknown, **options).train(training)
    ids = KNOWN if unknown == "error" else SOME_UNKNOWN
    torch.manual_seed(3)
    hidden = torch.randn(len(ids), D, dtype=torch.float64)
    torch.manual_seed(5)
    routing = router(hidden, RoutingContext(task_ids_B=ids))
    weight = router.weight.detach().clone().requires_grad_()
    torch.manual_seed(5)
    uniform = torch.rand(len(ids), N, dtype=torch.float64)
    draws = list(uniform) if training else [None] * len(ids)
    want = [reference.by_task(options, weight, task, draw) for task, draw in zip(ids.tolist(), draws, strict=True)]
    gates = torch.stack([torch.stack(decision.gates) for decision in want])
    logits = torch.stack([torch.stack(decision.logits) for decision in want])
    reference.close(routing.weights_TN, gates, 1e-12, "gates")
    reference.close(routing.probs_TN, gates, 1e-12, "probs")
    reference.close(routing.logits_TN, logits, 1e-12, "logits")
    upstream = torch.sin(torch.arange(gates.numel()).double() + 1.0).view(gates.shape)
    (routing.weights_TN * upstream).sum().backward()
    (gates * upstream).sum().backward()
    reference.close(router.weight.grad, weight.grad, 1e-11, "gradient of the table")
    assert routing.granularity == "task"
    assert routing.selected_TN.all()
    assert routing.indices_TK is None


def test_only_the_task_counts() -> None:
    router = make().eval()
    first, second = route(router, KNOWN), route(router, KNOWN.flip(0))
    assert torch.equal(first.weights_TN, second.weights_TN.flip(0))
    assert torch.equal(first.weights_TN[1], first.weights_TN[2])
    assert not torch.allclose(first.weights_TN[0], first.weights_TN[1])


def test_no_task_ids_at_all_is_the_mean_row() -> None:
    router = make(unknown_task="mean").eval()
    routing = route(router, None, rows=3)
    assert torch.equal(routing.logits_TN, router.weight.mean(0).expand(3, -1))


@pytest.mark.parametrize(
    ("options", "ids", "rows", "message"),
    [
        ({}, None, 2, r"none is given.*`task_ids`.*unknown_task: mean"),
        ({}, torch.tensor([0, -1]), 2, r"row 1 is of no known task \(-1\).*unknown_task: mean"),
        ({}, torch.tensor([3, 0]), 2, r"row 0 is of task 3, but the router task_table has 3 tasks, 0 to 2"),
        ({"unknown_task": "mean"}, torch.tensor([0, 3]), 2, r"row 1 is of task 3"),
        ({"unknown_task": "mean"}, torch.tensor([0, 1]), 3, r"\(2,\) for a batch of 3"),
    ],
)
def test_unknown_tasks(options: dict[str, Any], ids: Tensor | None, rows: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        route(make(**options), ids, rows)


def test_the_number_of_tasks_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"router.num_tasks: .*mixture.tasks"):
        ROUTERS.build(ROUTERS.parse("task_table"), D, N)


@pytest.mark.parametrize("training", [True, False])
def test_bernoulli_equals_the_poly_router_of_peft(training: bool) -> None:
    from peft import PolyConfig
    from peft.tuners.poly.router import PolyRouter

    router = make(gate="bernoulli").float().train(training)
    other = PolyRouter(PolyConfig(n_tasks=TASKS, n_skills=N, n_splits=1)).train(training)
    other.module_logits.data = router.weight.data.clone()
    hidden = torch.randn(len(KNOWN), D)
    torch.manual_seed(11)
    got = router(hidden, RoutingContext(task_ids_B=KNOWN)).weights_TN
    torch.manual_seed(11)
    reference.close(got, other(KNOWN, None).squeeze(1), 1e-5, "gates")


def test_noise_is_for_training_and_differs_between_rows() -> None:
    router = make(gate="bernoulli")
    same = torch.zeros(2, dtype=torch.int64)
    noisy = route(router, same).weights_TN
    assert not torch.allclose(noisy[0], noisy[1])
    calm = route(router.eval(), same).weights_TN
    assert torch.equal(calm[0], calm[1])


def test_precision() -> None:
    router = make().float()
    context = RoutingContext(task_ids_B=KNOWN)
    assert router(torch.randn(4, D).bfloat16(), context).weights_TN.dtype == torch.float32
    assert router(torch.randn(4, D).double(), context).weights_TN.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "spread"),
    [
        ({"init_std": 0.05}, 0.05),
        ({"init": "uniform"}, 1e-3 / 3**0.5),
        ({"init": "kaiming"}, 1600**-0.5 / 3**0.5),
    ],
)
def test_initialisation(options: dict[str, Any], spread: float) -> None:
    router = ROUTERS.build(ROUTERS.parse({"kind": "task_table", "num_tasks": 5, **options}), D, 1600)
    assert [(name, tuple(p.shape)) for name, p in router.named_parameters()] == [("weight", (5, 1600))]
    assert router.weight.std().item() == pytest.approx(spread, rel=0.05)
    if "init" in options:
        assert router.weight.abs().max().item() <= spread * 3**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"granularity": "token"}, "granularity"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"gate": "sigmoid"}, "gate"),
        ({"unknown_task": "zero"}, "unknown_task"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS.parse({"kind": "task_table", **options})
