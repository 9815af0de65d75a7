"""Putting a mixture into a model: replace the targets, attach the routers, make copies of `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moadapt.config import MixtureConfig
from moadapt.errors import ConfigError
from moadapt.experts.base import ExpertBank, Role
from moadapt.layer import MixtureLayer, PartitionLayer, RouterSite, SharedRouterHook, TrainableCopy, build_site
from moadapt.partition import (
    Replacement,
    build_router,
    check_config,
    choose_indices,
    fit_router,
    plan_blocks,
    replace_blocks,
)
from moadapt.per_layer import Site, value_at
from moadapt.registry import EXPERTS, ROUTERS
from moadapt.routers.base import RouterConfig
from moadapt.routing import AdapterSwitch
from moadapt.targets import Target, find_targets

SHARED_ROUTER = "mixture_router"


@dataclass
class Injection:
    """What was put into a model.

    Attributes:
        layers: mixture layers by the name of the module they replaced.
        routers: router sites by their unique name.
        copies: trainable copies by the name of the module they stand for.
        switch: turns all of them off and on.
        handles: hooks of the shared routers.
        was_trainable: names of the base parameters that had `requires_grad` before.
        replacements: feed-forward blocks whose place experts have taken.
    """

    layers: dict[str, MixtureLayer | PartitionLayer] = field(default_factory=dict)
    routers: dict[str, RouterSite] = field(default_factory=dict)
    copies: dict[str, TrainableCopy] = field(default_factory=dict)
    switch: AdapterSwitch = field(default_factory=AdapterSwitch)
    handles: list[RemovableHandle] = field(default_factory=list)
    was_trainable: set[str] = field(default_factory=set)
    replacements: list[Replacement] = field(default_factory=list)

    def remove(self, model: nn.Module, merged: bool) -> None:
        """Put the base layers back; `merged` keeps the trained copies of `modules_to_save` instead of the originals."""
        for name, layer in self.layers.items():
            if isinstance(layer, MixtureLayer):
                model.set_submodule(name, layer.base_layer)
        for replacement in self.replacements:
            replacement.undo(model)
        for handle in self.handles:
            handle.remove()
        for module in list(model.modules()):
            if SHARED_ROUTER in module._modules:
                del module._modules[SHARED_ROUTER]
        for name, wrapper in self.copies.items():
            model.set_submodule(name, wrapper.copy if merged else wrapper.original_module)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.was_trainable)


def inject(
    model: PreTrainedModel, config: MixtureConfig, neuron_indices: Mapping[str, Tensor] | None = None
) -> Injection:
    """Freeze the model and put a mixture into it.

    Args:
        model: a transformers model; changed in place.
        config: the mixture.
        neuron_indices: which neurons form which expert, by block name, for experts that replace a block; None splits
            the blocks now.

    Raises:
        ConfigError: targets that do not exist or per-layer values that do not fit.
    """
    if any(isinstance(module, (MixtureLayer, PartitionLayer)) for module in model.modules()):
        raise ConfigError("this model already holds a mixture; unload() it, or start from the base model")
    if EXPERTS.get(config.expert.kind).cls.replaces_block:
        return _inject_partition(model, config, neuron_indices)
    if ROUTERS.get(config.router.kind).cls.needs_fit(config.router):
        raise ConfigError(
            f"router: {config.router.kind} with these options is made from the experts of a split feed-forward block; "
            "it needs expert.kind: ffn_partition"
        )
    targets = find_targets(model, config)
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.router, []).append(target)
    routers = {name: _build_router(model, config, ruled) for name, ruled in groups.items()}
    banks = {target.site.name: _build_bank(model, config, target) for target in targets}
    saved_too = _modules_to_save(model, config, [target.site.name for target in targets])

    # Nothing has been changed up to here, and nothing below fails.
    injection = Injection(
        routers=routers, was_trainable={name for name, p in model.named_parameters() if p.requires_grad}
    )
    model.requires_grad_(False)
    for target in targets:
        name = target.site.name
        own = routers[target.router] if target.router == name else None
        member = groups[target.router].index(target) if config.expert_unit == "module" else None
        layer = MixtureLayer(model.get_submodule(name), banks[name], own, target.router, injection.switch, member)
        model.set_submodule(name, layer)
        injection.layers[name] = layer
    for name, (first, *_) in groups.items():
        if name != first.site.name:
            block = model.get_submodule(first.router_module)
            block.add_module(SHARED_ROUTER, routers[name])
            hook = SharedRouterHook(routers[name], injection.switch)
            injection.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    _copy_modules(model, saved_too, injection)
    return injection


def _inject_partition(
    model: PreTrainedModel, config: MixtureConfig, neuron_indices: Mapping[str, Tensor] | None
) -> Injection:
    """Experts in the place of feed-forward blocks."""
    check_config(config)
    planned = plan_blocks(model, config)
    indices = choose_indices(planned, neuron_indices)
    routers = {item.block.name: build_router(config, item) for item in planned}
    if neuron_indices is None:
        for item in planned:
            fit_router(config, item, routers[item.block.name], indices[item.block.name])
    saved_too = _modules_to_save(model, config, [linear for item in planned for linear in item.block.linears(model)])
    injection = Injection(
        routers=routers, was_trainable={name for name, p in model.named_parameters() if p.requires_grad}
    )
    model.requires_grad_(False)
    layers, injection.replacements = replace_blocks(model, planned, indices, routers, injection.switch)
    injection.layers.update(layers)
    _copy_modules(model, saved_too, injection)
    return injection


def _copy_modules(model: PreTrainedModel, names: list[str], injection: Injection) -> None:
    """Trainable copies of `modules_to_save`."""
    for name in names:
        original = model.get_submodule(name)
        wrapper = TrainableCopy(original, copy.deepcopy(original), injection.switch)
        wrapper.copy.requires_grad_(True)
        model.set_submodule(name, wrapper)
        injection.copies[name] = wrapper


def _num_experts(config: MixtureConfig, site: Site) -> int:
    return value_at("num_experts", config.num_experts, site)


def _weight(model: nn.Module, name: str) -> tuple[torch.device, torch.dtype]:
    """Device of a layer, and the dtype of its adapter: fp32 beside half-precision or quantised weights."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    floating = weight.dtype if weight.dtype.is_floating_point else torch.float32
    return weight.device, torch.promote_types(floating, torch.float32)


