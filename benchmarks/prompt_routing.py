"""Quality of prompt-routed modules (MiLoRA) on several real tasks, one task at a time and all together.

    python benchmarks/prompt_routing.py --model MODEL --train train.jsonl --test test.jsonl --eos-token 1 \\
        --output results.json --markdown results.md

The files hold rows with `task`, `prompt` and `response`. Arms, of nearly equal numbers of trainable parameters and of
the same scale alpha / r = 2: one LoRA; MoLoRA, 8 experts of which each token keeps 2, a router for each linear layer;
MiLoRA with k = 3 and k = 1 of the modules of a layer, chosen once for each prompt.

Multi: one adapter for all tasks, batches of all tasks mixed. Single: an adapter for each task. Every task has as many
rows as every other, and both see each once: so all single runs of an arm together take as many steps as the multi run,
with the same rows. A seed changes the adapter, dropout, which rows these are and their order; every arm gets the same.
Each arm has one learning rate, the best of `--learning-rates` for the mean loss of a multi run of `--tune-steps` with
seed 0 on training rows that are held out.

Reported: each task's metric and loss per response token on the test file, mean ± standard deviation over seeds; and
which modules the prompts of each task choose, layer by layer.
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
from multitask import BALANCE, METRICS, ROUTED, run, spread

from moadapt.cli.report import short_names
from moadapt.cli.running import count_usage
from moadapt.train.trainer import MultiTaskTrainer

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""By arm: `multi`, and each task's name for the single runs; one entry for each seed."""


def lora(r: int) -> dict[str, Any]:
    """Options of the experts."""
    return {"kind": "lora", "r": r, "lora_alpha": 2 * r, "lora_dropout": 0.05}


def arms(r: int) -> dict[str, dict[str, Any]]:
    """Name -> mixture. `r` is the rank of MoLoRA's eight experts; its routers are as large as four ranks of a LoRA."""
    one = {"num_experts_per_tok": 1, "norm_topk_prob": False}
    return {
        f"LoRA r={8 * r + 4}": {"preset": "lora", "expert": lora(8 * r + 4)},
        f"MoLoRA 2 of 8, r={r}": {"num_experts": 8, "expert": lora(r), "router": ROUTED, "losses": BALANCE},
        f"MiLoRA 3 of 7, r={8 * r + 3}": {"preset": "milora", "expert": lora(8 * r + 3)},
        f"MiLoRA 1 of 7, r={8 * r + 3}": {"preset": "milora", "expert": lora(8 * r + 3), "router": one},
    }


