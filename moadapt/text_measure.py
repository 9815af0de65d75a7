"""Perplexity on text, and how much of a converted model is at work there.

    loss        mean over the labelled tokens of -log p(token), in nats; perplexity = exp(loss)
    active share of a block         mean over the real tokens of (routed experts that are on) / N
    share of the blocks' parameters mean over the tokens of the parameters of the experts that are on (the shared ones
                                    included) over those of all experts, summed over the blocks that were split
    share of the model              the same with everything else in both sums, embeddings included; routers and LoRA,
                                    which the dense model has not, in neither

Counts and sums are exact (int64, float64); no logits are kept beyond a batch.

Shapes: B rows, S positions, T real tokens, V vocabulary, E experts (shared first), N routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.errors import DataError
from moadapt.layer import PartitionLayer
from moadapt.model import MixtureModel
from moadapt.passes import PassRequest, requesting
from moadapt.routing import IGNORE_INDEX, RoutingRecord

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[str, int, int], None]
Batch = Mapping[str, Tensor]
_CHUNK = 1024  # tokens whose losses are computed together: bounds the memory for large vocabularies


@dataclass
class BlockActivity:
    """What the experts of one feed-forward block did.

    Attributes:
        name: the block.
        tokens: real tokens that it saw.
        num_experts: N, routed experts.
        num_shared: experts that are always on.
        selections: how many tokens selected each routed expert.
        tokens_without_expert: tokens that selected none.
        parameters: of all experts, the output's bias included.
        active_parameters: mean over the tokens of those at work.
        reconstruction: mean over the tokens of the squared distance to the dense block's output over that output's
            squared norm; None where it was not asked for.
    """

    name: str
    tokens: int
    num_experts: int
    num_shared: int
    selections: list[int]
    tokens_without_expert: int
    parameters: int
    active_parameters: float
    reconstruction: float | None = None

    @property
    def mean_active(self) -> float:
        """Routed experts that a token selects, in the mean."""
        return sum(self.selections) / max(self.tokens, 1)

    @property
    def active_share(self) -> float:
        """The same as a share of the routed experts."""
        return self.mean_active / self.num_experts


@dataclass
class TextResult:
    """What came of one reading.

    Attributes:
        loss: nats per labelled token.
        tokens: labelled tokens.
        blocks: the split blocks, in the order of the model; none for a dense model.
        other_parameters: the model's parameters outside of split blocks.
    """

    loss: float
    tokens: int
    blocks: list[BlockActivity] = field(default_factory=list)
    other_parameters: int = 0

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def active_share(self) -> float | None:
        """Mean of the blocks' active shares."""
        return _mean([block.active_share for block in self.blocks])

    @property
    def mean_active(self) -> float | None:
        """Routed experts that a token selects at a block, in the mean."""
        return _mean([block.mean_active for block in self.blocks])

    @property
    def reconstruction(self) -> float | None:
        """Mean of the blocks' relative squared errors."""
        return _mean([block.reconstruction for block in self.blocks if block.reconstruction is not None])

    @property
    def ffn_share(self) -> float | None:
        """Share of the split blocks' parameters that are at work for a token."""
        total = sum(block.parameters for block in self.blocks)
        return sum(block.active_parameters for block in self.blocks) / total if total else None

    @property
    def model_share(self) -> float | None:
        """Share of the whole model's parameters that are at work for a token."""
        if not self.blocks:
            return None
        total = self.other_parameters + sum(block.parameters for block in self.blocks)
        return (self.other_parameters + sum(block.active_parameters for block in self.blocks)) / total

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what is None is left out."""
        summary = {
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "tokens": self.tokens,
            "mean_active_experts": self.mean_active,
            "active_share": self.active_share,
            "ffn_share": self.ffn_share,
            "model_share": self.model_share,
            "reconstruction": self.reconstruction,
        }
        blocks = [
            {**asdict(block), "mean_active_experts": block.mean_active, "active_share": block.active_share}
            for block in self.blocks
        ]
        return {name: value for name, value in {**summary, "blocks": blocks or None}.items() if value is not None}

    def table(self, title: str = "experts at work") -> Table:
        """One line for each block, and the mean."""
        from rich.table import Table

        table = Table(title=title)
        table.add_column("block", overflow="fold")
        errors = any(block.reconstruction is not None for block in self.blocks)
        for name in ("experts", "active", "share", "tokens without", *(["error"] if errors else [])):
            table.add_column(name, justify="right")
        for block in self.blocks:
            shared = f"{block.num_shared} + " if block.num_shared else ""
            table.add_row(
                block.name,
                f"{shared}{block.num_experts}",
                f"{shared}{block.mean_active:.2f}",
                f"{100 * block.active_share:.1f} %",
                f"{100 * block.tokens_without_expert / max(block.tokens, 1):.1f} %",
                *([_shown(block.reconstruction)] if errors else []),
            )
        table.add_section()
        mean, share = self.mean_active or 0.0, self.active_share or 0.0
        table.add_row(
            "mean", "", f"{mean:.2f}", f"{100 * share:.1f} %", "", *([_shown(self.reconstruction)] if errors else [])
        )
        return table


def measure(
    model: MixtureModel | PreTrainedModel,
    batches: Sequence[Batch],
    *,
    reconstruction: bool = False,
    what: str = "reading",
    progress: Progress | None = None,
) -> TextResult:
    """Read text and report how well it is predicted and how many experts were at work.

    The model is in evaluation mode meanwhile.

    Args:
        model: a converted model, any other mixture or a plain model.
        batches: arguments of the model by name: `input_ids`, `attention_mask` (B, S) int64, and `labels` (-100: not
            this one); without those all real tokens but the first of a row are predicted.
        reconstruction: compare every split block's output with the dense block's.
        what: the word for it in `progress`.
        progress: called with what is done, how many batches, and the total.

    Raises:
        DataError: there is no token to predict.
    """
    mixture = model if isinstance(model, MixtureModel) else None
    base: PreTrainedModel = model.base_model if isinstance(model, MixtureModel) else model
    device, shift = base.device, 0 if base.config.is_encoder_decoder else 1
    counter = _Activity(mixture)
    total, tokens, before = 0.0, 0, model.training
    model.eval()
    try:
        for number, batch in enumerate(batches):
            inputs = {name: value.to(device) for name, value in batch.items()}
            labels_BS = _labels(inputs)
            if not base.config.is_encoder_decoder:
                inputs.pop("labels", None)
            request = PassRequest(record=mixture is not None, wants_reconstruction=reconstruction)
            with torch.no_grad(), requesting(request) if mixture is not None else nullcontext():
                logits_BSV = base(**inputs, use_cache=False).logits
            loss, count = _sum_of_losses(logits_BSV, labels_BS, shift)
            total, tokens = total + loss, tokens + count
            if request.context is not None:
                counter.add(request.context.records)
            if progress is not None:
                progress(what, number + 1, len(batches))
    finally:
        model.train(before)
    if tokens == 0:
        raise DataError("there is no token to predict in this text; give a longer one")
    return TextResult(total / tokens, tokens, counter.blocks(), counter.other_parameters())


def _labels(inputs: Mapping[str, Tensor]) -> Tensor:
    if "labels" in inputs:
        return inputs["labels"]
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs["input_ids"]
    # Behind padding on the left there is a first token too, which nothing predicts.
    return inputs["input_ids"].masked_fill((mask == 0) | (mask.cumsum(1) == 1), IGNORE_INDEX)


def _sum_of_losses(logits_BSV: Tensor, labels_BS: Tensor, shift: int) -> tuple[float, int]:
    """(sum in float64, number) of the labelled tokens' losses."""
    labels_BS = labels_BS[:, shift:]
    rows, columns = (labels_BS != IGNORE_INDEX).nonzero(as_tuple=True)
    total = torch.zeros((), dtype=torch.float64, device=logits_BSV.device)
    for start in range(0, len(rows), _CHUNK):
        row_T, column_T = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
        logits_TV = logits_BSV[row_T, column_T].float()
        losses_T = nn.functional.cross_entropy(logits_TV, labels_BS[row_T, column_T], reduction="none")
        total += losses_T.double().sum()
    return float(total), len(rows)


