"""Putting routed experts in the place of a model's feed-forward blocks, and the dense blocks back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.blocks import Block, check_block, find_blocks, read_block, write_block
from moadapt.config import MixtureConfig
from moadapt.errors import ConfigError
from moadapt.experts.ffn_partition import FfnPartitionConfig, check_padding
from moadapt.ffn import FeedForward, StackedExperts
from moadapt.layer import PartitionLayer, RouterSite, build_site
from moadapt.per_layer import value_at
from moadapt.registry import EXPERTS, LOSSES, SPLITS
from moadapt.routers.base import RouterConfig, RouterSample
from moadapt.routing import AdapterSwitch
from moadapt.splits.base import BlockSample, Sizes, Split, index_lists, slices


@dataclass(frozen=True)
class PlannedBlock:
    """A block, its weights, and what the config says of it.

    Attributes:
        block: where it is.
        ffn: its weights; views of the model's.
        expert: the expert's options with one value for every per-layer option.
        sizes: numbers of experts.
    """

    block: Block
    ffn: FeedForward
    expert: FfnPartitionConfig
    sizes: Sizes


def plan_blocks(model: PreTrainedModel, config: MixtureConfig) -> list[PlannedBlock]:
    """Find and read the blocks that a config selects, and check that they can be split as it says.

    Raises:
        ConfigError: a block that cannot be read, or numbers of experts that do not fit its width.
    """
    planned = []
    for block in find_blocks(model, config):
        ffn = read_block(model, block)
        check_block(model, block, ffn)
        expert = config.expert.at_site(block.site, "expert")
        assert isinstance(expert, FfnPartitionConfig)
        assert isinstance(expert.num_shared_experts, int)
        num_experts = value_at("num_experts", config.num_experts, block.site)
        total, neurons = expert.num_shared_experts + num_experts, ffn.num_neurons
        if total > neurons:
            raise ConfigError(f"num_experts: {total} experts at {block.name}, which has only {neurons} neurons")
        if neurons % total and not expert.padding:
            divisors = [n for n in range(1, min(neurons, 4 * total) + 1) if neurons % n == 0]
            raise ConfigError(
                f"num_experts: {total} experts (routed and shared) do not divide the {neurons} neurons of "
                f"{block.name}. Numbers that do: {', '.join(map(str, divisors))}; or set expert.padding: true, which "
                "gives some experts one neuron less"
            )
        check_padding(expert, ffn, -(-neurons // total))
        planned.append(PlannedBlock(block, ffn, expert, Sizes(expert.num_shared_experts, num_experts, neurons)))
    return planned


def check_config(config: MixtureConfig) -> None:
    """Refuse options that mean nothing where experts replace blocks.

    Raises:
        ConfigError: names the option.
    """
    scope = getattr(config.router, "scope", "linear")
    if scope not in ("linear", "ffn", ["ffn"]):
        raise ConfigError(f"router.scope: {scope} with ffn_partition experts, which have one router per block; use ffn")


def split_without_samples(planned: PlannedBlock) -> Tensor:
    """Index lists from a split that needs no calibration.

    Raises:
        ConfigError: it needs calibration.
    """
    split: Split = SPLITS.build(planned.expert.split)
    if split.needs_inputs(planned.sizes.num_shared) or split.needs_gradients():
        raise ConfigError(
            f"expert.split: {planned.expert.split.kind} needs calibration text; use `moadapt convert` with "
            "calibration.path (in Python convert_ffn_to_experts with calibration), or another split"
        )
    if planned.ffn.up_FD.is_meta:  # only sizes are wanted
        return consecutive_indices(planned.sizes)
    return split.assign(planned.ffn, planned.sizes, BlockSample(), planned.block.name)


def consecutive_indices(sizes: Sizes) -> Tensor:
    """Index lists of consecutive neurons: for a model without weights, of which only sizes are wanted."""
    experts = sizes.num_shared + sizes.num_experts
    return index_lists(slices(torch.arange(sizes.num_neurons), sizes.counts), -(-sizes.num_neurons // experts))


def build_router(config: MixtureConfig, planned: PlannedBlock) -> RouterSite:
    """A router for a block, not yet fitted.

    Raises:
        ConfigError: it keeps more experts than there are.
    """
    block, num_experts = planned.block, planned.sizes.num_experts
    router_config = config.router.at_site(block.site, "router")
    num_kept = getattr(router_config, "num_experts_per_tok", None) or 1
    if num_kept > num_experts:
        raise ConfigError(f"router.num_experts_per_tok: {num_kept} at {block.name}, which has {num_experts} experts")
    weight = planned.ffn.up_FD
    dtype = torch.promote_types(weight.dtype, torch.float32)
    assert isinstance(router_config, RouterConfig)
    sizes = planned.ffn.hidden_size, num_experts
    site = build_site(block.name, router_config, *sizes, block.stream, device=weight.device, dtype=dtype)
    router = site.router
    site.requires_grad_(router.constant_weights() is None and (router.learns_from_task or _reads_routings(config)))
    router.attach(planned.ffn.act)
    return site


def _reads_routings(config: MixtureConfig) -> bool:
    """Whether a loss trains the routers directly, and not through the experts' outputs."""
    kinds = [LOSSES.get(loss.kind).cls for loss in config.losses]
    return any(not kind.wants_reconstruction and not kind.wants_teacher_logits for kind in kinds)


