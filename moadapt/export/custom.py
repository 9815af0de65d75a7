"""Writing a converted model as a checkpoint that brings its own code along (`trust_remote_code`).

It holds every router kind and every family, threshold routing included, and loads where moadapt is not installed: the
code is `templates/modeling_routed_ffn.py` with the base model's classes in the place of Llama's.

Shapes: N experts, M neurons of an expert, D hidden size.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from moadapt.errors import AdapterError
from moadapt.export import templates
from moadapt.export.source import Source, SourceBlock

FILE = "modeling_routed_ffn.py"
_MODULE = FILE.removesuffix(".py")
_ROUTER_OPTIONS: dict[str, tuple[str, ...]] = {
    "top_k": ("combine", "rescale", "temperature", "bias"),
    "softmax": ("temperature",),
    "sigmoid_ste": ("combine", "rescale", "min_active", "bias"),
    "relu": ("rescale", "bias"),
    "representative": ("rescale", "absolute", "learned_scale"),
    "norm_regression": ("rescale", "rule", "router_width"),
}
"""Options that inference reads and that all blocks share."""
_PER_ROUTER = ("threshold", "num_experts_per_tok")
"""Options that each router may have a value of its own for."""


def custom_reasons(source: Source) -> list[str]:
    """Why this form cannot hold a model either; empty for all kinds and families of this project."""
    kind = source.model.mixture_config.router.kind
    reasons = []
    if kind not in _ROUTER_OPTIONS:
        reasons.append(f"router {kind} is not among those that the code beside the checkpoint knows")
    if _base_classes(source) is None:
        reasons.append(
            f"{type(source.model.base_model).__name__} is not a class of transformers that code can build on"
        )
    return reasons


def write_custom(source: Source, folder: Path, max_shard_size: int | str) -> None:
    """Save the model and its code.

    Args:
        source: the converted model.
        folder: where to; exists.
        max_shard_size: of one safetensors file.

    Raises:
        AdapterError: the classes in the code do not take the tensors.
    """
    (folder / FILE).write_text(_code(source), encoding="utf-8")
    base = source.model.base_model
    tensors = dict(source.outside)
    for block in source.blocks:
        tensors |= {f"{block.name}.{name}": tensor for name, tensor in _tensors(block).items()}
    with loaded_code(folder) as code:
        drop = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path")
        options = {key: value for key, value in base.config.to_dict().items() if key not in drop}
        config = code.RoutedFFNConfig(**options, routed_ffn=_description(source))
        config.tie_word_embeddings = source.tied if hasattr(base.config, "tie_word_embeddings") else False
        with torch.device("meta"):
            model = code.RoutedFFNForLM(config)
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise AdapterError(f"the code beside the checkpoint does not take these tensors: {error}") from None
        model.tie_weights()
        if base.can_generate():
            model.generation_config = base.generation_config
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    _add_auto_map(folder / "config.json", encoder_decoder=bool(base.config.is_encoder_decoder))


def load_custom(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The saved model with the code of its folder, without a copy in the cache of remote code."""
    with loaded_code(folder) as code:
        model: PreTrainedModel = code.RoutedFFNForLM.from_pretrained(folder, **kwargs)
    return model


