"""What every bank of experts shares: its options and its interface.

Shapes: T tokens, I in features, O out features, N experts, K experts per token, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.per_layer import PerLayerInt
from moadapt.registry import KindConfig
from moadapt.routing import Routing

Role = Literal["router", "activation", "down", "up", "shared_down", "other"]


class ExpertConfig(KindConfig):
    """Options of every expert kind: none but its name."""


class LowRankConfig(ExpertConfig):
    """Options that the low-rank kinds share, under peft's names.

    Attributes:
        r: rank of every expert; one value, a list per layer, or a map of patterns.
        lora_alpha: the delta is scaled by lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: probability of dropping an input feature in training; one mask serves all experts.
        use_rslora: rank-stabilised scaling (2312.03732).
    """

    r: PerLayerInt = 8
    lora_alpha: float = Field(default=8.0, gt=0.0)
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False

    def scaling(self) -> float:
        """lora_alpha / r or lora_alpha / sqrt(r); needs `r` resolved to one value."""
        assert isinstance(self.r, int)
        return float(self.lora_alpha) / (self.r**0.5 if self.use_rslora else self.r)


class ExpertBank(nn.Module, ABC):
    """All experts of one base layer, in stacked parameters.

    Args:
        config: the options of this kind, with one value for every per-layer option.
        in_features: I.
        out_features: O.
        num_experts: N.
        device: where to create the parameters.
        dtype: their dtype.
    """

    roles: ClassVar[dict[str, Role]] = {}
    """What each parameter is, for parameter groups; a name that is missing is `other`."""
    replaces_block: ClassVar[bool] = False
    """Whether the experts take the place of a whole feed-forward block, and do not add to a linear layer."""
    per_sequence: ClassVar[bool] = False
    """Whether `forward` takes routings of granularity `prompt` and `task` as they are, with a row for each sequence.
    For the others they are spread over the tokens first."""

    def __init__(
        self,
        config: ExpertConfig,
        in_features: int,
        out_features: int,
        num_experts: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_features = in_features
        self.out_features = out_features
        self.num_experts = num_experts

    @abstractmethod
    def forward(self, x_TI: Tensor, routing: Routing, base: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """The base output plus the mixed deltas of the selected experts.

        Args:
            x_TI: the base layer's input.
            routing: gate weights of each row of `x_TI`; for `per_sequence` kinds, also of each sequence.
            base: the base layer, for the bank to run on `x_TI` when it suits it; or (T, O), what the layer has made
                of `x_TI` already, which may be overwritten.

        Returns:
            (T, O), dtype of the base output.
        """

    @abstractmethod
    def delta_weight(self, expert: int) -> Tensor:
        """(O, I): what one expert with gate 1 adds to the base weight, in the parameters' dtype.

        Raises:
            ConfigError: a kind that has no such matrix says why.
        """

    def mixed_delta(self, gates_N: Tensor) -> Tensor:
        """(O, I): what all experts with these gates add to the base weight, in the wider dtype of both.

        Raises:
            ConfigError: a kind whose experts have no such matrix says why.
        """
        factors = self.mixed_factors(gates_N)
        if factors is not None:
            return factors[0] @ factors[1]
        deltas = [gate * self.delta_weight(expert) for expert, gate in enumerate(gates_N)]
        return torch.stack(deltas).sum(0)

    def mixed_factors(self, gates_N: Tensor) -> tuple[Tensor, Tensor] | None:
        """(O, M) and (M, I), whose product is `mixed_delta`, where it has a low rank M; None where it does not.

        Raises:
            ConfigError: as `mixed_delta`.
        """
        return None

    @abstractmethod
    def num_active_params(self, num_experts_per_tok: int) -> int:
        """Parameters that take part for one token when K experts are selected; shared ones count once."""

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that belong to the adapter and not to the base model, with their names; here, all."""
        return list(self.named_parameters())

    def num_params(self) -> int:
        """All parameters of the bank."""
        return sum(parameter.numel() for parameter in self.parameters())

    def keep_original(self) -> None:
        """Keep what the base model computes before it is trained, for losses that compare; here it is frozen."""
        return

    def regularization(self) -> Tensor | None:
        """A scalar to add to the training loss, for kinds that bring one."""
        return None

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, num_experts={self.num_experts}"

    def _check_rows(self, x_TI: Tensor, routing: Routing) -> None:
        tokens, (rows, num_experts) = x_TI.shape[0], routing.weights_TN.shape
        if routing.granularity == "token":
            fits = rows == tokens
        elif routing.rows_T is None:
            fits = tokens == 0 if rows == 0 else tokens % rows == 0
        else:
            fits = tokens == routing.rows_T.shape[0]
        if not fits or num_experts != self.num_experts:
            raise ConfigError(
                f"this layer got {tokens} tokens for {self.num_experts} experts but a routing of shape "
                f"{(rows, num_experts)}; a router can only rule layers that see the same tokens as its "
                "input: use scope: linear for this layer"
            )
