"""The stock architectures that a converted model can be written as, and what each can hold.

| target           | weights of the kept experts        | factor           | shared experts     | dense layers      |
|------------------|------------------------------------|------------------|--------------------|-------------------|
| mixtral          | softmax over the kept              | down-projections | no                 | no                |
| qwen2_moe        | softmax over all or over the kept  | down-projections | yes, half of twice | any               |
| qwen3_moe        | softmax over all or over the kept  | down-projections | no                 | any               |
| granitemoeshared | softmax over the kept              | down-projections | yes                | no                |
| glm4_moe         | sigmoid, or a sigmoid's share      | of its own       | yes                | the first ones    |

Read from transformers 5.23's modelling files. All of them have one number of experts and of kept experts, and one
width, for all their mixtures, a linear router without bias, and gated experts without biases.

Shapes: D hidden size, S shared and N routed experts, M neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moadapt.routers.gates import Combine

AUTO_MAP = "auto_map"


@dataclass(frozen=True)
class Sizes:
    """What every mixture of an exported model has.

    Attributes:
        num_experts: N.
        num_kept: K.
        width: M.
        num_shared: S, of the same width.
        dense_layers: layers with a dense block.
        dense_width: neurons of a dense block; 0 without any.
        combine: how the kept experts are weighed.
        factor: of the kept experts where the target has an option for it.
    """

    num_experts: int
    num_kept: int
    width: int
    num_shared: int
    dense_layers: tuple[int, ...]
    dense_width: int
    combine: Combine
    factor: float


@dataclass(frozen=True)
class Target:
    """A stock architecture.

    Attributes:
        name: its `model_type`.
        combines: the weights that its router can give.
        options: its own options in the config.
        router: name of the router's weight in layer `{i}`.
        experts: name of the module of the stacked experts.
        shared: tensors of the shared experts from their (S M, D) gate, (S M, D) up and (D, S M) down projections.
        shared_experts: whether it has any.
        own_factor: whether a factor of the kept experts is an option and not folded into their down-projections.
        dense: which layers may be dense.
        windows: sliding attention: for no layer, for all alike, or for any.
        partial_rotary: whether a part of each head can go without rotary embedding.
        least_experts: the fewest experts its router can do with.
        extra: further tensors of a mixture in layer `{i}`.
    """

    name: str
    combines: tuple[Combine, ...]
    options: Callable[[Any, Sizes], dict[str, Any]]
    router: str
    experts: str
    shared: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = None
    own_factor: bool = False
    dense: Literal["none", "first", "any"] = "none"
    windows: Literal["none", "uniform", "any"] = "none"
    partial_rotary: bool = False
    least_experts: int = 1
    extra: Callable[[int, int], dict[str, Tensor]] = lambda num_experts, hidden_size: {}

    @property
    def shared_experts(self) -> bool:
        """Whether it has shared experts."""
        return self.shared is not None


def _mixtral(source: Any, sizes: Sizes) -> dict[str, Any]:
    return {
        "intermediate_size": sizes.width,
        "num_local_experts": sizes.num_experts,
        "sliding_window": source.windows[0],
    }


def _qwen2_moe(source: Any, sizes: Sizes) -> dict[str, Any]:
    windows = source.windows
    window = next((window for window in windows if window is not None), None)
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {
        "intermediate_size": sizes.dense_width or sizes.width,
        "moe_intermediate_size": sizes.width,
        "shared_expert_intermediate_size": sizes.width * sizes.num_shared,
        "num_experts": sizes.num_experts,
        "norm_topk_prob": sizes.combine == "softmax_renorm",
        "mlp_only_layers": list(sizes.dense_layers),
        "decoder_sparse_step": 1,
        "qkv_bias": _has(source, "q_proj.bias"),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": kinds,
    }


def _qwen3_moe(source: Any, sizes: Sizes) -> dict[str, Any]:
    return {
        "intermediate_size": sizes.dense_width or sizes.width,
        "moe_intermediate_size": sizes.width,
        "num_experts": sizes.num_experts,
        "norm_topk_prob": sizes.combine == "softmax_renorm",
        "mlp_only_layers": list(sizes.dense_layers),
        "decoder_sparse_step": 1,
        "attention_bias": _has(source, "q_proj.bias"),
        "use_sliding_window": source.windows[0] is not None,
        "sliding_window": source.windows[0],
    }


def _granite(source: Any, sizes: Sizes) -> dict[str, Any]:
    return {
        "intermediate_size": sizes.width,
        "shared_intermediate_size": sizes.width * sizes.num_shared,
        "num_local_experts": sizes.num_experts,
        "attention_bias": _has(source, "q_proj.bias"),
        "attention_multiplier": source.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _glm4_moe(source: Any, sizes: Sizes) -> dict[str, Any]:
    return {
        "intermediate_size": sizes.dense_width or sizes.width,
        "moe_intermediate_size": sizes.width,
        "n_routed_experts": sizes.num_experts,
        "n_shared_experts": sizes.num_shared,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": sizes.combine == "softmax_renorm",
        "routed_scaling_factor": sizes.factor,
        "first_k_dense_replace": len(sizes.dense_layers),
        "attention_bias": _has(source, "q_proj.bias"),
        "use_qk_norm": _has(source, "q_norm.weight"),
        "num_mtp_layers": 0,
        # Without it this architecture rotates half of each head.
        "rope_parameters": source.rope | {"partial_rotary_factor": source.partial_rotary},
    }


def _has(source: Any, end: str) -> bool:
    """Whether the first layer's attention has a tensor of this name that is not zero."""
    tensor = source.tensors.get(f"model.layers.0.self_attn.{end}")
    return tensor is not None and bool(tensor.any())


