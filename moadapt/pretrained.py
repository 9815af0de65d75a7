"""Base models, tokenizers and mixtures as a run's config names them, with weights and without."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from moadapt.errors import ConfigError, MoadaptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moadapt.model import MixtureModel
    from moadapt.run_config import RunConfig

_LOADING_ERRORS = (OSError, ValueError, ImportError)


def load_base(config: RunConfig, *, for_training: bool = False) -> PreTrainedModel:
    """The base model with its weights, on the CPU (quantised: on this process's GPU).

    Args:
        config: names the model and how to load it.
        for_training: with ZeRO-3, spread the weights over the processes as they are read; blocks that are cut into
            experts must be whole for that, and DeepSpeed spreads them later.

    Raises:
        ConfigError: it cannot be loaded as asked; names the option.
    """
    from moadapt.train.loading import partitioned_loading

    options = _loading_options(config)
    model_config, auto = _model_config(config)
    hidden_size = int(model_config.get_text_config().hidden_size)
    deepspeed = config.deepspeed if for_training and not _replaces_blocks(config) else None
    try:
        with partitioned_loading(deepspeed, config.training, hidden_size):
            model: PreTrainedModel = auto.from_pretrained(_name(config), **_source(config), **options)
    except MoadaptError:  # DeepSpeed's options, not the model
        raise
    except _LOADING_ERRORS as error:
        raise _failed(config, "model", error) from None
    return model


def empty_base(config: RunConfig) -> PreTrainedModel:
    """The base model without weights, on the meta device; only its config is read.

    Raises:
        ConfigError: its config cannot be read, or is not a language model's.
    """
    import torch

    model_config, auto = _model_config(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except _LOADING_ERRORS as error:
        raise _failed(config, "model", error) from None
    return model


def load_mixture(config: RunConfig) -> MixtureModel:
    """The mixture to train, on its base model: a new one, or where `model_name_or_path` holds one, that.

    Raises:
        ConfigError: the base model cannot be loaded, or the mixture does not fit it.
        AdapterError: what is saved in the folder does not fit the base model or the mixture.
    """
    from moadapt.model import MixtureModel, get_mixture_model
    from moadapt.saving import read_adapter_config

    assert config.mixture is not None
    base = load_base(config, for_training=True)
    if config.adapter is None:
        return get_mixture_model(base, config.mixture)
    saved, _ = read_adapter_config(config.adapter)
    changes = None if config.mixture == saved else config.mixture.model_dump(mode="json")
    return MixtureModel.from_pretrained(base, config.adapter, is_trainable=True, changes=changes)


def empty_mixture(config: RunConfig, *, as_converted: bool = False) -> MixtureModel:
    """The same without weights, on the meta device.

    Args:
        config: names the base model and the mixture.
        as_converted: leave out what only a conversion with calibration text can do; the sizes are the same.

    Raises:
        ConfigError: the mixture does not fit the base model.
    """
    from moadapt.model import MixtureModel
    from moadapt.partition import check_config, consecutive_indices, plan_blocks
    from moadapt.saving import INDICES, read_tensors

    assert config.mixture is not None
    base, lists = empty_base(config), None
    if config.adapter is not None:
        tensors = read_tensors(config.adapter)
        lists = {name.removesuffix(INDICES): tensor for name, tensor in tensors.items() if name.endswith(INDICES)}
    elif as_converted and _replaces_blocks(config):
        check_config(config.mixture)
        lists = {item.block.name: consecutive_indices(item.sizes) for item in plan_blocks(base, config.mixture)}
    return MixtureModel(base, config.mixture, lists or None)


def _replaces_blocks(config: RunConfig) -> bool:
    """Whether the mixture's experts are cut from the base model's feed-forward blocks."""
    from moadapt.registry import EXPERTS

    return config.mixture is not None and bool(EXPERTS.get(config.mixture.expert.kind).cls.replaces_block)


def load_tokenizer(config: RunConfig) -> Any:
    """The base model's tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_name(config), **_source(config))
    except _LOADING_ERRORS as error:
        raise _failed(config, "tokenizer", error) from None


def _name(config: RunConfig) -> str:
    """The base model: that of a mixture, where `model_name_or_path` is a mixture's folder."""
    if config.model_name_or_path is None:
        raise ConfigError("model_name_or_path: missing; give a hub id or a local folder")
    if config.adapter is None:
        return config.model_name_or_path
    from moadapt.saving import read_adapter_config

    _, identity = read_adapter_config(config.adapter)
    if not identity.get("name_or_path"):
        raise ConfigError(f"model_name_or_path: {config.adapter} does not name its base model, so it cannot be loaded")
    return str(identity["name_or_path"])


def _source(config: RunConfig) -> dict[str, Any]:
    return {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}


def _model_config(config: RunConfig) -> tuple[Any, Any]:
    """The model's own config, and the auto class that makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        model_config = AutoConfig.from_pretrained(_name(config), **_source(config))
    except _LOADING_ERRORS as error:
        raise _failed(config, "config", error) from None
    return model_config, AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM


def _loading_options(config: RunConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": config.dtype}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if not config.quantized:
        return options
    option = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{option}: needs bitsandbytes, which is not installed; run pip install 'moadapt[quant]', or set "
            f"{option}: false"
        )
    import torch
    from transformers import BitsAndBytesConfig

    from moadapt.train.engine import pick_device

    compute = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    options["quantization_config"] = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        if config.load_in_4bit
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    options["device_map"] = {"": pick_device(config.training.use_cpu)}
    return options


def _failed(config: RunConfig, what: str, error: Exception) -> ConfigError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConfigError(f"model_name_or_path: cannot load the {what} of {config.model_name_or_path!r}: {first}")
