"""The training loop's body on DeepSpeed: ZeRO stages 0 to 3, one process or many.

What DeepSpeed does not check by itself and would get wrong without a word is checked here: half precision at
stage 0, and gradients that arrive in a different order on another process (stages 1 and 2 would then add up
gradients of different tensors).
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.train.deepspeed_config import build_deepspeed, zero_stage
from moadapt.train.engine import (
    OptimizerState,
    Processes,
    TrainingError,
    collect_torch_state,
    full_precision,
    pick_device,
    set_torch_state,
    widen_trainables,
)
from moadapt.train.gradient_guard import GradientOrderGuard
from moadapt.train.optimizer import ParameterGroup, build_optimizer
from moadapt.train.training_config import TrainingConfig
from moadapt.train.zero3 import check_partitionable, visible_routings

_GUARDED_STEPS = 3


def bootstrap(config: TrainingConfig) -> Processes:
    """Get DeepSpeed's process group going, under any launcher or none.

    Sets the five variables of the environment that DeepSpeed asks for where no launcher did (else it asks for MPI),
    and switches off a C++ operator that it would otherwise compile at start on a CPU.

    Raises:
        ConfigError: DeepSpeed is not installed, or was loaded for another device before.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    device = pick_device(config.use_cpu)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(f"deepspeed: cannot be imported ({error}); install it, or set deepspeed: null") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deprecated = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)  # DeepSpeed's own calls
    loaded = deepspeed.get_accelerator().device_name()
    if loaded != device.type:
        raise ConfigError(
            f"training.use_cpu: DeepSpeed was loaded for {loaded!r} but this run is on {device.type!r}; set "
            f"DS_ACCELERATOR={device.type} in the environment before starting"
        )
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    if not deepspeed.comm.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        timeout = timedelta(seconds=config.ddp_timeout)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class DeepSpeedEngine:
    """DeepSpeed at any ZeRO stage, with torch's AdamW as its optimizer.

    Args:
        model: the mixture model, its adapter weights already as they shall be (a checkpoint's, on resume).
        groups: its trainable tensors.
        config: the training options.
        deepspeed: `zero0` to `zero3`, the path of a DeepSpeed JSON file, or its contents.
        processes: from `bootstrap`.

    Raises:
        ConfigError: the DeepSpeed configuration contradicts the training options or does not work.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        config: TrainingConfig,
        deepspeed: str | Path | dict[str, Any],
        processes: Processes,
    ) -> None:
        import deepspeed as library

        self.processes = processes
        settings = build_deepspeed(
            deepspeed, config, processes.world_size, _hidden_size(model), cuda=processes.device.type == "cuda"
        )
        self.zero_stage = zero_stage(settings)
        self._fp16 = bool(settings["fp16"]["enabled"])
        self._autocast = bool(settings.get("torch_autocast", {}).get("enabled", False))
        if self._autocast and not hasattr(library.runtime.constants, "TORCH_AUTOCAST"):
            raise ConfigError("deepspeed: torch_autocast needs a newer DeepSpeed (0.17.2 or later); update it")
        self._scale = processes.world_size * config.gradient_accumulation_steps
        if not self._fp16 and not settings["bf16"]["enabled"]:
            widen_trainables(groups)
        self._named = [item for group in groups for item in group.parameters]
        self._guard = GradientOrderGuard(self._named, processes, _GUARDED_STEPS)
        self._optimizer = build_optimizer(groups, config)
        if self.zero_stage == 3:
            check_partitionable(model)
        with _quiet(), visible_routings(model, enabled=self.zero_stage == 3):
            self._engine, *_ = library.initialize(model=model, optimizer=self._optimizer, config=settings)
        self.model: Any = self._engine.module

    def forward(self, batch: Mapping[str, Tensor], num_items_in_batch: Tensor) -> Any:
        """The model's output through DeepSpeed's engine."""
        return self._engine(**batch, num_items_in_batch=num_items_in_batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient. DeepSpeed takes means over micro-batches and processes: undone here."""
        self._engine.backward(loss * self._scale)
        if not last:
            self._engine.step()  # counts the micro-batch; nothing is applied before the last one

    def step(self, learning_rates: Sequence[float]) -> float | None:
        """Clip, check and apply the gradients."""
        self._guard.check()
        for group, rate in zip(self._optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        norm: float | None = None
        if self.zero_stage == 0:  # DeepSpeed neither reports the norm nor stops at a broken gradient here
            gradients = [parameter.grad for _, parameter in self._named if parameter.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            if not torch.isfinite(torch.tensor(norm)):
                raise TrainingError(f"the gradient's norm is {norm}")
        skipped = self._engine.skipped_steps
        self._engine.step()
        if self._engine.skipped_steps > skipped:
            if self._fp16:
                return None  # the loss scale was too high; DeepSpeed lowers it
            raise TrainingError("the gradient is not finite (DeepSpeed skipped the step)")
        if norm is None:
            value = self._engine.get_global_grad_norm()
            norm = None if value is None else float(value)
        return norm

    def computing(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast where DeepSpeed's engine uses it too."""
        if not self._autocast:
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def adapter_weights(self) -> dict[str, Tensor]:
        """All adapter tensors, those of the optimizer from DeepSpeed's fp32 masters. Collective."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        weights, stepped = {}, {name for name, _ in self._named}
        for name, parameter in self.model.adapter_parameters():
            whole: Tensor = parameter
            if self.zero_stage > 0 and name in stepped:
                whole = safe_get_full_fp32_param(parameter).view(_full_shape(parameter))
            with GatheredParameters([parameter], enabled=self.zero_stage == 3 and name not in stepped):
                if self.processes.is_main:
                    weights[name] = full_precision(whole)
        return weights

    def optimizer_state(self) -> OptimizerState:
        """AdamW's full state on the first process. Collective."""
        if self.zero_stage == 0:
            return collect_torch_state(self._optimizer, self._named)
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [int(item["step"]) for item in self._optimizer.state.values() if "step" in item]
        if steps:
            self._link_fragments()
        else:
            self._materialise(0)
        moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        for key, collected in moments.items():
            for name, parameter in self._named:
                full = safe_get_full_optimizer_state(parameter, key)
                if self.processes.is_main:
                    collected[name] = full_precision(full).view(_full_shape(parameter))
        return OptimizerState(max(steps, default=0), moments["exp_avg"], moments["exp_avg_sq"])

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Set AdamW's state in this process's partition."""
        if self.zero_stage == 0:
            set_torch_state(self._optimizer, self._named, state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self._materialise(state.step)
        for key, moments in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            for name, parameter in self._named:
                safe_set_full_optimizer_state(parameter, moments[name].to(self.processes.device), key)

    def _materialise(self, step: int) -> None:
        """Create AdamW's state, which torch makes only in the first step, for the flat partitions of ZeRO."""
        wrapper = self._engine.optimizer
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(wrapper, attribute):
                for flat in getattr(wrapper, attribute):
                    self._optimizer.state[flat] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": torch.zeros_like(flat),
                        "exp_avg_sq": torch.zeros_like(flat),
                    }
                break
        else:
            raise TrainingError(
                f"resuming is not known for DeepSpeed's {type(wrapper).__name__}; use another ZeRO stage"
            )
        self._link_fragments()

    def _link_fragments(self) -> None:
        """Point each tensor at its part of AdamW's flat state (stages 1 and 2).

        DeepSpeed does it by itself after the first group's first step, when the other groups have no state yet.
        """
        wrapper = self._engine.optimizer
        if self.zero_stage in (1, 2) and hasattr(wrapper, "single_partition_of_fp32_groups"):
            for group, flat in zip(wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True):
                for parameter in group:
                    if parameter._hp_mapping is not None:
                        parameter._hp_mapping.set_optim_state_fragment(flat, self._optimizer.state[flat])

    def load_adapter_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the trainable tensors, DeepSpeed's fp32 masters included. Collective."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = [parameter for _, parameter in self._named]
        context = GatheredParameters(parameters, modifier_rank=0) if self.zero_stage == 3 else nullcontext()
        with torch.no_grad(), context:
            for name, parameter in self._named:
                parameter.copy_(weights[name])
        if self.zero_stage > 0:
            for name, parameter in self._named:
                safe_set_full_fp32_param(parameter, weights[name].to(self.processes.device))

    def close(self) -> None:
        """Let DeepSpeed release its hooks and buffers."""
        self._engine.destroy()


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape before ZeRO-3 took the tensor apart."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    return int(getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 1024)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's notes on its start out of the terminal; warnings and errors still show."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
