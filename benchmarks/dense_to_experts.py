"""What splitting a dense feed-forward block costs in quality: without training, and healed on equal tokens.

    python benchmarks/dense_to_experts.py --model MODEL --text stories.jsonl --eval more.txt --output results.json

The text file (rows with `text`) is cut into a calibration and healing part and a held-out part. Every perplexity is on
the held-out part, and on the `--eval` files.

1. Without training: every split x every training-free router, at 25 % and 50 % of the routed experts off. Beside them a
   random choice, and the oracle, which keeps the experts with the largest outputs for each token: the best that a
   router could do on that split.
2. Healed: DSMoE, DSMoE without the straight-through estimator, top-k as LLaMA-MoE, ReMoE, and magnitude pruning of the
   same share of neurons, all trained on the same batches. Routers and feed-forward weights are trained, the rest is
   frozen. A threshold router has no fixed share: its coefficient is set so that the share comes out near that of top-k,
   and tau is then set after training so that the share on the training text is that of top-k.
3. The sweep over tau of the healed DSMoE model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moadapt import MixtureModel, convert_ffn_to_experts
from moadapt.blocks import find_blocks, read_block, write_block
from moadapt.convert import conversion_config
from moadapt.passes import PassRequest, requesting
from moadapt.routers.base import Router
from moadapt.routing import Routing, RoutingContext

Batches = list[dict[str, Tensor]]
PAD = -1
SPLITS: dict[str, dict[str, Any]] = {
    "contiguous": {"kind": "contiguous"},
    "random": {"kind": "random"},
    "k-means of gate rows": {"kind": "kmeans", "rows": "gate"},
    "k-means of up rows": {"kind": "kmeans", "rows": "up"},
    "co-activation": {"kind": "coactivation"},
    "activation rate": {"kind": "activation_rate"},
    "activation rate, 2 shared": {"kind": "activation_rate"},
    "gradient": {"kind": "gradient"},
    "gradient, 2 shared": {"kind": "gradient"},
}
THRESHOLDS = [0.2, 0.3, 0.4, 0.45, 0.48, 0.49, 0.5, 0.51, 0.52, 0.55, 0.6, 0.7, 0.8]


def routers(kept: int) -> dict[str, dict[str, Any]]:
    """Training-free routers that keep `kept` experts."""
    return {
        "mean gate": {"kind": "top_k", "num_experts_per_tok": kept, "combine": "unit", "init": "mean_gate"},
        "representative": {"kind": "representative", "num_experts_per_tok": kept},
        "representative, |score|": {"kind": "representative", "num_experts_per_tok": kept, "absolute": True},
        "norm regression": {"kind": "norm_regression", "num_experts_per_tok": kept, "threshold": 0.0},
        "random": {"kind": "top_k", "num_experts_per_tok": kept, "combine": "unit", "init": "normal"},
        "oracle": {"kind": "top_k", "num_experts_per_tok": kept, "combine": "unit", "init": "normal"},
    }


class Oracle(nn.Module):
    """Keeps the experts whose outputs are largest: a bound, since it computes all of them to choose."""

    def __init__(self, router: Router, bank: Any, kept: int) -> None:
        super().__init__()
        self.router, self.kept = router, kept
        self.bank = [bank]  # not a submodule: it is one of the layer's already

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing."""
        _, experts = self.bank[0].halves()
        outputs = [experts.expert(index, hidden_states).norm(dim=-1) for index in range(experts.num_experts)]
        norms_TN = torch.stack(outputs, dim=-1)
        indices_TK = norms_TN.topk(self.kept, dim=-1).indices
        selected_TN = torch.zeros_like(norms_TN, dtype=torch.bool).scatter_(-1, indices_TK, True)
        return Routing(selected_TN.to(norms_TN.dtype), selected_TN, norms_TN, norms_TN, indices_TK=indices_TK)


