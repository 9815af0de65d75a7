"""The second job: split a model's dense feed-forward blocks into routed experts.

Calibration runs the dense model over text and records what each block sees; splits and routers that need it get it. It
goes through the model a few blocks at a time, so that what is recorded stays within `calibration_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moadapt.calibration import collect
from moadapt.config import MixtureConfig, parse_mixture_config
from moadapt.errors import ConfigError
from moadapt.experts.ffn_partition import FfnPartitionConfig
from moadapt.layer import RouterSite
from moadapt.model import MixtureModel
from moadapt.partition import PlannedBlock, build_router, check_config, fit_router, plan_blocks
from moadapt.per_layer import map_values
from moadapt.registry import ROUTERS, SPLITS
from moadapt.splits.base import BlockSample, Split

Progress = Callable[[str, int, int], None]
Batch = dict[str, Tensor]
DEFAULT_CONVERSION: dict[str, Any] = {
    "expert": {"kind": "ffn_partition"},
    "router": {"kind": "top_k", "combine": "unit", "init": "mean_gate"},
}
"""Eight contiguous slices, half of them chosen by mean gate rows, summed as they are: no training, no calibration."""


def convert_ffn_to_experts(
    model: PreTrainedModel,
    config: MixtureConfig | dict[str, Any] | None = None,
    calibration: Sequence[Batch] | None = None,
    *,
    calibration_tokens: int = 32768,
    calibration_memory: float = 2.0,
    progress: Progress | None = None,
) -> MixtureModel:
    """Split a model's feed-forward blocks into routed experts.

    Args:
        model: a dense model; changed in place.
        config: the mixture, with `expert.kind: ffn_partition` (the default here); or a preset's name under `preset`.
        calibration: batches with `input_ids` and `attention_mask`, (B, S) int64, for splits and routers that need
            them.
        calibration_tokens: real tokens to record at each block, at most.
        calibration_memory: GiB that the recorded inputs may take at one time.
        progress: called with what is done, how much of it, and the total.

    Returns:
        The converted model. It generates, trains, saves and loads like a mixture of adapters.

    Raises:
        ConfigError: an invalid config, a model or block that cannot be split as it says, or no calibration where it is
            needed. The model is unchanged then.
        DataError: no token or too few texts to calibrate on, or index lists from a file that do not fit. Likewise.
    """
    if not isinstance(config, MixtureConfig):
        config = conversion_config(config)
    if not isinstance(config.expert, FfnPartitionConfig):
        raise ConfigError(f"expert.kind: {config.expert.kind} adapts linear layers; a conversion needs ffn_partition")
    check_config(config)
    planned = plan_blocks(model, config)
    _refuse_without_weights(planned)
    inputs, gradients = calibration_needs(config, planned, given=bool(calibration))
    groups = _groups(planned, calibration_tokens, calibration_memory, inputs, gradients)
    total = len(planned)
    indices: dict[str, Tensor] = {}
    fitted: dict[str, RouterSite] = {}
    tick = progress or (lambda what, done, total: None)
    for group in groups:
        samples: dict[str, BlockSample] = {}
        if inputs or gradients:
            samples = _collect(model, group, calibration or (), inputs, gradients, calibration_tokens, progress)
        for item in group:
            tick("splitting", len(indices), total)
            name = item.block.name
            sample = samples.get(name, BlockSample())
            split: Split = SPLITS.build(item.expert.split)
            with torch.no_grad():
                indices[name] = split.assign(item.ffn, item.sizes, sample, name)
            fitted[name] = build_router(config, item)
            fit_router(config, item, fitted[name], indices[name], sample.inputs_TD)
    tick("splitting", total, total)
    del planned, groups, group, item  # they hold on to the dense weights
    mixture = MixtureModel(model, config, indices)
    for name, site in mixture.injection.routers.items():
        site.load_state_dict(fitted[name].state_dict())
    return mixture


def calibration_needs(config: MixtureConfig, planned: Sequence[PlannedBlock], *, given: bool) -> tuple[bool, bool]:
    """Whether splits and routers read the blocks' inputs, and gradients, on calibration text.

    Args:
        config: the mixture.
        planned: the blocks.
        given: whether there is calibration text.

    Raises:
        ConfigError: there is none, and it is needed.
    """
    needs = [_split_needs(item) for item in planned]
    router = ROUTERS.get(config.router.kind).cls.needs_inputs(config.router)
    inputs, gradients = router or any(inputs for inputs, _ in needs), any(gradients for _, gradients in needs)
    if (inputs or gradients) and not given:
        what = "split" if any(any(item) for item in needs) else "router"
        kind = planned[0].expert.split.kind if what == "split" else config.router.kind
        raise ConfigError(
            f"{'expert.split' if what == 'split' else 'router'}: {kind} needs calibration text; give calibration.path "
            f"(in Python: calibration=batches), or choose a {what} that needs none"
        )
    return inputs, gradients


def conversion_config(options: dict[str, Any] | None) -> MixtureConfig:
    """A config for a conversion: what is not said is as in `DEFAULT_CONVERSION`.

    Raises:
        ConfigError: lists every problem.
    """
    return parse_mixture_config(conversion_options(options), "mixture")


def conversion_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The same as plain options, not checked yet."""
    given = dict(options or {})
    if given.get("preset") is None:
        expert, router = given.get("expert"), given.get("router")
        if isinstance(expert, dict):
            given["expert"] = {"kind": "ffn_partition", **expert}
        if isinstance(router, dict) and router.get("kind", "top_k") == "top_k":
            defaults = dict(DEFAULT_CONVERSION["router"])
            if "norm_topk_prob" in router:
                defaults.pop("combine")  # which this option stands for
            given["router"] = defaults | router
        given = DEFAULT_CONVERSION | given
        given["router"] = _half_of_the_experts(given)
    return given