def fit_router(
    config: MixtureConfig, planned: PlannedBlock, site: RouterSite, indices_EM: Tensor, inputs_TD: Tensor | None = None
) -> None:
    """Initialise or fit a router from the experts that it will rule.

    Args:
        config: the mixture.
        planned: the dense block.
        site: the router.
        indices_EM: index lists of the experts, the shared ones first.
        inputs_TD: what calibration saw.

    Raises:
        ConfigError: the router needs calibration and there is none.
    """
    if inputs_TD is None and type(site.router).needs_inputs(site.router.config):
        raise ConfigError(
            f"router: {config.router.kind} needs calibration text; use `moadapt convert` with calibration.path (in "
            "Python convert_ffn_to_experts with calibration), or another router"
        )
    if planned.ffn.up_FD.is_meta:
        return
    shared = planned.sizes.num_shared
    experts = StackedExperts.cut(planned.ffn, indices_EM[shared:])
    always_on = StackedExperts.cut(planned.ffn, indices_EM[:shared]) if shared else None
    with torch.no_grad():
        site.router.fit(RouterSample(experts, always_on, inputs_TD))


class Replacement:
    """A block whose place a partition layer has taken, and the way back.

    Its linear layers stay as shells without weights, which the experts hold.
    """

    def __init__(self, model: nn.Module, planned: PlannedBlock, layer: PartitionLayer) -> None:
        block = planned.block
        self.block, self.layer = block, layer
        self.linears = block.linears(model)
        self.dtype = planned.ffn.up_FD.dtype
        self.shells = {block.name: model.get_submodule(block.name)}
        if block.inline:
            layout = block.layout
            self.shells |= {f"{block.owner}.{part}": block.part(model, part) for part in (layout.act, layout.down)}
        for module in self.linears.values():
            for parameter in module.parameters():
                parameter.data = parameter.data.new_empty(0)
        for name in self.shells:
            model.set_submodule(name, layer if name == block.name else nn.Identity())

    def dense_names(self) -> set[str]:
        """Names of the dense block's parameters in the base model."""
        return {f"{name}.{kind}" for name, module in self.linears.items() for kind, _ in module.named_parameters()}

    def dense_state(self) -> dict[str, Tensor]:
        """The dense block's tensors under their names in the base model, as the experts are now, without LoRA."""
        transposed = any(isinstance(module, Conv1D) for module in self.linears.values())
        ffn = self.layer.experts.feed_forward()
        # Weights in training may be wider than the block was; frozen ones have the dtype that the model has now.
        dtype = self.dtype if self.layer.experts.config.trainable else ffn.up_FD.dtype
        tensors = write_block(ffn, self.block.layout, transposed)
        return {f"{self.block.owner}.{name}": tensor.to(dtype) for name, tensor in tensors.items()}

    def undo(self, model: nn.Module) -> None:
        """Put the dense block back, with the weights that the experts have now."""
        tensors = self.dense_state()
        for name, module in self.linears.items():
            for kind, parameter in module.named_parameters():
                parameter.data = tensors[f"{name}.{kind}"]
        for name, module in self.shells.items():
            model.set_submodule(name, module.train(self.layer.training))


def choose_indices(planned: list[PlannedBlock], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Index lists by block name.

    Args:
        planned: the blocks.
        given: lists that exist already; None makes them by a split that needs no calibration.

    Raises:
        ConfigError: the lists do not fit, or none can be made.
    """
    chosen = {}
    for item in planned:
        name, sizes = item.block.name, item.sizes
        indices_EM = split_without_samples(item) if given is None else given.get(name)
        shape = (sizes.num_shared + sizes.num_experts, sizes.width)
        if indices_EM is None or tuple(indices_EM.shape) != shape:
            found = "none" if indices_EM is None else f"shape {tuple(indices_EM.shape)}"
            raise ConfigError(f"index lists of {name}: needs shape {shape}, found {found}")
        _check_indices(name, indices_EM, sizes.num_neurons)
        chosen[name] = indices_EM
    return chosen


def _check_indices(name: str, indices_EM: Tensor, num_neurons: int) -> None:
    if indices_EM.is_meta:
        return
    real = indices_EM[indices_EM >= 0].sort().values.cpu()
    if real.shape[0] != num_neurons or not torch.equal(real, torch.arange(num_neurons)):
        raise ConfigError(f"index lists of {name}: every one of its {num_neurons} neurons must occur exactly once")


def replace_blocks(
    model: PreTrainedModel,
    planned: list[PlannedBlock],
    indices: Mapping[str, Tensor],
    routers: Mapping[str, RouterSite],
    switch: AdapterSwitch,
) -> tuple[dict[str, PartitionLayer], list[Replacement]]:
    """Cut the blocks up and put the experts in their place, one after the other, so that no two copies pile up.

    Args:
        model: changed in place.
        planned: the blocks; emptied, since it holds on to their weights.
        indices: index lists by block name.
        routers: router sites by block name.
        switch: of the mixture.
    """
    layers, replacements = {}, []
    while planned:
        item = planned.pop(0)
        name, features = item.block.name, item.ffn.hidden_size
        dtype = torch.promote_types(item.ffn.up_FD.dtype, torch.float32)
        sizes = features, features, item.sizes.num_experts
        bank = EXPERTS.build(item.expert, *sizes, dtype=dtype, ffn=item.ffn, neuron_indices=indices[name])
        layer = PartitionLayer(bank, routers[name], switch, item.block.output_dropout(model))
        layers[name] = layer
        replacements.append(Replacement(model, item, layer))
    return layers, replacements
