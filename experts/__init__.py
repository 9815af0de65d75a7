"""Expert kinds, one file each. Importing this package fills the table `moadapt.registry.EXPERTS`."""

from moadapt.experts.base import ExpertBank, ExpertConfig, LowRankConfig
from moadapt.experts.lora import LoraBank, LoraExpertConfig
from moadapt.experts.malora import MaloraBank, MaloraExpertConfig, malora_sizes

__all__ = [
    "ExpertBank",
    "ExpertConfig",
    "LoraBank",
    "LoraExpertConfig",
    "LowRankConfig",
    "MaloraBank",
    "MaloraExpertConfig",
    "malora_sizes",
]
