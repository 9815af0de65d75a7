"""Whether a stock architecture can hold a converted model, and if not, every reason.

Shapes: D hidden size, S shared and N routed experts, M neurons of an expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moadapt.export.gates import Gate, as_softmax, is_power_of_two
from moadapt.export.source import LLAMA_LIKE, Source, SourceBlock
from moadapt.export.targets import Sizes, Target

NO_ELEMENTS = "Initializing zero-element tensors"
"""A warning of torch about shared experts of width 0, which is how some architectures have none."""
_ATTENTION = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_ALIKE = (
    *_ATTENTION,
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Reason:
    """Why a target does not hold a model exactly.

    Attributes:
        text: the reason.
        approximable: whether it can be written with a small error all the same.
    """

    text: str
    approximable: bool = False


@dataclass(frozen=True)
class Fit:
    """A block's gate as the target computes it.

    Attributes:
        gate: with the weights of the target's own form.
        near: 0/1 weights that the target can only come near to.
    """

    gate: Gate
    near: bool = False


def fit_gate(target: Target, gate: Gate) -> Fit | Reason:
    """A linear gate in the target's form, or why it has none."""
    if gate.bias_N is not None:
        return Reason(f"its router has a bias, and that of {target.name} has none")
    if gate.combine == "sigmoid" and "sigmoid" in target.combines:
        return Fit(gate)
    if gate.combine == "sigmoid":
        return Reason(f"combine: sigmoid weighs each expert by itself, and {target.name} takes a softmax")
    if gate.combine != "unit" and "sigmoid" in target.combines:
        return Reason(f"combine: {gate.combine} is a softmax, and {target.name} scores by sigmoids")
    fitted = as_softmax(gate)
    if fitted is None:
        text = f"combine: unit keeps {gate.num_kept} of {gate.num_experts} experts with weight 1, to which the weights "
        return Reason(text + f"of {target.name} only come near", approximable=True)
    if fitted.combine == "softmax" and "softmax" not in target.combines:
        if fitted.num_kept < fitted.num_experts:
            text = f"combine: softmax leaves the kept weights as they are, and {target.name} divides them by their sum"
            return Reason(text)
        fitted = replace(fitted, combine="softmax_renorm")
    return Fit(fitted)


