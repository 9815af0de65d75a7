"""A naive mixture of adapters in float64: loops over tokens and experts, written from the papers' equations.

Nothing of moadapt is used here, and nothing is stacked, gathered or shared between experts. Autograd through these
loops gives the expected gradients. Names: D router input, I in, O out, N experts, R rank, C shared rank, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Decision:
    """What a router decided for one token: N gates (a list of scalars), and how it came to them."""

    gates: list[Tensor]
    selected: list[bool]
    logits: list[Tensor]
    probs: list[Tensor]
    straight_through: bool = False


def sigmoid(value: Tensor) -> Tensor:
    """1 / (1 + exp(-v))."""
    return 1.0 / (1.0 + torch.exp(-value))


def factor(rescale: Any, num_experts: int, num_active: int, num_kept: int | None = None) -> float:
    """What `rescale` multiplies the gates of one token by."""
    if rescale == "n_over_active":
        return num_experts / max(1, num_active)
    if rescale == "n_over_k":
        assert num_kept is not None
        return num_experts / num_kept
    return 1.0 if rescale == "none" else rescale


def softmax(values: list[Tensor]) -> list[Tensor]:
    """exp(v) / sum exp(v), shifted by the maximum."""
    largest = max(value.item() for value in values)
    exponentials = [torch.exp(value - largest) for value in values]
    total = exponentials[0]
    for item in exponentials[1:]:
        total = total + item
    return [item / total for item in exponentials]


@dataclass
class NaiveRouter:
    """The equations of the linear routers for one token.

    `draws` holds the random numbers of training: `jitter` (T, D) factors and `noise` (T, N) normal numbers. `scales`
    are those of the layer norms of x and of the rows of W, where the options ask for them.
    """

    options: dict[str, Any]
    weight_ND: Tensor
    noise_weight_ND: Tensor | None = None
    draws: dict[str, Tensor] = field(default_factory=dict)
    bias_N: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> NaiveRouter:
        """From a router's parameters by name."""
        scales = (tensors["input_scale"], tensors["weight_scale"]) if "input_scale" in tensors else None
        return cls(options, tensors["weight"], tensors.get("noise_weight"), {}, tensors.get("bias"), scales)

    def __call__(self, x_D: Tensor, token: int) -> Decision:
        if "jitter" in self.draws:
            x_D = x_D * self.draws["jitter"][token]
        rows = list(self.weight_ND)
        if self.scales is not None:
            x_D = layer_norm(x_D, self.scales[0])
            rows = [layer_norm(row, self.scales[1]) for row in rows]
        logits = [(row * x_D).sum() for row in rows]
        if "noise" in self.draws:
            assert self.noise_weight_ND is not None
            spread = [torch.log1p(torch.exp((row * x_D).sum())) + 0.01 for row in self.noise_weight_ND]
            logits = [
                logit + normal * std
                for logit, normal, std in zip(logits, self.draws["noise"][token], spread, strict=True)
            ]
        if self.bias_N is not None:
            logits = [logit + bias for logit, bias in zip(logits, self.bias_N, strict=True)]
        if self.options["kind"] == "sigmoid_ste":
            return self._threshold(logits)
        if self.options["kind"] == "relu":
            return self._relu(logits)
        temperature = self.options.get("temperature", 1.0)
        scaled = [logit / temperature for logit in logits]
        combine = self.options.get("combine", "softmax_renorm" if self.options.get("norm_topk_prob") else "softmax")
        probs = [sigmoid(score) for score in scaled] if combine == "sigmoid" else softmax(scaled)
        experts = range(len(probs))
        if self.options["kind"] == "softmax":
            return Decision(probs, [True] * len(probs), logits, probs)
        num_kept = self.options.get("num_experts_per_tok", 2)
        kept = sorted(experts, key=lambda expert: -probs[expert].item())[:num_kept]
        weights = probs
        if combine == "softmax_renorm":
            weights = [prob / sum(probs[expert] for expert in kept) for prob in probs]
        if combine == "unit":
            weights = [torch.ones_like(prob) for prob in probs]
        times = factor(self.options.get("rescale", "none"), len(probs), len(kept), num_kept)
        gates = [weights[expert] if expert in kept else torch.zeros_like(probs[expert]) for expert in experts]
        straight_through = self.options.get("straight_through", False)
        if straight_through:
            gates = [gate.item() + prob - prob.item() for gate, prob in zip(gates, probs, strict=True)]
        selected = [expert in kept for expert in experts]
        return Decision([gate * times for gate in gates], selected, logits, probs, straight_through)

    def _threshold(self, logits: list[Tensor]) -> Decision:
        """S(s) = G(s) + s - s with constants for the first and the last, times N / active."""
        probs = [sigmoid(logit) for logit in logits]
        best = sorted(range(len(probs)), key=lambda expert: -probs[expert].item())
        best = best[: self.options.get("min_active", 0)]
        threshold = self.options.get("threshold", 0.5)
        selected = [prob.item() > threshold or expert in best for expert, prob in enumerate(probs)]
        straight_through = self.options.get("straight_through", True)
        gates = []
        for prob, on in zip(probs, selected, strict=True):
            weight = prob if self.options.get("combine", "sigmoid") == "sigmoid" else torch.ones_like(prob)
            gate = weight if on else torch.zeros_like(weight)
            gates.append(gate.item() + prob - prob.item() if straight_through else gate)
        times = factor(self.options.get("rescale", "n_over_active"), len(probs), sum(selected))
        return Decision([gate * times for gate in gates], selected, logits, probs, straight_through)

    def _relu(self, logits: list[Tensor]) -> Decision:
        """max(0, v)."""
        probs = [logit if logit.item() > 0 else torch.zeros_like(logit) for logit in logits]
        selected = [logit.item() > 0 for logit in logits]
        times = factor(self.options.get("rescale", "none"), len(logits), sum(selected))
        return Decision([prob * times for prob in probs], selected, logits, probs)

    def margin(self, decision: Decision) -> float:
        """How far the decision is from another, in logits: the last kept one's lead, or the distance to a threshold."""
        if self.options["kind"] in ("sigmoid_ste", "relu"):
            threshold = self.options.get("threshold", 0.5)
            edge = math.log(threshold / (1.0 - threshold)) if self.options["kind"] == "sigmoid_ste" else 0.0
            return min(abs(logit.item() - edge) for logit in decision.logits)
        kept = [logit.item() for logit, on in zip(decision.logits, decision.selected, strict=True) if on]
        dropped = [logit.item() for logit, on in zip(decision.logits, decision.selected, strict=True) if not on]
        return min(kept) - max(dropped) if dropped else math.inf


