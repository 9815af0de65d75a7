"""Mixtures of adapters: tune one language model on many tasks with routed experts.

The main names are available here: `get_mixture_model`, `MixtureModel`, `MixtureConfig`, `MultiTaskTrainer`, and the
tables of kinds `EXPERTS`, `ROUTERS` and `LOSSES`. They are imported when first used, so `import moadapt` is light.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moadapt.config import MixtureConfig as MixtureConfig
    from moadapt.convert import convert_ffn_to_experts as convert_ffn_to_experts
    from moadapt.model import MixtureModel as MixtureModel
    from moadapt.model import get_mixture_model as get_mixture_model
    from moadapt.registry import EXPERTS as EXPERTS
    from moadapt.registry import LOSSES as LOSSES
    from moadapt.registry import ROUTERS as ROUTERS
    from moadapt.train.trainer import MultiTaskTrainer as MultiTaskTrainer

try:
    __version__ = version("moadapt")
except PackageNotFoundError:  # running from a checkout that is not installed
    __version__ = "0.0.0"

_HOME = {
    "get_mixture_model": "moadapt.model",
    "MixtureModel": "moadapt.model",
    "convert_ffn_to_experts": "moadapt.convert",
    "MixtureConfig": "moadapt.config",
    "MultiTaskTrainer": "moadapt.train.trainer",
    "EXPERTS": "moadapt.registry",
    "ROUTERS": "moadapt.registry",
    "LOSSES": "moadapt.registry",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moadapt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
