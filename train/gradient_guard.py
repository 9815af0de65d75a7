"""A guard against gradients that processes would mix up.

ZeRO adds up gradients in the order in which they arrive. Where two processes get gradients for different tensors, or
in a different order, stages 1 and 2 add up gradients of different tensors and say nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moadapt.train.engine import Processes, TrainingError


class GradientOrderGuard:
    """Checks in the first steps that every process gets the same gradients in the same order.

    Each trainable tensor notes when its gradient arrives. Before the optimizer steps, the processes compare a
    fingerprint of their notes (one 16-byte message), and stop if two differ.

    Args:
        named: the trainable tensors, before `deepspeed.initialize` touches them.
        processes: the processes to compare.
        steps: optimizer steps to watch; then the hooks are removed.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], processes: Processes, steps: int) -> None:
        self._processes = processes
        self._names = [name for name, _ in named]
        self._left = steps if processes.world_size > 1 else 0
        self._arrived: list[int] = []
        self._hooks = [self._watch(index, item[1]) for index, item in enumerate(named)] if self._left else []

    def _watch(self, index: int, parameter: nn.Parameter) -> Any:
        def note(gradient: Tensor) -> None:
            self._arrived.append(index)

        return parameter.register_hook(note)  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Compare this step's notes. Collective while the guard watches.

        Raises:
            TrainingError: on every process, when two processes differ.
        """
        if not self._left:
            return
        order = ",".join(map(str, self._arrived)).encode()
        mark = int.from_bytes(hashlib.blake2b(order, digest_size=7).digest(), "big")
        highest = self._processes.all_max(torch.tensor([mark, -mark], dtype=torch.int64))
        missing = sorted(set(range(len(self._names))) - set(self._arrived))
        self._arrived.clear()
        if int(highest[0]) != -int(highest[1]):
            names = [self._names[index] for index in missing[:4]]
            here = f"; process {self._processes.rank} has none for {names}" if names else ""
            raise TrainingError(
                "gradients arrive for other tensors, or in another order, than on another process" + here + ". "
                "DeepSpeed would mix them up. Every expert must take part in every forward pass, in a fixed order"
            )
        self._left -= 1
        if not self._left:
            for hook in self._hooks:
                hook.remove()
