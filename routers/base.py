"""What every router shares: its options and its interface.

Shapes: T rows to route (tokens, prompts or tasks), D hidden size, N experts, K experts per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from moadapt.ffn import Activation, StackedExperts
from moadapt.registry import KindConfig
from moadapt.routing import Routing, RoutingContext, router_dtype

Scope = Literal["linear", "ffn", "attention", "block"]


class RouterConfig(KindConfig):
    """Options of every router.

    Attributes:
        scope: whose input the router reads and which mixture layers its decision rules: `linear` (each adapted
            linear its own), `ffn` or `attention` (one per such block), `block` (one per transformer layer), or a
            list of `ffn` and `attention` for one router per block of either sort.
        granularity: what is routed: every `token`.
        init_std: standard deviation of the initial router weights; 0.02 as in MoLoRA (2309.05444) and MixLoRA.
    """

    scope: Scope | list[Literal["ffn", "attention"]] = "linear"
    granularity: Literal["token"] = "token"
    init_std: float = Field(default=0.02, ge=0.0)

    @field_validator("scope")
    @classmethod
    def _scope_not_empty(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not value:
            raise ValueError("the list is empty; name `ffn`, `attention` or both")
        return value


@dataclass(frozen=True)
class RouterSample:
    """What a router over the experts of a split feed-forward block can be initialised or fitted from.

    Attributes:
        experts: the N experts that it will rule.
        shared: experts that are always on, or None.
        inputs_TD: fp32 inputs of the block on calibration text, real tokens only; None without calibration data.
    """

    experts: StackedExperts
    shared: StackedExperts | None = None
    inputs_TD: Tensor | None = None


class Router(nn.Module, ABC):
    """Maps hidden states to a `Routing`. All arithmetic is in fp32 (fp64 for float64 hidden states).

    Args:
        config: the options of this kind, with one value for every per-layer option.
        in_features: D.
        num_experts: N.
        device: where to create the parameters.
    """

    selects_all: ClassVar[bool] = False
    """Whether every expert is selected for every row."""

    def __init__(
        self, config: RouterConfig, in_features: int, num_experts: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.in_features = in_features
        self.num_experts = num_experts
        self.create_parameters(device)

    def create_parameters(self, device: torch.device | None) -> None:
        """Create and initialise the parameters, in fp32; here `weight` (N, D). The config and sizes are set already."""
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.in_features, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, init_std²)."""
        nn.init.normal_(self.weight, std=self.config.init_std)

    @abstractmethod
    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """Route.

        Args:
            hidden_states: (T, D), any floating dtype; never written to.
            context: what else is known about the pass.

        Returns:
            The routing of the T rows.
        """

    @classmethod
    def needs_fit(cls, config: RouterConfig) -> bool:
        """Whether the router means nothing before `fit`, so that only experts cut from a block can have it."""
        return False

    @classmethod
    def needs_inputs(cls, config: RouterConfig) -> bool:
        """Whether `fit` needs the block's inputs on calibration text."""
        return False

    def fit(self, sample: RouterSample) -> None:
        """Initialise or fit the router from the experts of a split block; here, the weights stay as they were drawn.

        Called once, at conversion, under `torch.no_grad`.
        """
        return

    def attach(self, act: Activation) -> None:
        """Take note of the activation function of the block whose experts this router rules; here, nothing.

        Called whenever a router is put over experts cut from a block, at conversion (before `fit`) and at loading.
        """
        return

    @property
    def learns_from_task(self) -> bool:
        """Whether the gates carry a gradient to the router, so that the task's loss can train it."""
        return True

    def constant_weights(self) -> Tensor | None:
        """(N,) gate weights if they are the same for every input, else None."""
        return None

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"in_features={self.in_features}, num_experts={self.num_experts}"


class FittedRouter(Router):
    """A router that means nothing before `fit`, which reads the blocks' inputs on calibration text."""

    @classmethod
    def needs_fit(cls, config: RouterConfig) -> bool:
        """Yes."""
        return True

    @classmethod
    def needs_inputs(cls, config: RouterConfig) -> bool:
        """Yes."""
        return True


def linear_logits(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """`hidden_states @ weight.T` in router precision, also under autocast: (T, D), (N, D) -> (T, N)."""
    dtype = router_dtype(hidden_states)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return nn.functional.linear(hidden_states.to(dtype), weight.to(dtype))


def jitter(hidden_states: Tensor, noise: float) -> Tensor:
    """A copy of the hidden states multiplied by U(1 - noise, 1 + noise), as Switch (2101.03961) does in training."""
    factor = torch.empty_like(hidden_states, dtype=router_dtype(hidden_states)).uniform_(1.0 - noise, 1.0 + noise)
    return hidden_states * factor
