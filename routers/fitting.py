"""Fitting a router to calibration inputs: the options, the descent, and what experts give on these inputs.

Shapes: T calibration tokens, C of them at a time, D hidden size, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.ffn import StackedExperts
from moadapt.registry import Config
from moadapt.routers.base import RouterSample

_CHUNK = 1024  # tokens whose activations are in memory at a time


class FitConfig(Config):
    """How a router is fitted to calibration inputs, with Adam.

    Attributes:
        steps: optimizer steps.
        learning_rate: falls to zero along a half cosine.
        batch_size: tokens of one step, drawn without replacement until all have been seen.
        seed: of the draws (and of the initial weights where a fit draws them).
    """

    steps: int = Field(default=1000, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0.0)
    batch_size: int = Field(default=512, ge=1)
    seed: int = 0


def required_inputs(sample: RouterSample, what: str) -> Tensor:
    """The sample's inputs (T, D).

    Raises:
        ConfigError: there are none.
    """
    if sample.inputs_TD is None or sample.inputs_TD.shape[0] == 0:
        raise ConfigError(f"{what} needs the block's inputs on calibration text; set calibration.path")
    return sample.inputs_TD


def in_fp32(experts: StackedExperts) -> StackedExperts:
    """The experts in fp32 (float64 ones as they are); no copy where they have that dtype already."""
    dtype = torch.promote_types(experts.out_NMD.dtype, torch.float32)
    bias_NP = None if experts.in_bias_NP is None else experts.in_bias_NP.to(dtype)
    return replace(experts, in_NPD=experts.in_NPD.to(dtype), out_NMD=experts.out_NMD.to(dtype), in_bias_NP=bias_NP)


def chunks(inputs_TD: Tensor, experts: StackedExperts) -> Iterator[Tensor]:
    """The inputs, some tokens at a time, where the experts are and in their dtype: (C, D)."""
    for chunk_CD in torch.split(inputs_TD, _CHUNK):
        yield chunk_CD.to(device=experts.out_NMD.device, dtype=experts.out_NMD.dtype)


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    num_tokens: int,
    config: FitConfig,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """Minimise a loss by Adam. Runs with gradients whatever the caller's mode, and leaves `requires_grad` as it was.

    Args:
        parameters: what to change, in place.
        loss: from the indices of a batch's tokens, int64 on the CPU, to a scalar.
        num_tokens: T.
        config: steps, rate, batch size and seed.
        betas: of Adam.
    """
    parameters = list(parameters)
    trainable = [parameter.requires_grad for parameter in parameters]
    generator = torch.Generator().manual_seed(config.seed)
    batches = _batches(num_tokens, min(config.batch_size, num_tokens), generator)
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=betas)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        for _ in range(config.steps):
            gradients = torch.autograd.grad(loss(next(batches)), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    for parameter, flag in zip(parameters, trainable, strict=True):
        parameter.grad = None
        parameter.requires_grad_(flag)


def _batches(num_tokens: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(num_tokens, generator=generator)[: num_tokens // size * size]
        yield from torch.split(order, size)
