"""What every auxiliary loss shares: its options, its interface, and routers of equal shape stacked together.

Shapes: M routers stacked, T tokens, N experts, B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moadapt.registry import KindConfig
from moadapt.routing import RoutingRecord

Reduce = Literal["mean", "sum"]
Probs = Literal["full", "selected"]


class LossConfig(KindConfig):
    """Options of every auxiliary loss.

    Attributes:
        coef: factor of the loss in the sum that is trained.
    """

    coef: float = Field(default=0.01, ge=0.0)


class AuxiliaryLoss(ABC):
    """A scalar computed from the routings of one forward pass.

    Attributes:
        config: the options.
        measured: detached scalars that the last call found out beside its value. They are logged, and `end_step` gets
            their means over the step.
        state: what an adaptive loss remembers from step to step; checkpoints keep it.
    """

    wants_reconstruction: ClassVar[bool] = False
    """Whether it reads `RoutingRecord.outputs["reconstruction"]`."""
    wants_teacher_logits: ClassVar[bool] = False
    """Whether it is computed by `from_logits`, and not from routings."""

    steers_share: ClassVar[bool] = False
    """Whether it changes how many experts are kept, and so means nothing with a router that keeps a fixed number."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.measured: dict[str, Tensor] = {}
        self.state: dict[str, float] = {}

    @abstractmethod
    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        """The loss over all routers of the pass, before `coef`.

        Args:
            records: one per router; at least one.

        Returns:
            A scalar in the routers' dtype.
        """

    def from_logits(self, student_BSV: Tensor, teacher_BSV: Tensor, mask_BS: Tensor) -> Tensor:
        """The loss from final logits, before `coef`, for kinds with `wants_teacher_logits`.

        Args:
            student_BSV: logits of the model in training.
            teacher_BSV: logits of the dense model, without a gradient.
            mask_BS: bool, True at the positions that predict a label.

        Returns:
            A scalar.
        """
        raise TypeError(f"{type(self).__name__} is computed from routings, not from logits")

    def end_step(self, parts: Mapping[str, float]) -> None:
        """Adapt after an optimizer step; here, nothing.

        Args:
            parts: this loss's measured scalars by name, averaged over the step's micro-batches and processes, and
                so equal on every process.
        """
        return

    @classmethod
    def check(cls, config: KindConfig, router_selects_all: bool) -> None:
        """Refuse options that do nothing with this sort of router; here, none.

        Raises:
            ValueError: names the option and the way out.
        """
        return


class Group:
    """Routers with equal shapes and mask, stacked along a first dimension M so that one operation serves all."""

    def __init__(self, records: Sequence[RoutingRecord]) -> None:
        first = records[0]
        self.batch_size = first.batch_size
        self.logits_MTN = torch.stack([record.routing.logits_TN for record in records])
        self.probs_MTN = torch.stack([record.routing.probs_TN for record in records])
        self.selected_MTN = torch.stack([record.routing.selected_TN for record in records])
        tokens = self.probs_MTN.shape[1]
        mask = first.mask_T if first.mask_T is not None else torch.ones(tokens, device=self.probs_MTN.device)
        self.mask_T = mask.to(device=self.probs_MTN.device, dtype=self.probs_MTN.dtype)

    def probabilities(self, which: Probs) -> Tensor:
        """(M, T, N): all probabilities, or those of the selected experts with zeros elsewhere."""
        return self.probs_MTN if which == "full" else self.probs_MTN * self.selected_MTN


def groups(records: Sequence[RoutingRecord]) -> Iterator[Group]:
    """The records in groups of equal shape, device and mask."""
    grouped: dict[tuple[object, ...], list[RoutingRecord]] = {}
    for record in records:
        logits = record.routing.logits_TN
        mask = record.mask_T
        key = (logits.shape, logits.device, record.batch_size, None if mask is None else mask.data_ptr())
        grouped.setdefault(key, []).append(record)
    for members in grouped.values():
        yield Group(members)


def reduce_routers(per_router: list[Tensor], how: Reduce) -> Tensor:
    """Mean or sum over all routers of values of any shape, one for each router."""
    values = torch.cat([values.flatten().to(per_router[0].device) for values in per_router])
    return values.mean() if how == "mean" else values.sum()
