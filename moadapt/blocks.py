"""Feed-forward blocks of a model: where they are, which of their layers is which, and their weights as plain tensors.

A block is recognised by the names of its linear layers. What it computes is then compared with what this module reads
out of it, so that a block that does something else is refused and not converted wrongly.

Shapes: T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.config import MixtureConfig
from moadapt.errors import ConfigError
from moadapt.ffn import FeedForward
from moadapt.per_layer import Site
from moadapt.routing import Stream
from moadapt.targets import is_linear, linear_sizes, matches_names, site_of


@dataclass(frozen=True)
class Layout:
    """Names of a block's layers.

    Attributes:
        up: the up-projection; with `fused`, gate and up in one, gate rows first.
        down: the down-projection.
        act: the activation module.
        gate: the gate projection of a gated block.
        fused: whether `up` holds the gate too.
        dropout: a dropout module, if there may be one.
        dropout_inside: it drops neurons (before the down-projection), not outputs.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    fused: bool = False
    dropout: str | None = None
    dropout_inside: bool = False

    @property
    def linears(self) -> list[str]:
        """Names of the linear layers."""
        return [name for name in (self.gate, self.up, self.down) if name is not None]


LAYOUTS = (
    Layout(gate="gate_proj", up="up_proj", down="down_proj", act="act_fn"),  # Llama, Qwen, Mistral, Gemma
    Layout(up="gate_up_proj", down="down_proj", act="activation_fn", fused=True),  # Phi-3
    Layout(up="c_fc", down="c_proj", act="act", dropout="dropout"),  # GPT-2
    Layout(up="dense_h_to_4h", down="dense_4h_to_h", act="act"),  # GPT-NeoX
    Layout(gate="wi_0", up="wi_1", down="wo", act="act", dropout="dropout", dropout_inside=True),  # T5 1.1
    Layout(up="wi", down="wo", act="act", dropout="dropout", dropout_inside=True),  # T5
    Layout(up="fc1", down="fc2", act="activation_fn"),  # Phi, OPT
)
# These decoder layers hold the block's layers as their own children and call them one after the other.
_INLINE = ("OPTDecoderLayer",)


@dataclass(frozen=True)
class Block:
    """One feed-forward block.

    Attributes:
        site: name and transformer layer of the module that experts take the place of: the block's module, or where
            the layer holds the block's parts itself, its up-projection.
        owner: name of the module that holds the parts.
        layout: the names of the parts.
        inline: whether `owner` is a transformer layer and not a module of the block's own.
        stream: whose tokens it sees.
    """

    site: Site
    owner: str
    layout: Layout
    inline: bool
    stream: Stream

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    def part(self, model: nn.Module, name: str) -> nn.Module:
        """One of the parts, by its name in the layout."""
        return model.get_submodule(f"{self.owner}.{name}")

    def linears(self, model: nn.Module) -> dict[str, nn.Module]:
        """The linear layers by their names in the model."""
        return {f"{self.owner}.{name}": self.part(model, name) for name in self.layout.linears}

    def sizes(self, model: nn.Module) -> tuple[int, int]:
        """(D, F)."""
        features, neurons = linear_sizes(self.part(model, self.layout.up))
        return features, neurons // 2 if self.layout.fused else neurons

    def output_dropout(self, model: nn.Module) -> float:
        """Probability of dropping an output in training: by a module (GPT-2), or a function (Starcoder2)."""
        layout, owner = self.layout, model.get_submodule(self.owner)
        if self.inline or layout.dropout_inside:
            return 0.0
        module = dict(owner.named_children()).get(layout.dropout or "")
        rate = module.p if isinstance(module, nn.Dropout) else getattr(owner, "residual_dropout", 0.0)
        return float(rate) if isinstance(rate, (int, float)) else 0.0


