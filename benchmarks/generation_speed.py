"""Generation speed of a whole model with a mixture, by routing and by peer, in one process.

    python benchmarks/generation_speed.py                                 # a 1.1 B Llama in bf16, 2 threads
    python benchmarks/generation_speed.py --layers 2 --arms base,molora,loop --rounds 3

The base is TinyLlama's shape (22 layers, 2048 -> 5632, 32 heads, 4 of keys, vocabulary 32,000) with random weights; all
arms share its tensors. Every linear layer of the blocks is adapted:

    base      the bare model; it runs twice, and the difference of the two is the noise
    milora    preset milora, rank 32: one decision a block from the prompt, 3 of its 7 modules adapted (--kept)
    merged    the same, merge_after_prefill
    molora    top-2 of 8 experts of rank 4, each linear layer with a router, as `molora_topk` has it
    loop      that method as published code computes it (MoE-PEFT): a Python loop over all experts, fp32

The cases: one prompt, eight prompts, eight answers to one prompt, and three beams. In a batch of prompts a module is
skipped where none of them selected it, and nothing is merged.

Measured are the steps of `generate` after the second token: what is done once for a prompt (prefill, pooling, merging)
is in the time to the second token. Wall time (CPU time with --threads 1); all arms run in every round, in a new order
each. A ratio is the median over rounds of an arm's time over that of the first base in the same round.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moadapt import get_mixture_model

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS, TOP_K, RANK = 8, 2, 32
CASES = {  # different prompts, answers to each, beams
    "batch 1": (1, 1, 1),
    "batch 8": (8, 1, 1),
    "8 answers": (1, 8, 1),
    "beams 3": (1, 1, 3),
}
ARMS = ("base", "base again", "milora", "merged", "molora", "loop")


class PublishedMolora(nn.Module):
    """Top-k of N LoRAs around one linear layer, computed as MoE-PEFT does: everything in fp32, a loop over N."""

    def __init__(self, base_layer: nn.Linear, num_experts: int, rank: int, kept: int) -> None:
        super().__init__()
        size, out = base_layer.in_features, base_layer.out_features
        self.base_layer, self.kept, self.scaling = base_layer, kept, 2.0
        self.gate = nn.Linear(size, num_experts, bias=False)
        self.lora_A = nn.ModuleList(nn.Linear(size, rank, bias=False) for _ in range(num_experts))
        self.lora_B = nn.ModuleList(nn.Linear(rank, out, bias=False) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        x_TI = x.reshape(-1, x.shape[-1]).float()
        probs_TN = torch.softmax(self.gate(x_TI), dim=-1)
        weights_TK, indices_TK = probs_TN.topk(self.kept, dim=-1)
        mixed_TO = torch.zeros(x_TI.shape[0], base.shape[-1], dtype=torch.float32)
        for expert, (down, up) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            tokens, slots = torch.where(indices_TK == expert)
            output = up(down(x_TI[tokens])) * self.scaling
            mixed_TO.index_add_(0, tokens, output * weights_TK[tokens, slots, None])
        return base + mixed_TO.view(base.shape).to(base.dtype)


class Clock:
    """A stopping criterion that never stops: it notes when each token was chosen."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seconds.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def sharing(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model with modules of its own around the same tensors."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})


def contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What moadapt does before the vocabulary's layer, for its peers, too: it is not what is compared here."""
    return tuple(item.contiguous() for item in args)


def mixture(base: LlamaForCausalLM, config: dict[str, Any]) -> tuple[nn.Module, int]:
    """A mixture that is no longer at its start, where it would add nothing; and its number of parameters."""
    model = get_mixture_model(sharing(base), config).eval()
    count = 0
    for name, parameter in model.adapter_parameters():
        count += parameter.numel()
        if model.parameter_role(name) != "router":
            nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False), count


