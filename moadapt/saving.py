"""Adapters on disk: `mixture_config.json`, `mixture.safetensors` and a model card.

Only the adapter's tensors are written, and never a pickle. The JSON holds the mixture's options and what identifies
the base model, so that an adapter is not put onto another model by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import moadapt
from moadapt.config import MixtureConfig, parse_mixture_config
from moadapt.errors import AdapterError, ConfigError
from moadapt.presets import PRESETS, merge_preset
from moadapt.registry import config_error

if TYPE_CHECKING:
    from moadapt.model import MixtureModel

CONFIG_FILE = "mixture_config.json"
WEIGHTS_FILE = "mixture.safetensors"
INDICES = ".experts.neuron_indices"
"""End of the names of the tensors that say which neurons form which expert of a converted model."""
CARD_FILE = "README.md"
FORMAT_VERSION = 1
HERE = "."
"""As the name of an adapter's base model: it lies in the adapter's folder."""
_WEIGHTS = (".experts.in_proj", ".experts.out_proj", ".experts.in_bias", ".experts.out_bias")
"""Ends of the names of experts' own weights, which the base model holds where it lies in the adapter's folder."""

_STRUCTURE = (
    "num_experts",
    "expert_unit",
    "tasks",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "num_shared_experts",
    "split",
    "padding",
    "first_k_dense_replace",
    "last_k_dense_replace",
)
"""Options that decide which experts a model has."""

_IDENTITY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def base_identity(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one base model from another: its class and the sizes in its config."""
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name) for name in _IDENTITY if getattr(config, name, None) is not None}
    return {"architecture": type(model).__name__, **sizes}


def save_adapter(
    model: MixtureModel,
    directory: str | Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    card: str | None = None,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    with_base: bool = False,
) -> None:
    """Write an adapter folder.

    Args:
        model: the mixture.
        directory: where to; made if need be. Files of an earlier adapter in it are replaced.
        state_dict: the adapter's tensors, if they have been gathered already (as under ZeRO-3).
        card: text of the model card; a short one is written when not given.
        is_main_process: whether this process writes.
        safe_serialization: only true; adapters are never written as pickles.
        with_base: the folder holds the base model too, so the adapter names the folder itself; experts of its own
            feed-forward blocks are left to the base model's weights.

    Raises:
        AdapterError: the folder's place is taken by a file, the tensors are not whole, or a pickle is asked for.
    """
    if not safe_serialization:
        raise AdapterError("safe_serialization: false would write a pickle; adapters are saved as safetensors only")
    if not is_main_process:
        return
    folder = Path(directory)
    if folder.is_file():
        raise AdapterError(f"{folder} is a file; an adapter is saved as a folder")
    folder.mkdir(parents=True, exist_ok=True)
    given = (state_dict or model.adapter_state_dict()) | model.adapter_buffers()
    if with_base:
        given = {name: tensor for name, tensor in given.items() if not name.endswith(_WEIGHTS)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise AdapterError(f"{empty[0]} is empty: ZeRO-3 has partitioned it; save through the trainer")
    name = HERE if with_base else model.base_model.name_or_path
    base = {"name_or_path": name, **base_identity(model.base_model)}
    if with_base:
        base |= {"holds_experts": True, "experts_trained": model.experts_trained}
    document = {
        "format_version": FORMAT_VERSION,
        "moadapt_version": moadapt.__version__,
        "base_model": base,
        "mixture": model.mixture_config.model_dump(mode="json"),
    }
    _write(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(document, indent=2) + "\n"))
    _write(folder / CARD_FILE, lambda path: path.write_text(card or model_card(model)))


def _write(path: Path, write: Any) -> None:
    """Write beside the file and rename, so that nobody meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)


def model_card(model: MixtureModel, results: str = "") -> str:
    """Markdown with the metadata that model hubs read; `results` is a section of its own."""
    config = model.mixture_config
    name = model.base_model.name_or_path
    trainable = sum(parameter.numel() for _, parameter in model.adapter_parameters())
    header = f"base_model: {name}\n" if name else ""
    section = f"\n## Results\n\n{results}\n" if results else ""
    return f"""---
library_name: moadapt
{header}tags:
- moadapt
- mixture-of-experts
- lora
---

# Mixture of adapters for `{name or type(model.base_model).__name__}`

| | |
|---|---|
| preset | {config.preset or "none"} |
| experts | {config.num_experts} of kind `{config.expert.kind}` |
| router | `{config.router.kind}` |
| adapted layers | {len(model.injection.layers)} |
| adapter parameters | {trainable:,} |
{section}
## Use

