"""Prefill and generation of a whole converted model against the dense one, in one process.

    python benchmarks/converted_speed.py --dtype fp32 --threads 1

A Llama of about 0.3 billion parameters with random weights (20 layers, 1024 -> 2816, 16 heads, vocabulary 32,000). Half
of eight experts are active, chosen by a top-k router as it runs in use: routing is part of the time. The dense model
runs twice, as a control. Figures are tokens per second and ratios of median times to the first dense model; arms take
turns in random order.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from moadapt import convert_ffn_to_experts

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def build(num_experts: int, dtype: torch.dtype) -> dict[str, Any]:
    """Models by arm."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()
    router = {"kind": "top_k", "num_experts_per_tok": num_experts // 2, "combine": "unit", "init": "normal"}
    routed = convert_ffn_to_experts(copy.deepcopy(dense), {"num_experts": num_experts, "router": router}).eval()
    return {"dense": dense, "dense again": dense, f"{num_experts // 2} of {num_experts} experts": routed}


def cases(tokens: int) -> dict[str, tuple[int, Callable[[Any], None]]]:
    """What is timed: name -> (tokens, function of the model)."""

    def prefill(rows: int, length: int) -> tuple[int, Callable[[Any], None]]:
        ids = torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
        return rows * length, lambda model: model(input_ids=ids, logits_to_keep=1)

    def decode(rows: int) -> tuple[int, Callable[[Any], None]]:
        ids = torch.randint(3, SHAPE["vocab_size"], (rows, 16), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return rows * tokens, lambda model: model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return {
        "prefill, 1 x 512": prefill(1, 512),
        "prefill, 2 x 512": prefill(2, 512),
        f"generation, batch 1, {tokens} tokens": decode(1),
        f"generation, batch 8, {tokens} tokens": decode(8),
    }


@torch.no_grad()
def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--num-experts", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = build(args.num_experts, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    size = sum(parameter.numel() for parameter in models["dense"].parameters())
    order = random.Random(0)
    table = Table("", *[f"{arm}: tokens/s" for arm in models], *[f"{arm}: ratio" for arm in models])
    table.title = f"{size / 1e9:.2f} B parameters, {args.dtype}, {args.threads} thread(s), {args.rounds} rounds"
    for name, (tokens, run) in cases(args.new_tokens).items():
        seconds: dict[str, list[float]] = {arm: [] for arm in models}
        for model in models.values():
            run(model)
        for _ in track(range(args.rounds), description=name, console=Console(stderr=True), transient=True):
            for arm in order.sample(list(models), len(models)):
                started = time.perf_counter()
                run(models[arm])
                seconds[arm].append(time.perf_counter() - started)
        medians = {arm: statistics.median(times) for arm, times in seconds.items()}
        speeds = [f"{tokens / medians[arm]:.1f}" for arm in models]
        table.add_row(name, *speeds, *[f"{medians[arm] / medians['dense']:.2f}" for arm in models])
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
