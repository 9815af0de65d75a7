"""The auxiliary losses of one mixture together: what they need of a pass, their sum, and what they remember.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moadapt.experts.base import ExpertBank
from moadapt.losses import AuxiliaryLoss
from moadapt.registry import LOSSES, KindConfig
from moadapt.routing import IGNORE_INDEX, RoutingRecord


class Objective:
    """All auxiliary losses that a mixture's config lists.

    Args:
        configs: their configs.
    """

    def __init__(self, configs: Iterable[KindConfig]) -> None:
        self.losses: dict[str, AuxiliaryLoss] = {config.kind: LOSSES.build(config) for config in configs}

    @property
    def wants_reconstruction(self) -> bool:
        """Whether layers that replace a block must compare their output with the block's."""
        return any(loss.wants_reconstruction for loss in self.losses.values())

    @property
    def wants_teacher_logits(self) -> bool:
        """Whether the logits of the model with its adapter off are needed."""
        return any(loss.wants_teacher_logits for loss in self.losses.values())

    def of_routings(
        self, records: Sequence[RoutingRecord], banks: Iterable[ExpertBank], training: bool
    ) -> dict[str, Tensor]:
        """Losses of the pass's routings, by kind, and `regularization`, what the experts bring themselves.

        Args:
            records: of the pass; without any there are no losses of routings.
            banks: all expert banks.
            training: losses that compare with a teacher are left out otherwise.
        """
        values = {
            kind: loss(records)
            for kind, loss in self.losses.items()
            if records and not loss.wants_teacher_logits and (training or not loss.wants_reconstruction)
        }
        terms = [term for bank in banks if (term := bank.regularization()) is not None]
        if terms:
            values["regularization"] = torch.stack([term.float() for term in terms]).sum()
        return values

    def of_logits(
        self, student_BSV: Tensor, teacher_BSV: Tensor, labels_BS: Tensor, *, aligned: bool
    ) -> dict[str, Tensor]:
        """Losses of the final logits, by kind.

        Args:
            student_BSV: the model's.
            teacher_BSV: those without the adapter.
            labels_BS: the labels.
            aligned: whether position s predicts label s (encoder-decoder models), and not label s + 1.
        """
        mask_BS = labels_BS != IGNORE_INDEX
        if not aligned:
            mask_BS = nn.functional.pad(mask_BS[:, 1:], (0, 1), value=False)
        return {
            kind: loss.from_logits(student_BSV, teacher_BSV, mask_BS)
            for kind, loss in self.losses.items()
            if loss.wants_teacher_logits
        }

    def weighted_sum(self, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """sum(coef * value), fp32, on the device of `like`; what has no coefficient counts once."""
        total = torch.zeros((), dtype=torch.float32, device=like.device)
        for kind, value in values.items():
            loss = self.losses.get(kind)
            total = total + value.to(like.device) * (1.0 if loss is None else loss.config.coef)
        return total

    def parts(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values, detached, and what the losses measured beside them as `KIND/NAME`."""
        parts = {kind: value.detach() for kind, value in values.items()}
        for kind, value in values.items():
            measured = self.losses[kind].measured if kind in self.losses else {}
            parts |= {f"{kind}/{name}": number.to(value.device) for name, number in measured.items()}
        return parts

    def states(self) -> dict[str, Tensor]:
        """What adaptive losses remember, as float64 scalars by name."""
        return {
            f"losses.{kind}.{name}": torch.tensor(value, dtype=torch.float64)
            for kind, loss in self.losses.items()
            for name, value in loss.state.items()
        }

    def load_states(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `states` returned, where the tensors hold it."""
        for kind, loss in self.losses.items():
            for name in loss.state:
                if f"losses.{kind}.{name}" in tensors:
                    loss.state[name] = float(tensors[f"losses.{kind}.{name}"])

    def end_step(self, parts: Mapping[str, float]) -> None:
        """Tell adaptive losses that an optimizer step is done; `parts` are means over it, named as by `parts`."""
        for kind, loss in self.losses.items():
            loss.end_step({key.removeprefix(f"{kind}/"): value for key, value in parts.items()})
