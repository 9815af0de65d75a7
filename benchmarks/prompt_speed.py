"""Speed of a mixture layer with one decision for each sequence, against one plain LoRA of the same rank.

    python benchmarks/prompt_speed.py                        # 8 sequences x 256 tokens, 2048 -> 2048, r=16, top 2 of N
    python benchmarks/prompt_speed.py --dtype fp32 --features 1024 --experts 4 64 --rounds 15

Measured is forward + backward of the frozen base layer plus its adapter, with gradients to the input, the gates and
the adapter. Gates and indices are given (random, uniform), so routers are left out; dropout is 0; mixtures are in fp32,
plain adapters in the base's dtype. All variants run in every round, in a new order each, CPU time of one thread. The
table shows medians as ratios to the plain LoRA, which runs twice: the difference of these two is the noise. Set
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296 to keep the allocator out.

The plain LoRA is written here, as one autograd function around its base layer: no faster form of it is known to us. Of
rank r it does half of the adapter products of a top-2 mixture; of rank K r it does the same ones. MALoRA has experts of
rank r and a shared rank of N r / 2. "one expert" is a bank of N = 1, as in `expert_unit: module`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from moadapt.experts import LoraBank, LoraExpertConfig, MaloraBank, MaloraExpertConfig
from moadapt.experts.base import ExpertBank
from moadapt.routing import Routing

Variant = tuple[Callable[[], Tensor], list[Tensor]]
"""A forward pass, and the tensors that get gradients."""


class PlainLora(torch.autograd.Function):
    """y = x W^T + s (x A^T) B, with every product accumulated into the buffer that it belongs to."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_RO: Tensor, scaling: float) -> Tensor:
        h_TR = (x_TI @ a_RI.T).mul_(scaling)
        ctx.save_for_backward(x_TI, h_TR, w_OI, a_RI, b_RO)
        ctx.scaling = scaling
        return (x_TI @ w_OI.T).addmm_(h_TR, b_RO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TR, w_OI, a_RI, b_RO = ctx.saved_tensors
        grad_TR = (grad_TO @ b_RO.T).mul_(ctx.scaling)
        grad_x = (grad_TO @ w_OI).addmm_(grad_TR, a_RI)
        return grad_x, None, grad_TR.T @ x_TI, h_TR.T @ grad_TO, None


def make_routing(rows: int, experts: int, kept: int | None) -> Routing:
    """Random gates for each sequence; `kept` None keeps all experts."""
    probs_GN = torch.softmax(torch.randn(rows, experts), dim=-1)
    selected_GN, indices_GK = torch.ones_like(probs_GN, dtype=torch.bool), None
    if kept is not None:
        indices_GK = probs_GN.topk(kept, dim=-1).indices
        selected_GN = torch.zeros_like(selected_GN).scatter_(-1, indices_GK, True)
    weights_GN = (probs_GN * selected_GN).requires_grad_()
    return Routing(weights_GN, selected_GN, probs_GN, probs_GN, granularity="prompt", indices_TK=indices_GK)


def peft_layer(base: nn.Linear, rank: int) -> nn.Module:
    """peft's LoRA around the same weight, with adapters in its dtype."""
    holder = nn.Sequential(nn.Linear(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype))
    holder[0].weight = base.weight
    layer = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]), holder)[0]
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(base.weight.dtype)
    return layer


def build(args: argparse.Namespace) -> dict[str, Variant]:
    """Every variant by name."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    size, rank, kept, rows = args.features, args.rank, args.kept, args.sequences
    base = nn.Linear(size, size, bias=False, dtype=dtype).requires_grad_(False)
    x_TI = torch.randn(rows * args.length, size, dtype=dtype, requires_grad=True)

    def plain(rank: int) -> Variant:
        a_RI, b_RO = (torch.randn(rank, size, dtype=dtype).mul_(0.02).requires_grad_() for _ in range(2))
        return lambda: PlainLora.apply(x_TI, base.weight, a_RI, b_RO, 2.0), [x_TI, a_RI, b_RO]

    def mixture(bank: ExpertBank, kept: int | None, per_token: bool = False) -> Variant:
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.02)
        routing = make_routing(rows, bank.num_experts, kept)
        given = routing.per_token(len(x_TI)) if per_token else routing
        leaves = [x_TI, routing.weights_TN, *bank.parameters()]
        if per_token:  # the gates of the tokens are the leaf, or their graph would be freed by the first round
            detached = given.weights_TN.detach().requires_grad_()
            given = Routing(detached, given.selected_TN, given.logits_TN, given.probs_TN, indices_TK=given.indices_TK)
            leaves[1] = detached
        return lambda: bank(x_TI, given, base), leaves

    def lora(experts: int) -> LoraBank:
        return LoraBank(LoraExpertConfig(r=rank, lora_alpha=2 * rank), size, size, experts, dtype=torch.float32)

    def malora(experts: int) -> MaloraBank:
        config = MaloraExpertConfig(r=rank, shared_r=rank * experts // 2, lora_alpha=2 * rank, lora_dropout=0.0)
        return MaloraBank(config, size, size, experts, dtype=torch.float32)

    peft = peft_layer(base, rank)
    variants: dict[str, Variant] = {
        "base": (lambda: base(x_TI), [x_TI]),
        "plain LoRA, rank r": plain(rank),
        "plain LoRA, rank r, again": plain(rank),
        "plain LoRA, rank K r": plain(kept * rank),
        "peft LoRA, rank r": (lambda: peft(x_TI), [x_TI, *(p for p in peft.parameters() if p.requires_grad)]),
        "one expert": mixture(lora(1), None),
    }
    for experts in args.experts:
        variants[f"top {kept} of {experts}"] = mixture(lora(experts), kept)
        if args.per_token:
            variants[f"top {kept} of {experts}, token by token"] = mixture(lora(experts), kept, per_token=True)
    for experts in args.experts[:2]:
        variants[f"MALoRA, top {kept} of {experts}"] = mixture(malora(experts), kept)
    return variants


def timed(variant: Variant, grad: Tensor) -> float:
    """CPU seconds (wall seconds with several threads) of one forward and backward pass, without old gradients."""
    step, leaves = variant
    for leaf in leaves:
        leaf.grad = None
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    start = clock()
    step().backward(grad)
    return (clock() - start) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kept", type=int, default=2)
    parser.add_argument("--per-token", action="store_true", help="also the same gates, given for each token")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)

    variants = build(args)
    grad = torch.randn_like(variants["base"][0]())
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in track(range(args.rounds + 2), description="rounds", transient=True):
        # A new order in every round: what runs before a variant leaves its traces in the caches.
        for name in random.sample(list(variants), len(variants)):
            seconds = timed(variants[name], grad)
            if index >= 2:
                times[name].append(seconds)

    middle = {name: statistics.median(values) for name, values in times.items()}
    quarter = {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}
    plain, wide = "plain LoRA, rank r", "plain LoRA, rank K r"
    table = Table(
        title=f"{args.dtype}, {args.sequences} x {args.length} tokens, {args.features} -> {args.features}, "
        f"r={args.rank}, K={args.kept}; plain LoRA {middle[plain] * 1e3:.1f} ms, {args.rounds} rounds, "
        f"{args.threads} thread(s)",
        caption="medians as ratios to the plain LoRA of rank r and of rank K r, and the fastest quarter to rank r",
    )
    for column in ("variant", "to rank r", "to rank K r", "fastest quarter"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name in variants:
        ratios = (middle[name] / middle[plain], middle[name] / middle[wide], quarter[name] / quarter[plain])
        table.add_row(name, *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
