"""Which modules of a base model are adapted, where they sit, and which of them one router rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.config import MixtureConfig, Names
from moadapt.errors import ConfigError
from moadapt.per_layer import Site
from moadapt.routing import Stream

_CROSS_ATTENTION = re.compile(r"encdecattention|encoder_attn|cross_?attn|cross_?attention", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_KEY_VALUE = re.compile(r"^(k|v|key|value|kv|c_attn)(_proj)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """One linear layer to adapt.

    Attributes:
        site: its name and its transformer layer.
        in_features: I.
        out_features: O.
        stream: whose tokens it sees.
        router: name of the router that rules it.
        router_module: the module whose input that router reads; the layer itself for scope `linear`.
        router_features: D, size of that input.
    """

    site: Site
    in_features: int
    out_features: int
    stream: Stream
    router: str
    router_module: str
    router_features: int


def is_linear(module: nn.Module) -> bool:
    """Whether the module can be adapted: `nn.Linear`, its quantised subclasses, or GPT-2's `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(in features, out features), also when ZeRO-3 has taken the weight away."""
    if isinstance(module, Conv1D):
        shape = getattr(module.weight, "ds_shape", module.weight.shape)
        return int(shape[0]), int(module.nf)
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def find_targets(model: PreTrainedModel, config: MixtureConfig) -> list[Target]:
    """The linear layers that the config selects, in the order of `named_modules`.

    Raises:
        ConfigError: nothing matches, a name matches a module that is not linear, a layer index does not exist, or
            a target lies outside the blocks of the router's scope.
    """
    modules = dict(model.named_modules())
    head = _output_head(model)
    layers = [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    hidden_size = int(model.config.get_text_config().hidden_size)
    targets, seen_layers, wrong_type = [], set(), []
    for name, module in modules.items():
        if config.target_modules == "all-linear":
            matches = is_linear(module) and name != head
        else:
            matches = matches_names(name, config.target_modules)
        if not matches or (config.exclude_modules is not None and matches_names(name, config.exclude_modules)):
            continue
        site = site_of(name, modules)
        seen_layers.add(site.layer)
        if layers is not None and site.layer not in layers:
            continue
        if not is_linear(module):
            wrong_type.append(f"{name} ({type(module).__name__})")
            continue
        targets.append(_target(site, modules, config.router, hidden_size))
    if wrong_type:
        raise ConfigError(
            f"target_modules: only linear layers can be adapted, but it matches {', '.join(wrong_type[:5])}; use "
            "names of linear layers, or exclude_modules"
        )
    missing = sorted(set(layers or []) - {layer for layer in seen_layers if layer is not None})
    if missing:
        raise ConfigError(f"layers_to_transform: layer {missing[0]} has no module that target_modules selects")
    if not targets:
        raise ConfigError(
            f"target_modules: {config.target_modules!r} selects no module. Linear layers of this model: "
            f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name, module in modules.items() if is_linear(module)}))}"
        )
    return targets


def matches_names(name: str, pattern: Names) -> bool:
    """Whether a list of names (of a module, or of the end of its path) or a regular expression selects a module."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in pattern)


def _output_head(model: nn.Module) -> str | None:
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def _layer_prefix(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Name of the transformer layer around a module: the first indexed member of a `ModuleList` on its path."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if parts[depth].isdigit() and isinstance(modules[".".join(parts[:depth])], nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return None


def site_of(name: str, modules: dict[str, nn.Module]) -> Site:
    """A module's name and the transformer layer that holds it."""
    prefix = _layer_prefix(name, modules)
    if prefix is None:
        return Site(name, None, 0)
    stack, _, index = prefix.rpartition(".")
    return Site(name, int(index), len(modules[stack]))  # type: ignore[arg-type]


def _target(site: Site, modules: dict[str, nn.Module], router: Any, hidden_size: int) -> Target:
    name = site.name
    sizes = linear_sizes(modules[name])
    prefix = _layer_prefix(name, modules)
    inside = name[len(prefix) + 1 :] if prefix is not None else name
    in_encoder = "encoder" in (prefix or name).split(".")
    reads_encoder = bool(_CROSS_ATTENTION.search(inside) and _KEY_VALUE.match(name.rsplit(".", 1)[-1]))
    stream: Stream = "encoder" if in_encoder or reads_encoder else "decoder"
    scopes = router.scope if isinstance(router.scope, list) else [router.scope]
    if scopes == ["linear"]:
        return Target(site, *sizes, stream, name, name, sizes[0])
    if prefix is None:
        raise ConfigError(
            f"router.scope: {router.scope} needs modules inside transformer layers, but {name} is in none; use "
            "scope: linear or exclude it"
        )
    kind = "attention" if _ATTENTION.search(inside) else "ffn"
    if scopes != ["block"] and kind not in scopes:
        raise ConfigError(
            f"router.scope: {router.scope} rules no {kind} block, but target_modules selects {name}; use "
            "scope: [ffn, attention] or scope: block, or target fewer modules"
        )
    if reads_encoder and router.granularity == "token":
        # Keys and values of cross-attention see the encoder's tokens, which no router of the decoder has routed.
        siblings = [
            other
            for other in modules
            if other.rpartition(".")[0] == name.rpartition(".")[0] and _KEY_VALUE.match(other.rsplit(".", 1)[-1])
        ]
        router_name, router_module = f"{name.rpartition('.')[0]}.key_value", siblings[0]
    elif scopes == ["block"]:
        router_name, router_module = prefix, prefix
    else:
        router_name, router_module = _sub_block(name, prefix, kind, modules)
    entry = modules[router_module]
    features = linear_sizes(entry)[0] if is_linear(entry) else hidden_size
    return Target(site, *sizes, stream, router_name, router_module, features)


def _sub_block(name: str, prefix: str, kind: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """(router name, module whose input it reads) of the attention or feed-forward block around a linear layer."""
    if kind == "attention":
        parts = name.split(".")
        depth = next(i for i in range(prefix.count(".") + 1, len(parts)) if _ATTENTION.search(parts[i]))
        block = ".".join(parts[: depth + 1])
    else:
        block = name.rpartition(".")[0]
    if block not in (prefix, name):
        return block, block
    # The layer keeps its linears as direct children (OPT's fc1, fc2): read what the first of them reads.
    first = next(
        other
        for other, module in modules.items()
        if other.rpartition(".")[0] == prefix
        and is_linear(module)
        and ("attention" if _ATTENTION.search(other[len(prefix) :]) else "ffn") == kind
    )
    return f"{prefix}.{kind}", first