def split_files(args: argparse.Namespace, folder: Path) -> list[str]:
    """Write a training and a test file for each task, and give the tasks' names."""
    names: set[str] = set()
    for part in ("train", "test"):
        rows: dict[str, list[str]] = {}
        with Path(getattr(args, part)).open(encoding="utf-8") as file:
            for line in file:
                rows.setdefault(json.loads(line)["task"], []).append(line)
        for name, lines in rows.items():
            (folder / f"{name}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        names = set(rows)
    return [name for name in sorted(names) if args.tasks is None or name in args.tasks]


def data_of(folder: Path, tasks: list[str], metrics: dict[str, str], rows: int, tune: bool) -> dict[str, Any]:
    """The data section: so many rows of each of these tasks."""

    def section(name: str) -> dict[str, Any]:
        held_out = {"eval_fraction": 0.1} if tune else {"eval_path": str(folder / f"{name}.test.jsonl")}
        metric = None if tune else metrics.get(name)
        path = str(folder / f"{name}.train.jsonl")
        return {"name": name, "path": path, "max_samples": rows, "metric": metric, **held_out}

    return {"tasks": [section(name) for name in tasks], "sampling": {"strategy": "uniform"}}


def choices(trainer: MultiTaskTrainer) -> dict[str, Any]:
    """Of each router: its modules, how well they tell the task, and the share of a task's prompts that choose each."""
    usage = count_usage(trainer, trainer.tasks)
    return {
        router: {
            "modules": short_names(usage.expert_names(router)),
            "task_information": usage.task_information(router),
            "shares": {
                task: (usage.counts[router][number] / usage.tokens[router][number]).tolist()
                for number, task in enumerate(usage.tasks)
            },
        }
        for router in usage.counts
    }


# -- Markdown ---------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows))


def values_of(
    runs: dict[str, list[dict[str, Any]]], tasks: list[str], metric: Callable[[str], str], multi: bool
) -> Any:
    """Each task's values by seed, and the mean of the tasks by seed."""
    results = {task: [each["result"] for each in runs["multi" if multi else task]] for task in tasks}
    values = {task: [result[task][metric(task)] for result in results[task]] for task in tasks}
    return {"mean": [statistics.mean(column) for column in zip(*values.values(), strict=True)], **values}


def quality(runs: Runs, rates: dict[str, float], metrics: dict[str, str], tasks: list[str]) -> list[str]:
    """Tables of scores and losses, single and multi."""
    parts = []
    scored = [task for task in tasks if task in metrics]
    for title, names, name_of, scale, digits in (
        ("Score in % (higher is better)", scored, lambda task: metrics[task], 100, 1),
        ("Loss per response token (lower is better)", tasks, lambda task: "loss", 1, 3),
    ):
        rows = []
        for arm, by_data in runs.items():
            for multi in (False, True) if len(by_data) > 1 else (True,):
                values = values_of(by_data, names, name_of, multi)
                cells = [spread([scale * value for value in values[task]], digits) for task in ("mean", *names)]
                rows.append([arm, "multi" if multi else "single", *cells])
        parts += [f"**{title}**", table(["arm", "trained on", "mean", *names], rows)]
    rows = []
    for arm, by_data in runs.items():
        multi = by_data["multi"]
        seconds = spread([1e3 * each["seconds_per_step"] for each in multi], 0)
        rows.append([arm, f"{multi[0]['trainable']:,}", f"{rates[arm]:g}", seconds])
    parts += ["**Sizes**", table(["arm", "trainable", "learning rate", "CPU ms / step, multi"], rows)]
    return parts


def shares_of(seen: list[dict[str, Any]], router: str, task: str) -> list[float]:
    """Share of a task's prompts that choose each module of a router, mean over seeds."""
    return [statistics.mean(column) for column in zip(*(each[router]["shares"][task] for each in seen), strict=True)]


def choice_tables(arm: str, seen: list[dict[str, Any]], tasks: list[str], k: int) -> list[str]:
    """Which modules each task's prompts choose: the k + 1 most chosen of each layer, and all of them over all tasks."""
    routers = list(seen[0])
    modules = seen[0][routers[0]]["modules"]
    rows = []
    for task in tasks:
        cells = []
        for router in routers:
            share = shares_of(seen, router, task)
            top = sorted(range(len(modules)), key=lambda number: -share[number])[: k + 1]
            cells.append(", ".join(f"{modules[n].removesuffix('_proj')} {100 * share[n]:.0f}" for n in top))
        rows.append([task, *cells])
    layers = [f"layer {number}" for number in range(len(routers))]
    info = [spread([each[router]["task_information"] for each in seen], 2) for router in routers]
    parts = [
        f"**{arm}: % of each task's prompts that choose a module, the {k + 1} most chosen**, mean over seeds",
        table(["task", *layers], [*rows, ["task information, 0 to 1", *info]]),
    ]
    rows = [
        [
            module,
            *(f"{100 * statistics.mean(shares_of(seen, router, task)[n] for task in tasks):.0f}" for router in routers),
        ]
        for n, module in enumerate(modules)
    ]
    parts += [f"**{arm}: % of all tasks' prompts that choose a module**", table(["module", *layers], rows)]
    by_seed = []
    for router in routers:
        for n in range(len(modules)):
            for task in tasks:
                shares = [each[router]["shares"][task][n] for each in seen]
                by_seed.append(statistics.pstdev(shares))
    parts.append(f"Standard deviation of a share between seeds, mean: {100 * statistics.mean(by_seed):.0f} points.")
    return parts


def report(saved: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    runs, tasks = saved["runs"], saved["tasks"]
    seeds = len(next(iter(runs.values()))["multi"])
    parts = [f"{saved['title']}; {seeds} seeds", *quality(runs, saved["rates"], saved["metrics"], tasks)]
    for arm, by_data in runs.items():
        seen = [each["seen"] for each in by_data["multi"] if "seen" in each]
        if seen:
            parts += choice_tables(arm, seen, tasks, k=int(arm.split()[1]))
    tried = [[arm, *(f"{loss:.3f}" for loss in losses.values())] for arm, losses in saved["tried"].items()]
    names = list(next(iter(saved["tried"].values())))
    parts += ["**Held-out loss by learning rate**", table(["arm", *names], tried)]
    parts.append(f"All of it: {saved['cpu_seconds'] / 60:.0f} CPU minutes.")
    return "\n\n".join(parts) + "\n"


# -- the command ------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and evaluate everything; writes what there is after every arm."""
    metrics = json.loads(args.metrics)
    tasks = split_files(args, folder)
    single_steps = max(args.steps // len(tasks), 1)
    rows = single_steps * args.batch_size
    title = (
        f"{Path(args.model).name}, {len(tasks)} tasks, {rows} rows of each: {args.steps} steps of {args.batch_size} "
        f"rows for all together, {single_steps} for each alone"
    )
    saved: dict[str, Any] = {"title": title, "tasks": tasks, "metrics": metrics, "tried": {}, "rates": {}, "runs": {}}
    chosen = {arm: mixture for arm, mixture in arms(args.r).items() if args.arms is None or is_one(arm, args.arms)}
    for arm, mixture in chosen.items():
        data = data_of(folder, tasks, metrics, rows, tune=True)
        tried = {
            rate: run(args, mixture, 0, rate, args.tune_steps, True, data)["result"]["mean"]["loss"]
            for rate in args.learning_rates
        }
        saved["tried"][arm] = {f"{each:g}": loss for each, loss in tried.items()}
        saved["rates"][arm] = min(tried, key=lambda rate: tried[rate])
        saved["runs"][arm] = {name: [] for name in ("multi", *([] if is_one(arm, args.multi_only) else tasks))}
        print(f"{arm}: held-out losses {tried}", flush=True)
    for seed in args.seeds:
        for arm, by_data in saved["runs"].items():
            for name, done in by_data.items():
                multi = name == "multi"
                data = data_of(folder, tasks if multi else [name], metrics, rows, tune=False)
                steps = args.steps if multi else single_steps
                look = choices if multi and arm.startswith("MiLoRA") else None
                done.append(
                    {"seed": seed, **run(args, chosen[arm], seed, saved["rates"][arm], steps, False, data, look)}
                )
                print(f"{arm}, {name}, seed {seed}: {done[-1]['result']['mean']}", flush=True)
            saved["cpu_seconds"] = time.process_time()
            if args.output is not None:
                args.output.write_text(json.dumps(saved, indent=1))
    return saved


def is_one(arm: str, names: list[str]) -> bool:
    """Whether the arm's name begins as one of these."""
    return any(arm.startswith(name) for name in names)


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One result from files of the same command with other `--arms` or `--seeds`."""
    first, *others = parts
    for other in others:
        if other["title"] != first["title"]:
            raise SystemExit(f"these are different experiments: {first['title']!r} and {other['title']!r}")
        for key in ("tried", "rates"):
            first[key] = first[key] | {arm: value for arm, value in other[key].items() if arm not in first[key]}
        for arm, by_data in other["runs"].items():
            mine = first["runs"].setdefault(arm, {name: [] for name in by_data})
            for name, done in by_data.items():
                known = {each.get("seed") for each in mine[name]} - {None}
                if known & {each.get("seed") for each in done}:
                    raise SystemExit(f"{arm}, {name}: two files hold the same seed; it would count twice")
                mine[name] += done
        first["cpu_seconds"] += other["cpu_seconds"]
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--metrics", default=json.dumps(METRICS), help="JSON: task -> metric")
    parser.add_argument("--tasks", nargs="+", default=None, help="only these; default: all of the file")
    parser.add_argument("--eos-token", default=None, help="the token that ends an answer, if not the tokenizer's")
    parser.add_argument("--output", type=Path, default=None, help="everything, as JSON")
    parser.add_argument("--markdown", type=Path, default=None, help="the tables")
    parser.add_argument("--r", type=int, default=2, help="rank of MoLoRA's experts, which sets all sizes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tune-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-batch-size", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=None, help="only those that begin so; default: all")
    parser.add_argument("--multi-only", nargs="*", default=["MiLoRA 1"], help="arms without single runs, as --arms")
    parser.add_argument("--show", type=Path, nargs="+", default=None, help="print the tables of earlier --output files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.show:
        text = report(joined([json.loads(path.read_text()) for path in args.show]))
    else:
        if None in (args.model, args.train, args.test):
            parser.error("--model, --train and --test are needed (or --show)")
        with tempfile.TemporaryDirectory() as folder:
            text = report(measure(args, Path(folder)))
    print(text)
    if args.markdown is not None:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
