"""Which rows make which batch: a pure function of the seed and the global micro-batch index.

An epoch holds as many rows as the training set. Each task gets its share of them (`task_counts`), the epoch's order
is a fresh shuffle, and a task's rows follow one permutation after the other, none skipped: where a task's share of an
epoch ends, the next epoch goes on. Batches cut this endless stream into equal pieces, so every batch is full and the
last one of an epoch takes its missing rows from the start of the next. With one task a batch, the stream is one of
batches, and each task's last batch of an epoch takes its missing rows from that task's next permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moadapt.errors import ConfigError, DataError
from moadapt.train.data_config import SamplingConfig

Ints = npt.NDArray[np.int64]
_ORDER, _ROWS = 0, 1  # the two uses of randomness, so that they never share a stream
_PAGE = 65536  # rows whose permutations are drawn together


def task_probabilities(sizes: Sequence[int], config: SamplingConfig, weights: Sequence[float] | None) -> list[float]:
    """Each task's share of the rows; they sum to 1. A task without rows has share 0.

    `temperature` gives p_t ∝ n_t^(1/T) (Arivazhagan et al., arXiv 1907.05019, section 4.2).

    Raises:
        ConfigError: weights are missing, of the wrong number, or all zero.
        DataError: no task has rows, or a task with a positive weight has none.
    """
    sizes_N = np.asarray(sizes, dtype=np.float64)
    if not sizes_N.size or not sizes_N.any():
        raise DataError("there is no training row in any task")
    if config.strategy == "weights":
        if weights is None or len(weights) != len(sizes):
            raise ConfigError(f"sampling.weights: strategy weights needs one weight for each of {len(sizes)} tasks")
        share_N = np.asarray(weights, dtype=np.float64)
        if not share_N.any():
            raise ConfigError("sampling.weights: at least one weight must be above 0")
        empty = [i for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)) if weight > 0 and not size]
        if empty:
            raise DataError(f"sampling.weights: tasks number {empty} have a weight but no training row")
    elif config.strategy == "uniform":
        share_N = (sizes_N > 0).astype(np.float64)
    elif config.strategy == "temperature":
        assert config.temperature is not None  # checked by SamplingConfig
        # Relative to the largest task, so that a very small temperature cannot overflow.
        share_N = (sizes_N / sizes_N.max()) ** (1.0 / config.temperature)
    else:
        share_N = sizes_N
    return [float(p) for p in share_N / share_N.sum()]


def largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` and differ from `total * share` by less than 1.

    Every positive share gets at least 1, taken from the largest count; `total` must allow for that.
    """
    exact_N = np.asarray(shares, dtype=np.float64) * total
    counts_N = np.floor(exact_N + 1e-9).astype(np.int64)
    order = sorted(range(len(shares)), key=lambda i: (counts_N[i] - exact_N[i], i))
    for i in order[: total - int(counts_N.sum())]:
        counts_N[i] += 1
    for i, share in enumerate(shares):
        if share > 0 and counts_N[i] == 0:
            counts_N[int(counts_N.argmax())] -= 1
            counts_N[i] = 1
    return [int(count) for count in counts_N]


class MixtureSampler:
    """Gives the rows of any micro-batch, in any order of asking; to resume, only the next index is needed.

    Args:
        sizes: number of training rows of each task, in the order of the task ids.
        batch_size: rows of a micro-batch.
        config: strategy and batching.
        seed: 0 or more.
        weights: for strategy `weights`, one for each task: `DataConfig.sampling_weights(names)`.

    Raises:
        ConfigError: weights are missing for strategy `weights`.
        DataError: there are no rows to sample.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        config: SamplingConfig,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"the batch size must be 1 or more (got {batch_size})")
        if seed < 0:
            raise ConfigError(f"the seed must be 0 or more (got {seed})")
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.config = config
        self.seed = seed
        self.probabilities: list[float] = task_probabilities(sizes, config, weights)
        self.per_task = config.batching == "per_task"
        self.task_counts: list[int] = self._task_counts()
        self.epoch_units = sum(self.task_counts)
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._page = lru_cache(maxsize=len(self.sizes) + 2)(self._build_page)

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every row of a proportional epoch was seen; the last may hold rows of the next epoch."""
        return self.epoch_units if self.per_task else -(-self.epoch_units // self.batch_size)

    def batch(self, index: int) -> list[tuple[int, int]]:
        """The (task id, row) pairs of the micro-batch with this global index; row counts within `Task.train`."""
        if index < 0:
            raise ValueError(f"a batch index is 0 or more (got {index})")
        if self.per_task:
            epoch, offset = divmod(index, self.epoch_units)
            task_U, first_U = self._epoch(epoch)
            task, first = int(task_U[offset]), int(first_U[offset])
            rows = self._rows(task, first, first + self.batch_size)
            return [(task, int(row)) for row in rows]
        pairs: list[tuple[int, int]] = []
        position = index * self.batch_size
        while len(pairs) < self.batch_size:
            epoch, offset = divmod(position + len(pairs), self.epoch_units)
            task_U, row_U = self._epoch(epoch)
            stop = offset + self.batch_size - len(pairs)
            pairs.extend(zip(task_U[offset:stop].tolist(), row_U[offset:stop].tolist(), strict=True))
        return pairs

    def _task_counts(self) -> list[int]:
        """Rows (or, with one task a batch, batches) of each task in an epoch."""
        total = sum(self.sizes)
        active = sum(p > 0 for p in self.probabilities)
        if self.per_task:
            if self.config.strategy == "proportional":
                return [-(-size // self.batch_size) for size in self.sizes]
            return largest_remainder(max(-(-total // self.batch_size), active), self.probabilities)
        if self.config.strategy == "proportional":
            return list(self.sizes)
        return largest_remainder(max(total, active), self.probabilities)

    def _build_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """Task of each unit of the epoch, and its row (mixed) or the task's first stream position (per task)."""
        task_U = np.repeat(np.arange(len(self.sizes)), self.task_counts)
        second = []
        for task, count in enumerate(self.task_counts):
            if self.per_task:
                second.append((epoch * count + np.arange(count)) * self.batch_size)
            else:
                second.append(self._rows(task, epoch * count, (epoch + 1) * count))
        # Shuffle the order of tasks, and hand each task its rows in its own order.
        order_U = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(task_U)
        ranks_U = np.argsort(order_U, kind="stable")
        second_U = np.empty(len(task_U), dtype=np.int64)
        second_U[ranks_U] = np.concatenate(second)
        return order_U.astype(np.int64), second_U

    def _rows(self, task: int, start: int, stop: int) -> Ints:
        """Rows at positions [start, stop) of the task's endless stream of permutations."""
        if start >= stop:
            return np.empty(0, dtype=np.int64)
        length = self._page_length(task)
        pieces = []
        for page in range(start // length, (stop - 1) // length + 1):
            base = page * length
            pieces.append(self._page(task, page)[max(start - base, 0) : stop - base])
        return np.concatenate(pieces)

    def _page_length(self, task: int) -> int:
        return max(1, _PAGE // self.sizes[task]) * self.sizes[task]

    def _build_page(self, task: int, page: int) -> Ints:
        """The permutations number `page * k ... page * k + k - 1` of the task's rows, one after the other."""
        size = self.sizes[task]
        rows_KR = np.tile(np.arange(size, dtype=np.int64), (self._page_length(task) // size, 1))
        return np.random.default_rng([self.seed, _ROWS, task, page]).permuted(rows_KR, axis=1).reshape(-1)
