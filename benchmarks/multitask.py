"""Quality of mixtures against single LoRAs on several real tasks, with one base model, equal steps and equal tokens.

    python benchmarks/multitask.py --model MODEL --train train.jsonl --test test.jsonl --output results.json

The files hold rows with `task`, `prompt` and `response`. Arms: the bare base model, one LoRA of rank r, one LoRA of the
mixture's total rank, MoLoRA top-2 of 8, MALoRA and MALoRA-Small at the paper's proportions. Every arm sees the same
batches of the same rows in the same order; a seed changes the adapter's initialisation, dropout and that order. The
learning rate of each arm is the best of `--learning-rates` on rows held out from the training file, after a fifth of
the steps.
Reported is the loss per response token and each task's metric on the test file, mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from moadapt import get_mixture_model
from moadapt.saving import load_base_model
from moadapt.train.collate import Collator
from moadapt.train.data_config import DataConfig
from moadapt.train.sampling import MixtureSampler
from moadapt.train.tasks import load_tasks
from moadapt.train.trainer import MultiTaskTrainer

ROUTED = {"kind": "top_k", "num_experts_per_tok": 2}
BALANCE = [{"kind": "load_balance", "coef": 0.01}]


def arms(r: int) -> dict[str, dict[str, Any] | None]:
    """Name -> mixture; every scale is lora_alpha / r = 2, dropout 0.05, all linear layers."""

    def lora(rank: int) -> dict[str, Any]:
        return {"kind": "lora", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}

    def malora(rank: int, shared: int) -> dict[str, Any]:
        sizes = {"r": rank, "shared_r": shared, "lora_alpha": 2 * rank}
        return {"kind": "malora", **sizes, "lora_dropout": 0.05}

    return {
        "base": None,
        f"LoRA r={r}": {"preset": "lora", "expert": lora(r)},
        f"LoRA r={8 * r}": {"preset": "lora", "expert": lora(8 * r)},
        "MoLoRA 2 of 8": {"num_experts": 8, "expert": lora(r), "router": ROUTED, "losses": BALANCE},
        "MALoRA": {"num_experts": 8, "expert": malora(3 * r // 2, 4 * r), "router": ROUTED, "losses": BALANCE},
        "MALoRA-Small": {"num_experts": 8, "expert": malora(r, 22 * r // 8), "router": ROUTED, "losses": BALANCE},
    }


def run(
    args: argparse.Namespace,
    mixture: dict[str, Any] | None,
    seed: int,
    rate: float,
    steps: int,
    tune: bool,
    data: dict[str, Any] | None = None,
    look: Callable[[MultiTaskTrainer], Any] | None = None,
) -> dict[str, Any]:
    """Train one arm and evaluate it; with `tune` on held-out training rows, losses only.

    Args:
        args: the command line.
        mixture: the arm; None is the base model.
        seed: of the adapter, dropout, and the order of the rows.
        rate: learning rate.
        steps: optimizer steps; 0 evaluates only.
        tune: as above.
        data: options of the data section; None takes the files of the command line, with all tasks.
        look: what to find out at the end, for the key `seen`.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    mixture = mixture or {"preset": "lora"}
    model = get_mixture_model(load_base_model(args.model), {"target_modules": "all-linear", **mixture})
    held_out = {"eval_fraction": 0.1} if tune else {"eval_path": args.test}
    if data is None:
        data = {
            "path": args.train,
            "task_column": "task",
            "metrics": {} if tune else json.loads(args.metrics),
            "sampling": {"strategy": "proportional", "batching": "per_task"},  # one task a batch: little padding
            **held_out,
        }
    data = {**data, "max_length": args.max_length}
    if args.eos_token is not None:
        data["eos_token"] = int(args.eos_token) if args.eos_token.isdigit() else args.eos_token
    with tempfile.TemporaryDirectory() as folder:
        training = {
            "output_dir": folder,
            "per_device_train_batch_size": args.batch_size,
            "per_device_eval_batch_size": args.eval_batch_size,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "weight_decay": 0.01,
            "max_steps": max(steps, 1),
            "logging_steps": 50,
            "save_strategy": "no",
            "report_to": "none",
            "seed": seed,
            "data_seed": seed,
            "disable_tqdm": True,
        }
        trainer = MultiTaskTrainer(model, tokenizer, data, training)
        started = time.process_time()
        if steps:
            trainer.train()
        seconds = (time.process_time() - started) / max(steps, 1)
        result = trainer.evaluate(metrics=not tune).to_dict()
        seen = {} if look is None else {"seen": look(trainer)}
    trainable = model.get_nb_trainable_parameters()[0] if steps else 0
    return {"result": result, "seconds_per_step": seconds if steps else None, "trainable": trainable, **seen}


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def show(runs: dict[str, list[dict]], rates: dict[str, float], title: str) -> None:
    tasks = [name for name in next(iter(runs.values()))[0]["result"] if name != "mean"]
    console = Console(width=150)
    losses = Table(title=f"{title}: loss per response token (lower is better)")
    scores = Table(title=f"{title}: score in % (higher is better)")
    scored = [task for task in tasks if set(next(iter(runs.values()))[0]["result"][task]) - NOT_SCORES]
    for column in ("arm", "trainable", "learning rate", "s / step", "mean", *tasks):
        losses.add_column(column, justify="left" if column == "arm" else "right")
    for column in ("arm", "mean", *scored):
        scores.add_column(column, justify="left" if column == "arm" else "right")
    for arm, results in runs.items():
        by_task = {task: [run["result"][task] for run in results] for task in ["mean", *tasks]}
        cost = [run["seconds_per_step"] for run in results]
        losses.add_row(
            arm,
            f"{results[0]['trainable']:,}",
            f"{rates[arm]:g}" if arm in rates else "–",
            spread(cost, 3) if None not in cost else "–",
            *[spread([values["loss"] for values in by_task[task]], 3) for task in ["mean", *tasks]],
        )
        metrics = {task: next(iter(set(by_task[task][0]) - NOT_SCORES)) for task in scored}
        cells = [spread([100 * values[metrics[task]] for values in by_task[task]], 1) for task in scored]
        scores.add_row(arm, spread([100 * values["score"] for values in by_task["mean"]], 1), *cells)
    console.print(losses)
    console.print(scores)


