"""Banks with a routing of one row for each sequence, and the naive loop for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from kinds import EXPERTS as KINDS
from kinds import randomize
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import moadapt.experts  # noqa: F401
from moadapt.experts import sequence
from moadapt.experts.base import ExpertBank
from moadapt.registry import EXPERTS
from moadapt.routing import Routing, RoutingContext

IN, OUT, G, S, N = 7, 6, 3, 4, 4
TASKS = [1, 0, 1]
CONTEXT = {"task_ids_B": torch.tensor(TASKS), "batch_size": G}

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: KINDS[name] for name in ("lora", "lora_dropout", "shared_down", "malora", "malora_dropout")},
    "factors": {"kind": "lora", "r": 3, "lora_alpha": 6.0, "mixing": "factors"},
    "factors_dropout": {"kind": "lora", "r": 2, "mixing": "factors", "lora_dropout": 0.4},
    "mtl_lora": {"kind": "mtl_lora", "r": 3, "num_tasks": 2, "lora_alpha": 5.0},
    "mtl_diagonal": {"kind": "mtl_lora", "r": 3, "num_tasks": 2, "task_transform": "diagonal", "lora_dropout": 0.4},
}
MODES = ["top_2", "top_all", "soft", "relu", "straight_through", "one"]
BODIES = ["chosen", "all", "stacked", "mixed"]


@dataclass
class Case:
    """A bank and a routing of G rows whose gates are a leaf."""

    options: dict[str, Any]
    bank: ExpertBank
    routing: Routing
    length: int

    @property
    def gates(self) -> Tensor:
        return self.routing.weights_TN

    def inputs(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(len(self.gates) * self.length, IN, dtype=torch.float64).to(dtype)


def make(kind: str, mode: str, dtype: torch.dtype, length: int = S, rows: int = G, experts: int = N) -> Case:
    experts = 1 if mode == "one" else experts
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    bank = EXPERTS.build(EXPERTS.parse(OPTIONS[kind]), IN, OUT, experts, dtype=adapter_dtype)
    randomize(bank.parameters())
    values = torch.rand(rows, experts, dtype=adapter_dtype) + 0.1
    selected = torch.ones(rows, experts, dtype=torch.bool)
    indices = None
    if mode in ("top_2", "top_all", "straight_through"):
        indices = torch.rand(rows, experts).topk(experts if mode == "top_all" else 2, -1).indices
        selected = torch.zeros_like(selected).scatter(1, indices, True)
    elif mode == "relu":
        selected = torch.rand(rows, experts) > 0.5
        selected[0] = False
    elif mode == "one":
        selected[1] = False
    weights = (values * selected).requires_grad_()
    routing = Routing(weights, selected, values, values, "prompt", indices, mode == "straight_through")
    return Case(OPTIONS[kind], bank, routing, length)


def base_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    base = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)
    randomize(base.parameters())
    return base.to(dtype).requires_grad_(False)


def force(monkeypatch: pytest.MonkeyPatch, body: str) -> list[str]:
    """Take this body wherever there is one of that name; the bodies that were taken."""
    taken: list[str] = []

    def choose(costs: dict[str, float]) -> str:
        taken.append(body if body in costs else min(costs, key=lambda name: costs[name]))
        return taken[-1]

    monkeypatch.setattr(sequence, "_cheapest", choose)
    return taken


def upstream(y: Tensor) -> Tensor:
    return torch.sin(torch.arange(y.numel(), dtype=torch.float64) + 1.0).view(y.shape).to(y.dtype)


def library_pass(case: Case, x: Tensor, base: Any, routing: Routing | None = None) -> dict[str, Tensor]:
    """Output and gradients of sum(y * r)."""
    x, before = x.detach().clone().requires_grad_(), x.detach().clone()
    leaves = {"gates": case.gates, **dict(case.bank.named_parameters())}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(7)
    with RoutingContext(**CONTEXT).active():
        y = case.bank(x, case.routing if routing is None else routing, base)
    (y * upstream(y)).sum().backward()
    assert torch.equal(x.detach(), before), "the bank wrote into its input"
    return {"y": y.detach(), "x": x.grad, **{name: leaf.grad for name, leaf in leaves.items()}}


def naive_pass(case: Case, x: Tensor, base: nn.Module) -> dict[str, Tensor]:
    """The same by the loop, everything in float64."""
    tensors = {name: p.detach().double().requires_grad_() for name, p in case.bank.named_parameters()}
    gates = case.gates.detach().double().requires_grad_()
    x_TI = x.detach().double().requires_grad_()
    routing, length = case.routing, case.length
    rows = [
        reference.Decision(list(gates[row]), routing.selected_TN[row].tolist(), [], [], routing.straight_through)
        for row in range(len(gates))
    ]
    decisions = [rows[token // length] for token in range(len(x_TI))]
    keep_TI = None
    if case.bank.training and case.options.get("lora_dropout", 0.0):
        torch.manual_seed(7)
        keep_TI = nn.functional.dropout(torch.ones_like(x), case.options["lora_dropout"]).double()
    weight = base.weight.detach().double()
    base_OI = weight.T if isinstance(base, Conv1D) else weight
    tasks = [TASKS[token // length] for token in range(len(x_TI))] if "num_tasks" in case.options else None
    bias_O = base.bias.detach().double()
    y = reference.mixture(x_TI, decisions, case.options, tensors, base_OI, bias_O, keep_TI, tasks)
    (y * upstream(y)).sum().backward()
    grads = {name: tensor.grad for name, tensor in {"x": x_TI, "gates": gates, **tensors}.items()}
    return {
        "y": y.detach(),
        **{k: torch.zeros_like(tensors.get(k, gates)) if v is None else v for k, v in grads.items()},
    }


def compare(case: Case, got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(want)
    for name in got:
        value, expected = got[name], want[name]
        if name == "gates" and case.routing.indices_TK is None:  # the router's own graph drops the others
            value, expected = value * case.routing.selected_TN, expected * case.routing.selected_TN
        reference.close(value, expected, tolerance, name)
