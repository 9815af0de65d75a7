"""Activation checkpointing of a base model, such that recomputation repeats the routing decisions of the first pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moadapt.errors import ConfigError
from moadapt.routing import checkpoint_context_fn


def enable_checkpointing(model: PreTrainedModel, options: dict[str, Any] | None, **kwargs: Any) -> None:
    """Switch it on.

    Args:
        model: the base model.
        options: passed to `torch.utils.checkpoint.checkpoint`.
        **kwargs: further arguments of the base model's method, as `every_n_layers`.

    Raises:
        ConfigError: `use_reentrant: true`, which would lose the auxiliary losses' gradients without a word.
    """
    options = dict(options or {})
    if options.pop("use_reentrant", False):
        raise ConfigError(
            "gradient_checkpointing_kwargs.use_reentrant: true loses the gradient of the auxiliary losses; "
            "set it to false"
        )
    options |= {"use_reentrant": False, "context_fn": checkpoint_context_fn}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
    else:  # transformers before 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Keep all activations again."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def check_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Recomputation must replay the first decisions; only `enable_checkpointing` sees to that.

    Args:
        modules: those with a `gradient_checkpointing` attribute.

    Raises:
        ConfigError: it was switched on behind the mixture.
    """
    for module in modules:
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if module.gradient_checkpointing and options.get("context_fn") is not checkpoint_context_fn:
            raise ConfigError(
                "activation checkpointing was switched on at the base model, where its recomputation would route "
                "again; call activation_checkpointing_enable() of the mixture model"
            )
