"""One mixture layer against the naive float64 loop: outputs and all gradients, for every row of the table."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from kinds import FEW, ROWS, TOLERANCE, Row, randomize
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moadapt.config import MixtureConfig
from moadapt.layer import MixtureLayer, RouterSite
from moadapt.registry import EXPERTS, ROUTERS
from moadapt.routing import AdapterSwitch

IN, OUT, BATCH, LENGTH = 7, 6, 2, 5
TOKENS = BATCH * LENGTH


def build(row: Row, base: nn.Module, dtype: torch.dtype) -> MixtureLayer:
    config = MixtureConfig.model_validate(row.config())
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    bank = EXPERTS.build(config.expert, IN, OUT, row.num_experts, dtype=adapter_dtype)
    router = ROUTERS.build(config.router, IN, row.num_experts).to(adapter_dtype)
    randomize([*bank.parameters(), *router.parameters()])
    return MixtureLayer(base, bank, RouterSite("site", router, "decoder"), "site", AdapterSwitch())


def base_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    base = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=kind == "bias")
    randomize(base.parameters())
    return base.to(dtype).requires_grad_(False)


def random_draws(row: Row, dtype: torch.dtype, training: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """The numbers that a training pass draws after `manual_seed(7)`: jitter, then noise, then dropout."""
    torch.manual_seed(7)
    draws: dict[str, Tensor] = {}
    router_dtype = torch.promote_types(dtype, torch.float32)
    noise = row.router.get("router_jitter_noise", 0.0)
    if training and noise:
        draws["jitter"] = torch.empty(TOKENS, IN, dtype=router_dtype).uniform_(1 - noise, 1 + noise).double()
    if training and row.router.get("noisy_gating"):
        draws["noise"] = torch.randn(TOKENS, row.num_experts, dtype=router_dtype).double()
    p = row.expert.get("lora_dropout", 0.0)
    return draws, nn.functional.dropout(torch.ones(TOKENS, IN, dtype=dtype), p).double() if training and p else None


def naive_pass(row: Row, layer: MixtureLayer, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Output and gradients of sum(y * r) by the loop, everything in float64."""
    tensors = {name: p.detach().double().requires_grad_() for name, p in layer.experts.named_parameters()}
    router = {name: p.detach().double().requires_grad_() for name, p in layer.router.router.named_parameters()}
    weight = layer.weight.detach().double()
    base_OI = weight.T if isinstance(layer.base_layer, Conv1D) else weight
    bias_O = None if layer.bias is None else layer.bias.detach().double()
    draws, keep_TI = random_draws(row, x.dtype, training)
    naive = reference.NaiveRouter(row.router, router["weight"], router.get("noise_weight"), draws)
    x_TI = x.detach().double().reshape(-1, IN).requires_grad_()
    decisions = [naive(x_I, token) for token, x_I in enumerate(x_TI)]
    assert min(naive.margin(decision) for decision in decisions) > 1e-5, "a near tie: choose another seed"
    y_TO = reference.mixture(x_TI, decisions, row.expert, tensors, base_OI, bias_O, keep_TI)
    (y_TO * upstream(y_TO)).sum().backward()
    return {
        "y": y_TO,
        "x": x_TI.grad,
        **{k: v.grad for k, v in tensors.items()},
        **{k: v.grad for k, v in router.items()},
    }


def upstream(y: Tensor) -> Tensor:
    return torch.sin(torch.arange(y.numel(), dtype=torch.float64) + 1.0).view(y.shape).to(y.dtype)


