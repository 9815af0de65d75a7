"""LoRA experts (2106.09685), as mixed by MoLoRA (2309.05444).

    y = W0 x + s sum_e g_e B_e A_e dropout(x),    s = lora_alpha / r   (rsLoRA, 2312.03732: lora_alpha / sqrt(r))

A_e is Kaiming-uniform (a = sqrt 5), B_e = 0. With `shared_down` all experts share one A, which is HydraLoRA
(2404.19245): y = W0 x + s sum_e g_e B_e A x. With `mixing: factors` the factors are mixed and not the outputs, as in
Poly (2202.13914) and SMEAR (2306.03745): y = W0 x + s (sum_e g_e B_e) (sum_e g_e A_e) x.

Shapes: T tokens, I in, O out, N experts, R rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.experts.base import ExpertBank, LowRankConfig, Role
from moadapt.experts.low_rank import Base, project_down
from moadapt.experts.sequence import base_output, mix_by_factors, mix_shared_up, mix_tokens, skips_all
from moadapt.registry import EXPERTS
from moadapt.routing import Routing


class LoraExpertConfig(LowRankConfig):
    """Options of the `lora` experts.

    Attributes:
        init_lora_weights: `true` for Kaiming-uniform A, `gaussian` for normal A; B is zero in both.
        init_std: standard deviation of the Gaussian A; 1 / r (peft's) when not given.
        shared_down: one A for all experts (HydraLoRA).
        mixing: `outputs` sums the experts' outputs; `factors` sums their A and their B, once for each sequence, which
            needs a router of granularity prompt or task.
    """

    kind: Literal["lora"] = "lora"
    init_lora_weights: Literal[True, "gaussian"] = True
    init_std: float | None = Field(default=None, gt=0.0)
    shared_down: bool = False
    mixing: Literal["outputs", "factors"] = "outputs"

    @model_validator(mode="after")
    def _std_needs_gaussian(self) -> Self:
        if self.init_std is not None and self.init_lora_weights != "gaussian":
            raise ValueError("init_std has no effect without init_lora_weights: gaussian; set it, or drop init_std")
        return self

    @model_validator(mode="after")
    def _factors_need_down_projections(self) -> Self:
        if self.mixing == "factors" and self.shared_down:
            raise ValueError(
                "mixing: factors sums the experts' A, and shared_down leaves only one; drop one of the two"
            )
        return self


@EXPERTS.register("lora", LoraExpertConfig)
class LoraBank(ExpertBank):
    """N LoRA experts of one linear layer.

    Parameters: `lora_A` (N, R, I), or (1, R, I) with `shared_down`; `lora_B` (N, R, O).
    """

    config: LoraExpertConfig
    per_sequence: ClassVar[bool] = True
    roles: ClassVar[dict[str, Role]] = {"lora_A": "down", "lora_B": "up"}

    def __init__(
        self,
        config: LoraExpertConfig,
        in_features: int,
        out_features: int,
        num_experts: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, in_features, out_features, num_experts, device, dtype)
        assert isinstance(config.r, int)
        self.r = config.r
        self.scaling = config.scaling()
        num_down = 1 if config.shared_down else num_experts
        self.lora_A = nn.Parameter(torch.empty(num_down, self.r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(num_experts, self.r, out_features, device=device, dtype=dtype))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A as configured, B = 0: every expert starts as the zero map."""
        if self.config.init_lora_weights == "gaussian":
            self.lora_A.normal_(std=self.config.init_std or 1.0 / self.r)
        else:
            bound = self.in_features**-0.5  # Kaiming-uniform with a = sqrt(5) and fan-in I
            self.lora_A.uniform_(-bound, bound)
        self.lora_B.zero_()

    def forward(self, x_TI: Tensor, routing: Routing, base: Base) -> Tensor:
        """(T, I) -> (T, O); see the base class."""
        self._check_rows(x_TI, routing)
        dropped_TI = self.dropout(x_TI) if self.training and self.dropout.p > 0.0 else None
        if self.config.mixing == "factors":
            if routing.granularity == "token":
                raise ConfigError(
                    "expert.mixing: factors mixes the experts' factors once for each sequence, and this routing has a "
                    "decision for each token; use router.granularity: prompt or task, or expert.mixing: outputs"
                )
            return mix_by_factors(base, x_TI, routing, self.lora_A, self.lora_B, self.scaling, dropped_TI)
        if not self.config.shared_down:
            return mix_tokens(base, x_TI, routing, self.lora_A, self.lora_B, self.scaling, dropped_TI)
        if skips_all(routing):
            return base_output(base, x_TI)
        base_TO, h_TR = project_down(base, x_TI, self.lora_A[0], dropped_TI)
        return mix_shared_up(base_TO, h_TR, routing, self.lora_B, self.scaling)

    def delta_weight(self, expert: int) -> Tensor:
        """s B_e A_e: (O, I).

        Raises:
            ConfigError: with `mixing: factors`.
        """
        if self.config.mixing == "factors":
            raise ConfigError(
                "with expert.mixing: factors an expert has no delta of its own, as its A also meets the other experts' "
                "B; use mixed_delta with all gates, or expert.mixing: outputs"
            )
        return self.scaling * self.lora_B[expert].T @ self.lora_A[0 if self.config.shared_down else expert]

    def mixed_factors(self, gates_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of s sum_e g_e B_e A_e, or s (sum_e g_e B_e) (sum_e g_e A_e): (O, N R) and (N R, I), or with R for N R."""
        if self.config.mixing == "factors":
            a_RI, b_RO = (
                torch.einsum("n,nrk->rk", gates_N, factor.to(gates_N.dtype)) for factor in (self.lora_A, self.lora_B)
            )
            return self.scaling * b_RO.T, a_RI
        gated_NRO = self.lora_B * (self.scaling * gates_N).view(-1, 1, 1)
        if self.config.shared_down:
            return gated_NRO.sum(0).T, self.lora_A[0].to(gated_NRO.dtype)
        return gated_NRO.flatten(0, 1).T, self.lora_A.flatten(0, 1).to(gated_NRO.dtype)

    def num_active_params(self, num_experts_per_tok: int) -> int:
        """r (K I + K O), or r (I + K O) with a shared A."""
        num_down = 1 if self.config.shared_down else num_experts_per_tok
        return self.r * (num_down * self.in_features + num_experts_per_tok * self.out_features)