def layer_norm(values_D: Tensor, scale_D: Tensor) -> Tensor:
    """Mean 0 and variance 1, times the scale."""
    mean = sum(values_D) / len(values_D)
    variance = sum((value - mean) ** 2 for value in values_D) / len(values_D)
    return torch.stack([(value - mean) / torch.sqrt(variance + 1e-5) for value in values_D]) * scale_D


def pooled(kind: str, rows: list[Tensor], weight_D: Tensor | None = None) -> Tensor:
    """One vector for the hidden states of a prompt's real tokens: (D,)."""
    if kind == "last":
        return rows[-1]
    if kind == "max":
        return torch.stack([max(feature, key=lambda value: value.item()) for feature in zip(*rows, strict=True)])
    shares = [torch.ones_like(row[0]) / len(rows) for row in rows]
    if kind == "self_attention":
        assert weight_D is not None
        shares = softmax([(weight_D * row).sum() for row in rows])
    total = torch.zeros_like(rows[0])
    for share, row in zip(shares, rows, strict=True):
        total = total + share * row
    return total


def activated(kind: str, h_D: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The function between the pooler and the router; `tensors` holds the coefficients of the rational one."""
    if kind == "relu":
        return torch.stack([value if value.item() > 0 else torch.zeros_like(value) for value in h_D])
    if kind == "gelu":
        return torch.stack([value * 0.5 * (1.0 + torch.erf(value / math.sqrt(2.0))) for value in h_D])
    if kind == "rational":
        upper = sum(a * h_D**power for power, a in enumerate(tensors["numerator"]))
        lower = sum(b * h_D**power for power, b in enumerate(tensors["denominator"], start=1))
        return upper / (1.0 + torch.abs(lower))
    return h_D


def by_task(options: dict[str, Any], weight_UN: Tensor, task: int, uniform_N: Tensor | None = None) -> Decision:
    """The decision of a table of tasks; `uniform_N` holds the random numbers of training."""
    logits = list(weight_UN[task]) if task >= 0 else [sum(column) / len(column) for column in weight_UN.T]
    temperature = options.get("temperature", 1.0)
    if options.get("gate", "softmax") == "softmax":
        gates = softmax([logit / temperature for logit in logits])
    else:
        noisy = logits
        if uniform_N is not None:
            noisy = [
                (logit + torch.log(u) - torch.log(1.0 - u)) / temperature
                for logit, u in zip(logits, uniform_N, strict=True)
            ]
        on = [sigmoid(value) for value in noisy]
        gates = [value / (sum(on) + 1e-12) for value in on]
    return Decision(gates, [True] * len(gates), logits, gates)


def scaling(options: dict[str, Any], r: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    alpha = options.get("lora_alpha", 24.0 if options["kind"] == "malora" else 8.0)
    return alpha / math.sqrt(r) if options.get("use_rslora") else alpha / r


def expert_output(
    options: dict[str, Any], tensors: dict[str, Tensor], expert: int, x_I: Tensor, task: int | None = None
) -> Tensor:
    """What one expert with gate 1 adds for one token: (O,). Without a task, mtl_lora has the mean of its transforms."""
    if options["kind"] == "lora":
        down_RI = tensors["lora_A"][0 if options.get("shared_down") else expert]
        up_RO = tensors["lora_B"][expert]
        h_R = torch.stack([(row * x_I).sum() for row in down_RI])
    elif options["kind"] == "mtl_lora":
        up_RO = tensors["mtl_B"][expert]
        z_R = torch.stack([(row * x_I).sum() for row in tensors["shared_A"]])
        known = list(tensors["mtl_lambda"]) if task is None else [tensors["mtl_lambda"][task]]
        transform = sum(known[1:], known[0]) / len(known)
        if options.get("task_transform") == "diagonal":
            h_R = torch.stack([value * z for value, z in zip(transform, z_R, strict=True)])
        else:
            h_R = torch.stack([(row * z_R).sum() for row in transform])
    else:
        up_RO = tensors["malora_B"][expert]
        z_C = torch.stack([(row * x_I).sum() for row in tensors["shared_A"]])
        h_R = torch.stack([(row * z_C).sum() for row in tensors["malora_P"][expert]])
    total = torch.zeros_like(up_RO[0])
    for number, row_O in zip(h_R, up_RO, strict=True):
        total = total + number * row_O
    return scaling(options, len(up_RO)) * total


def mixed_factors(tensors: dict[str, Tensor], decision: Decision) -> dict[str, Tensor]:
    """The one expert that `mixing: factors` makes of all: sum of gate * A and sum of gate * B."""
    mixed = {}
    for name, stack in tensors.items():
        total = torch.zeros_like(stack[0])
        for expert, gate in enumerate(decision.gates):
            if decision.selected[expert] or decision.straight_through:
                total = total + gate * stack[expert]
        mixed[name] = total.unsqueeze(0)
    return mixed


def mixture(
    x_TI: Tensor,
    decisions: list[Decision],
    options: dict[str, Any],
    tensors: dict[str, Tensor],
    base_OI: Tensor,
    bias_O: Tensor | None,
    keep_TI: Tensor | None = None,
    tasks: list[int | None] | None = None,
) -> Tensor:
    """y = W0 x + b + sum over the selected experts of gate * expert(x * dropout mask), token by token: (T, O).

    With `mixing: factors` it is one expert whose factors are the sums of the selected experts' factors times gates.
    """
    rows = []
    for token, x_I in enumerate(x_TI):
        y_O = base_OI @ x_I
        if bias_O is not None:
            y_O = y_O + bias_O
        inner_I = x_I if keep_TI is None else x_I * keep_TI[token]
        if options.get("mixing") == "factors":
            rows.append(y_O + expert_output(options, mixed_factors(tensors, decisions[token]), 0, inner_I))
            continue
        task = None if tasks is None else tasks[token]
        for expert, gate in enumerate(decisions[token].gates):
            # A straight-through gate of zero adds nothing to y but has a gradient.
            if decisions[token].selected[expert] or decisions[token].straight_through:
                y_O = y_O + gate * expert_output(options, tensors, expert, inner_I, task)
        rows.append(y_O)
    return torch.stack(rows)


# -- losses -------------------------------------------------------------------------------------------------------


@dataclass
class Routed:
    """The decisions of one router in one pass: one per token, row after row, with the padding of each token."""

    decisions: list[Decision]
    real: list[bool]
    batch_size: int = 1

    @property
    def num_experts(self) -> int:
        return len(self.decisions[0].probs)

    def rows(self) -> list[Routed]:
        """One `Routed` for each sequence."""
        length = len(self.decisions) // self.batch_size
        starts = range(0, len(self.decisions), length)
        return [Routed(self.decisions[i : i + length], self.real[i : i + length]) for i in starts]


def _combine(values: list[Tensor], reduce: str) -> Tensor:
    total = sum(values[1:], values[0])
    return total if reduce == "sum" else total / len(values)


def _statistics(items: list[Routed], count: str, probs: str) -> tuple[list[float], list[Tensor], int]:
    """(c_i, sum of p_ti, tokens) over the real tokens of all items."""
    num_experts = items[0].num_experts
    counts = [0.0] * num_experts
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(num_experts)]
    tokens = 0
    for item in items:
        for decision, real in zip(item.decisions, item.real, strict=True):
            if not real:
                continue
            tokens += 1
            best = max(range(num_experts), key=lambda expert: decision.probs[expert].item())
            for expert in range(num_experts):
                counts[expert] += float(expert == best if count == "argmax" else decision.selected[expert])
                if probs == "full" or decision.selected[expert]:
                    sums[expert] = sums[expert] + decision.probs[expert]
    return counts, sums, tokens


def load_balance(
    routed: list[Routed], count: str = "topk", probs: str = "full", reduce: str = "mean", level: str = "batch"
) -> Tensor:
    """N sum_i f_i P_i: per router (or over the tokens of all routers), per batch or per sequence."""

    def one(items: list[Routed]) -> Tensor | None:
        counts, sums, tokens = _statistics(items, count, probs)
        if tokens == 0:
            return None
        total = sum(counts) if count == "topk" else tokens
        return len(counts) * sum(c / total * (p / tokens) for c, p in zip(counts, sums, strict=True))

    def all_sequences(items: list[Routed]) -> Tensor:
        if level == "batch":
            value = one(items)
            return torch.zeros((), dtype=torch.float64) if value is None else value
        values = [one(list(rows)) for rows in zip(*(item.rows() for item in items), strict=True)]
        return _combine([value for value in values if value is not None], "mean")

    if reduce == "pooled":
        return all_sequences(routed)
    return _combine([all_sequences([item]) for item in routed], reduce)


def router_z(routed: list[Routed], reduce: str = "mean") -> Tensor:
    """Mean over real tokens of logsumexp(logits)²."""
    values = []
    for item in routed:
        squares = [
            torch.log(sum(torch.exp(logit) for logit in decision.logits)) ** 2
            for decision, real in zip(item.decisions, item.real, strict=True)
            if real
        ]
        values.append(sum(squares) / len(squares))
    return _combine(values, reduce)


def importance(routed: list[Routed], probs: str = "full", reduce: str = "mean") -> Tensor:
    """(std / mean)² of the experts' summed probabilities, population std."""
    values = []
    for item in routed:
        _, sums, _ = _statistics([item], "topk", probs)
        mean = sum(sums) / len(sums)
        variance = sum((value - mean) ** 2 for value in sums) / len(sums)
        values.append(variance / mean**2)
    return _combine(values, reduce)


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Largest difference, relative to the largest expected entry, is at most `tolerance`."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} against {tuple(want.shape)}"
    scale = max(want.abs().max().item(), 1e-12)
    error = (got.double() - want.double()).abs().max().item() / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e} (largest entry {scale:.2e})"