class _Activity:
    """Adds up the routing records of the blocks that were split."""

    def __init__(self, mixture: MixtureModel | None) -> None:
        self.mixture = mixture
        layers = {} if mixture is None else mixture.injection.layers
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, PartitionLayer)}
        self.counts: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.without: dict[str, int] = {}
        self.errors: dict[str, float] = {}

    def add(self, records: Sequence[RoutingRecord]) -> None:
        """Count one pass."""
        for record in records:
            if record.name not in self.layers:
                continue
            name, selected_TN = record.name, record.routing.selected_TN
            error_T = record.outputs.get("reconstruction")
            if record.mask_T is not None:
                mask_T = record.mask_T.to(selected_TN.device)
                selected_TN = selected_TN[mask_T]
                error_T = None if error_T is None else error_T[mask_T]
            self.counts[name] = self.counts.get(name, 0) + selected_TN.sum(0).cpu()
            self.tokens[name] = self.tokens.get(name, 0) + len(selected_TN)
            self.without[name] = self.without.get(name, 0) + int((~selected_TN.any(-1)).sum())
            if error_T is not None:
                self.errors[name] = self.errors.get(name, 0.0) + float(error_T.double().sum())

    def blocks(self) -> list[BlockActivity]:
        """In the order of the model; blocks that saw no token are left out."""
        return [self._block(name) for name in self.layers if name in self.counts]

    def _block(self, name: str) -> BlockActivity:
        experts = self.layers[name].experts
        indices: Any = experts.neuron_indices
        neurons_E = (indices >= 0).sum(1).double().cpu()
        bias = 0 if experts.out_bias is None else experts.out_bias.numel()
        lora = sum(p.numel() for key, p in experts.named_parameters() if key.startswith("lora_"))
        parameters = experts.num_params() - lora
        per_neuron = (parameters - bias) / float(neurons_E.sum())
        selections, tokens = self.counts[name], self.tokens[name]
        shared = float(neurons_E[: experts.num_shared].sum())
        routed = float((neurons_E[experts.num_shared :] * selections).sum()) / max(tokens, 1)
        error = self.errors.get(name)
        return BlockActivity(
            name,
            tokens,
            experts.num_experts,
            experts.num_shared,
            selections.tolist(),
            self.without[name],
            parameters,
            per_neuron * (shared + routed) + bias,
            None if error is None else error / max(tokens, 1),
        )

    def other_parameters(self) -> int:
        """Parameters of the model outside of split blocks; of `modules_to_save` one copy."""
        if self.mixture is None or not self.layers:
            return 0
        outside = {id(p) for layer in self.layers.values() for p in layer.parameters()}
        outside |= {id(p) for wrapper in self.mixture.injection.copies.values() for p in wrapper.copy.parameters()}
        return sum(p.numel() for p in self.mixture.base_model.parameters() if id(p) not in outside)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