def library_pass(layer: MixtureLayer, x: Tensor, training: bool) -> dict[str, Tensor]:
    layer.train(training)
    x = x.detach().clone().requires_grad_()
    before = x.detach().clone()
    torch.manual_seed(7)
    y = layer(x)
    assert y.shape == (*x.shape[:-1], OUT)
    (y.reshape(-1, OUT) * upstream(y.reshape(-1, OUT))).sum().backward()
    assert torch.equal(x.detach(), before), "the layer wrote into its input"
    got = {"y": y.reshape(-1, OUT), "x": x.grad.reshape(-1, IN)}
    for module in (layer.experts, layer.router.router):
        for name, parameter in module.named_parameters():
            if not training and name == "noise_weight":
                assert parameter.grad is None, "the noise has no part in evaluation"
                continue
            assert parameter.grad.dtype == parameter.dtype
            got[name] = parameter.grad
    return got


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in got.items():
        reference.close(tensor, want[name], tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_training_pass_equals_the_loop(row: Row, dtype: torch.dtype) -> None:
    layer = build(row, base_layer("bias", dtype), dtype)
    x = torch.randn(BATCH, LENGTH, IN).to(dtype)
    compare(library_pass(layer, x, True), naive_pass(row, layer, x, True), TOLERANCE[dtype])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_evaluation_pass_equals_the_loop_without_noise(row: Row) -> None:
    layer = build(row, base_layer("bias", torch.float64), torch.float64)
    x = torch.randn(BATCH, LENGTH, IN, dtype=torch.float64)
    compare(library_pass(layer, x, False), naive_pass(row, layer, x, False), TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("kind", ["no_bias", "conv1d"])
@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_base_layers(row: Row, kind: str, dtype: torch.dtype) -> None:
    layer = build(row, base_layer(kind, dtype), dtype)
    x = torch.randn(BATCH, LENGTH, IN).to(dtype)
    compare(library_pass(layer, x, True), naive_pass(row, layer, x, True), TOLERANCE[dtype])


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_trainable_base_layer_gets_its_gradient(row: Row) -> None:
    """In-place accumulation into the base output must not disturb the base layer's own backward pass."""
    base = base_layer("bias", torch.float64).requires_grad_()
    layer = build(row, base, torch.float64)
    x = torch.randn(BATCH, LENGTH, IN, dtype=torch.float64)
    compare(library_pass(layer, x, False), naive_pass(row, layer, x, False), 1e-11)
    grad_TO = upstream(torch.empty(TOKENS, OUT, dtype=torch.float64))
    reference.close(base.weight.grad, grad_TO.T @ x.reshape(-1, IN), 1e-12, "base weight")
    reference.close(base.bias.grad, grad_TO.sum(0), 1e-12, "base bias")


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_autocast_bf16(row: Row) -> None:
    """Weights and input in fp32, products in bf16; the router stays in fp32 and so decides as the loop does."""
    layer = build(row, base_layer("bias", torch.float32), torch.float32)
    x = torch.randn(BATCH, LENGTH, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = library_pass(layer, x, False)
        routing = layer.router.router(x.reshape(-1, IN), None if row.router["kind"] == "softmax" else _context())
    assert got["y"].dtype == torch.bfloat16
    assert routing.weights_TN.dtype == routing.logits_TN.dtype == torch.float32
    compare(got, naive_pass(row, layer, x, False), TOLERANCE[torch.bfloat16])
    exact = (x.reshape(-1, IN).double() @ layer.router.router.weight.detach().double().T).float()
    reference.close(routing.logits_TN, exact, 1e-6, "fp32 logits under autocast")


def _context() -> Any:
    from moadapt.routing import RoutingContext

    return RoutingContext()


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 2, 3, IN)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = build(FEW[3], base_layer("bias", torch.float64), torch.float64).eval()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    alone = torch.stack([layer(x_I) for x_I in x.reshape(-1, IN)])
    reference.close(y.reshape(-1, OUT), alone, 1e-12, "token by token")


def test_no_tokens_at_all() -> None:
    layer = build(FEW[3], base_layer("bias", torch.float64), torch.float64)
    x = torch.zeros(0, 4, IN, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 4, OUT)
    y.sum().backward()
    assert layer.experts.shared_A.grad.abs().sum() == 0


def test_non_contiguous_input() -> None:
    layer = build(FEW[1], base_layer("bias", torch.float64), torch.float64).eval()
    x = torch.randn(LENGTH, BATCH, IN, dtype=torch.float64).transpose(0, 1)
    reference.close(layer(x), layer(x.contiguous()), 1e-14, "transposed input")


def test_no_gradient_mode_and_inference_mode() -> None:
    layer = build(FEW[3], base_layer("bias", torch.float32), torch.float32).eval()
    x = torch.randn(2, 3, IN)
    want = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer(x), want)
    with torch.inference_mode():
        assert torch.equal(layer(x), want)


def test_wrong_number_of_tokens_names_the_way_out() -> None:
    from moadapt.errors import ConfigError

    layer = build(FEW[3], base_layer("bias", torch.float32), torch.float32)
    routing = layer.router(torch.randn(4, IN))
    with pytest.raises(ConfigError, match="scope: linear"):
        layer.experts(torch.randn(5, IN), routing, torch.randn(5, OUT))
