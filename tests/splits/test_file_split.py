"""Index lists from files: round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_splits import block
from torch import Tensor

from moadapt.errors import DataError
from moadapt.ffn import PADDING
from moadapt.registry import SPLITS
from moadapt.splits import BlockSample, Sizes
from moadapt.splits.file import SUFFIX

LAYER = "model.layers.0.mlp"
SIZES = Sizes(1, 3, 10)
LISTS = [[9, 0, 4], [1, 2, 3], [5, 6], [8, 7]]
INDICES = torch.tensor([[0, 4, 9], [1, 2, 3], [5, 6, PADDING], [7, 8, PADDING]])


def load(path: Path, sizes: Sizes = SIZES, layer: str = LAYER) -> Tensor:
    split = SPLITS.build(SPLITS.parse({"kind": "file", "path": str(path)}))
    made: Tensor = split.assign(block(neurons=sizes.num_neurons), sizes, BlockSample(), layer)
    return made


def written(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_json_and_safetensors_and_a_converted_folder_give_the_same(tmp_path: Path) -> None:
    assert torch.equal(load(written(tmp_path / "lists.json", {LAYER: LISTS})), INDICES)
    padded = [row + [PADDING] * (3 - len(row)) for row in LISTS]
    assert torch.equal(load(written(tmp_path / "padded.json", {LAYER: padded})), INDICES)
    save_file({LAYER + SUFFIX: INDICES, "other.weight": torch.rand(2)}, tmp_path / "mixture.safetensors")
    assert torch.equal(load(tmp_path), INDICES)
    assert torch.equal(load(tmp_path / "mixture.safetensors"), INDICES)
    save_file({LAYER: torch.tensor(padded, dtype=torch.int32)}, tmp_path / "plain.safetensors")
    assert torch.equal(load(tmp_path / "plain.safetensors"), INDICES)


@pytest.mark.parametrize("kind", ["random", "kmeans"])
def test_what_a_split_made_is_read_back_as_it_was(tmp_path: Path, kind: str) -> None:
    sizes = Sizes(0, 4, 27)
    made = SPLITS.build(SPLITS.parse(kind)).assign(block(neurons=27), sizes, BlockSample(), LAYER)
    save_file({LAYER + SUFFIX: made}, tmp_path / "lists.safetensors")
    assert torch.equal(load(tmp_path / "lists.safetensors", sizes), made)


WRONG = {
    "two lists": ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], r"2 lists, but the config asks for 4 experts \(1 shared, 3"),
    "no such neuron": ([[9, 0, 4], [1, 2, 3], [5, 6], [8, 10]], r"no such neuron: 10; the block has 0 to 9"),
    "negative": ([[9, 0, 4], [1, 2, 3], [5, 6], [8, -2]], r"no such neuron: -2"),
    "twice": ([[9, 0, 4], [1, 2, 3], [5, 6], [8, 6]], r"listed more than once: 6;"),
    "missing": ([[9, 0, 4], [1, 2, 3], [5, 6], [8]], r"in no list: 7;"),
    "many missing": ([[9], [0], [5], [8]], r"in no list: 1, 2, 3, 4, 6 and 1 more;"),
    "unequal": ([[9, 0, 4, 8], [1, 2], [5, 6], [3, 7]], r"2 to 4 neurons; sizes may differ by one"),
    "no whole numbers": ([[9.5, 0, 4], [1, 2, 3], [5, 6], [8, 7]], r"not a list of lists of whole numbers"),
    "no lists": ({"a": 1}, r"not a list of lists of whole numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    lists, message = WRONG[case]
    path = written(tmp_path / "lists.json", {LAYER: lists})
    with pytest.raises(DataError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert LAYER in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expert\.split\.path: there is no file .*nothing\.json"):
        load(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"there is no file .*mixture\.safetensors"):
        load(tmp_path)
    with pytest.raises(DataError, match="not a JSON file"):
        load(written(tmp_path / "bad.json", "{"))
    with pytest.raises(DataError, match="holds no map"):
        load(written(tmp_path / "list.json", [[1]]))
    with pytest.raises(DataError, match=r"not a \.safetensors file"):
        load(written(tmp_path / "bad.safetensors", "nothing of the sort"))
    save_file({LAYER: torch.rand(4, 3)}, tmp_path / "floats.safetensors")
    with pytest.raises(DataError, match=r"torch\.float32"):
        load(tmp_path / "floats.safetensors")


def test_a_missing_block_is_named_with_the_closest_one(tmp_path: Path) -> None:
    save_file({LAYER + SUFFIX: INDICES}, tmp_path / "lists.safetensors")
    with pytest.raises(
        DataError, match=r"no index lists of model\.layers\.1\.mlp; did you mean 'model\.layers\.0\.mlp'"
    ):
        load(tmp_path / "lists.safetensors", layer="model.layers.1.mlp")
