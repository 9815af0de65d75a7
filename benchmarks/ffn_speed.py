"""Speed of a feed-forward block cut into experts, half of them active, against the dense block, in one process.

    python benchmarks/ffn_speed.py                              # fp32, one thread: inference and training
    python benchmarks/ffn_speed.py --dtype bf16 --experts 4
    python benchmarks/ffn_speed.py --bodies all --tokens 1 2 4  # every way of computing it, not only the chosen one

The peer is the gated block as models have it: three linear layers, 1024 -> 2816 -> 1024. Every token selects half of
the experts at random, anew in every round. Gates and selection are given: what a router costs is left out, what it
takes to turn the selection into lists of tokens is in. Training is forward + backward with gradients to the input, the
gates and all weights; gates have a gradient where experts are active (`train`) or everywhere (`train,
straight-through`).

All variants run in every round, in a new order each, each after 64 MB were written, so that weights come from memory as
in a model of many layers; CPU time of one thread, wall time of several. The table shows
medians as ratios to the dense block, which runs twice: the difference of these two is the noise. Set
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296 to keep the allocator out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from moadapt.experts.partition_blocks import BODIES
from moadapt.experts.partition_compute import mix_experts
from moadapt.experts.partition_dispatch import choose_body
from moadapt.ffn import FeedForward, StackedExperts
from moadapt.routing import Routing

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("inference", "train", "train, straight-through")
CEILING = 1.05


def goal(mode: str, dtype: str, tokens: int, experts: int, threads: int) -> float | None:
    """What the ratio to the dense block must not exceed; None where nothing is promised."""
    if mode != "inference":
        if dtype == "fp32" and tokens >= 512:
            return 0.65 if mode == "train" else 0.8
        return None
    if dtype == "fp32" and experts == 8 and (tokens == 1 or tokens >= 512):
        return 0.6 if threads == 1 or tokens == 1 else 0.65
    if dtype == "bf16" and experts == 4 and tokens == 2048:
        return 0.7
    return CEILING


class DenseBlock(nn.Module):
    """The peer: gate, up and down as three linear layers."""

    def __init__(self, features: int, neurons: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(features, neurons, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(features, neurons, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(neurons, features, bias=False, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))

    def cut(self, experts: int, trained: bool) -> StackedExperts:
        down_FD = self.down_proj.weight.detach().T
        ffn = FeedForward(self.up_proj.weight.detach(), down_FD, self.gate_proj.weight.detach(), nn.functional.silu)
        cut = StackedExperts.cut(ffn, torch.arange(ffn.num_neurons).view(experts, -1))
        return StackedExperts(
            cut.in_NPD.requires_grad_(trained), cut.out_NMD.requires_grad_(trained), None, cut.act, True
        )


def make_routing(tokens: int, experts: int, active: int, straight_through: bool, trained: bool) -> Routing:
    """`active` experts of every token, drawn at random, with random weights."""
    indices_TK = torch.rand(tokens, experts).topk(active, dim=-1).indices
    selected_TN = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(-1, indices_TK, True)
    weights_TN = (torch.rand(tokens, experts) * selected_TN).requires_grad_(trained)
    return Routing(weights_TN, selected_TN, weights_TN, weights_TN, straight_through=straight_through)


CACHES = torch.empty(16 * 1024 * 1024)


def timed(step: Callable[[], Tensor], grad_TD: Tensor | None) -> float:
    """CPU seconds (wall seconds with several threads) of a forward pass, and of a backward pass if given a gradient."""
    CACHES.fill_(0.0)
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    start = clock()
    y_TD = step()
    if grad_TD is not None:
        y_TD.backward(grad_TD)
    return (clock() - start) / 1e9


def measure(args: argparse.Namespace, mode: str, tokens: int, bodies: list[str]) -> tuple[dict[str, list[float]], str]:
    """Seconds of every variant in every round, and the name of the body that is chosen."""
    dtype, trained = DTYPES[args.dtype], mode != "inference"
    block = DenseBlock(args.features, args.neurons, dtype).requires_grad_(trained)
    experts = block.cut(args.experts, trained)
    x_TD = torch.randn(tokens, args.features, dtype=dtype, requires_grad=trained)
    grad_TD = torch.randn(tokens, args.features, dtype=dtype) if trained else None
    active = round(args.active * args.experts)
    times: dict[str, list[float]] = {name: [] for name in ("dense", "dense again", "moadapt", *bodies)}
    chosen = set()
    for index in track(range(args.rounds + 2), description=f"{mode}, {tokens} tokens", transient=True):
        routing = make_routing(tokens, args.experts, active, mode.endswith("straight-through"), trained)
        chosen.add(choose_body(x_TD, routing, experts, trained))
        # A new order in every round: what runs before a variant leaves its traces in the caches.
        for name in random.sample(list(times), len(times)):
            for leaf in (x_TD, routing.weights_TN, experts.in_NPD, experts.out_NMD, *block.parameters()):
                leaf.grad = None

            def step(name: str = name, routing: Routing = routing) -> Tensor:
                if name.startswith("dense"):
                    return block(x_TD)
                return mix_experts(x_TD, routing, experts, body=None if name == "moadapt" else name[6:])  # type: ignore[arg-type]

            with torch.set_grad_enabled(trained):
                seconds = timed(step, grad_TD)
            if index >= 2:
                times[name].append(seconds)
    return times, "/".join(sorted(chosen))


def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 128, 256, 512, 2048])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--train-from", type=int, default=64, help="least number of tokens that training is timed for")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--neurons", type=int, default=2816)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=float, default=0.5, help="share of the experts that a token selects")
    parser.add_argument("--bodies", nargs="+", choices=[*BODIES, "all"], default=[])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)

    bodies = [f"body: {body}" for body in (BODIES if "all" in args.bodies else args.bodies)]
    table = Table(
        title=f"{args.dtype}, {args.features} -> {args.neurons}, N={args.experts}, {args.active:.0%} active; "
        f"{args.rounds} rounds, {args.threads} thread(s)",
        caption="ratios of medians to the dense block; in brackets of the fastest quarters",
    )
    for column in ("mode", "tokens", "dense, ms", "again", "moadapt", "(quarter)", "body", *bodies, "goal", "met"):
        table.add_column(column, justify="left" if column in ("mode", "body") else "right")
    for mode in args.modes:
        for tokens in args.tokens:
            if mode != "inference" and tokens < args.train_from:
                continue
            times, chosen = measure(args, mode, tokens, bodies)
            median = {name: statistics.median(values) for name, values in times.items()}
            ratio = {name: value / median["dense"] for name, value in median.items()}
            quarter = {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}
            wanted = goal(mode, args.dtype, tokens, args.experts, args.threads)
            met = "" if wanted is None else "yes" if ratio["moadapt"] <= wanted else "NO"
            table.add_row(
                mode,
                str(tokens),
                f"{median['dense'] * 1e3:.2f}",
                f"{ratio['dense again']:.2f}",
                f"{ratio['moadapt']:.2f}",
                f"({quarter['moadapt'] / quarter['dense']:.2f})",
                chosen,
                *(f"{ratio[body]:.2f}" for body in bodies),
                "" if wanted is None else f"{wanted:.2f}",
                met,
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