```python
from moadapt import MixtureModel

model = MixtureModel.from_pretrained(None, "path/to/this/folder")
```
"""


def read_adapter_config(adapter: str | Path) -> tuple[MixtureConfig, dict[str, Any]]:
    """The mixture and the base model's identity that an adapter folder names.

    Raises:
        AdapterError: no adapter there, or its JSON cannot be used.
    """
    folder = adapter_folder(adapter)
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{adapter}: no {CONFIG_FILE} there; give the folder that save_pretrained wrote") from None
    except UnicodeDecodeError:
        raise AdapterError(f"{path}: not a text file; it is damaged, copy it again") from None
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise AdapterError(f"{path}: format_version {version!r}, this version reads {FORMAT_VERSION}; update moadapt")
    if not isinstance(document.get("base_model", {}), dict):
        raise AdapterError(f"{path}: base_model must be a mapping; the file is damaged")
    try:
        config, base = MixtureConfig.model_validate(document["mixture"]), dict(document["base_model"])
    except KeyError as error:
        raise AdapterError(f"{path}: no {error} in it; the file is not whole") from None
    except ValidationError as error:
        raise AdapterError(str(config_error(error, str(path)))) from None
    if base.get("name_or_path") == HERE:
        base["name_or_path"] = str(adapter)  # of a hub repository its id: only the adapter's files were downloaded
    return config, base


def not_in_file(names: Iterable[str], config: MixtureConfig, saved: Mapping[str, Any]) -> set[str]:
    """Parameters of experts that an adapter's file does not hold, and that keep what they are given at the start.

    Args:
        names: of the parameters of the adapter as it is to be now.
        config: the mixture as it was saved.
        saved: what was saved about its base model.

    Returns:
        Weights that the base model in the folder holds, and weights or LoRA that are trained from now on.
    """
    trained = getattr(config.expert, "trainable", False) and not saved.get("holds_experts")
    new_lora = hasattr(config.expert, "lora") and config.expert.lora is None
    left_out = set()
    for name in names:
        if name.endswith(_WEIGHTS):
            left_out |= set() if trained else {name}
        elif new_lora and ".experts.lora_" in name:
            left_out.add(name)
    return left_out


def changed_mixture(config: MixtureConfig, changes: Mapping[str, Any]) -> MixtureConfig:
    """A saved mixture with other options, for further training.

    Args:
        config: what was saved.
        changes: options over it. A `preset` gives its router's, losses' and experts' options, but not what fixes which
            neurons form which expert.

    Raises:
        ConfigError: an option that decides which tensors there are, and so cannot change any more; or an invalid one.
    """
    saved = config.model_dump(mode="json")
    given = dict(changes)
    merged = saved
    if given.get("preset") is not None:
        if given["preset"] not in PRESETS:
            parse_mixture_config(given, "mixture")  # which names the valid presets
        preset = {key: value for key, value in PRESETS[given["preset"]].items() if key not in _STRUCTURE}
        preset["expert"] = {key: value for key, value in preset.get("expert", {}).items() if key not in _STRUCTURE}
        merged = merge_preset(merged, preset)
    changed = parse_mixture_config(merge_preset(merged, given), "mixture")
    after = changed.model_dump(mode="json")
    problems = [key for key in _STRUCTURE if key in saved and after[key] != saved[key]]
    problems += [f"expert.{k}" for k in (*_STRUCTURE, "kind") if saved["expert"].get(k) != after["expert"].get(k)]
    if problems:
        raise ConfigError(
            f"mixture: {', '.join(problems)} cannot differ from what the model was made with; leave out what is saved "
            "in it, or start from its base model"
        )
    return changed


def adapter_folder(adapter: str | Path) -> Path:
    """A local folder as it is; anything else is downloaded as a hub repository.

    Raises:
        AdapterError: neither exists.
    """
    folder = Path(adapter)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(adapter), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"{adapter}: no such folder, and no hub repository to fetch ({error})") from None


def check_base(model: PreTrainedModel, saved: dict[str, Any], adapter: str | Path) -> None:
    """Compare a model with the base model that an adapter was trained on.

    Args:
        model: the model.
        saved: what was saved about its base model.
        adapter: a folder, or the id of a hub repository.

    Raises:
        AdapterError: they differ; says in what. Or the experts were trained, and are in the base model that lies in the
            adapter's folder, which is not the one given.
    """
    here = base_identity(model)
    differences = [
        f"{key}: {value!r} there, {here[key]!r} here" for key, value in saved.items() if here.get(key, value) != value
    ]
    if differences:
        name = saved.get("name_or_path")
        raise AdapterError(f"{adapter} was trained on another base model ({name}): " + "; ".join(differences))
    given = model.name_or_path
    if saved.get("holds_experts") and saved.get("experts_trained", True) and not _same_place(given, adapter):
        raise AdapterError(
            f"{adapter} holds trained experts as a part of its own base model, and {given or 'the model'} is another "
            "one, without them; load the base model from there (in Python pass None, or from_pretrained of the "
            "same folder; on the command line leave --base out)"
        )


def _same_place(first: str, second: str | Path) -> bool:
    """Whether two names are the same hub id or folder."""
    return first == str(second) or Path(first).resolve() == Path(second).resolve()


def read_tensors(adapter: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    path = adapter_folder(adapter) / WEIGHTS_FILE
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{adapter}: {WEIGHTS_FILE} is missing; the folder is not whole") from None
    except SafetensorError as error:
        raise AdapterError(f"{path}: cannot be read ({error}); the file is damaged, copy it again") from None
    return tensors


def load_base_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """A causal or encoder-decoder language model by its hub id or folder.

    Args:
        name_or_path: hub id or local folder.
        **kwargs: passed to `from_pretrained`, as `dtype` or `quantization_config`.

    Raises:
        AdapterError: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: PreTrainedModel = auto.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot load the base model {name_or_path!r}: {error}") from None
    return model
