"""The one table of expert kind x router kind x options that the common tests run over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One mixture: options of its experts and of its router."""

    name: str
    expert: dict[str, Any]
    router: dict[str, Any]
    num_experts: int = 4

    def config(self, scope: Any = "linear", **more: Any) -> dict[str, Any]:
        """Options of a `MixtureConfig`."""
        router = {**self.router, "scope": scope}
        return {"num_experts": self.num_experts, "expert": self.expert, "router": router, **more}


EXPERTS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 3, "lora_alpha": 6.0},
    "rslora": {"kind": "lora", "r": 3, "lora_alpha": 2.0, "use_rslora": True},
    "lora_gaussian": {"kind": "lora", "r": 2, "init_lora_weights": "gaussian"},
    "lora_dropout": {"kind": "lora", "r": 3, "lora_dropout": 0.4},
    "shared_down": {"kind": "lora", "r": 3, "shared_down": True},
    "malora": {"kind": "malora", "r": 3, "shared_r": 5, "lora_dropout": 0.0},
    "malora_beta": {"kind": "malora", "r": 2, "shared_r": 4, "beta": 2.0, "use_rslora": True, "lora_dropout": 0.0},
    "malora_dropout": {"kind": "malora", "r": 3, "shared_r": 5, "lora_dropout": 0.4},
    "mtl_lora": {"kind": "mtl_lora", "r": 3, "num_tasks": 2, "unknown_task": "mean"},
}

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax"},
    "softmax_warm_jitter": {"kind": "softmax", "temperature": 2.5, "router_jitter_noise": 0.2},
    "top_1": {"kind": "top_k", "num_experts_per_tok": 1},
    "top_2": {"kind": "top_k", "num_experts_per_tok": 2},
    "top_2_norm": {"kind": "top_k", "num_experts_per_tok": 2, "norm_topk_prob": True},
    "top_2_cold": {"kind": "top_k", "num_experts_per_tok": 2, "temperature": 0.5},
    "top_2_jitter": {"kind": "top_k", "num_experts_per_tok": 2, "router_jitter_noise": 0.3},
    "top_2_noisy": {"kind": "top_k", "num_experts_per_tok": 2, "noisy_gating": True},
    "top_3_noisy_norm_jitter": {
        "kind": "top_k",
        "num_experts_per_tok": 3,
        "noisy_gating": True,
        "norm_topk_prob": True,
        "router_jitter_noise": 0.1,
    },
    "top_all": {"kind": "top_k", "num_experts_per_tok": 4, "norm_topk_prob": True},
    "top_2_sigmoid": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "sigmoid", "rescale": "n_over_k"},
    "top_3_renorm": {"kind": "top_k", "num_experts_per_tok": 3, "combine": "softmax_renorm", "rescale": 2.5},
    "top_2_unit": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "unit", "rescale": "n_over_active"},
    "top_1_norm_ste": {"kind": "top_k", "num_experts_per_tok": 1, "norm_topk_prob": True, "straight_through": True},
    "top_2_unit_ste": {
        "kind": "top_k",
        "num_experts_per_tok": 2,
        "combine": "unit",
        "rescale": "n_over_k",
        "straight_through": True,
    },
    "sigmoid_ste": {"kind": "sigmoid_ste"},
    "sigmoid_ste_unit": {"kind": "sigmoid_ste", "threshold": 0.6, "combine": "unit", "min_active": 1},
    "sigmoid_g": {"kind": "sigmoid_ste", "straight_through": False, "min_active": 2, "rescale": "none"},
    "relu": {"kind": "relu"},
    "relu_n_over_active": {"kind": "relu", "rescale": "n_over_active"},
}
PROMPT_ROUTERS: dict[str, dict[str, Any]] = {
    "milora_3": {"kind": "top_k", "num_experts_per_tok": 3, "norm_topk_prob": True, "granularity": "prompt"},
    "milora_1": {"kind": "top_k", "num_experts_per_tok": 1, "granularity": "prompt"},
    "milora_rational_ste": {
        "kind": "top_k",
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "straight_through": True,
        "granularity": "prompt",
        "activation": "rational",
    },
    "prompt_softmax_mean": {"kind": "softmax", "granularity": "prompt", "pooler": "mean", "activation": "none"},
    "prompt_smear": {
        "kind": "softmax",
        "normalize": True,
        "granularity": "prompt",
        "pooler": "mean",
        "activation": "none",
    },
    "prompt_sigmoid_last": {"kind": "sigmoid_ste", "granularity": "prompt", "pooler": "last"},
    "prompt_relu_max": {"kind": "relu", "granularity": "prompt", "pooler": "max", "activation": "relu"},
}
"""Routers with one decision for each prompt; pooler and activation are MiLoRA's where they are not given."""

TASK_ROUTERS: dict[str, dict[str, Any]] = {
    "task_table_softmax": {"kind": "task_table", "temperature": 0.1, "init": "kaiming"},
    "task_table_mean": {"kind": "task_table", "unknown_task": "mean"},
    "task_table_bernoulli": {"kind": "task_table", "gate": "bernoulli", "init": "uniform"},
}
"""Routers by task id. Their mixture needs `tasks`."""

NOT_TRAINED = {"top_2_unit"}
"""Routers that get no gradient from the task."""

ROWS = [
    Row(f"{expert}-{router}", EXPERTS[expert], ROUTERS[router])
    for expert in EXPERTS
    for router in ROUTERS
    if router not in NOT_TRAINED
]
FEW = [
    Row(f"{expert}-{router}", EXPERTS[expert], ROUTERS[router])
    for expert, router in [
        ("lora", "softmax"),
        ("lora", "top_2_norm"),
        ("shared_down", "top_1"),
        ("malora", "top_2"),
        ("malora_beta", "softmax_warm_jitter"),
    ]
]
DETERMINISTIC = [
    Row(name, EXPERTS["malora" if index % 2 else "lora"], ROUTERS[name])
    for index, name in enumerate(name for name in ROUTERS)
]
"""Every router; in evaluation all of them are deterministic."""

SCOPES: list[Any] = ["linear", "ffn", "attention", ["ffn", "attention"], "block"]
TARGETS = {
    "ffn": ["gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def targets_of(scope: Any) -> Any:
    """The Llama modules that a router of this scope can rule."""
    return TARGETS.get(scope, "all-linear") if isinstance(scope, str) else "all-linear"


# Largest error relative to the largest entry. Unit roundoff u: 1.1e-16, 6e-8 and 2^-9 = 2e-3 (bf16). Chains of a few
# products with fan-in below 20 and sums over 10 tokens stay within some tens of u in the full-precision dtypes. In bf16
# the input, W0 x, the rank-space activations and every product are each rounded once, about ten roundings.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.5e-2}


@torch.no_grad()
def randomize(parameters: Any, std: float = 0.5) -> None:
    """Overwrite parameters (zero-initialised ones among them) by noise."""
    for parameter in parameters:
        parameter.normal_(std=std)
