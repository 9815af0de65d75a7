"""What `record_routing` costs: time beside a forward pass, and memory while a million tokens are counted.

    python benchmarks/recording_overhead.py                  # CPU time of one thread, fp32
    python benchmarks/recording_overhead.py --device cuda --dtype bf16 --rounds 50

The model is a random Llama of 0.1 B parameters with a top-2-of-8 mixture on all of its linears and a router at each:
84 routers. A forward pass over 4 x 256 tokens with and without recording takes turns, in a new order each round; the
table shows the median of each, and the median of the rounds' ratios. The pass without recording is run twice: the ratio
of these two is the noise. Memory is that of the process (RSS), over passes of a small model with the same number of
routers in a layer; what grows with the tokens would show between the first tenth and the end.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from moadapt import MixtureModel, get_mixture_model
from moadapt.statistics import record_routing

VOCABULARY = 8000
MIXTURE: dict[str, Any] = {
    "num_experts": 8,
    "expert": {"kind": "lora", "r": 8, "lora_alpha": 16},
    "router": {"kind": "top_k", "num_experts_per_tok": 2, "scope": "linear"},
}


def model_of(hidden: int, layers: int, args: argparse.Namespace) -> MixtureModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=1024,
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    base = LlamaForCausalLM(config).to(args.device, dtype)
    return get_mixture_model(base, MIXTURE).eval()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_time(args: argparse.Namespace, console: Console) -> None:
    model = model_of(768, 12, args)
    ids = torch.randint(0, VOCABULARY, (args.rows, args.length), device=args.device)
    task_ids = torch.arange(args.rows, device=args.device) % 4
    tasks = ["a", "b", "c", "d"]
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    variants = {"alone": None, "alone, again": None, "recorded": {}, "recorded, by token too": {"vocabulary": True}}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in track(range(args.rounds + 2), "rounds", console=console):
        random.shuffle(names)
        for name in names:
            options = variants[name]
            recording = nullcontext() if options is None else record_routing(model, tasks, **options)
            with recording, torch.no_grad():
                for _ in range(1 if options is None else 2):  # the first pass of a recording makes its tensors
                    synchronize(args.device)
                    start = clock()
                    model(input_ids=ids, task_ids=task_ids, use_cache=False)
                    synchronize(args.device)
                    seconds = clock() - start
            if number >= 2:
                taken[name].append(seconds)
    parameters = sum(parameter.numel() for parameter in model.base_model.parameters())
    title = f"{parameters / 1e6:.0f} M parameters, 84 routers, {args.rows} x {args.length} tokens, {args.dtype}"
    table = Table("forward pass", "ms", "ratio", "over it", title=title)
    for name, values in taken.items():
        ratios = [value / alone for value, alone in zip(values, taken["alone"], strict=True)]
        ratio = statistics.median(ratios)
        milliseconds = 1000 * statistics.median(values)
        table.add_row(name, f"{milliseconds:.1f}", f"{ratio:.4f}", f"{100 * (ratio - 1):+.2f} %")
    console.print(table)


def resident() -> float:
    """Memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def measure_memory(args: argparse.Namespace, console: Console) -> None:
    model = model_of(64, 2, args)
    ids = torch.randint(0, VOCABULARY, (8, 512), device=args.device)
    passes = args.tokens // ids.numel()
    table = Table(
        "passes", "after a tenth", "in the end", "growth", title=f"{passes * ids.numel():,} tokens, RSS in MiB"
    )
    for name in ("alone", "recorded"):
        recording = record_routing(model) if name == "recorded" else nullcontext()
        with recording as counted, torch.no_grad():
            for number in track(range(passes), name, console=console):
                if number == passes // 10:
                    first = resident()
                model(input_ids=ids, use_cache=False)
            last = resident()
        table.add_row(name, f"{first:.0f}", f"{last:.0f}", f"{last - first:+.1f}")
        if counted is not None:
            assert all(int(counts.rows.sum()) == passes * ids.numel() for counts in counted.routers.values())
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="for the memory; 0 leaves it out")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    console = Console()
    measure_time(args, console)
    if args.tokens > 0:
        measure_memory(args, console)


if __name__ == "__main__":
    main()