@dataclass(frozen=True)
class Plan:
    """A converted model, and an architecture for it.

    Attributes:
        source: the converted model.
        target: the architecture.
    """

    source: Source
    target: Target

    @cached_property
    def fits(self) -> list[Fit]:
        """Of every block, in order; near ones where only those can be."""
        fits = []
        for block in self.source.blocks:
            assert isinstance(block.gate, Gate)
            fitted = fit_gate(self.target, block.gate)
            fits.append(Fit(block.gate, near=True) if isinstance(fitted, Reason) else fitted)
        return fits

    @cached_property
    def sizes(self) -> Sizes:
        """Of the target. Experts that are narrower in some layers are filled up with zero neurons."""
        blocks, source = self.source.blocks, self.source
        gate = self.fits[0].gate if isinstance(blocks[0].gate, Gate) else None
        dense = source.dense_layers
        name = f"model.layers.{dense[0]}.mlp.gate_proj.weight" if dense else ""
        combine = "softmax_renorm" if gate is None or gate.combine == "unit" else gate.combine
        factor = 1.0 if gate is None else gate.factor * (gate.num_kept if self.fits[0].near else 1)
        return Sizes(
            num_experts=blocks[0].num_experts,
            num_kept=1 if gate is None else gate.num_kept,
            width=max(block.width for block in blocks),
            num_shared=max(block.num_shared for block in blocks),
            dense_layers=tuple(dense),
            dense_width=source.tensors[name].shape[0] if name in source.tensors else 0,
            combine=combine,
            factor=factor,
        )

    @cached_property
    def config(self) -> Any:
        """The target's config."""
        source = self.source.config
        common = {name: getattr(source, name) for name in _ALIKE if hasattr(source, name)}
        own = {
            "head_dim": self.source.head_dim,
            "hidden_act": self.source.activation,
            "rope_parameters": self.source.rope,
            "tie_word_embeddings": self.source.tied,
            "num_experts_per_tok": self.sizes.num_kept,
        }
        return AutoConfig.for_model(self.target.name, **common | own | self.target.options(self.source, self.sizes))

    @cached_property
    def empty_model(self) -> PreTrainedModel:
        """The target without weights."""
        config = self.config
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", NO_ELEMENTS)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """The target's tensors outside its mixtures, on the meta device."""
        inside = tuple(
            f"model.layers.{block.layer}.{part}."
            for block in self.source.blocks
            for part in ("mlp", "block_sparse_moe", "shared_mlp")
        )
        return {name: t for name, t in self.empty_model.state_dict().items() if not name.startswith(inside)}

    @cached_property
    def names(self) -> set[str]:
        """Of all tensors of the target."""
        return set(self.empty_model.state_dict())

    @cached_property
    def reasons(self) -> list[Reason]:
        """Why the target does not hold the model exactly; empty if it does."""
        return list(dict.fromkeys(self._find_reasons()))

    def _find_reasons(self) -> Iterator[Reason]:
        source, target = self.source, self.target
        if source.model_type not in LLAMA_LIKE:
            yield Reason(
                f"{source.model_type} models have another architecture around the experts; {target.name} takes the "
                f"place of {', '.join(LLAMA_LIKE)}"
            )
        else:
            yield from self._attention_reasons()
        yield from self._routing_reasons()
        yield from self._block_reasons()

    def _attention_reasons(self) -> Iterator[Reason]:
        source, target = self.source, self.target
        windows = set(source.windows)
        if target.windows == "none" and windows != {None}:
            yield Reason(f"its attention has a sliding window, and that of {target.name} has none")
        elif target.windows == "uniform" and len(windows) > 1:
            yield Reason(f"only some of its layers have a sliding window, and {target.name} has one window for all")
        if source.partial_rotary != 1.0 and not target.partial_rotary:
            yield Reason(
                f"partial_rotary_factor: {source.partial_rotary} rotates a part of each head, {target.name} all"
            )
        if not isinstance(source.blocks[0].gate, Gate):
            return  # a target without a number of kept experts cannot be made
        have, want = source.tensors, self.shapes
        names = {name for name, tensor in have.items() if name not in want and bool(tensor.any())}
        if ends := sorted({_end(name) for name in names}):
            yield Reason(f"it has {', '.join(ends)}, for which {target.name} has no place")
        missing = {name for name in want if name not in have and not name.endswith(".bias")}
        if ends := sorted({_end(name) for name in missing}):
            yield Reason(f"it has no {', '.join(ends)}, which {target.name} needs")

    def _routing_reasons(self) -> Iterator[Reason]:
        target, blocks = self.target, self.source.blocks
        for block in blocks:
            fitted = Reason(block.gate) if isinstance(block.gate, str) else fit_gate(target, block.gate)
            if isinstance(fitted, Reason):
                yield fitted
        yield from self._same("num_experts", {block.layer: block.num_experts for block in blocks})
        kept = {block.layer: block.gate.num_kept for block in blocks if isinstance(block.gate, Gate)}
        yield from self._same("router.num_experts_per_tok", kept)
        if target.own_factor and kept:
            factors = {block.layer: fit.gate.factor for block, fit in zip(blocks, self.fits, strict=True)}
            yield from self._same("the factor of router.rescale", factors)
        fewest = min(block.num_experts for block in blocks)
        if fewest < target.least_experts:
            yield Reason(f"num_experts: {fewest}, and the router of {target.name} needs {target.least_experts}")
        if kept and self._rounds():
            yield Reason(
                "the factor of the kept experts is no power of two, so folding it into half-precision weights would "
                "round them (load the model in float32, --dtype float32, for an exact export)",
                approximable=True,
            )

    def _rounds(self) -> bool:
        """Whether folding a factor changes bits that matter."""
        if self.target.own_factor:
            return False
        halves = (torch.float16, torch.bfloat16)
        return any(
            block.bank.experts.out_proj.dtype in halves and not is_power_of_two(fold_of(fit))
            for block, fit in zip(self.source.blocks, self.fits, strict=True)
        )

    def _same(self, option: str, values: dict[int, Any]) -> Iterator[Reason]:
        if len(set(values.values())) > 1:
            shown = ", ".join(f"layer {layer}: {value:g}" for layer, value in list(values.items())[:6])
            yield Reason(f"{option} differs among layers ({shown}), and {self.target.name} has one for all")

    def _block_reasons(self) -> Iterator[Reason]:
        source, target = self.source, self.target
        blocks: list[SourceBlock] = source.blocks
        if not blocks[0].bank.experts.gated:
            yield Reason(f"its feed-forward blocks have no gate projection, and the experts of {target.name} do")
        if any(block.has_biases for block in blocks):
            yield Reason(f"its experts have biases, and those of {target.name} have none")
        if any(block.num_shared for block in blocks) and not target.shared_experts:
            yield Reason(f"it has shared experts, and {target.name} has none")
        if source.model_type not in LLAMA_LIKE:
            return
        dense = source.dense_layers
        if dense and (target.dense == "none" or (target.dense == "first" and dense != list(range(len(dense))))):
            can = "has a mixture in every layer" if target.dense == "none" else "can leave only the first layers dense"
            shown = ", ".join(map(str, dense[:8]))
            yield Reason(f"its layers {shown} are dense, and {target.name} {can}")


def fold_of(fit: Fit) -> float:
    """What the kept experts' down-projections are multiplied by, in a target without a factor of its own."""
    return fit.gate.factor * (fit.gate.num_kept if fit.near else 1)


def _end(name: str) -> str:
    """`self_attn.o_proj.bias` of `model.layers.3.self_attn.o_proj.bias`."""
    parts = name.split(".")
    return ".".join(parts[3:] if parts[:2] == ["model", "layers"] else parts)
