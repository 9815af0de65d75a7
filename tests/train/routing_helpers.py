"""Runs, counts and event files for the tests of routing in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainer_helpers import make_model, make_tasks, make_tokenizer, options

from moadapt.statistics import RouterCounts
from moadapt.train.trainer import MultiTaskTrainer

STILL = 1e-30  # a learning rate that moves no weight enough to count: all steps have the routers of the first
ALARM: dict[str, Any] = {"max_share": 0.95, "dead_fraction": 0.5}
BIASED = {"kind": "top_k", "num_experts_per_tok": 2, "bias": True}


def make_trainer(folder: Path, model: Any = None, callbacks: Any = (), deepspeed: Any = None, **changes: Any) -> Any:
    settings = options(folder, **{"learning_rate": STILL, **changes})
    return MultiTaskTrainer(model or make_model(), make_tokenizer(), make_tasks(), settings, deepspeed, callbacks)


def routing_of(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("routing/")}


def counts_of(name: str, loads: list[int], layer: int | None = 0, module: str = "mlp", **more: Any) -> RouterCounts:
    """A top-1 router, whose rows selected the experts so often."""
    counts = RouterCounts.zeros(name, [str(i) for i in range(len(loads))], layer=layer, module=module, **more)
    counts.selections[0, 0, 0] = torch.tensor(loads)
    counts.weights[0, 0, 0] = torch.tensor(loads).double()
    counts.rows[0, 0, 0] = sum(loads)
    counts.entropy[0] = torch.tensor([0.25 * sum(loads), 0.0625 * sum(loads)])
    counts.entropy_histogram[3] = sum(loads)
    return counts


def collapsed_model(**changes: Any) -> Any:
    """In layer 1 the router of `q_proj` selects the experts 0 and 3 whatever it sees."""
    model = make_model(router=BIASED, **changes)
    set_bias(model, [1e3, 0.0, 0.0, 1e3])
    return model


def set_bias(model: Any, bias: list[float]) -> None:
    [site] = [site for name, site in model.injection.routers.items() if "layers.1" in name and "q_proj" in name]
    with torch.no_grad():
        site.router.bias.copy_(torch.tensor(bias))


def events(folder: Path, step: int) -> dict[str, bytes]:
    """The images of a step by tag, from the run's event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "logs" / folder.name), size_guidance={"images": 0})
    found.Reload()
    tags = found.Tags()["images"]
    return {tag: [image for image in found.Images(tag) if image.step == step][-1].encoded_image_string for tag in tags}
