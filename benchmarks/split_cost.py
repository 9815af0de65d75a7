"""Time and memory of cutting one feed-forward block into experts, with random weights.

    python benchmarks/split_cost.py                              # 4096 -> 11008 (Llama-2-7B), 8, 16 and 64 experts
    python benchmarks/split_cost.py --hidden 2048 --neurons 5632 --experts 16

Every row is a process of its own with one thread. "peak" is the highest resident memory during the split less what the
weights and the calibration inputs took before it. Kinds that read activations see `--tokens` random inputs. `shared` of
the experts are always on. The comparison is the square cost matrix that CMoE (2502.04416) gives to its assignment
solver, (neurons that are not shared)² doubles. "assignment" is that step alone, on random costs.

Random weights have no clusters: k-means takes more iterations on them than on a trained model, so times are high.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moadapt.ffn import FeedForward
from moadapt.registry import SPLITS
from moadapt.splits import BlockSample, Sizes
from moadapt.splits.balanced import balanced_assignment

KINDS = ["assignment", "contiguous", "random", "kmeans", "coactivation", "activation_rate", "gradient"]
MB = 1e6


def memory(field: str) -> float:
    """A line of /proc/self/status in MB: VmRSS now, VmHWM the highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / MB


def measure(kind: str, total: int, shared: int, hidden: int, neurons: int, tokens: int) -> tuple[float, float]:
    """(seconds, peak MB beyond the inputs) of one split."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = Sizes(shared, total - shared, neurons)
    if kind == "assignment":
        cost_FN = torch.rand(neurons, total)

        def run() -> object:
            return balanced_assignment(cost_FN, Sizes(0, total, neurons).counts)

    else:
        std = hidden**-0.5
        up_FD, gate_FD, down_FD = (torch.randn(neurons, hidden) * std for _ in range(3))
        ffn = FeedForward(up_FD, down_FD, gate_FD, torch.nn.functional.silu)
        sample = BlockSample(torch.randn(tokens, hidden), torch.rand(sizes.num_experts, neurons).square())
        split = SPLITS.build(SPLITS.parse(kind))

        def run() -> object:
            return split.assign(ffn, sizes, sample, "block")

    Path("/proc/self/clear_refs").write_text("5")  # the highest starts again from now
    before, start = memory("VmRSS"), time.perf_counter()
    run()
    return time.perf_counter() - start, memory("VmHWM") - before


def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()

    title = f"One block {args.hidden} -> {args.neurons}, fp32 weights, {args.tokens} calibration tokens, one thread"
    table = Table(title=title, title_justify="left")
    for column in ("split", "experts", "shared", "seconds", "peak MB", "CMoE's cost matrix MB"):
        table.add_column(column, justify="left" if column == "split" else "right")
    cases = [(kind, total) for kind in args.kinds for total in args.experts]
    context = multiprocessing.get_context("spawn")
    for kind, total in track(cases, transient=True):
        shared = total // 8 if kind == "activation_rate" else 0
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            job = pool.submit(measure, kind, total, shared, args.hidden, args.neurons, args.tokens)
            seconds, peak = job.result()
        square = sum(Sizes(shared, total - shared, args.neurons).routed_counts) ** 2 * 8 / MB
        clusters = kind not in ("contiguous", "random")
        table.add_row(
            kind, str(total), str(shared), f"{seconds:.2f}", f"{peak:.0f}", f"{square:.0f}" if clusters else "–"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