def time_arms(args: argparse.Namespace, rounds: int) -> None:
    """Print the CPU time of one optimizer step of every arm, on the same batches, interleaved round by round."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    mixtures = {arm: mixture for arm, mixture in arms(args.r).items() if mixture is not None}
    data = DataConfig(path=args.train, task_column="task", max_length=args.max_length)
    tasks = load_tasks(data, tokenizer)
    sampler = MixtureSampler([len(task.train) for task in tasks], args.batch_size, data.sampling, seed=0)
    collator = Collator(tokenizer.pad_token_id or 0)
    models = {
        arm: get_mixture_model(load_base_model(args.model), {"target_modules": "all-linear", **mixture}).train()
        for arm, mixture in mixtures.items()
    }
    optimizers = {
        arm: torch.optim.AdamW([parameter for _, parameter in model.adapter_parameters()])
        for arm, model in models.items()
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in models}
    for index in range(rounds + 2):
        batch = collator([tasks[task].train[row] for task, row in sampler.batch(index)])
        for arm, model in models.items():
            started = time.process_time()
            model(**batch).loss.backward()
            optimizers[arm].step()
            optimizers[arm].zero_grad()
            if index >= 2:
                seconds[arm].append(time.process_time() - started)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    first = next(iter(medians.values()))
    table = Table(
        title=f"{Path(args.model).name}: one step of {args.batch_size} mixed rows, {rounds} interleaved rounds"
    )
    for column in ("arm", "CPU ms", "ratio to the first"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, median in medians.items():
        table.add_row(arm, f"{1e3 * median:.0f}", f"{median / first:.2f}")
    Console(width=150).print(table)


NOT_SCORES = {"loss", "num_examples", "num_tokens", "score"}
METRICS = {
    "opinion": "accuracy",
    "question_type": "accuracy",
    "bank_intent": "accuracy",
    "data_to_text": "rouge_l",
    "word_problem": "token_f1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--metrics", default=json.dumps(METRICS), help="JSON: task -> metric")
    parser.add_argument("--eos-token", default=None, help="the token that ends an answer, if not the tokenizer's")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=None, help="run only these; default: all")
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="only time steps, arms interleaved")
    parser.add_argument("--show", type=Path, nargs="+", default=None, help="print the table of earlier --output files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    runs: dict[str, list[dict]] = {}
    rates: dict[str, float] = {}
    if args.show:
        for path in args.show:
            saved = json.loads(path.read_text())
            runs, rates = runs | saved["runs"], rates | saved["rates"]
        show({arm: runs[arm] for arm in arms(args.r) if arm in runs}, rates, saved["title"])
        return
    if None in (args.model, args.train, args.test):
        parser.error("--model, --train and --test are needed (or --show)")
    if args.time:
        time_arms(args, args.time)
        return
    title = f"{Path(args.model).name}, {args.steps} steps of {args.batch_size} rows"
    for arm, mixture in arms(args.r).items():
        if args.arms and arm not in args.arms:
            continue
        if mixture is None:
            runs[arm] = [run(args, None, args.seeds[0], 1e-3, 0, tune=False)]
            continue
        tried = {
            rate: run(args, mixture, 100, rate, args.steps // 5, tune=True)["result"]["mean"]["loss"]
            for rate in args.learning_rates
        }
        rates[arm] = min(tried, key=lambda rate: tried[rate])
        print(f"{arm}: held-out losses {tried}", flush=True)
        runs[arm] = []
        for seed in args.seeds:
            runs[arm].append(run(args, mixture, seed, rates[arm], args.steps, tune=False))
            print(f"{arm}, seed {seed}: {runs[arm][-1]['result']['mean']}", flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps({"title": title, "rates": rates, "runs": runs}, indent=1))
    show(runs, rates, title)


if __name__ == "__main__":
    main()
