"""The poolers of granularity `prompt` against loops over the prompt's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from moadapt.registry import ROUTERS
from moadapt.routers.pooling import build_pooler

B, J, S, D = 4, 2, 7, 5
POOLERS = ["self_attention", "mean", "last", "max"]
every_pooler = pytest.mark.parametrize("kind", POOLERS)


def make(kind: str, **options: Any) -> nn.Module:
    config: Any = ROUTERS.parse({"kind": "softmax", "granularity": "prompt", "pooler": kind, **options})
    pooler = build_pooler(config, D)
    for parameter in pooler.parameters():
        nn.init.normal_(parameter)
    return pooler


def turns() -> Tensor:
    """Left and right padding, two turns, a turn with holes, and turns without any token."""
    mask_BJS = torch.zeros(B, J, S, dtype=torch.bool)
    mask_BJS[0, 0, :3] = True
    mask_BJS[0, 1, 4:6] = True
    mask_BJS[1, 0, 3:] = True
    mask_BJS[2, 0, [1, 2, 5]] = True
    return mask_BJS  # row 3 has no prompt at all


def naive(kind: str, pooler: nn.Module, hidden_BSD: Tensor, mask_BJS: Tensor) -> Tensor:
    parameters = list(pooler.parameters())
    rows = []
    for hidden_SD, mask_JS in zip(hidden_BSD, mask_BJS, strict=True):
        for mask_S in mask_JS:
            tokens = [hidden for hidden, real in zip(hidden_SD, mask_S, strict=True) if real]
            rows.append(reference.pooled(kind, tokens, *parameters) if tokens else torch.zeros_like(hidden_SD[0]))
    return torch.stack(rows).view(*mask_BJS.shape[:2], -1)


@every_pooler
def test_outputs_and_gradients_equal_the_loop(kind: str) -> None:
    pooler = make(kind).double()
    results = []
    for function in (pooler, lambda hidden, mask: naive(kind, pooler, hidden, mask)):
        torch.manual_seed(0)
        hidden = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
        pooler.zero_grad()
        rows = function(hidden, turns())
        (rows * torch.sin(torch.arange(B * J * D).double() + 1.0).view(B, J, D)).sum().backward()
        results.append([rows, hidden.grad, *[parameter.grad for parameter in pooler.parameters()]])
    assert len(results[0]) == (3 if kind == "self_attention" else 2)
    for got, want in zip(*results, strict=True):
        reference.close(got, want, 1e-12, kind)
    assert torch.equal(results[0][0][3], torch.zeros(J, D, dtype=torch.float64))
    assert torch.equal(results[0][1][3], torch.zeros(S, D, dtype=torch.float64))


@every_pooler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_fp32_also_under_autocast(kind: str, dtype: torch.dtype) -> None:
    pooler = make(kind)
    hidden = torch.randn(B, S, D).to(dtype)
    rows = pooler(hidden, turns())
    assert rows.dtype == torch.float32
    reference.close(rows, naive(kind, pooler.double(), hidden.double(), turns()), 1e-6, "rows")
    pooler.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pooler(hidden, turns()), rows)


@every_pooler
def test_what_is_not_in_the_prompt_has_no_influence(kind: str) -> None:
    """Neither batch mates, nor padding of whatever amount and side, nor the answer."""
    pooler = make(kind).double()
    prompt = torch.randn(3, D, dtype=torch.float64)
    mask = torch.ones(1, 1, 3, dtype=torch.bool)
    alone = pooler(prompt.unsqueeze(0), mask)
    for left, right in ((0, 4), (4, 0), (2, 3)):
        noise = 100.0 * torch.randn(2, left + 3 + right, D, dtype=torch.float64)
        noise[0, left : left + 3] = prompt
        masks = torch.rand(2, 1, left + 3 + right) > 0.5
        masks[0] = False
        masks[0, 0, left : left + 3] = True
        reference.close(pooler(noise, masks)[:1], alone, 1e-12, f"{left} left, {right} right")


def test_scores_far_apart_pick_one_token() -> None:
    pooler = make("self_attention")
    pooler.weight.data = torch.tensor([1e4, 0.0, 0.0, 0.0, 0.0])
    hidden = torch.randn(1, S, D)
    hidden[0, :, 0] = torch.arange(S)
    mask = torch.ones(1, 1, S, dtype=torch.bool)
    torch.testing.assert_close(pooler(hidden, mask)[0, 0], hidden[0, -1])
    mask[..., -2:] = False  # not even scores of 1e4 come from outside of the prompt
    torch.testing.assert_close(pooler(hidden, mask)[0, 0], hidden[0, -3])


def test_initialisation() -> None:
    config: Any = ROUTERS.parse({"kind": "top_k", "granularity": "prompt", "init_std": 0.05})
    pooler = build_pooler(config, 4000)
    assert [(name, tuple(p.shape)) for name, p in pooler.named_parameters()] == [("weight", (4000,))]
    assert pooler.weight.std().item() == pytest.approx(0.05, rel=0.05)
    config = ROUTERS.parse({"kind": "top_k", "granularity": "prompt", "init_std": 0.0})
    pooler, hidden = build_pooler(config, D), torch.randn(B, S, D)
    mean = make("mean")(hidden, turns())
    rows = pooler(hidden, turns())
    torch.testing.assert_close(rows, mean)
    (rows * torch.randn(B, J, D)).sum().backward()
    assert pooler.weight.grad.abs().max() > 0  # zeros learn
