"""Parameter groups, AdamW and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moadapt.errors import ConfigError
from moadapt.train.training_config import TrainingConfig

_OPTION_OF = {
    "router_learning_rate": "router",
    "loraplus_lr_ratio": "up",
    "activation_learning_rate": "activation",
    "bilevel_activation": "activation",
}  # options that need a group of this kind


@dataclass
class ParameterGroup:
    """Trainable tensors that share a learning rate and a weight decay.

    Attributes:
        name: `adapter`, `up` or `router`, with `_no_decay` where weight decay does not apply; or `activation`.
        learning_rate: the peak learning rate.
        weight_decay: AdamW's weight decay.
        parameters: the tensors with their names.
    """

    name: str
    learning_rate: float
    weight_decay: float
    parameters: list[tuple[str, nn.Parameter]]


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The tensors that are trained, with their names in the adapter file, in a fixed order.

    Raises:
        ConfigError: there is none, or a tensor outside the adapter is trainable.
    """
    adapter = [(name, parameter) for name, parameter in model.adapter_parameters() if parameter.requires_grad]  # type: ignore[operator]
    if not adapter:
        raise ConfigError(
            "mixture: the model has no trainable adapter tensor. Load it with is_trainable=True; a converted model "
            "under gates of weight 1 needs expert.trainable: true or expert.lora besides"
        )
    known = {id(parameter) for _, parameter in adapter}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise ConfigError(
            f"{len(others)} tensors outside the adapter are trainable, as {others[0]!r}: they would be trained but not "
            "saved. Freeze them, or name their modules in mixture.modules_to_save"
        )
    return adapter


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[ParameterGroup]:
    """Split the trainable tensors by learning rate and weight decay.

    Routers get `router_learning_rate`. Up-projections (the B of an adapter) get `learning_rate *
    loraplus_lr_ratio` (LoRA+, arXiv:2402.12354, section 4). The coefficients of the routers' rational activation get
    `activation_learning_rate` (MiLoRA, arXiv:2410.18035). These and one-dimensional tensors are never decayed.

    Raises:
        ConfigError: there is nothing to train, or nothing that an option is for.
    """
    router_rate = config.router_learning_rate or config.learning_rate
    rates = {
        "adapter": config.learning_rate,
        "up": config.learning_rate * (config.loraplus_lr_ratio or 1.0),
        "router": router_rate,
        "activation": config.activation_learning_rate or router_rate,
    }
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in trainable_parameters(model):
        role = model.parameter_role(name)  # type: ignore[operator]
        kind = role if role in rates else "adapter"
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = len(shape) > 1 and config.weight_decay > 0 and kind != "activation"
        bare = decays or config.weight_decay == 0 or kind == "activation"
        key = kind if bare else f"{kind}_no_decay"
        if key not in groups:
            groups[key] = ParameterGroup(key, rates[kind], config.weight_decay if decays else 0.0, [])
        groups[key].parameters.append((name, parameter))
    for option, kind in _OPTION_OF.items():
        if getattr(config, option) and not any(key.startswith(kind) for key in groups):
            way_out = ", or set router.activation: rational" if kind == "activation" else ""
            raise ConfigError(
                f"training.{option}: this mixture has no trainable {kind} tensor; leave the option out{way_out}"
            )
    return [groups[key] for key in sorted(groups)]


def build_optimizer(groups: Iterable[ParameterGroup], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW of torch over the groups, in their order."""
    settings: list[dict[str, Any]] = [
        {
            "params": [parameter for _, parameter in group.parameters],
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in groups
    ]
    return torch.optim.AdamW(settings, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)


class LearningRates:
    """The learning rate of each group at each step: a pure function, so a checkpoint needs only the step.

    Args:
        groups: the parameter groups.
        config: names the schedule, its arguments and the warmup.
        total_steps: optimizer steps of the whole run.

    Raises:
        ConfigError: the schedule refuses `lr_scheduler_kwargs`.
    """

    def __init__(self, groups: Iterable[ParameterGroup], config: TrainingConfig, total_steps: int) -> None:
        from transformers import get_scheduler

        self.peaks = [group.learning_rate for group in groups]
        stand_ins = [{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in self.peaks]
        try:
            schedule = get_scheduler(
                config.lr_scheduler_type,
                torch.optim.SGD(stand_ins),
                num_warmup_steps=config.warmup(total_steps),
                num_training_steps=total_steps,
                scheduler_specific_kwargs=config.lr_scheduler_kwargs or None,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training.lr_scheduler_kwargs: {config.lr_scheduler_type}: {error}") from error
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            raise ConfigError(
                f"training.lr_scheduler_type: {config.lr_scheduler_type} is no function of the step alone"
            )
        self._factors = schedule.lr_lambdas

    def at(self, step: int) -> list[float]:
        """The rates for the optimizer step that follows `step` finished ones."""
        return [peak * float(factor(step)) for peak, factor in zip(self.peaks, self._factors, strict=True)]
