"""A converted model on disk: the dense base model, whole, with the routed experts' part of it beside.

The folder is a checkpoint of the base architecture (any loader of transformers reads it, and gets the ungated sum of
all experts, which is the dense model), and holds `mixture_config.json` and `mixture.safetensors`: the routers, which
neurons form which expert, and LoRA where there is one. `MixtureModel.from_pretrained(None, folder)` puts both together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moadapt.errors import AdapterError
from moadapt.saving import save_adapter

if TYPE_CHECKING:
    from moadapt.model import MixtureModel

REPORT_FILE = "conversion.json"


def dense_state_dict(model: MixtureModel) -> dict[str, Tensor]:
    """The dense base model's tensors under its own names, with the experts' weights as they are now.

    Raises:
        AdapterError: the model is not a converted one.
    """
    if not model.injection.replacements:
        raise AdapterError("this mixture adapts linear layers; only a converted model holds its base model's blocks")
    tensors = tensors_outside_experts(model)
    for item in model.injection.replacements:
        # Copies, which only the main memory has to have room for all at once.
        tensors |= {name: tensor.cpu() for name, tensor in item.dense_state().items()}
    return tensors


def tensors_outside_experts(model: MixtureModel) -> dict[str, Tensor]:
    """The base model's tensors under its own names, without those of the blocks whose place experts have taken."""
    injection = model.injection
    inside = tuple(f"{name}." for name in injection.layers)
    shells = {name for item in injection.replacements for name in item.dense_names()}
    tensors = {
        name: tensor
        for name, tensor in model.base_model.state_dict().items()
        if not name.startswith(inside) and name not in shells
    }
    for name in injection.copies:  # of modules_to_save the trained copies
        tensors = {
            key.replace(f"{name}.copy.", f"{name}.", 1): tensor
            for key, tensor in tensors.items()
            if not key.startswith(f"{name}.original_module.")
        }
    return tensors


def save_converted(
    model: MixtureModel,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    report: dict[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a converted model that needs nothing else: base model, generation config, tokenizer, experts' part.

    Args:
        model: the converted model.
        directory: where to; made if need be.
        tokenizer: saved too, where given.
        report: written as `conversion.json`.
        max_shard_size: of one safetensors file of the base model.

    Raises:
        AdapterError: the model is not a converted one, or the folder's place is taken by a file.
    """
    folder = Path(directory)
    if folder.is_file():
        raise AdapterError(f"{folder} is a file; a converted model is saved as a folder")
    tensors = dense_state_dict(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.base_model.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size)
    del tensors
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_adapter(model, folder, with_base=True)
    if report is not None:
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
