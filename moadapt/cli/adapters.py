"""What commands on a saved adapter share: finding an adapter's config, and loading it onto its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moadapt.run_config import CONFIG_FILE, RunConfig, load_run_config

if TYPE_CHECKING:
    from moadapt.model import MixtureModel


def saved_config(adapter: str) -> Path | None:
    """The `config.yaml` that `train` left in an adapter's folder (for a checkpoint: in the run's)."""
    folder = Path(adapter)
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), None)


def with_base(config: RunConfig, adapter: str, base: str | None, *, prefer_config: bool = False) -> RunConfig:
    """The config with the base model set: `base`, or the one that the adapter names.

    Args:
        config: how to load it.
        adapter: a folder or hub id.
        base: what `--base` says.
        prefer_config: take the config's own base model over the adapter's.

    Raises:
        AdapterError: there is no adapter, or it names no base model.
    """
    from moadapt.errors import AdapterError
    from moadapt.saving import read_adapter_config

    _, identity = read_adapter_config(adapter)
    name = base or (config.model_name_or_path if prefer_config else None) or identity.get("name_or_path")
    if not name:
        raise AdapterError(f"{adapter} does not name its base model; give it with --base")
    return config.model_copy(update={"model_name_or_path": name})


def adapter_config(adapter: str, base: str | None, dtype: str | None, cpu: bool) -> RunConfig:
    """The config that `train` or `convert` left beside an adapter, or the defaults, with the command's options in it.

    Args:
        adapter: a folder or hub id.
        base: what `--base` says.
        dtype: what `--dtype` says, checked.
        cpu: stay on the CPU.

    Raises:
        AdapterError: there is no adapter, or it names no base model.
        ConfigError: a mistake in the saved config.
    """
    path = saved_config(adapter)
    config = load_run_config(path) if path is not None else RunConfig()
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if cpu:
        changes["training"] = config.training.model_copy(update={"use_cpu": True})
    return with_base(config.model_copy(update=changes), adapter, base)


def load_for_inference(config: RunConfig, adapter: str) -> MixtureModel:
    """The adapter on its base model, on this process's device.

    Raises:
        AdapterError: it does not fit the base model.
        ConfigError: the base model cannot be loaded.
    """
    from moadapt.model import MixtureModel
    from moadapt.pretrained import load_base
    from moadapt.train.engine import pick_device, place

    model = MixtureModel.from_pretrained(load_base(config), adapter)
    place(model, pick_device(config.training.use_cpu))
    return model