def find_blocks(model: PreTrainedModel, config: MixtureConfig) -> list[Block]:
    """The feed-forward blocks that a config selects, in the order of the model.

    Args:
        model: a dense model.
        config: its `target_modules` (names or a regular expression of blocks; `all-linear` means all of them),
            `exclude_modules`, `layers_to_transform`, and the expert's `first_k_dense_replace` and
            `last_k_dense_replace`.

    Raises:
        ConfigError: a mixture of experts already, no block that can be read, nothing is selected, or a block is that
            holds more than its layout.
    """
    refuse_mixtures(model)
    extras = list(_all_blocks(model))
    found = [block for block, _ in extras]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no feed-forward block of a known layout. Known: "
            f"{'; '.join(', '.join(layout.linears) for layout in LAYOUTS)}"
        )
    wanted = [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    chosen = []
    for block, others in extras:
        names = {block.name, block.owner}
        if config.target_modules != "all-linear" and not any(matches_names(n, config.target_modules) for n in names):
            continue
        if config.exclude_modules is not None and any(matches_names(n, config.exclude_modules) for n in names):
            continue
        layer, count = block.site.layer, block.site.num_layers
        assert layer is not None
        first, last = (getattr(config.expert, f"{side}_k_dense_replace", 0) for side in ("first", "last"))
        if (wanted is not None and layer not in wanted) or layer < first or layer >= count - last:
            continue
        if others:
            raise ConfigError(
                f"{block.owner} ({type(model.get_submodule(block.owner)).__name__}) has the layers "
                f"{', '.join(block.layout.linears)} of a feed-forward block beside {', '.join(others)}; such a block "
                "cannot be split here. Leave it out with exclude_modules"
            )
        chosen.append(block)
    missing = sorted(set(wanted or []) - {block.site.layer for block in found})
    if missing:
        raise ConfigError(f"layers_to_transform: there is no layer {missing[0]} with a feed-forward block")
    if not chosen:
        raise ConfigError(
            f"target_modules and the choice of layers select no feed-forward block; the model has "
            f"{', '.join(block.name for block in found[:3])}{', …' if len(found) > 3 else ''}"
        )
    return chosen


def refuse_mixtures(model: nn.Module) -> None:
    """Stop at a model that is a mixture of experts already.

    Raises:
        ConfigError: names the module.
    """
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and not is_linear(module):
            raise ConfigError(
                f"{name} holds experts: {type(model).__name__} is a mixture of experts already, and only dense "
                "feed-forward blocks are split; start from a dense model"
            )


def _all_blocks(model: PreTrainedModel) -> Iterator[tuple[Block, list[str]]]:
    """Blocks, and names of what they hold that is not in their layout: of these nobody knows what they compute."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        children = dict(module.named_children())
        layout = next((layout for layout in LAYOUTS if _fits(layout, children)), None)
        if layout is None:
            continue
        allowed = {*layout.linears, layout.act, layout.dropout}
        inline = type(module).__name__ in _INLINE
        others = [] if inline else [child for child in children if child not in allowed]
        site = site_of(f"{name}.{layout.up}" if inline else name, modules)
        if site.layer is None:
            continue
        stream: Stream = "encoder" if "encoder" in name.split(".") else "decoder"
        yield Block(site, name, layout, inline, stream), others


def _fits(layout: Layout, children: dict[str, nn.Module]) -> bool:
    return layout.act in children and all(name in children and is_linear(children[name]) for name in layout.linears)


def read_block(model: nn.Module, block: Block) -> FeedForward:
    """The block's weights, one row per neuron; views of the model's own where the layout allows it.

    Raises:
        ConfigError: quantised weights, weights that ZeRO-3 has spread, or weights in several dtypes.
    """
    layout = block.layout
    weights = {name: _rows(f"{block.owner}.{name}", block.part(model, name)) for name in layout.linears}
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight, _ in weights.values()})
    if len(dtypes) > 1:
        raise ConfigError(
            f"{block.name} has weights in {' and '.join(dtypes)} (T5 keeps some of them in fp32 when it is loaded in "
            "fp16); load the model in one dtype, as dtype: bfloat16 or float32, to split it"
        )
    up_FD, up_bias_F = weights[layout.up]
    down_DF, down_bias_D = weights[layout.down]
    gate_FD, gate_bias_F = weights[layout.gate] if layout.gate is not None else (None, None)
    if layout.fused:
        gate_FD, up_FD = up_FD.chunk(2)
        gate_bias_F, up_bias_F = (None, None) if up_bias_F is None else up_bias_F.chunk(2)
    dropout = block.part(model, layout.dropout) if layout.dropout is not None and layout.dropout_inside else None
    return FeedForward(
        up_FD=up_FD,
        down_FD=down_DF.T,
        gate_FD=gate_FD,
        act=block.part(model, layout.act),
        up_bias_F=up_bias_F,
        gate_bias_F=gate_bias_F,
        down_bias_D=down_bias_D,
        dropout=float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0,
    )


def write_block(ffn: FeedForward, layout: Layout, transposed: bool) -> dict[str, Tensor]:
    """Inverse of `read_block`: tensors by the names of the block's own parameters, as `up_proj.weight`.

    Args:
        ffn: the block.
        layout: names of its layers.
        transposed: whether they are GPT-2's `Conv1D`, which stores (in, out).
    """
    matrices = {layout.up: (ffn.up_FD, ffn.up_bias_F), layout.down: (ffn.down_FD.T, ffn.down_bias_D)}
    if layout.fused:
        assert ffn.gate_FD is not None
        biases = None if ffn.up_bias_F is None else torch.cat([ffn.gate_bias_F, ffn.up_bias_F])  # type: ignore[list-item]
        matrices[layout.up] = torch.cat([ffn.gate_FD, ffn.up_FD]), biases
    elif layout.gate is not None:
        assert ffn.gate_FD is not None
        matrices[layout.gate] = ffn.gate_FD, ffn.gate_bias_F
    tensors = {}
    for name, (weight, bias) in matrices.items():
        tensors[f"{name}.weight"] = (weight.T if transposed else weight).contiguous()
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    return tensors


@torch.no_grad()
def check_block(model: nn.Module, block: Block, ffn: FeedForward) -> None:
    """Compare what the block computes with what was read out of it, on four random inputs.

    Raises:
        ConfigError: they differ.
    """
    if block.inline or ffn.up_FD.is_meta:
        return
    module = model.get_submodule(block.owner)
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(1, 4, ffn.hidden_size, generator=generator).to(ffn.up_FD.device, ffn.up_FD.dtype)
    modes = [(part, part.training) for part in module.modules()]
    try:
        want_TD = module.eval()(x_BSD)[0].float()
    finally:
        for part, training in modes:
            part.training = training
    got_TD = ffn(x_BSD[0]).float()
    bound = 1e-4 if ffn.up_FD.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(got_TD, want_TD, rtol=0.0, atol=bound * max(float(want_TD.abs().max()), 1e-20)):
        raise ConfigError(
            f"{block.name} ({type(module).__name__}) computes something else than act(gate) * up, down of its layers; "
            "such a block cannot be split here. Leave it out with exclude_modules"
        )


def _rows(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(out, in) weight and bias of a linear layer, detached."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if weight.dim() != 2:
        raise ConfigError(f"{name} is empty: ZeRO-3 has spread its weights; load the model whole to split it")
    if not weight.dtype.is_floating_point or weight.element_size() < 2:  # fp8 has scales beside it
        raise ConfigError(f"{name} is quantised ({weight.dtype}); load the model unquantised to split it")
    weight = weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight, bias.detach() if isinstance(bias, Tensor) else None
