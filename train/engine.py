"""What the training loop needs of the machinery below it, and its body for one process in plain torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moadapt.errors import ConfigError, MoadaptError
from moadapt.train.optimizer import ParameterGroup, build_optimizer
from moadapt.train.training_config import TrainingConfig


class TrainingError(MoadaptError, RuntimeError):
    """Training cannot go on: a loss or a gradient is not finite, or processes disagree."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and the few things they say to each other. One process says nothing.

    Attributes:
        rank: this process, 0 is the one that writes files.
        world_size: number of processes.
        device: where this process computes, and where its messages must lie.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the processes, on the CPU. Collective."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def all_max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over the processes, on the CPU. Collective."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.world_size > 1:
            tensor = tensor.detach().to(self.device, copy=True)
            dist.all_reduce(tensor, op=op)
        return tensor.detach().cpu()

    def any(self, flag: bool) -> bool:
        """Whether any process says yes. Collective."""
        return bool(self.all_max(torch.tensor([int(flag)]))[0]) if self.world_size > 1 else flag

    def barrier(self) -> None:
        """Wait for all processes. Collective."""
        if self.world_size > 1:
            self.any(False)


@dataclass
class OptimizerState:
    """AdamW's state, independent of the engine: full fp32 tensors on the CPU by adapter tensor name.

    Attributes:
        step: AdamW steps done.
        exp_avg: first moments.
        exp_avg_sq: second moments.
        bilevel_step: steps done on the tensors that `bilevel_activation` trains apart; None without it. Their moments
            are among the others.
    """

    step: int
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    bilevel_step: int | None = None


class Engine(Protocol):
    """One way to run forward, backward and the optimizer.

    The gradient that `step` applies is the sum over all micro-batches and processes of the gradients of the losses
    given to `backward`: no mean is taken anywhere, so the loss must be normalised over the global batch already.
    """

    model: Any
    processes: Processes
    zero_stage: int

    def forward(self, batch: Mapping[str, Tensor], num_items_in_batch: Tensor) -> Any:
        """The model's output in training mode for one micro-batch that lies on `processes.device`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient; `last` marks the last micro-batch of the step."""

    def step(self, learning_rates: Sequence[float]) -> float | None:
        """Clip and apply the gradients; returns their norm before clipping (None: the step was skipped, fp16).

        Raises:
            TrainingError: the gradient is not finite, on every process alike.
        """

    def computing(self) -> AbstractContextManager[Any]:
        """The autocast that forward passes outside of `forward` need."""

    def adapter_weights(self) -> dict[str, Tensor]:
        """All adapter tensors, full, fp32, on the CPU; empty on other processes than the first. Collective."""

    def optimizer_state(self) -> OptimizerState:
        """AdamW's full state on the first process. Collective."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Set AdamW's state before the first step. Every process gives the full state."""

    def load_adapter_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the trainable tensors after training (AdamW's state is not touched). Collective."""

    def close(self) -> None:
        """Release what the engine holds."""


def pick_device(use_cpu: bool) -> torch.device:
    """The CPU, or this process's GPU where there is one."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def place(model: nn.Module, device: torch.device) -> None:
    """Move the model, unless it is quantized or spread over devices and so has its place already."""
    if not (getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)):
        model.to(device)


def widen_trainables(groups: Sequence[ParameterGroup]) -> None:
    """Keep trainable tensors of half precision in fp32, in place: AdamW's small steps vanish in bfloat16."""
    for group in groups:
        for _, parameter in group.parameters:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()


class PlainEngine:
    """Plain torch in one process.

    Args:
        model: the mixture model.
        groups: its trainable tensors.
        config: the training options.

    Raises:
        ConfigError: several processes were started, or `fp16` is asked for.
    """

    zero_stage = 0

    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup], config: TrainingConfig) -> None:
        refuse_many_processes()
        if config.fp16:
            raise ConfigError(
                "training.fp16: needs the loss scaling of DeepSpeed; use `bf16: true`, or deepspeed: zero1 on a GPU"
            )
        self.processes = Processes(device=pick_device(config.use_cpu))
        place(model, self.processes.device)
        widen_trainables(groups)
        self.model: Any = model
        self._named = [item for group in groups for item in group.parameters]
        self._max_norm = config.max_grad_norm or float("inf")
        self._bf16 = config.bf16
        self._optimizer = build_optimizer(groups, config)

    def forward(self, batch: Mapping[str, Tensor], num_items_in_batch: Tensor) -> Any:
        """The model's output, under bfloat16 autocast with `bf16`."""
        with self.computing():
            return self.model(**batch, num_items_in_batch=num_items_in_batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rates: Sequence[float]) -> float | None:
        """Clip, check and apply the gradients."""
        for group, rate in zip(self._optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        norm = float(nn.utils.clip_grad_norm_([parameter for _, parameter in self._named], self._max_norm))
        if not torch.isfinite(torch.tensor(norm)):
            raise TrainingError(f"the gradient's norm is {norm}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def computing(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast with `bf16`, else nothing."""
        if not self._bf16:
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def adapter_weights(self) -> dict[str, Tensor]:
        """All adapter tensors, copied to the CPU (float64 stays float64)."""
        return {name: full_precision(parameter) for name, parameter in self.model.adapter_parameters()}

    def optimizer_state(self) -> OptimizerState:
        """AdamW's state, copied to the CPU."""
        return collect_torch_state(self._optimizer, self._named)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Set AdamW's state."""
        set_torch_state(self._optimizer, self._named, state)

    def load_adapter_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the trainable tensors."""
        with torch.no_grad():
            for name, parameter in self._named:
                parameter.copy_(weights[name])

    def close(self) -> None:
        """Nothing to release."""


def refuse_many_processes() -> None:
    """Raise where a launcher started several processes: plain torch would train the same thing in each.

    Raises:
        ConfigError: WORLD_SIZE is above 1.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"deepspeed: null trains in one process, but {os.environ['WORLD_SIZE']} were started. Set deepspeed: zero1 "
            "(zero0 for plain data parallelism), or start one process"
        )


def full_precision(parameter: Tensor) -> Tensor:
    """A copy on the CPU in at least fp32."""
    tensor = parameter.detach()
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)


def collect_torch_state(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]]) -> OptimizerState:
    """AdamW's state where torch holds it by parameter; a tensor that was never stepped has zeros."""
    steps, moments = [0], {}
    for key in ("exp_avg", "exp_avg_sq"):
        moments[key] = {
            name: full_precision(optimizer.state[parameter][key] if parameter in optimizer.state else parameter * 0)
            for name, parameter in named
        }
    for _, parameter in named:
        if parameter in optimizer.state:
            steps.append(int(optimizer.state[parameter]["step"]))
    return OptimizerState(max(steps), moments["exp_avg"], moments["exp_avg_sq"])


def set_torch_state(
    optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], state: OptimizerState
) -> None:
    """Write AdamW's state where torch holds it by parameter."""
    for name, parameter in named:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.exp_avg[name].to(parameter.device, parameter.dtype, copy=True),
            "exp_avg_sq": state.exp_avg_sq[name].to(parameter.device, parameter.dtype, copy=True),
        }
