"""What every router shares: its options and its interface.

A router maps rows to decisions and need not know what a row is. For granularity `prompt` it is one pooled and activated
vector for each prompt (see `pooling.py` and `activation.py`), for `task` one row for each sequence.

Shapes: T rows to route (tokens, prompts or tasks), D hidden size, N experts, K experts per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from moadapt.ffn import Activation, StackedExperts
from moadapt.registry import KindConfig
from moadapt.routing import Granularity, Routing, RoutingContext, router_dtype

Scope = Literal["linear", "ffn", "attention", "block"]


class RouterConfig(KindConfig):
    """Options of every router.

    Attributes:
        scope: whose input the router reads and which mixture layers its decision rules: `linear` (each adapted
            linear its own), `ffn` or `attention` (one per such block), `block` (one per transformer layer), or a
            list of `ffn` and `attention` for one router per block of either sort.
        granularity: what is routed: every `token`, every `prompt` (one decision for each turn of a sequence, from the
            prompt's tokens, that its answer follows) or every `task` (one for each sequence, by its task id).
        pooler: of granularity `prompt`, how the prompt's hidden states become one: `self_attention` (the default, as in
            MiLoRA), `mean`, `last` token or `max`.
        activation: of granularity `prompt`, the function between the pooler and the router: `gelu` (the default),
            `relu`, `none`, or `rational`, whose coefficients are learned.
        init_std: standard deviation of the initial router weights; 0.02 as in MoLoRA (2309.05444) and MixLoRA.
    """

    granularities: ClassVar[tuple[Granularity, ...]] = ("token", "prompt")
    """What this kind of router can route."""

    scope: Scope | list[Literal["ffn", "attention"]] = "linear"
    granularity: Granularity = "token"
    pooler: Literal["self_attention", "mean", "last", "max"] | None = None
    activation: Literal["none", "gelu", "relu", "rational"] | None = None
    init_std: float = Field(default=0.02, ge=0.0)

    @field_validator("scope")
    @classmethod
    def _scope_not_empty(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not value:
            raise ValueError("the list is empty; name `ffn`, `attention` or both")
        return value

    @field_validator("granularity")
    @classmethod
    def _granularity_of_the_kind(cls, value: Granularity) -> Granularity:
        if value not in cls.granularities:
            able = " or ".join(cls.granularities)
            hint = "; router.kind: task_table decides per task" if value == "task" else ""
            raise ValueError(f"this kind of router decides per {able}; set granularity: {able}{hint}")
        return value

    @model_validator(mode="after")
    def _pools_prompts_only(self) -> Self:
        if self.granularity == "prompt":
            # Assigned through __dict__: an ordinary assignment would validate, and so run this again.
            self.__dict__["pooler"] = self.pooler or "self_attention"
            self.__dict__["activation"] = self.activation or "gelu"
            return self
        for option in ("pooler", "activation"):
            if getattr(self, option) is not None:
                raise ValueError(
                    f"{option}: {getattr(self, option)} acts on pooled prompts, but granularity is {self.granularity}; "
                    f"set granularity: prompt or leave {option} out"
                )
        return self

    def refuse_prompts(self, option: str) -> None:
        """Check that an option which fits the router to tokens has tokens to route.

        Raises:
            ValueError: the granularity is `prompt`.
        """
        if self.granularity == "prompt":
            raise ValueError(
                f"{option} takes the router from a block's weights or its inputs, which are those of tokens, but "
                f"granularity is prompt; set granularity: token or leave {option} out"
            )


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
