"""The tensors that make up an adapter beside its parameters, and filling an adapter from a file."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.errors import AdapterError
from moadapt.inject import Injection
from moadapt.saving import INDICES


def buffers_of(model: PreTrainedModel, injection: Injection) -> dict[str, Tensor]:
    """What experts and routers remember and do not train, by name, as index lists of experts.

    Args:
        model: the base model with the mixture in it.
        injection: the mixture.
    """
    modules = dict(model.named_modules())
    buffers: dict[str, Tensor] = {}
    for name in injection.layers:
        for part in (f"{name}.experts", f"{name}.router"):
            persistent = modules[part].state_dict() if part in modules else {}
            known = {key for key, _ in modules[part].named_parameters()} if part in modules else set()
            buffers |= {f"{part}.{key}": value for key, value in persistent.items() if key not in known}
    return buffers


@torch.no_grad()
def copy_into(
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: str,
    optional: Container[str] = (),
) -> None:
    """Copy the tensors of a file into an adapter.

    Args:
        parameters: the adapter's, by name; all must be in the file.
        buffers: the adapter's, by name; they may be missing.
        tensors: what the file holds.
        source: where it comes from, for the error message.
        optional: names of parameters that may be missing and then keep their values.

    Raises:
        AdapterError: a name is missing or left over, or a shape or an index list differs; nothing is changed then.
    """
    known = {**parameters, **buffers}
    problems = [f"missing: {name}" for name in parameters if name not in tensors and name not in optional]
    problems += [f"left over: {name}" for name in tensors if name not in known]
    problems += [
        f"shape of {name}: {tuple(tensors[name].shape)} in the file, {tuple(mine.shape)} in the model"
        for name, mine in known.items()
        if name in tensors and tensors[name].shape != mine.shape
    ]
    if not problems:
        problems = [
            f"{name}: other neurons than in the model"
            for name, mine in buffers.items()
            if name.endswith(INDICES) and name in tensors and not torch.equal(tensors[name].cpu(), mine.cpu())
        ]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        shown = "\n  ".join(problems[:10])
        raise AdapterError(f"{source} does not fit this model and config:\n  {shown}{more}")
    for name, parameter in known.items():
        if name in tensors:
            parameter.copy_(tensors[name])
