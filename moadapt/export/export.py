"""Writing a converted model so that others can load it, and checking that they get the same."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moadapt
from moadapt.errors import AdapterError, ConfigError
from moadapt.export.custom import custom_reasons, load_custom, write_custom
from moadapt.export.equivalence import RELATIVE_BOUND, compare, run_reference
from moadapt.export.plan import NO_ELEMENTS, Plan
from moadapt.export.source import Source, read_source
from moadapt.export.stock import write_stock
from moadapt.export.targets import AUTO_MAP, STOCK, TARGETS
from moadapt.model import MixtureModel
from moadapt.registry import closest

REPORT_FILE = "equivalence.json"
Progress = Callable[[str, int, int], None]


def export_converted(
    model: MixtureModel,
    to: str,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    approximate: bool = False,
    text_batches: Sequence[dict[str, Tensor]] | None = None,
    max_tokens: int = 2048,
    tolerance: float = RELATIVE_BOUND,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a converted model as an ordinary checkpoint, and compare what it computes in fp32 with the model.

    Args:
        model: the converted model.
        to: `mixtral`, `qwen2_moe`, `qwen3_moe`, `granitemoeshared` or `glm4_moe`, which transformers loads by itself,
            or `auto_map`, which brings its own code along and holds every routing.
        directory: where to; must not exist or be empty. Nothing is left there if the export fails.
        tokenizer: saved too, where given.
        approximate: write also what the target holds only nearly; the report says how nearly.
        text_batches: text to compare on: batches with `input_ids` and maybe `attention_mask`, (B, S) int64. Without
            any, random tokens.
        max_tokens: how many of its tokens to use, at most.
        tolerance: by how much of the largest logit (and of no less than 1) an exact export's logits may differ.
        max_shard_size: of one safetensors file.
        progress: called with what is done, how much of it, and the total.

    Returns:
        The report, which is also written as `equivalence.json`.

    Raises:
        ConfigError: an unknown target, a folder that is not empty, or a target that cannot hold the model, with every
            reason and those that can.
        AdapterError: not a converted model, or an exact export that does not compute the same.
    """
    folder = Path(directory)
    if to not in TARGETS:
        raise ConfigError(f"to: unknown target {to!r}{closest(to, TARGETS)} Valid targets: {', '.join(TARGETS)}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not an empty folder; choose another")
    source = read_source(model)
    plan = None if to == AUTO_MAP else _checked_plan(source, to, approximate)
    if plan is None and custom_reasons(source):
        raise ConfigError("auto_map cannot hold this model:\n  " + "\n  ".join(custom_reasons(source)))
    tick = progress or (lambda what, done, total: None)
    tick("running the converted model", 0, 3)
    reference = run_reference(model, text_batches, max_tokens)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        tick("writing", 1, 3)
        folds: dict[str, Any] = {}
        if plan is None:
            write_custom(source, unfinished, max_shard_size)
        else:
            folds = write_stock(plan, unfinished, reference.largest, max_shard_size)
            _release(plan)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        tick("comparing", 2, 3)
        measured = compare(reference, _reload(source, plan, unfinished), tolerance)
        report = _report(source, to, plan, folds, measured)
        if report["exact"]:
            _check(to, measured)
        (unfinished / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    tick("comparing", 3, 3)
    return report


def refusals(model: MixtureModel, to: str) -> list[str]:
    """Why a stock target does not hold a converted model exactly; empty if it does.

    Raises:
        ConfigError: an unknown target.
        AdapterError: not a converted model.
    """
    source = read_source(model)
    if to == AUTO_MAP:
        return custom_reasons(source)
    if to not in STOCK:
        raise ConfigError(f"to: unknown target {to!r}{closest(to, TARGETS)} Valid targets: {', '.join(TARGETS)}")
    return [reason.text for reason in Plan(source, STOCK[to]).reasons]


def _checked_plan(source: Source, to: str, approximate: bool) -> Plan:
    plan = Plan(source, STOCK[to])
    hard = [reason for reason in plan.reasons if not reason.approximable]
    if not plan.reasons or (approximate and not hard):
        return plan
    exact = [name for name, target in STOCK.items() if name != to and not Plan(source, target).reasons]
    if not custom_reasons(source):
        exact.append(AUTO_MAP)
    ways = [f"exact: --to {' or '.join(exact)}"] if exact else []
    if not hard:
        ways.append("nearly the same, with the error measured: --approximate")
    lines = "\n".join(f"  - {reason.text}" for reason in plan.reasons)
    raise ConfigError(f"{to} cannot hold this model exactly:\n{lines}\nWhat can: {'; '.join(ways) or 'nothing here'}")


def _release(plan: Plan) -> None:
    """Let go of the target's tensors before they are read again."""
    for name in ("empty_model", "shapes"):
        plan.__dict__.pop(name, None)


def _reload(source: Source, plan: Plan | None, folder: Path) -> PreTrainedModel:
    base = source.model.base_model
    options = {"dtype": torch.float32, "attn_implementation": base.config._attn_implementation}
    load = load_custom if plan is None else AutoModelForCausalLM.from_pretrained
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_ELEMENTS)
        loaded = load(folder, **options)
    return loaded.to(base.device).eval()  # type: ignore[no-any-return]


def _report(
    source: Source, to: str, plan: Plan | None, folds: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    reasons = [] if plan is None else [reason.text for reason in plan.reasons]
    gates = [block.gate for block in source.blocks]
    return {
        "target": to,
        "exact": not reasons,
        "not_exact_because": reasons,
        "base_model": {"model_type": source.model_type, "name_or_path": source.model.base_model.name_or_path},
        "router": source.model.mixture_config.router.model_dump(mode="json"),
        "comparison": {"dtype": "float32", **measured},
        "blocks": {
            block.name: {
                "num_experts": block.num_experts,
                "num_shared_experts": block.num_shared,
                "expert_width": block.width if plan is None else plan.sizes.width,
                **({} if isinstance(gate, str) else {"num_experts_per_tok": gate.num_kept}),
                **({"folded": folds[block.name]} if block.name in folds else {}),
            }
            for block, gate in zip(source.blocks, gates, strict=True)
        },
        "versions": {
            "moadapt": moadapt.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _check(to: str, measured: dict[str, Any]) -> None:
    """Stop at an export that does not compute the same."""
    if measured["unexplained_positions"]:
        raise AdapterError(
            f"the {to} checkpoint computes something else than the converted model: logits differ by up to "
            f"{measured['max_logit_difference']:.2g} (allowed {measured['bound']:.2g}) at "
            f"{measured['unexplained_positions']} of {measured['tokens']} tokens. Nothing was written; please report "
            "this model's configuration (a very deep model may need a higher tolerance)"
        )
    if measured["generation_unexplained"]:
        raise AdapterError(
            f"the {to} checkpoint gives the same logits as the converted model, but generates other tokens. Nothing "
            "was written; please report this model's configuration"
        )
