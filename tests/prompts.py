"""Batches for routers that decide by prompt: rows of letters, `u` prompt, `a` answer, `p` padding; and mixtures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kinds import PROMPT_ROUTERS, TASK_ROUTERS, targets_of
from tiny import VOCAB, mixture_model
from torch import Tensor, nn

from moadapt import MixtureModel
from moadapt.routing import Routing

LORA = {"kind": "lora", "r": 3, "lora_alpha": 6.0}
UNITS: dict[str, dict[str, Any]] = {
    "module": {"expert_unit": "module", "expert": LORA},
    "bank": {"num_experts": 4, "expert": LORA, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}


def of_kind(name: str, unit: str = "bank", scope: Any = "block", **more: Any) -> dict[str, Any]:
    """A mixture with one of the routers of kinds.py."""
    by_task = name in TASK_ROUTERS
    router = {**(TASK_ROUTERS if by_task else PROMPT_ROUTERS)[name], "scope": scope}
    return UNITS[unit] | {"router": router} | ({"tasks": ["sums", "names", "dates"]} if by_task else {}) | more


TOKENS: dict[str, Any] = {"num_experts": 4, "expert": LORA, "router": {"kind": "top_k", "scope": "block"}}
MILORA, BANK, TASKS = of_kind("milora_3", "module"), of_kind("milora_1"), of_kind("task_table_softmax")


def mixture(config: dict[str, Any], family: str = "llama", dtype: torch.dtype = torch.float64) -> MixtureModel:
    """A mixture of noise in evaluation mode."""
    return mixture_model(config, family, dtype).eval()


_MODELS: dict[str, MixtureModel] = {}


def model_of(name: str, unit: str = "module", scope: Any = "block") -> MixtureModel:
    """One model per row of the table for all tests below; none of them changes it."""
    key = f"{name}-{unit}-{scope}"
    if key not in _MODELS:
        _MODELS[key] = mixture(of_kind(name, unit, scope, target_modules=targets_of(scope)))
    return _MODELS[key]


@contextmanager
def decisions_seen(model: MixtureModel) -> Iterator[dict[str, Routing]]:
    """What each router site decides inside the block, by router name."""
    seen: dict[str, Routing] = {}
    handles = [
        site.register_forward_hook(lambda module, args, output: seen.update({module.name: output}))
        for site in model.injection.routers.values()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_counted(model: MixtureModel) -> Iterator[Counter[str]]:
    """How often the expert bank of each layer is called inside the block, by layer name."""
    called: Counter[str] = Counter()
    handles = [
        layer.experts.register_forward_hook(lambda module, args, output, name=name: called.update([name]))
        for name, layer in model.injection.layers.items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def ids_of(*lengths: int, seed: int = 3) -> list[Tensor]:
    """Random token ids for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def batch_of(rows: list[str], ids: list[Tensor] | None = None, fill: int = 0) -> dict[str, Tensor]:
    """Ids (of the real tokens of each row, random when not given), mask, positions, labels at answers, prompt mask."""
    ids = ids_of(*(len(row) for row in rows)) if ids is None else ids
    real = torch.tensor([[token != "p" for token in row] for row in rows])
    filled = torch.full(real.shape, fill)
    for number, row in enumerate(rows):
        filled[number, real[number]] = ids[number][: len(row) - row.count("p")]
    answer = torch.tensor([[token == "a" for token in row] for row in rows])
    return {
        "input_ids": filled,
        "attention_mask": real.long(),
        "position_ids": (real.cumsum(-1) - 1).clamp(min=0),
        "labels": torch.where(answer, filled, -100),
        "prompt_mask": real & ~answer,
    }


def left_padded(rows: list[Tensor], length: int | None = None, fill: int = 0) -> dict[str, Tensor]:
    """Prompts as `generate` takes them."""
    length = max(map(len, rows)) if length is None else length
    ids, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :], mask[number, length - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def lm_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean over the labelled tokens, in float64 (transformers' own is in fp32)."""
    return nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())