def load(name: str) -> PreTrainedModel:
    """The dense model in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval()


def read_texts(path: str) -> list[str]:
    """Rows of a JSONL file with `text`, or the paragraphs of a text file."""
    content = Path(path).read_text(encoding="utf-8")
    if path.endswith(".jsonl"):
        return [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
    return [part for part in content.split("\n\n") if part.strip()]


def rows_of(tokenizer: Any, texts: list[str], length: int, end: int) -> Tensor:
    """A text a row, with the tokenizer's beginning and `end`, longer ones in pieces; PAD fills up: (R, length)."""
    rows = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], end]
        rows += [ids[start : start + length] for start in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) > 1]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def batch_of(rows: Tensor) -> dict[str, Tensor]:
    """Arguments of the model, without columns that are padding throughout."""
    rows = rows[:, : int((rows != PAD).sum(1).max())]
    real = rows != PAD
    labels = rows.masked_fill(~real, -100)
    return {"input_ids": rows.clamp(min=0), "attention_mask": real.long(), "labels": labels}


def batches(rows: Tensor, size: int) -> Batches:
    """Batches for evaluation or calibration."""
    return [batch_of(part) for part in rows.split(size)]


@torch.no_grad()
def evaluate(model: Any, data: Batches) -> dict[str, float]:
    """Perplexity, and of a converted model the mean share of active routed experts."""
    model.eval()
    total, tokens, active, possible = 0.0, 0, 0, 0
    for batch in data:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with requesting(PassRequest(record=isinstance(model, MixtureModel))) as request:
            base = model.base_model if isinstance(model, MixtureModel) else model
            logits_BSV = base(**inputs).logits
        labels = batch["labels"][:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels, reduction="sum"))
        tokens += int((labels != -100).sum())
        for record in request.context.records if request.context is not None else []:
            selected_TN = record.routing.selected_TN[inputs["attention_mask"].flatten().bool()]
            active += int(selected_TN.sum())
            possible += selected_TN.numel()
    return {"perplexity": math.exp(total / tokens), "share": active / possible if possible else 1.0}


