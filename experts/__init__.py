"""Expert kinds, one file each. Importing this package fills the table `moadapt.registry.EXPERTS`."""

from moadapt.experts.base import ExpertBank, ExpertConfig, LowRankConfig
from moadapt.experts.ffn_partition import FfnPartitionConfig, PartitionBank, PartitionLoraConfig
from moadapt.experts.lora import LoraBank, LoraExpertConfig
from moadapt.experts.malora import MaloraBank, MaloraExpertConfig, malora_sizes
from moadapt.experts.mtl_lora import MtlLoraBank, MtlLoraExpertConfig

__all__ = [
    "ExpertBank",
    "ExpertConfig",
    "FfnPartitionConfig",
    "LoraBank",
    "LoraExpertConfig",
    "LowRankConfig",
    "MaloraBank",
    "MaloraExpertConfig",
    "MtlLoraBank",
    "MtlLoraExpertConfig",
    "PartitionBank",
    "PartitionLoraConfig",
    "malora_sizes",
]
