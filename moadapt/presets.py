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
    # -- a decision for each prompt, or for each task ---------------------------------------------------------------
    # MiLoRA, 2410.18035: the LoRA modules of a transformer layer are the experts, one router per layer reads the prompt
    # and keeps 3 of them. The paper says both 3 and 1; with num_experts_per_tok: 1 set norm_topk_prob: false, for the
    # renormalised gate of one expert is a constant. Plain GELU; the paper's learnable function is activation: rational.
    "milora": {
        "expert_unit": "module",
        "expert": {"kind": "lora", "r": 32, "lora_alpha": 32},
        "router": {
            "kind": "top_k",
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "scope": "block",
            "granularity": "prompt",
            "pooler": "self_attention",
            "activation": "gelu",
        },
        "losses": [{"kind": "load_balance", "coef": 0.01, "count": "argmax"}],
    },
    # SMEAR, 2306.03745, with LoRA experts in the place of its adapters: the mean prompt state, both sides of the score
    # normalised, and the experts' factors merged for each prompt. No balance loss. The mean leaves padding out.
    "smear": {
        "num_experts": 8,
        "expert": {"kind": "lora", "r": 8, "lora_alpha": 8, "mixing": "factors"},
        "router": {
            "kind": "softmax",
            "scope": "block",
            "granularity": "prompt",
            "pooler": "mean",
            "activation": "none",
            "normalize": True,
        },
    },
    # MTL-LoRA, 2410.09437: one A, a transform of each task, three B's mixed by a table of logits.
    "mtl_lora": {
        "num_experts": 3,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "expert": {"kind": "mtl_lora", "r": 8, "lora_alpha": 16},
        "router": {"kind": "task_table", "gate": "softmax", "temperature": 0.1, "init": "kaiming"},
    },
    # Poly, 2202.13914, as in peft: skills switched on by task through a relaxed Bernoulli, their factors averaged; the
    # delta is divided by the rank, which is lora_alpha 1.
    "poly": {
        "num_experts": 4,
        "expert": {"kind": "lora", "r": 8, "lora_alpha": 1, "mixing": "factors"},
        "router": {"kind": "task_table", "gate": "bernoulli", "init": "uniform"},
    },
    # -- dense feed-forward blocks cut into experts ---------------------------------------------------------------
    # DSMoE, 2502.12455: eight consecutive slices, sigmoid gates with a threshold and a straight-through gradient, and
    # an L1 penalty on the kept gates. Experts and routers are trained; the paper does not say what else is.
    "dsmoe": {
        "num_experts": 8,
        "expert": {"kind": "ffn_partition", "split": {"kind": "contiguous"}, "trainable": True},
        "router": {"kind": "sigmoid_ste", "threshold": 0.5},
        "losses": [{"kind": "sparsity", "coef": 1.0}],
    },
    # LLaMA-MoE v1, 2406.16554: the random split of the launched runs, noisy top-2 of 8 from a zero gate, softmax over
    # the kept experts times N / K. Of its balance loss CV²(importance) + CV²(load), the first part.
    "llama_moe": {
        "num_experts": 8,
        "expert": {"kind": "ffn_partition", "split": {"kind": "random"}, "trainable": True},
        "router": {
            "kind": "top_k",
            "num_experts_per_tok": 2,
            "combine": "softmax_renorm",
            "rescale": "n_over_k",
            "init": "zeros",
            "noisy_gating": True,
        },
        "losses": [{"kind": "importance", "coef": 0.01}],
    },
    # LLaMA-MoE v2, 2411.15708, its vanilla form: consecutive slices, top-2 of 8, the kept weights times 4.
    "llama_moe_v2": {
        "num_experts": 8,
        "expert": {"kind": "ffn_partition", "split": {"kind": "contiguous"}, "trainable": True},
        "router": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "softmax_renorm", "rescale": 4.0},
        "losses": [{"kind": "load_balance", "coef": 0.01}],
    },
    # FactorLLM, 2408.11855, 1R4E2K: stage one fits the routers to the dense block at conversion, stage two trains the
    # slices under 0/1 gates, which give the routers no gradient.
    "factorllm": {
        "num_experts": 4,
        "expert": {"kind": "ffn_partition", "split": {"kind": "contiguous"}, "trainable": True},
        "router": {
            "kind": "top_k",
            "num_experts_per_tok": 2,
            "combine": "unit",
            "rescale": "n_over_k",
            "bias": True,
            "fit": {"kind": "prior_approximate"},
        },
    },
    # CMoE, 2502.04416, S3A3E8: three shared experts and three of five routed ones, no training.
    "cmoe": {
        "num_experts": 5,
        "expert": {"kind": "ffn_partition", "num_shared_experts": 3, "split": {"kind": "activation_rate"}},
        "router": {"kind": "representative", "num_experts_per_tok": 3},
    },
    # EMoE, 2310.10908: balanced clusters of gate rows, scored by their mean row, 16 of 64, summed as they are.
    "emoe": {
        "num_experts": 64,
        "expert": {"kind": "ffn_partition", "split": {"kind": "kmeans"}},
        "router": {"kind": "top_k", "num_experts_per_tok": 16, "combine": "unit", "init": "mean_gate"},
    },
    # D2DMoE, 2310.04361, on a model that is as dense as it comes: regressed output norms, as many experts as a token
    # needs. The number of experts is not the paper's.
    "d2dmoe": {
        "num_experts": 8,
        "expert": {"kind": "ffn_partition", "split": {"kind": "kmeans"}},
        "router": {"kind": "norm_regression"},
    },
    # ReMoE's routing, 2412.14711, over slices of a dense block: ReLU gates and an adaptive penalty to a target share.
    "remoe": {
        "num_experts": 8,
        "expert": {"kind": "ffn_partition", "split": {"kind": "contiguous"}, "trainable": True},
        "router": {"kind": "relu"},
        "losses": [{"kind": "target_sparsity", "target": 0.5}],
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