def _half_of_the_experts(given: dict[str, Any]) -> Any:
    """The router's options with K = N / 2, rounded up, where K is not said."""
    router, number = given["router"], given.get("num_experts", MixtureConfig.model_fields["num_experts"].default)
    if not isinstance(router, dict) or router.get("kind") != "top_k" or "num_experts_per_tok" in router:
        return router
    try:
        return router | {"num_experts_per_tok": map_values(number, lambda value: -(-value // 2))}
    except TypeError:  # not a number of experts, which the config will say
        return router


def _refuse_without_weights(planned: Sequence[PlannedBlock]) -> None:
    for item in planned:
        if item.ffn.up_FD.is_meta or item.ffn.down_FD.is_meta:
            raise ConfigError(
                f"{item.block.name} has no weights in memory (offloaded, or a model on the meta device); "
                "load the model whole, without device_map or onto devices with enough memory, to split it"
            )


def _split_needs(item: PlannedBlock) -> tuple[bool, bool]:
    """(inputs, gradients) that the split reads."""
    split: Split = SPLITS.build(item.expert.split)
    return split.needs_inputs(item.sizes.num_shared), split.needs_gradients()


def _groups(
    planned: list[PlannedBlock], tokens: int, memory: float, inputs: bool, gradients: bool
) -> list[list[PlannedBlock]]:
    """Blocks whose calibration is recorded together: within the memory, and with as many text clusters as experts."""
    groups: list[list[PlannedBlock]] = []
    size = 4 * tokens * max(item.ffn.hidden_size for item in planned)
    at_once = max(1, int(memory * 2**30 // size)) if inputs else len(planned)
    for item in planned:
        last = groups[-1] if groups else []
        fits = 0 < len(last) < at_once
        if fits and (not gradients or last[0].sizes.num_experts == item.sizes.num_experts):
            last.append(item)
        else:
            groups.append([item])
    return groups


def _collect(
    model: PreTrainedModel,
    group: Sequence[PlannedBlock],
    batches: Sequence[Batch],
    inputs: bool,
    gradients: bool,
    max_tokens: int,
    progress: Progress | None,
) -> dict[str, BlockSample]:
    blocks, downs = {}, {}
    for item in group:
        block = item.block
        # A block without a module of its own is entered through its up-projection.
        blocks[block.name] = block.part(model, block.layout.up) if block.inline else model.get_submodule(block.name)
        downs[block.name] = block.part(model, block.layout.down)
    return collect(
        model,
        blocks,
        batches,
        inputs=inputs,
        gradients=gradients,
        down_modules=downs,
        num_clusters=max(item.sizes.num_experts for item in group),
        streams={item.block.name: item.block.stream for item in group},
        max_tokens=max_tokens,
        progress=None if progress is None else lambda done, total: progress("calibrating", done, total),
    )