def _separate(prefix: str, down_factor: float = 1.0) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    def tensors(gate: Tensor, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        return {
            f"{prefix}.gate_proj.weight": gate,
            f"{prefix}.up_proj.weight": up,
            f"{prefix}.down_proj.weight": down * down_factor,
        }

    return tensors


def _granite_shared(gate: Tensor, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    return {"shared_mlp.input_linear.weight": torch.cat([gate, up]), "shared_mlp.output_linear.weight": down}


STOCK: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "mixtral",
            ("softmax_renorm",),
            _mixtral,
            router="mlp.gate.weight",
            experts="mlp.experts",
            windows="uniform",
        ),
        Target(
            "qwen2_moe",
            ("softmax", "softmax_renorm"),
            _qwen2_moe,
            router="mlp.gate.weight",
            experts="mlp.experts",
            # The gate of the shared expert is sigmoid(0) = 1/2 everywhere, so twice its output.
            shared=_separate("mlp.shared_expert", down_factor=2.0),
            dense="any",
            windows="any",
            extra=lambda num_experts, hidden_size: {"mlp.shared_expert_gate.weight": torch.zeros(1, hidden_size)},
        ),
        Target(
            "qwen3_moe",
            ("softmax", "softmax_renorm"),
            _qwen3_moe,
            router="mlp.gate.weight",
            experts="mlp.experts",
            dense="any",
            windows="uniform",
        ),
        Target(
            "granitemoeshared",
            ("softmax_renorm",),
            _granite,
            router="block_sparse_moe.router.weight",
            experts="block_sparse_moe.experts",
            shared=_granite_shared,
        ),
        Target(
            "glm4_moe",
            ("sigmoid", "softmax_renorm"),  # the latter only where the sigmoids are equal: see `moadapt.export.plan`
            _glm4_moe,
            router="mlp.gate.weight",
            experts="mlp.experts",
            shared=_separate("mlp.shared_experts"),
            own_factor=True,
            dense="first",
            partial_rotary=True,
            least_experts=2,
            extra=lambda num_experts, hidden_size: {"mlp.gate.e_score_correction_bias": torch.zeros(num_experts)},
        ),
    )
}
TARGETS = [*STOCK, AUTO_MAP]
