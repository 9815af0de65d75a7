"""Full traces: what each router decided about each token, up to a limit, in one file.

A file in the Parquet format has the columns below; in the safetensors format each column is a tensor, `router` is the
index into the names in the metadata, and `experts` and `weights` are padded with -1 and 0 to the most that a row has.

    pass        number of the forward pass, from 0
    sequence    row of the batch
    position    of the token among the real tokens of its sequence in this pass; of the turn for decisions about prompts
    token       id of the input token, -1 where it is not known
    task        index of the task, -1 where it is not known
    part        0 prompt, 1 answer
    phase       0 prefill, 1 decode
    router      which router decided
    experts     the selected experts, in the order of their numbers
    weights     their gate weights
    entropy     of the router's probabilities, in nats

Shapes: T rows of a pass, B sequences, S rows of a sequence, N experts, K most experts of a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moadapt.errors import ConfigError
from moadapt.routing import RoutingRecord
from moadapt.statistics.counts import PHASES
from moadapt.statistics.streaming import PassRows, shares_of

_NUMBERS = ("pass", "sequence", "position", "token", "task", "part", "phase")


@dataclass(frozen=True)
class Trace:
    """Where a trace goes, and how long it may become.

    Attributes:
        path: the file to write.
        limit: the most rows (one for each token and router). A token is traced for all routers of a pass or for none.
        format: `parquet` or `safetensors`.
    """

    path: str | Path
    limit: int = 100_000
    format: Literal["parquet", "safetensors"] = "parquet"

    def __post_init__(self) -> None:
        if self.format not in ("parquet", "safetensors"):
            raise ConfigError(f"trace.format: {self.format!r} is not known; use parquet or safetensors")
        if self.limit < 1:
            raise ConfigError(f"trace.limit: {self.limit} leaves nothing to write; leave the trace out instead")


class TraceWriter:
    """Collects rows on the host and writes them in the end.

    Args:
        trace: where to.
        routers: names of all routers.
    """

    def __init__(self, trace: Trace, routers: list[str]) -> None:
        self.trace = trace
        self.routers = routers
        self.complete = True
        self._num_rows = 0
        self._num_passes = 0
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, groups: list[tuple[list[RoutingRecord], PassRows]], num_tasks: int) -> None:
        """One pass.

        Args:
            groups: records that are about the same rows, and these rows.
            num_tasks: how many tasks have an index; higher ones stand for no task that is known.
        """
        routers = sum(len(records) for records, _ in groups)
        if not self.complete or routers == 0:
            return
        allowed = (self.trace.limit - self._num_rows) // routers
        for records, rows in groups:
            real_T = rows.real_BS.flatten().cpu().nonzero().flatten()
            self.complete &= real_T.shape[0] <= allowed
            real_T = real_T[:allowed]
            columns = self._facts(rows, real_T, num_tasks)
            for record in records:
                self._add_record(record, real_T, columns)
        self._num_passes += 1

    def _facts(self, rows: PassRows, real_T: Tensor, num_tasks: int) -> dict[str, Tensor]:
        batch_size, length = rows.real_BS.shape
        sequence_T = real_T // length
        position_BS = rows.real_BS.cpu().long().cumsum(-1) - 1
        tasks_B = torch.full((batch_size,), -1) if rows.tasks_B is None else rows.tasks_B.cpu()
        ids_T = torch.full_like(real_T, -1) if rows.ids_BS is None else rows.ids_BS.flatten().cpu()[real_T]
        return {
            "pass": torch.full_like(real_T, self._num_passes),
            "sequence": sequence_T,
            "position": position_BS.flatten()[real_T],
            "token": ids_T,
            "task": torch.where(tasks_B < num_tasks, tasks_B, -1)[sequence_T],
            "part": rows.answer_BS.flatten().cpu()[real_T].long(),
            "phase": torch.full_like(real_T, PHASES.index(rows.phase)),
        }

    def _add_record(self, record: RoutingRecord, real_T: Tensor, columns: dict[str, Tensor]) -> None:
        selected_TN = record.routing.selected_TN.cpu()[real_T]
        weights_TN = record.routing.weights_TN.detach().float().cpu()[real_T]
        entropy_T = torch.special.entr(shares_of(record.routing.probs_TN.detach().cpu()[real_T])).sum(-1)
        row_E, expert_E = selected_TN.nonzero(as_tuple=True)
        found = {
            **columns,
            "router": torch.full_like(real_T, self.routers.index(record.name)),
            "entropy": entropy_T,
            "num_experts": selected_TN.sum(-1),
            "experts": expert_E,
            "weights": weights_TN[row_E, expert_E],
        }
        for name, value in found.items():
            self._columns.setdefault(name, []).append(value)
        self._num_rows += real_T.shape[0]

    def close(self, tasks: list[str]) -> None:
        """Write the file.

        Args:
            tasks: their names, for the file's metadata.
        """
        names = (*_NUMBERS, "router", "num_experts", "experts")
        columns = {name: torch.cat(self._columns.get(name, [torch.zeros(0, dtype=torch.int64)])) for name in names}
        for name, dtype in (("entropy", torch.float64), ("weights", torch.float32)):
            columns[name] = torch.cat(self._columns.get(name, [torch.zeros(0, dtype=dtype)]))
        notes = {"routers": self.routers, "tasks": tasks, "complete": self.complete, "limit": self.trace.limit}
        metadata = {name: json.dumps(value) for name, value in notes.items()}
        Path(self.trace.path).parent.mkdir(parents=True, exist_ok=True)
        if self.trace.format == "parquet":
            _write_parquet(self.trace.path, columns, metadata, self.routers)
        else:
            _write_safetensors(self.trace.path, columns, metadata)
        self._columns = {}


def _write_parquet(path: str | Path, columns: dict[str, Tensor], metadata: dict[str, str], routers: list[str]) -> None:
    import pyarrow as pa  # type: ignore[import-untyped,import-not-found]
    from pyarrow import parquet  # type: ignore[import-untyped,import-not-found]

    ends = torch.cat([torch.zeros(1, dtype=torch.int64), columns["num_experts"].cumsum(0)]).int().numpy()
    arrays: dict[str, Any] = {name: pa.array(columns[name].numpy()) for name in _NUMBERS}
    arrays["router"] = pa.DictionaryArray.from_arrays(
        pa.array(columns["router"].int().numpy()), pa.array(routers, type=pa.string())
    )
    for name in ("experts", "weights"):
        arrays[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(columns[name].numpy()))
    arrays["entropy"] = pa.array(columns["entropy"].numpy())
    parquet.write_table(pa.table(arrays).replace_schema_metadata(metadata), str(path))


def _write_safetensors(path: str | Path, columns: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    counts_T = columns["num_experts"]
    most = int(counts_T.max()) if counts_T.numel() > 0 else 0
    filled_TK = torch.arange(most) < counts_T.unsqueeze(-1)
    tensors = {name: columns[name] for name in (*_NUMBERS, "router", "entropy")}
    for name, empty in (("experts", -1), ("weights", 0)):
        padded_TK = torch.full(filled_TK.shape, empty, dtype=columns[name].dtype)
        padded_TK[filled_TK] = columns[name]
        tensors[name] = padded_TK
    save_file(tensors, str(path), metadata=metadata)
