"""Folding a mixture into the base weights, where its gates are the same for every input."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.errors import AdapterError
from moadapt.inject import Injection
from moadapt.layer import MixtureLayer


@torch.no_grad()
def fold_into_base(model: PreTrainedModel, injection: Injection) -> None:
    """Add every mixture layer's delta to its base weight.

    Args:
        model: the base model with the mixture in it; its weights are changed.
        injection: the mixture.

    Raises:
        AdapterError: a layer's routing depends on its input, so no single weight equals it; its base weight is
            quantised, or tied to another module's; or experts replace a whole block. Nothing is changed then.
    """
    gates: dict[str, Tensor] = {}
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {name: layer for name, layer in injection.layers.items() if isinstance(layer, MixtureLayer)}
    if len(layers) < len(injection.layers):
        raise AdapterError(
            "routed experts in the place of a feed-forward block cannot be merged into one; export the model "
            "(moadapt export), or unload() it to get the dense block back"
        )
    for name, layer in layers.items():
        constant = injection.routers[layer.ruled_by].router.constant_weights()
        if constant is None:
            raise AdapterError(
                f"cannot merge {name}: its routing depends on the input, so no single weight equals the mixture. "
                "Keep the adapter beside the base model, or train with num_experts: 1"
            )
        if not layer.weight.dtype.is_floating_point:
            raise AdapterError(f"cannot merge {name}: its base weight is quantised; load it unquantised")
        if owners[id(layer.weight)] > 1:
            raise AdapterError(
                f"cannot merge {name}: its base weight is tied to another module's, which would change too; untie "
                "them (tie_word_embeddings: false) before training, or keep the adapter beside the base model"
            )
        gates[name] = constant if layer.member is None else constant[layer.member : layer.member + 1]
    for name, layer in layers.items():
        weight = layer.weight
        delta_OI = layer.delta_weight(gates[name])
        delta = delta_OI.T if isinstance(layer.base_layer, Conv1D) else delta_OI
        weight.copy_(weight.to(delta.dtype) + delta.to(weight.device))
