"""DeepSpeed's configuration: from a stage's name, a JSON file or a mapping to what `deepspeed.initialize` gets.

DeepSpeed ignores a top-level key it does not know, so they are checked here. What the training options decide
is filled in where the file says `auto` or nothing, and a value that contradicts them is refused.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from moadapt.errors import ConfigError
from moadapt.registry import closest
from moadapt.train.training_config import TrainingConfig

_COMMON: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}

BUILT_IN: dict[str, dict[str, Any]] = {
    "zero0": {**_COMMON, "zero_optimization": {"stage": 0}},
    "zero1": {**_COMMON, "zero_optimization": {"stage": 1}},
    "zero2": {**_COMMON, "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": False}},
    "zero3": {
        **_COMMON,
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    },
}
"""What the names `zero0` to `zero3` mean; `configs/deepspeed/*.json` holds the same."""

_KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
    "zero_optimization",
    "optimizer",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "data_types",
    "aio",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "timers",
    "disable_allgather",
    "disable_python_gc",
    "log_level",
}
_REFUSED = {
    "scheduler": "the schedule is training.lr_scheduler_type (WarmupDecayLR is linear, WarmupLR constant_with_warmup)",
    "activation_checkpointing": "use training.gradient_checkpointing",
    "checkpoint": "checkpoints are written by this library (training.save_steps), not by DeepSpeed",
    "dataloader_drop_last": "batches are made by this library",
    "data_efficiency": "batches are made by this library; see data.sampling",
    "curriculum_learning": "batches are made by this library; see data.sampling",
    "elasticity": "it changes the batch size; set the training options instead",
    "gradient_allreduce_op": "losses are normalised over the global batch by this library",
    "managed_gradient_accumulation": "accumulation is managed by training.gradient_accumulation_steps",
    "expert_parallel": "it replaces the model's routers; mixtures run data parallel",
    "tensor_parallel": "mixtures run data parallel",
    "autotuning": "it needs DeepSpeed's own launcher loop",
    "amp": "use training.bf16",
    "compression_training": "it changes the base model",
    "compile": "it changes the order in which gradients arrive",
    "hybrid_engine": "it replaces layers of the base model",
    "pipeline": "mixtures run data parallel",
    "sparse_gradients": "adapters have no sparse gradients",
}


def read_deepspeed(value: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The raw configuration behind `deepspeed:`.

    Args:
        value: `zero0` to `zero3`, the path of a JSON file, or its contents.

    Raises:
        ConfigError: no such name or file, broken JSON, or a key that is unknown or has no effect here.
    """
    if isinstance(value, dict):
        source, config = "deepspeed", copy.deepcopy(value)
    elif str(value) in BUILT_IN:
        source, config = str(value), copy.deepcopy(BUILT_IN[str(value)])
    else:
        path = Path(value)
        source = str(path)
        if not path.is_file():
            names = ", ".join(BUILT_IN)
            raise ConfigError(
                f"deepspeed: {str(value)!r} is no file and no built-in name{closest(str(value), list(BUILT_IN))} "
                f"Valid names: {names}, or the path of a DeepSpeed JSON file"
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"deepspeed: {path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"deepspeed: {path} must hold a JSON object")
    problems = []
    for key in config:
        if key in _REFUSED:
            problems.append(f"{key}: {_REFUSED[key]}; remove it")
        elif key not in _KNOWN:
            hint = closest(str(key), sorted(_KNOWN))
            problems.append(f"{key}: unknown key (DeepSpeed would ignore it){hint}")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        problems.append("zero_optimization: needs a mapping with stage 0, 1, 2 or 3")
    _raise(problems, source)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def build_deepspeed(
    value: str | Path | dict[str, Any], training: TrainingConfig, world_size: int, hidden_size: int, *, cuda: bool
) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, complete and without `auto`.

    Args:
        value: as in `read_deepspeed`.
        training: the training options, which decide batch sizes, clipping and precision.
        world_size: number of processes.
        hidden_size: of the base model; sets the bucket sizes of ZeRO-3 that say `auto`, as transformers does.
        cuda: whether this runs on CUDA.

    Raises:
        ConfigError: a value contradicts the training options, or the combination does not work.
    """
    config = read_deepspeed(value)
    problems: list[str] = []
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    _fill(config, "train_micro_batch_size_per_gpu", micro, "per_device_train_batch_size", problems)
    _fill(config, "gradient_accumulation_steps", accumulation, "gradient_accumulation_steps", problems)
    total = "per_device_train_batch_size * gradient_accumulation_steps * processes"
    _fill(config, "train_batch_size", micro * accumulation * world_size, total, problems)
    _fill(config, "gradient_clipping", training.max_grad_norm, "max_grad_norm", problems)
    _precision(config, training, problems, cuda=cuda)
    _optimizer(config, training, problems)

    zero = config.setdefault("zero_optimization", {"stage": 0})
    autos = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, number in autos.items():
        if zero.get(key) == "auto":
            zero[key] = number
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        # DeepSpeed would insist on its own CPU Adam, which has to be compiled.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 10**9)  # progress is shown by this library
    problems.extend(f"{path}: auto cannot be filled in here; give a value or remove it" for path in _autos(config))
    _raise(problems, "deepspeed")
    return config


def _fill(config: dict[str, Any], key: str, wanted: float, option: str, problems: list[str]) -> None:
    given = config.get(key, "auto")
    if given == "auto":
        config[key] = wanted
    elif given != wanted:
        problems.append(f"{key}: {given} contradicts training.{option}, which gives {wanted}; write auto")


def _precision(config: dict[str, Any], training: TrainingConfig, problems: list[str], *, cuda: bool) -> None:
    autocast = config.get("torch_autocast", {}).get("enabled", False)
    if autocast == "auto":
        autocast = config["torch_autocast"]["enabled"] = training.bf16
    if autocast:
        config["torch_autocast"].setdefault("dtype", "bfloat16")
        if not training.bf16 or config["torch_autocast"]["dtype"] != "bfloat16":
            problems.append("torch_autocast: needs training.bf16: true and dtype bfloat16")
    for name in ("bf16", "fp16"):
        wanted = getattr(training, name) and not autocast
        section = config.setdefault(name, {"enabled": "auto"})
        if section.get("enabled", "auto") == "auto":
            section["enabled"] = wanted
        elif section["enabled"] != wanted:
            problems.append(f"{name}.enabled: {section['enabled']} contradicts training.{name}; write auto")
        for key in [key for key, item in section.items() if item == "auto"]:
            del section[key]  # loss scaling: DeepSpeed's own defaults
        if section["enabled"] and zero_stage(config) == 0:
            problems.append(
                f"{name}: DeepSpeed's half precision does not train right at ZeRO stage 0; use zero1, or {name}: false"
            )
    if training.fp16 and not cuda:
        problems.append("fp16: needs a CUDA device; use bf16")


def _optimizer(config: dict[str, Any], training: TrainingConfig, problems: list[str]) -> None:
    """An `optimizer` section may only repeat what the training options say: AdamW is built here."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    if section.get("type", "AdamW") != "AdamW":
        problems.append(f"optimizer.type: {section['type']!r} is not supported; the optimizer is torch's AdamW")
    wanted = {
        "lr": training.learning_rate,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    for key, given in section.get("params", {}).items():
        if key not in wanted:
            problems.append(f"optimizer.params.{key}: has no effect here; remove it")
        elif given not in ("auto", wanted[key]):
            problems.append(f"optimizer.params.{key}: {given} contradicts the training options; write auto")


def _autos(config: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, item in config.items():
        if item == "auto":
            found.append(f"{path}{key}")
        elif isinstance(item, dict):
            found.extend(_autos(item, f"{path}{key}."))
    return found


def _raise(problems: list[str], source: str) -> None:
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the DeepSpeed configuration"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))
