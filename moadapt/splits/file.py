"""Index lists from a file: of another conversion, or made by hand.

Read are a folder that `moadapt convert` wrote, its `mixture.safetensors`, any `.safetensors` file, or a `.json` file
that maps a block's name to lists of neuron indices, shared experts first:

    {"model.layers.0.mlp": [[0, 2, 5], [1, 3, 4]], ...}

Tensors are int64 (S + N, M) under `<block>.experts.neuron_indices` or the block's name; -1 is no neuron.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moadapt.errors import DataError
from moadapt.ffn import PADDING, FeedForward
from moadapt.registry import SPLITS, closest
from moadapt.splits.base import BlockSample, Sizes, Split, SplitConfig, index_lists

SUFFIX = ".experts.neuron_indices"
"""After a block's name: the key of its index lists among the tensors of a converted model."""
_FOLDER_FILE = "mixture.safetensors"


class FileSplitConfig(SplitConfig):
    """Options of the `file` split.

    Attributes:
        path: a converted folder, a `.safetensors` file or a `.json` file with the index lists of every block.
    """

    kind: Literal["file"] = "file"
    path: str


@SPLITS.register("file", FileSplitConfig)
class FileSplit(Split):
    """Experts as a file lists them."""

    config: FileSplitConfig

    def assign(self, ffn: FeedForward, sizes: Sizes, sample: BlockSample, layer: str) -> Tensor:
        """int64 (S + N, M); see `Split.assign`.

        Raises:
            DataError: a file that cannot be read, a block that it lacks, or lists that are no balanced partition of
                the block into S + N experts.
        """
        path = Path(self.config.path).expanduser()
        path = path / _FOLDER_FILE if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"expert.split.path: there is no file {path}")
        lists = _from_json(path, layer) if path.suffix == ".json" else _from_safetensors(path, layer)
        return checked_lists(lists, sizes, f"{path}: {layer}")


def checked_lists(lists: list[list[int]], sizes: Sizes, source: str) -> Tensor:
    """Index lists as a tensor, if they are a balanced partition.

    Args:
        lists: one list of neuron indices per expert, the shared ones first; padding is left out.
        sizes: how many experts, and how wide.
        source: where the lists are from, for messages.

    Returns:
        int64 (S + N, M), as from `Split.assign`.

    Raises:
        DataError: another number of lists, a neuron that is missing, listed twice or does not exist, or sizes that
            differ by more than one.
    """
    expected = sizes.num_shared + sizes.num_experts
    if len(lists) != expected:
        raise DataError(
            f"{source}: {len(lists)} lists, but the config asks for {expected} experts "
            f"({sizes.num_shared} shared, {sizes.num_experts} routed); set num_experts and expert.num_shared_experts"
        )
    groups = [[index for index in group if index != PADDING] for group in lists]
    listed = torch.tensor([index for group in groups for index in group], dtype=torch.int64)
    outside = sorted(set(listed[(listed < 0) | (listed >= sizes.num_neurons)].tolist()))
    if outside:
        raise DataError(f"{source}: no such neuron: {_some(outside)}; the block has 0 to {sizes.num_neurons - 1}")
    count_F = torch.bincount(listed, minlength=sizes.num_neurons)
    twice, missing = (count_F > 1).nonzero().flatten().tolist(), (count_F == 0).nonzero().flatten().tolist()
    if twice:
        raise DataError(f"{source}: listed more than once: {_some(twice)}; every neuron belongs to one expert")
    if missing:
        raise DataError(f"{source}: in no list: {_some(missing)}; every neuron belongs to one expert")
    shortest, longest = min(map(len, groups)), max(map(len, groups))
    if longest - shortest > 1:
        raise DataError(f"{source}: the experts have {shortest} to {longest} neurons; sizes may differ by one")
    return index_lists([torch.tensor(group, dtype=torch.int64) for group in groups], sizes.width)


def _some(neurons: list[int]) -> str:
    """The first few, and how many more."""
    more = f" and {len(neurons) - 5} more" if len(neurons) > 5 else ""
    return ", ".join(str(neuron) for neuron in neurons[:5]) + more


def _from_safetensors(path: Path, layer: str) -> list[list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            name = _key(names, layer, path)
            indices_NM = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a .safetensors file ({error})") from error
    if indices_NM.dim() != 2 or indices_NM.is_floating_point() or indices_NM.dtype == torch.bool:
        shape = tuple(indices_NM.shape)
        raise DataError(f"{path}: {name} is {indices_NM.dtype} {shape}, not whole numbers of shape (experts, neurons)")
    lists: list[list[int]] = indices_NM.tolist()
    return lists


def _from_json(path: Path, layer: str) -> list[list[int]]:
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: holds no map from the blocks' names to lists of neuron indices")
    lists = document[_key(list(document), layer, path)]
    if not isinstance(lists, list) or not all(
        isinstance(group, list) and all(type(index) is int for index in group) for group in lists
    ):
        raise DataError(f"{path}: {layer} is not a list of lists of whole numbers")
    return lists


def _key(names: list[str], layer: str, path: Path) -> str:
    for name in (layer + SUFFIX, layer):
        if name in names:
            return name
    blocks = [name.removesuffix(SUFFIX) for name in names]
    raise DataError(f"{path}: has no index lists of {layer}{closest(layer, blocks)}")
