"""Speed and memory of one mixture layer against its named peers, in one process.

    python benchmarks/layer_speed.py                         # the headline: 2048 tokens, 2048 -> 2048, N=8, r=16, K=2
    python benchmarks/layer_speed.py --dtype fp32 --features 1024 --rounds 25

Measured is forward + backward of the frozen base layer plus its adapter, with gradients to the input, the gates and
the adapter. Gates and indices are given (random, uniform), so routers are left out; dropout is 0. All variants run in
every round, in a new order each, CPU time of one thread. The table shows medians as ratios to the base layer alone,
which runs twice: the difference of these two is the noise. Set
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296 to keep the allocator out.

Peers: peft's LoRA of the same rank, as it comes (fp32 adapters) and in the base's dtype; a loop over the experts as the
method repositories have it (MoE-PEFT's MoLA: gather, fp32 LoRA, gate, index_add); the same loop for MALoRA. MALoRA has
the same r and a shared rank of N r / 2; "paper's rank" is its rule at equal parameters, r-bar = 1.5 r.
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
from moadapt.routing import Routing

Step = Callable[[], Tensor]


def make_routing(tokens: int, experts: int, kept: int) -> Routing:
    probs_TN = torch.softmax(torch.randn(tokens, experts), dim=-1)
    indices_TK = probs_TN.topk(kept, dim=-1).indices
    selected_TN = torch.zeros_like(probs_TN, dtype=torch.bool).scatter_(-1, indices_TK, True)
    weights_TN = (probs_TN * selected_TN).requires_grad_()
    return Routing(weights_TN, selected_TN, probs_TN, probs_TN, indices_TK=indices_TK)


def loop_over_experts(
    x_TI: Tensor, base_TO: Tensor, routing: Routing, deltas: list[Callable[[Tensor], Tensor]]
) -> Tensor:
    """The published form: for each expert gather its tokens, apply it in fp32, gate, add back."""
    mixed_TO = torch.zeros(base_TO.shape, dtype=torch.float32)
    for expert, delta in enumerate(deltas):
        tokens = torch.where(routing.selected_TN[:, expert])[0]
        output = delta(x_TI[tokens].float()) * routing.weights_TN[tokens, expert, None]
        mixed_TO.index_add_(0, tokens, output)
    return base_TO + mixed_TO.to(base_TO.dtype)


def peft_layer(base: nn.Linear, rank: int, same_dtype: bool) -> nn.Module:
    holder = nn.Sequential(nn.Linear(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype))
    holder[0].weight = base.weight
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
    layer = inject_adapter_in_model(config, holder)[0]
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(base.weight.dtype if same_dtype else torch.float32)
    return layer


def fill(bank: nn.Module) -> nn.Module:
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.02)
    return bank


def build(args: argparse.Namespace) -> dict[str, Step]:
    """Every variant as a function that runs the forward pass and returns the output."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    size, experts, rank = args.features, args.experts, args.rank
    base = nn.Linear(size, size, bias=False, dtype=dtype).requires_grad_(False)
    x_TI = torch.randn(args.tokens, size, dtype=dtype, requires_grad=True)
    routing = make_routing(args.tokens, experts, args.kept)
    lora = fill(LoraBank(LoraExpertConfig(r=rank, lora_alpha=2 * rank), size, size, experts, dtype=torch.float32))
    shared = rank * experts // 2
    malora_config = MaloraExpertConfig(r=rank, shared_r=shared, lora_alpha=2 * rank, lora_dropout=0.0)
    malora = fill(MaloraBank(malora_config, size, size, experts, dtype=torch.float32))
    wide_config = MaloraExpertConfig(molora_r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    wide = fill(MaloraBank(wide_config, size, size, experts, dtype=torch.float32))
    default, same = peft_layer(base, rank, same_dtype=False), peft_layer(base, rank, same_dtype=True)

    def lora_delta(expert: int) -> Callable[[Tensor], Tensor]:
        return lambda x: (x @ lora.lora_A[expert].T) @ lora.lora_B[expert] * lora.scaling

    def malora_delta(expert: int) -> Callable[[Tensor], Tensor]:
        p_RC, b_RO = malora.malora_P[expert], malora.malora_B[expert]
        return lambda x: ((x @ malora.shared_A.T) @ p_RC.T) @ b_RO * malora.scaling

    lora_loop = [lora_delta(expert) for expert in range(experts)]
    malora_loop = [malora_delta(expert) for expert in range(experts)]
    zero_TO = torch.zeros(args.tokens, size, dtype=dtype)
    return {
        "base": lambda: base(x_TI),
        "base again": lambda: base(x_TI),
        "peft LoRA, as it comes": lambda: default(x_TI),
        "peft LoRA, same dtype": lambda: same(x_TI),
        "MoLoRA, loop over experts": lambda: loop_over_experts(x_TI, base(x_TI), routing, lora_loop),
        "MoLoRA, moadapt": lambda: lora(x_TI, routing, base),
        "MALoRA, loop over experts": lambda: loop_over_experts(x_TI, base(x_TI), routing, malora_loop),
        "MALoRA, moadapt": lambda: malora(x_TI, routing, base),
        "MALoRA, paper's rank": lambda: wide(x_TI, routing, base),
        "adapter alone: MoLoRA, loop": lambda: loop_over_experts(x_TI, zero_TO, routing, lora_loop),
        "adapter alone: MoLoRA, moadapt": lambda: lora(x_TI, routing, zero_TO.detach()),
        "adapter alone: MALoRA, loop": lambda: loop_over_experts(x_TI, zero_TO, routing, malora_loop),
        "adapter alone: MALoRA, moadapt": lambda: malora(x_TI, routing, zero_TO.detach()),
        "adapter alone: MALoRA, paper's rank": lambda: wide(x_TI, routing, zero_TO.detach()),
    }


def timed(step: Step, grad: Tensor, leaves: list[Tensor]) -> float:
    """CPU seconds (wall seconds with several threads) of one forward and backward pass, without old gradients."""
    for leaf in leaves:
        leaf.grad = None
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    start = clock()
    step().backward(grad)
    return (clock() - start) / 1e9


def saved_elements(step: Step, leaves: list[Tensor]) -> int:
    """Elements kept for the backward pass, beyond inputs and parameters, each storage counted once."""
    skip = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            storages[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def peak_bytes(step: Step, grad: Tensor, leaves: list[Tensor]) -> int:
    """Highest number of bytes that one forward and backward pass holds beyond what it started with."""
    for leaf in leaves:
        leaf.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step().backward(grad)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def leaves_of(step: Step) -> list[Tensor]:
    """The parameters and inputs that a variant closes over."""
    found: list[Tensor] = []

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Routing):
            visit(vars(value), depth)
        elif isinstance(value, nn.Module):
            visit(list(value.parameters()), depth)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item, depth)
        elif isinstance(value, dict):
            visit(list(value.values()), depth)
        elif callable(value) and depth < 4:
            for cell in getattr(value, "__closure__", None) or ():
                visit(cell.cell_contents, depth + 1)

    visit(step, 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kept", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)

    variants = build(args)
    grad = torch.randn_like(variants["base"]())
    leaves = {name: leaves_of(step) for name, step in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in track(range(args.rounds + 2), description="rounds", transient=True):
        # A new order in every round: what runs before a variant leaves its traces in the caches.
        for name in random.sample(list(variants), len(variants)):
            seconds = timed(variants[name], grad, leaves[name])
            if index >= 2:
                times[name].append(seconds)

    base = statistics.median(times["base"])
    base_peak = peak_bytes(variants["base"], grad, leaves["base"])
    table = Table(
        title=f"{args.dtype}, {args.tokens} tokens, {args.features} -> {args.features}, N={args.experts}, "
        f"r={args.rank}, K={args.kept}; base {base * 1e3:.1f} ms, {args.rounds} rounds, {args.threads} thread(s)",
        caption="time and peak: ratios to the base layer; saved: elements kept for backward, in (T, O) activations",
    )
    for column in ("variant", "time", "fastest quarter", "saved", "peak"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, values in times.items():
        saved = saved_elements(variants[name], leaves[name]) / grad.numel()
        quarter = statistics.quantiles(values, n=4)[0] / statistics.quantiles(times["base"], n=4)[0]
        row = [f"{statistics.median(values) / base:.2f}", f"{quarter:.2f}", f"{saved:.3f}"]
        table.add_row(name, *row, f"{peak_bytes(variants[name], grad, leaves[name]) / base_peak:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