def _build_bank(model: nn.Module, config: MixtureConfig, target: Target) -> ExpertBank:
    device, dtype = _weight(model, target.site.name)
    expert = config.expert.at_site(target.site, "expert")
    sizes = target.in_features, target.out_features, _num_experts(config, target.site)
    try:
        bank: ExpertBank = EXPERTS.build(expert, *sizes, device=device, dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"{target.site.name}: {error}") from None
    return bank


def _build_router(model: nn.Module, config: MixtureConfig, ruled: list[Target]) -> RouterSite:
    first = ruled[0]
    numbers = {target.site.name: _num_experts(config, target.site) for target in ruled}
    num_experts = len(ruled) if config.expert_unit == "module" else numbers[first.site.name]
    if len(set(numbers.values())) > 1:
        raise ConfigError(
            f"num_experts: the router {first.router} rules layers with different numbers of experts ({numbers}); one "
            "router can only rule layers with the same number"
        )
    # A router that rules several layers is configured by its own name, not by that of one of its linears.
    place = Site(first.router, first.site.layer, first.site.num_layers)
    router_config = config.router.at_site(place, "router")
    num_kept = getattr(router_config, "num_experts_per_tok", 1)
    if num_kept > num_experts:
        what = "adapted modules" if config.expert_unit == "module" else "experts"
        raise ConfigError(f"router.num_experts_per_tok: {num_kept} at {first.router}, which has {num_experts} {what}")
    device, dtype = _weight(model, first.site.name)
    assert isinstance(router_config, RouterConfig)
    sizes = first.router_features, num_experts
    site = build_site(first.router, router_config, *sizes, first.stream, device=device, dtype=dtype)
    # A router whose gates are the same for every input (one expert) has nothing to learn.
    site.requires_grad_(site.router.constant_weights() is None)
    return site


def _modules_to_save(model: PreTrainedModel, config: MixtureConfig, adapted: list[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` asks for."""
    names = [name for name, _ in model.named_modules()]
    chosen: list[str] = []
    for wanted in config.modules_to_save:
        found = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise ConfigError(f"modules_to_save: the model has no module {wanted!r}")
        chosen += [name for name in found if name not in chosen]
    for name in chosen:
        if any(other == name or other.startswith(f"{name}.") for other in adapted):
            raise ConfigError(
                f"modules_to_save: {name} is, or holds, an adapted module; adapt it or train it, not both"
            )
        outer = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ConfigError(f"modules_to_save: {name} is a part of {outer}, which is listed too; keep one")
    return chosen


def adapter_roles(injection: Injection, names: dict[str, nn.Parameter]) -> dict[str, Role]:
    """What each adapter parameter is, by name: of a router, a role that its bank declares, or `other`."""
    roles: dict[str, Role] = {}
    by_id = {id(parameter): name for name, parameter in names.items()}
    for site in injection.routers.values():
        roles |= {by_id[id(parameter)]: "router" for parameter in site.parameters()}
        if site.activation is not None:
            roles |= {by_id[id(parameter)]: "activation" for parameter in site.activation.parameters()}
    for layer in injection.layers.values():
        for local, parameter in layer.experts.adapter_parameters():
            roles[by_id[id(parameter)]] = layer.experts.roles.get(local, "other")
    return {name: roles.get(name, "other") for name in names}
