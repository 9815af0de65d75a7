"""A converted model as the export sees it: its blocks, its attention, and the tensors around the experts.

Shapes: D hidden size, S shared and N routed experts, M neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from moadapt.converted import tensors_outside_experts
from moadapt.errors import AdapterError
from moadapt.export.gates import Gate, read_gate
from moadapt.ffn import Activation, StackedExperts
from moadapt.layer import PartitionLayer
from moadapt.model import MixtureModel
from moadapt.partition import Replacement
from moadapt.routers.base import Router

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""Decoders of RMS norms, rotary attention and gated blocks, whose tensors stock mixtures name alike."""


@dataclass(frozen=True)
class SourceBlock:
    """One converted feed-forward block.

    Attributes:
        name: of its module in the base model.
        layer: index of its transformer layer.
        bank: the layer that took its place.
        router: its router.
        replacement: how it was put there.
        gate: the router in linear form, or why it has none.
    """

    name: str
    layer: int
    bank: PartitionLayer
    router: Router
    replacement: Replacement
    gate: Gate | str

    @property
    def halves(self) -> tuple[StackedExperts | None, StackedExperts]:
        """(shared, routed) with LoRA folded in, detached."""
        with torch.no_grad():
            shared, routed = self.bank.experts.halves()
        return None if shared is None else _detached(shared), _detached(routed)

    @property
    def num_shared(self) -> int:
        """S."""
        return self.bank.experts.num_shared

    @property
    def num_experts(self) -> int:
        """N."""
        return self.bank.experts.num_experts

    @property
    def width(self) -> int:
        """M, zero rows included."""
        return int(self.bank.experts.out_proj.shape[1])

    @property
    def has_biases(self) -> bool:
        """Whether its experts have a bias that is not zero."""
        bank = self.bank.experts
        return any(bias is not None and bool(bias.detach().any()) for bias in (bank.in_bias, bank.out_bias))


@dataclass(frozen=True)
class Source:
    """A converted model.

    Attributes:
        model: the mixture.
        blocks: its converted blocks in the order of the model.
    """

    model: MixtureModel
    blocks: list[SourceBlock]

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.model.base_model.config

    @property
    def model_type(self) -> str:
        """As `llama`."""
        return str(self.config.model_type)

    @cached_property
    def outside(self) -> dict[str, Tensor]:
        """Everything but the converted blocks, detached, under the base model's names."""
        return {name: tensor.detach() for name, tensor in tensors_outside_experts(self.model).items()}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The same under the names that Llama has for them, where the model is like it."""
        return self._unfused(self.outside) if self.model_type == "phi3" else self.outside

    def _unfused(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Phi-3's projections of query, key and value, and of gate and up, one by one."""
        config = self.config
        sizes = [config.num_attention_heads * self.head_dim] + 2 * [config.num_key_value_heads * self.head_dim]
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            stem, _, end = name.rpartition("_proj.")
            if stem.endswith(".qkv"):
                parts = dict(zip("qkv", torch.split(tensor, sizes), strict=True))
                out |= {f"{stem[:-3]}{letter}_proj.{end}": part for letter, part in parts.items()}
            elif stem.endswith(".gate_up"):
                gate, up = tensor.chunk(2)
                out |= {f"{stem[:-7]}gate_proj.{end}": gate, f"{stem[:-7]}up_proj.{end}": up}
            else:
                out[name] = tensor
        return out

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def windows(self) -> list[int | None]:
        """The attention window of every layer; None where it sees everything."""
        config = self.config
        window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
        if self.model_type in ("mistral", "phi3"):
            return [window] * layers
        if self.model_type in ("qwen2", "qwen3"):
            return [window if kind == "sliding_attention" else None for kind in config.layer_types]
        return [None] * layers

    @property
    def rope(self) -> dict[str, Any]:
        """Options of the rotary embedding."""
        return dict(self.config.rope_parameters or {})

    @property
    def partial_rotary(self) -> float:
        """Share of a head that is rotated."""
        return float(self.rope.get("partial_rotary_factor", 1.0))

    @property
    def dense_layers(self) -> list[int]:
        """Layers whose block was left dense."""
        converted = {block.layer for block in self.blocks}
        return [layer for layer in range(self.config.num_hidden_layers) if layer not in converted]

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are still the same tensor; a trained copy of one of them is not."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return False
        copies = self.model.injection.copies
        ends = (self.model.base_model.get_input_embeddings(), self.model.base_model.get_output_embeddings())
        return not any(wrapper in ends or wrapper.copy in ends for wrapper in copies.values())

    @cached_property
    def activation(self) -> str:
        """Name of the blocks' activation function in transformers."""
        named = (
            getattr(self.config, name, None) for name in ("hidden_act", "hidden_activation", "activation_function")
        )
        return activation_name(self.blocks[0].bank.experts.act, [name for name in named if isinstance(name, str)])


def read_source(model: MixtureModel) -> Source:
    """Look at a converted model.

    Raises:
        AdapterError: it is not one, is of custom code, or decides for whole prompts, which no other loader does.
    """
    injection = model.injection
    if not injection.replacements:
        raise AdapterError(
            "only a converted model can be exported: this mixture adapts linear layers. Convert a dense model with "
            "`moadapt convert`, or fold an adapter of one expert with `moadapt merge`"
        )
    if model.decides_by_sequence:
        raise AdapterError(
            "router.granularity: this mixture decides once for a whole sequence, and the routers of exported "
            "checkpoints for each token; only granularity: token can be exported"
        )
    blocks = []
    for item in injection.replacements:
        name, router = item.block.name, injection.routers[item.layer.ruled_by].router
        layer = item.block.site.layer
        assert layer is not None
        blocks.append(SourceBlock(name, layer, item.layer, router, item, read_gate(router)))
    return Source(model, blocks)


def activation_name(act: Activation, likely: Sequence[str] = ()) -> str:
    """The name under which transformers knows an activation function: that which computes the same numbers.

    Args:
        act: the function.
        likely: names to try before all others.

    Raises:
        AdapterError: none does.
    """
    grid = torch.linspace(-8.0, 8.0, 1025)
    want = act(grid)
    for name in (*likely, *ACT2FN):
        try:
            if torch.equal(ACT2FN[name](grid), want):
                return str(name)
        except (KeyError, TypeError, ValueError, RuntimeError, ImportError):  # those that want another shape or package
            continue
    raise AdapterError(f"the activation function {act!r} has no name in transformers, so no config can hold it")


def _detached(stacked: StackedExperts) -> StackedExperts:
    bias = stacked.in_bias_NP
    return StackedExperts(
        stacked.in_NPD.detach(),
        stacked.out_NMD.detach(),
        None if bias is None else bias.detach(),
        stacked.act,
        stacked.gated,
        stacked.dropout,
    )
