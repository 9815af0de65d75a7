"""Published methods as values of the ordinary options. `preset: NAME` starts from them; what the config says wins.

Every preset names the paper and what was chosen where paper and code differ; docs/methods.md has the details.
"""

from __future__ import annotations

import copy
from typing import Any

_ALL_BUT_O = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]

PRESETS: dict[str, dict[str, Any]] = {
    # One ordinary LoRA: a single expert whose gate is always 1. The baseline for every mixture.
    "lora": {
        "num_experts": 1,
        "expert": {"kind": "lora", "r": 8, "lora_alpha": 16},
        "router": {"kind": "softmax"},
    },
    # MoLoRA, 2309.05444: dense soft merging, no balance loss; sizes and initialisation of the released code.
    "molora": {
        "num_experts": 10,
        "expert": {"kind": "lora", "r": 4, "lora_alpha": 16, "init_lora_weights": "gaussian", "init_std": 0.02},
        "router": {"kind": "softmax"},
    },
    # The sparse MoLoRA that MALoRA (2410.22782) compares with: softmax over all, then top-2, not renormalised.
    "molora_topk": {
        "num_experts": 8,
        "target_modules": _ALL_BUT_O,
        "expert": {"kind": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
        "router": {"kind": "top_k", "num_experts_per_tok": 2},
        "losses": [{"kind": "load_balance", "coef": 0.01}],
    },
    # MALoRA, 2410.22782: tables 8 and 9, inter-domain; balance coefficient of the tables (0.001 in the text). The
    # kind's default sizes are the paper's: r 12, shared_r 32.
    "malora": {
        "num_experts": 8,
        "target_modules": _ALL_BUT_O,
        "expert": {"kind": "malora", "lora_alpha": 24, "lora_dropout": 0.05, "beta": 1.0},
        "router": {"kind": "top_k", "num_experts_per_tok": 2},
        "losses": [{"kind": "load_balance", "coef": 0.01}],
    },
    # MALoRA-Small: the rank of MoLoRA kept, about a third fewer parameters; alpha / rank stays 2.
    "malora_small": {
        "num_experts": 8,
        "target_modules": _ALL_BUT_O,
        "expert": {"kind": "malora", "r": 8, "shared_r": 22, "lora_alpha": 16, "lora_dropout": 0.05, "beta": 1.0},
        "router": {"kind": "top_k", "num_experts_per_tok": 2},
        "losses": [{"kind": "load_balance", "coef": 0.01}],
    },
    # MoLA, 2402.08562: more experts in higher layers (its best allocation, 2-4-6-8 over the quarters of 32 layers),
    # renormalised top-2, balance loss at 1e-3. Give a list of your own for another number of layers.
    "mola": {
        "num_experts": [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8,
        "expert": {"kind": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
        "router": {"kind": "top_k", "num_experts_per_tok": 2, "norm_topk_prob": True},
        "losses": [{"kind": "load_balance", "coef": 0.001}],
    },
    # HydraLoRA, 2404.19245: one A, several B, dense routing, no balance loss.
    "hydralora": {
        "num_experts": 3,
        "target_modules": ["q_proj", "v_proj"],
        "expert": {"kind": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "shared_down": True},
        "router": {"kind": "softmax"},
    },
}


def merge_preset(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preset's values under the given ones.

    Mappings are merged option by option, except that another `kind` discards the preset's options for the old kind.
    Lists replace lists.
    """
    merged = copy.deepcopy(preset)
    for key, value in given.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            same_kind = value.get("kind", below.get("kind")) == below.get("kind")
            merged[key] = below | value if same_kind else value
        else:
            merged[key] = value
    return merged