def published(base: LlamaForCausalLM) -> tuple[nn.Module, int]:
    """The base model with a loop over experts in every linear layer of its blocks."""
    model, count = sharing(base), 0
    model.lm_head.register_forward_pre_hook(contiguous)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = PublishedMolora(child, EXPERTS, RANK // EXPERTS, TOP_K)
                adapter = [p for part in (layer.gate, layer.lora_A, layer.lora_B) for p in part.parameters()]
                for parameter in adapter:
                    nn.init.normal_(parameter, std=0.02)
                count += sum(parameter.numel() for parameter in adapter)
                setattr(parent, name, layer)
    return model.requires_grad_(False).eval(), count


def build(args: argparse.Namespace) -> tuple[dict[str, tuple[nn.Module, dict[str, Any]]], dict[str, int], int]:
    """By arm: model and options of `generate`; its number of adapter parameters; and the base's of its own."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": args.layers}
    if args.tiny:
        shape |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    base = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    torch.set_default_dtype(before)
    arms: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    counts = dict.fromkeys(args.arms, 0)
    if "base" in args.arms:
        model = sharing(base)
        model.lm_head.register_forward_pre_hook(contiguous)
        arms |= {"base": (model, {}), "base again": (model, {})}
        counts["base again"] = 0
    if "milora" in args.arms or "merged" in args.arms:
        config = {"preset": "milora", "expert": {"r": RANK}, "router": {"num_experts_per_tok": args.kept}}
        model, count = mixture(base, config)
        for arm, options in (("milora", {}), ("merged", {"merge_after_prefill": True})):
            if arm in args.arms:
                arms[arm], counts[arm] = (model, options), count
    if "molora" in args.arms:
        expert = {"r": RANK // EXPERTS, "lora_alpha": 2 * RANK // EXPERTS}
        config = {"preset": "molora_topk", "num_experts": EXPERTS, "target_modules": "all-linear", "expert": expert}
        model, counts["molora"] = mixture(base, config)
        arms["molora"] = (model, {})
    if "loop" in args.arms:
        model, counts["loop"] = published(base)
        arms["loop"] = (model, {})
    return arms, counts, base.num_parameters()


def run(model: nn.Module, options: dict[str, Any], ids_BS: Tensor, beams: int, tokens: int) -> dict[str, float]:
    """Seconds of one call: a step after the second token (mean), up to the second token, and in all."""
    clock = Clock()
    start = clock.now()
    model.generate(
        ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=tokens,
        num_beams=beams,
        do_sample=False,
        stopping_criteria=[clock],
        **options,
    )
    whole = clock.now() - start
    if len(clock.seconds) != tokens:
        raise RuntimeError(f"{len(clock.seconds)} steps were timed, {tokens} tokens asked for")
    step = (clock.seconds[-1] - clock.seconds[1]) / (tokens - 2)
    return {"step": step, "second": clock.seconds[1] - start, "whole": whole}


def measure(
    arms: dict[str, tuple[nn.Module, dict[str, Any]]], case: str, args: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Times of every arm in every round, in the same order of rounds."""
    prompts, answers, beams = CASES[case]
    generator = torch.Generator().manual_seed(1)
    vocabulary = next(iter(arms.values()))[0].config.vocab_size
    ids_BS = torch.randint(3, vocabulary, (prompts, args.prompt_tokens), generator=generator).repeat(answers, 1)
    call: Callable[[str, int], dict[str, float]] = lambda arm, tokens: run(*arms[arm], ids_BS, beams, tokens)  # noqa: E731
    times: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for arm in arms:
        call(arm, 3)
    for _ in track(range(args.rounds), description=case, transient=True):
        for arm in random.sample(list(arms), len(arms)):
            times[arm].append(call(arm, args.new_tokens))
    return times


def one_or_more(valid: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads names that are separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(valid):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not of {', '.join(valid)}")
        return [name for name in valid if name in names]

    return parse


def main() -> None:
    """Time everything and print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=one_or_more(ARMS), default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--cases", type=one_or_more(CASES), default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--tiny", action="store_true", help="a width of 64: to see that everything runs")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--kept", type=int, default=3, help="modules of a block that milora keeps")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.new_tokens < 3:
        parser.error("--new-tokens: 3 at least")
    torch.set_num_threads(args.threads)
    random.seed(0)
    arms, counts, size = build(args)
    console = Console(width=120)
    console.print(
        f"{size / 1e9:.2f} B parameters, {args.dtype}, {args.layers} layers, "
        f"{args.prompt_tokens} + {args.new_tokens} tokens, {args.rounds} rounds, {args.threads} thread(s)"
    )
    for case in args.cases:
        prompts, answers, _ = CASES[case]
        # Prompts that are routed differently cannot share a merged weight.
        times = measure({arm: value for arm, value in arms.items() if arm != "merged" or prompts == 1}, case, args)
        first = next(iter(times))
        table = Table(
            "arm", "adapter", "tokens/s", "step, ms", f"ratio to {first}", "quartiles", "to 2nd token, s", "call, s"
        )
        table.title = case
        for arm, rounds in times.items():
            step, second, whole = (
                statistics.median(each[key] for each in rounds) for key in ("step", "second", "whole")
            )
            ratios = [each["step"] / other["step"] for each, other in zip(rounds, times[first], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            row = [f"{counts[arm] / 1e6:.1f} M", f"{prompts * answers / step:.2f}", f"{step * 1e3:.1f}"]
            row += [f"{statistics.median(ratios):.3f}", f"{low:.3f}–{high:.3f}", f"{second:.2f}", f"{whole:.2f}"]
            table.add_row(arm, *row)
        console.print(table)


if __name__ == "__main__":
    main()