@contextmanager
def loaded_code(folder: Path) -> Iterator[ModuleType]:
    """The module in a folder, imported under a name of its own for the time of the `with` block."""
    name = f"_{_MODULE}_{abs(hash(str(folder)))}"
    spec = importlib.util.spec_from_file_location(name, folder / FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.modules.pop(name, None)


def _base_classes(source: Source) -> tuple[str, str, str] | None:
    """Names of the config, of the language model and of the model without a head, if transformers has them."""
    base = source.model.base_model
    plain = AutoModel._model_mapping.get(type(base.config), None)
    if plain is None or isinstance(plain, tuple):
        return None
    names = type(base.config).__name__, type(base).__name__, plain.__name__
    ours = type(base.config), type(base), plain
    same = all(getattr(transformers, name, None) is cls for name, cls in zip(names, ours, strict=True))
    return names if same else None


def _code(source: Source) -> str:
    names = _base_classes(source)
    assert names is not None
    text = (Path(templates.__file__).parent / FILE).read_text(encoding="utf-8")
    for llama, name in zip(("LlamaConfig", "LlamaForCausalLM", "LlamaModel"), names, strict=True):
        text, count = re.subn(
            rf"^from transformers import {llama} as ", f"from transformers import {name} as ", text, flags=re.M
        )
        assert count == 1
    stem = source.model_type.removesuffix("_routed_ffn")
    return re.sub(r"\s*# (type: ignore|noqa).*", "", text.replace('"llama_routed_ffn"', f'"{stem}_routed_ffn"'))


def _description(source: Source) -> dict[str, Any]:
    """`routed_ffn` in config.json: what all blocks share, and every number of each block."""
    first, config = source.blocks[0].bank.experts, source.model.mixture_config.router
    base = source.model.base_model
    prefix = base.base_model_prefix + "." if hasattr(base, base.base_model_prefix) else ""
    routers = [_router_options(block) for block in source.blocks]
    # What all blocks have alike stands once, where it is easily changed.
    shared = {key: value for key, value in routers[0].items() if all(router.get(key) == value for router in routers)}
    blocks = {}
    for block, router in zip(source.blocks, routers, strict=True):
        bank = block.bank.experts
        own: dict[str, Any] = {
            "num_experts": bank.num_experts,
            "num_shared_experts": bank.num_shared,
            "expert_width": block.width,
            "router": {key: value for key, value in router.items() if key not in shared},
        }
        if block.bank.output_dropout:
            own["output_dropout"] = block.bank.output_dropout
        taken = [name.removeprefix(prefix) for name in block.replacement.shells if name != block.name]
        if taken:
            own["taken_over"] = taken
        blocks[block.name.removeprefix(prefix)] = own
    experts = {
        "hidden_size": first.in_features,
        "hidden_act": source.activation,
        "gated": first.gated,
        "in_bias": first.in_bias is not None,
        "down_bias": first.out_bias is not None,
        "dropout": first.dropout,
    }
    return {"format": 1, "router": {"kind": config.kind, **shared}, "experts": experts, "blocks": blocks}


def _router_options(block: SourceBlock) -> dict[str, Any]:
    config = block.router.config
    options = {name: getattr(config, name) for name in _ROUTER_OPTIONS[config.kind]}
    for name in _PER_ROUTER:
        if hasattr(block.router, name):
            options[name] = getattr(block.router, name)
    return options


def _tensors(block: SourceBlock) -> dict[str, Tensor]:
    """A block's tensors by their names in `RoutedFeedForward`."""
    shared, routed = block.halves
    tensors = {}
    for name, experts in (("experts", routed), ("shared_experts", shared)):
        if experts is None:
            continue
        tensors[f"{name}.gate_up_proj"] = experts.in_NPD.contiguous()
        tensors[f"{name}.down_proj"] = experts.out_NMD.transpose(1, 2).contiguous()
        if experts.in_bias_NP is not None:
            tensors[f"{name}.in_bias"] = experts.in_bias_NP.contiguous()
    bias = block.bank.experts.out_bias
    if bias is not None:
        tensors["down_bias"] = bias.detach()
    only_training = ("noise_weight",)
    tensors |= {
        f"router.{name}": tensor.detach()
        for name, tensor in block.router.state_dict().items()
        if name not in only_training
    }
    return tensors


def _add_auto_map(path: Path, encoder_decoder: bool) -> None:
    auto = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["auto_map"] = {
        "AutoConfig": f"{_MODULE}.RoutedFFNConfig",
        "AutoModel": f"{_MODULE}.RoutedFFNModel",
        auto: f"{_MODULE}.RoutedFFNForLM",
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
