"""Routings with every token's decision kept, random and adversarial, and their streamed counts made by loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.statistics.counts import ENTROPY_BINS, RouterCounts


@dataclass
class Trace:
    """One router's decisions about T tokens.

    Attributes:
        probs: T rows of N probabilities.
        chosen: the experts that each token selected, largest weight first.
        task: of each token.
        sequence: of each token.
        token: input id of each token.
    """

    probs: list[list[float]]
    chosen: list[list[int]]
    task: list[int]
    sequence: list[int]
    token: list[int]

    @property
    def num_experts(self) -> int:
        return len(self.probs[0])

    def __len__(self) -> int:
        return len(self.probs)

    def count(self, expert: int, task: int | None = None) -> int:
        return sum(expert in chosen for chosen, of in zip(self.chosen, self.task, strict=True) if task in (None, of))


def make_trace(kind: str, num_experts: int = 4, k: int = 2, tokens: int = 240, seed: int = 0) -> Trace:
    """`random`, `uniform`, `collapsed`, `ties`, `threshold` (0 to N experts), or `one_token_task`."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(tokens, num_experts, generator=generator)).double().softmax(-1)
    sequence = [place // 12 for place in range(tokens)]
    task = [number % 3 for number in sequence]
    if kind == "uniform":
        probs = torch.full_like(probs, 1 / num_experts)
    if kind == "collapsed":
        probs = torch.zeros_like(probs)
        probs[:, 1], probs[:, 2] = 0.75, 0.25
    if kind == "ties":
        probs = torch.zeros_like(probs)
        probs[:, :3] = 1 / 3
    if kind == "one_token_task":
        task = [2 if place == 0 else number % 2 for place, number in enumerate(sequence)]
        sequence = [0, *(number + 1 for number in sequence[1:])]
    chosen = []
    for place, row in enumerate(probs.tolist()):
        ranked = sorted(range(num_experts), key=lambda expert: -row[expert])
        if kind == "threshold":
            chosen.append([expert for expert in ranked if row[expert] > 0.3 and place % 10])
        elif kind == "uniform":
            chosen.append([(place + step) % num_experts for step in range(k)])
        else:
            chosen.append(ranked[:k])
    token = torch.randint(0, 9, (tokens,), generator=generator).tolist()
    return Trace(probs.tolist(), chosen, task, sequence, token)


def entropy_of(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def stream(trace: Trace, name: str = "router", tasks: int = 3, *, layer: int = 0, module: str = "mlp") -> RouterCounts:
    """The counts, one token at a time; the prompt is a sequence's first half."""
    experts, sequences = trace.num_experts, sorted(set(trace.sequence))
    counts = RouterCounts.zeros(
        name, [str(e) for e in range(experts)], [f"t{n}" for n in range(tasks)], layer=layer, module=module,
        vocabulary_size=10,
    )  # fmt: skip
    by_sequence = torch.zeros(len(sequences), experts, dtype=torch.int32)
    task_of = torch.zeros(len(sequences), dtype=torch.int64)
    assert counts.vocabulary is not None
    for place, (row, chosen, task) in enumerate(zip(trace.probs, trace.chosen, trace.task, strict=True)):
        part, entropy = int(place % 12 >= 6), entropy_of(row)
        counts.rows[task, part, 0] += 1
        counts.active[len(chosen)] += 1
        counts.entropy[task] += torch.tensor([entropy, entropy**2], dtype=torch.float64)
        counts.entropy_histogram[min(int(entropy / math.log(experts) * ENTROPY_BINS), ENTROPY_BINS - 1)] += 1
        counts.probs[task] += torch.tensor(row, dtype=torch.float64)
        number = sequences.index(trace.sequence[place])
        task_of[number] = task
        for first in chosen:
            counts.selections[task, part, 0, first] += 1
            counts.weights[task, part, 0, first] += row[first]
            by_sequence[number, first] += 1
            for second in chosen:
                counts.pairs[first, second] += 1
        if chosen:
            counts.top[task, chosen[0]] += 1
            counts.vocabulary[trace.token[place], chosen[0]] += 1
    counts.add_sequences(torch.arange(len(sequences), dtype=torch.float64), task_of, by_sequence)
    return counts


def clustered(
    sizes: list[int], lengths: list[tuple[int, int]], base: Tensor, concentration: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sequences of unrelated tasks: (M,) tasks, (M, N) counts.

    Args:
        sizes: sequences of each task.
        lengths: shortest and longest of each task.
        base: (N,) expected shares, the same for all tasks.
        concentration: how alike sequences are; 0 makes every token independent of its sequence.
        generator: of the draws.
    """
    tasks: list[int] = []
    counts: list[Tensor] = []
    for task, (size, (low, high)) in enumerate(zip(sizes, lengths, strict=True)):
        shares = base.expand(size, -1)
        if concentration:
            shares = torch._sample_dirichlet((concentration * shares).contiguous(), generator=generator)
        picks = torch.multinomial(shares, high, replacement=True, generator=generator)
        kept = torch.arange(high) < torch.randint(low, high + 1, (size, 1), generator=generator)
        counts.append(torch.zeros(size, len(base), dtype=torch.int64).scatter_add_(1, picks, kept.long()))
        tasks += [task] * size
    return torch.tensor(tasks), torch.cat(counts)