def train(model: Any, rows: Tensor, args: argparse.Namespace, seed: int) -> None:
    """AdamW with a cosine schedule over the trainable tensors; the batches depend on the seed alone."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in trained]
    routers = [parameter for name, parameter in trained if ".router." in name]
    others = [parameter for name, parameter in trained if ".router." not in name]
    groups = [{"params": others}, {"params": routers, "lr": args.router_learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for part in _order(len(rows), args.steps * args.batch_size, generator).split(args.batch_size):
        model(**batch_of(rows[part])).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, MixtureModel):
            model.end_step({name: float(value) for name, value in model.last_losses.items()})
    model.eval()


def _order(rows: int, needed: int, generator: torch.Generator) -> Tensor:
    passes = [torch.randperm(rows, generator=generator) for _ in range(-(-needed // rows))]
    return torch.cat(passes)[:needed]


def convert(args: argparse.Namespace, calibration: Batches, **options: Any) -> MixtureModel:
    """A fresh copy of the dense model, converted."""
    config = {"num_experts": args.num_experts, **options}
    return convert_ffn_to_experts(load(args.model), config, calibration, calibration_tokens=args.calibration_tokens)


def set_threshold(model: MixtureModel, value: float) -> None:
    """tau of every router."""
    model.set_router_threshold(value)


def match_share(model: MixtureModel, share: float, data: Batches) -> float:
    """The tau at which the share of active experts is closest to `share`, by bisection; the model is left with it."""
    low, high = 0.0, 1.0
    for _ in range(18):
        middle = (low + high) / 2
        set_threshold(model, middle)
        low, high = (middle, high) if evaluate(model, data)["share"] > share else (low, middle)
    set_threshold(model, low)
    return low


def pruned(args: argparse.Namespace, share: float) -> PreTrainedModel:
    """The dense model with the neurons of the smallest magnitude taken out of every block; their weights alone train.

    The magnitude of a neuron is the product of the lengths of its rows.
    """
    model = load(args.model)
    model.requires_grad_(False)
    for block in find_blocks(model, conversion_config({})):
        ffn = read_block(model, block)
        magnitude_F = ffn.up_FD.norm(dim=1) * ffn.down_FD.norm(dim=1)
        if ffn.gate_FD is not None:
            magnitude_F = magnitude_F * ffn.gate_FD.norm(dim=1)
        kept = magnitude_F.topk(round(share * ffn.num_neurons)).indices.sort().values
        for name, tensor in write_block(ffn.take(kept), block.layout, transposed=False).items():
            module, _, kind = name.partition(".")
            setattr(block.part(model, module), kind, nn.Parameter(tensor.clone()))
    return model


def training_free(args: argparse.Namespace, calibration: Batches, test: dict[str, Batches], tick: Any) -> list[Any]:
    """One entry for each split, router and sparsity."""
    results = []
    for split_name, split in SPLITS.items():
        shared = 2 if "shared" in split_name else 0
        for sparsity in (0.25, 0.5):
            kept = round((1 - sparsity) * args.num_experts) - shared
            for router_name, router in routers(kept).items():
                torch.manual_seed(0)
                expert = {"kind": "ffn_partition", "split": split, "num_shared_experts": shared}
                model = convert(
                    args, calibration, num_experts=args.num_experts - shared, expert=expert, router=router
                ).eval()
                if router_name == "oracle":
                    for name, site in model.injection.routers.items():
                        site.router = Oracle(site.router, model.injection.layers[name].experts, kept)
                scores = {name: evaluate(model, data)["perplexity"] for name, data in test.items()}
                results.append({"split": split_name, "router": router_name, "sparsity": sparsity, **scores})
                tick()
    return results


def arms(args: argparse.Namespace, calibration: Batches) -> dict[str, Callable[[], Any]]:
    """Models to heal, by name."""
    kept = round(args.share * args.num_experts)
    top_k = {"kind": "top_k", "num_experts_per_tok": kept, "combine": "softmax_renorm", "rescale": "n_over_k"}

    def sparsity(coef: float, penalise: str = "G") -> list[dict[str, Any]]:
        return [{"kind": "sparsity", "coef": coef, "penalise": penalise}]

    def dense() -> PreTrainedModel:
        model = load(args.model)
        model.requires_grad_(False)
        for block in find_blocks(model, conversion_config({})):
            for module in block.linears(model).values():
                module.requires_grad_(True)
        return model

    return {
        "dense, trained on": dense,
        "DSMoE": lambda: convert(args, calibration, preset="dsmoe", losses=sparsity(args.coef)),
        "DSMoE, penalty on S": lambda: convert(args, calibration, preset="dsmoe", losses=sparsity(args.coef_on_s, "S")),
        "DSMoE without straight-through": lambda: convert(
            args,
            calibration,
            preset="dsmoe",
            losses=sparsity(args.coef_without_ste),
            router={"straight_through": False},
        ),
        f"top-{kept}": lambda: convert(
            args,
            calibration,
            expert={"kind": "ffn_partition", "trainable": True},
            router=top_k,
            losses=[{"kind": "load_balance", "coef": 0.01}],
        ),
        "ReMoE": lambda: convert(
            args, calibration, preset="remoe", losses=[{"kind": "target_sparsity", "target": args.share}]
        ),
        f"magnitude pruning, {args.share:.0%} kept": lambda: pruned(args, args.share),
    }


def heal(args: argparse.Namespace, rows: Tensor, calibration: Batches, test: dict[str, Batches], tick: Any) -> Any:
    """Scores of every healed arm and seed, and the sweep of DSMoE."""
    results, sweep = [], []
    for name, build in arms(args, calibration).items():
        if args.arms and name not in args.arms:
            continue
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model = build()
            started = time.perf_counter()
            train(model, rows, args, seed)
            seconds = time.perf_counter() - started
            entry: dict[str, Any] = {"arm": name, "seed": seed, "seconds": seconds}
            thresholded = isinstance(model, MixtureModel) and model.mixture_config.router.kind == "sigmoid_ste"
            if thresholded:
                entry["as trained"] = _scores(model, test)
                if name == "DSMoE":
                    for value in THRESHOLDS:
                        set_threshold(model, value)
                        sweep.append({"threshold": value, "seed": seed, **_scores(model, test)})
                entry["threshold"] = match_share(model, args.share, calibration)
            entry |= _scores(model, test)
            results.append(entry)
            tick()
    return results, sweep


def _scores(model: Any, test: dict[str, Batches]) -> dict[str, float]:
    scores = {name: evaluate(model, data) for name, data in test.items()}
    return {name: score["perplexity"] for name, score in scores.items()} | {"share": scores["held out"]["share"]}


def _spread(values: list[float]) -> str:
    text = f"{statistics.mean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def print_tables(result: dict[str, Any], names: list[str]) -> None:
    """The figures as tables."""
    console = Console(width=140)
    console.print("dense: " + ", ".join(f"{name} {result['dense'][name]:.3f}" for name in names))
    free = result["training_free"]
    kinds = list(dict.fromkeys(entry["router"] for entry in free))
    for sparsity in dict.fromkeys(entry["sparsity"] for entry in free):
        table = Table("split", *kinds, title=f"no training, {sparsity:.0%} of the neurons off: perplexity, held out")
        for split in dict.fromkeys(entry["split"] for entry in free):
            cells = [e for e in free if e["split"] == split and e["sparsity"] == sparsity]
            table.add_row(split, *[f"{entry['held out']:.2f}" for entry in cells])
        console.print(table)
    table = Table("arm", *names, "active share", "as trained: share", *[f"as trained: {name}" for name in names])
    for arm in dict.fromkeys(entry["arm"] for entry in result["healed"]):
        runs = [entry for entry in result["healed"] if entry["arm"] == arm]
        before = [entry["as trained"] for entry in runs if "as trained" in entry]
        cells = [_spread([entry[name] for entry in runs]) for name in (*names, "share")]
        cells += [_spread([entry[name] for entry in before]) if before else "" for name in ("share", *names)]
        table.add_row(arm, *cells)
    table.title = "healed: perplexity at equal active share"
    console.print(table)
    table = Table("tau", *names, "active share", title="DSMoE, tau changed after training")
    for value in dict.fromkeys(entry["threshold"] for entry in result["sweep"]):
        runs = [entry for entry in result["sweep"] if entry["threshold"] == value]
        table.add_row(f"{value}", *[_spread([entry[name] for entry in runs]) for name in (*names, "share")])
    console.print(table)


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="JSONL with `text`")
    parser.add_argument("--eval", action="append", default=[], help="more text to measure perplexity on")
    parser.add_argument("--end-token", type=int, help="id between texts; default: the tokenizer's end token")
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--router-learning-rate", type=float, default=2e-2)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="of the experts that are active")
    parser.add_argument("--coef", type=float, default=10.0, help="of DSMoE's penalty on G")
    parser.add_argument("--coef-on-s", type=float, default=3.0, help="of its penalty on S")
    parser.add_argument("--coef-without-ste", type=float, default=0.0, help="of its penalty without the estimator")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="names of the arms to heal; default: all")
    parser.add_argument("--only", choices=["training-free", "healed"])
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _stages(args: argparse.Namespace) -> Iterator[str]:
    yield from (stage for stage in ("training-free", "healed") if args.only in (None, stage))


def main() -> None:
    """Run everything and print it."""
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    end = tokenizer.eos_token_id if args.end_token is None else args.end_token
    texts = read_texts(args.text)
    cut = round(len(texts) * (1 - args.held_out))
    rows = rows_of(tokenizer, texts[:cut], args.length, end)
    test = {"held out": batches(rows_of(tokenizer, texts[cut:], args.length, end), 32)}
    for path in args.eval:
        test[Path(path).stem] = batches(rows_of(tokenizer, read_texts(path), args.length, end), 32)
    calibration = batches(rows[: -(-args.calibration_tokens // args.length)], 32)
    per_row = float((rows != PAD).sum(1).double().mean())
    result: dict[str, Any] = {"options": {**vars(args), "output": str(args.output)}, "training_rows": len(rows)}
    result["tokens"] = {name: sum(int(batch["attention_mask"].sum()) for batch in data) for name, data in test.items()}
    result["healing_tokens"] = round(args.steps * args.batch_size * per_row)
    result["dense"] = {name: evaluate(load(args.model), data)["perplexity"] for name, data in test.items()}
    result |= {"training_free": [], "healed": [], "sweep": []}
    total = {
        "training-free": len(SPLITS) * 2 * len(routers(1)),
        "healed": len(args.arms or arms(args, [])) * args.seeds,
    }
    with Progress(console=Console(stderr=True)) as progress:
        for stage in _stages(args):
            task = progress.add_task(stage, total=total[stage])
            tick = lambda task=task: progress.advance(task)  # noqa: E731
            if stage == "training-free":
                result["training_free"] = training_free(args, calibration, test, tick)
            else:
                result["healed"], result["sweep"] = heal(args, rows, calibration, test, tick)
    print_tables(result, list(test))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
