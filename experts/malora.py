"""MALoRA experts (2410.22782): the down-projections share a low-rank subspace.

    y = W0 x + (lora_alpha / r) sum_t g_t B_t P_t (S_A dropout(x))                          (eq. 7)

S_A (d, I) is shared by all experts of the layer and S_A x is computed once. Initialisation (eqs. 8-10): for every
expert t a Kaiming-uniform K_t (d, I) = U_t Sigma_t V_t; then P_t = (U_t Sigma_t)[:r] / beta, S_A = beta V_0, B_t = 0.
beta > 1 moves the gradient from S_A to P_t (appendix A.3) and leaves the function unchanged.

Sizes (section 3.3): to replace MoLoRA experts of rank r0, d = lambda r0 N and r = (2 - lambda) r0.

Shapes: T tokens, I in, O out, N experts, R rank (the paper's r-bar), C shared rank (the paper's d).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.experts.base import ExpertBank, LowRankConfig, Role
from moadapt.experts.low_rank import Base, project_down
from moadapt.experts.sequence import base_output, mix_tokens, skips_all
from moadapt.per_layer import OptionalPerLayerInt
from moadapt.registry import EXPERTS
from moadapt.routing import Routing


def malora_sizes(molora_r: int, num_experts: int, share_ratio: float = 0.5) -> dict[str, int]:
    """The paper's rule for replacing MoLoRA experts: d = lambda r N and r-bar = (2 - lambda) r, both rounded.

    Args:
        molora_r: rank of the MoLoRA experts to replace.
        num_experts: N.
        share_ratio: lambda, in (0, 1].

    Returns:
        `{"r": r-bar, "shared_r": d}`.

    Raises:
        ConfigError: lambda outside (0, 1], or so small that r-bar > d.
    """
    if not 0.0 < share_ratio <= 1.0:
        raise ConfigError(f"share_ratio must be in (0, 1], not {share_ratio}")
    sizes = {"r": round((2.0 - share_ratio) * molora_r), "shared_r": round(share_ratio * molora_r * num_experts)}
    if sizes["r"] > sizes["shared_r"]:
        raise ConfigError(
            f"share_ratio {share_ratio} with {num_experts} experts gives r = {sizes['r']} above "
            f"shared_r = {sizes['shared_r']}; raise share_ratio or the number of experts"
        )
    return sizes


class MaloraExpertConfig(LowRankConfig):
    """Options of the `malora` experts; the defaults are the paper's for 8 experts.

    Attributes:
        r: the experts' rank, r-bar in the paper; 12 without `molora_r`.
        shared_r: d, rank of the shared down-projection, at least `r`; 32 without `molora_r`.
        molora_r: convenience: set `r` and `shared_r` by the paper's rule from the MoLoRA rank to be replaced.
        share_ratio: lambda of that rule, 0.5 in the paper.
        beta: weight balance scale of the initialisation.
    """

    kind: Literal["malora"] = "malora"
    r: OptionalPerLayerInt = None  # type: ignore[assignment]
    shared_r: OptionalPerLayerInt = None
    molora_r: Annotated[int, Field(gt=0)] | None = None
    share_ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    beta: float = Field(default=1.0, gt=0.0)
    lora_alpha: float = Field(default=24.0, gt=0.0)
    lora_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.molora_r is not None and (self.r is not None or self.shared_r is not None):
            raise ValueError("give either molora_r, which sets r and shared_r, or r and shared_r themselves")
        if self.molora_r is None and self.share_ratio is not None:
            raise ValueError("share_ratio has no effect without molora_r; add molora_r, or give r and shared_r instead")
        if self.molora_r is None:
            # Through __dict__: an ordinary assignment would validate, and so run this again.
            self.__dict__["r"] = 12 if self.r is None else self.r
            self.__dict__["shared_r"] = 32 if self.shared_r is None else self.shared_r
            if isinstance(self.r, int) and isinstance(self.shared_r, int):
                _check_sizes(self.r, self.shared_r)
        return self

    def resolve_sizes(self, num_experts: int) -> MaloraExpertConfig:
        """A copy with `r` and `shared_r` set by the rule, if `molora_r` asks for it."""
        if self.molora_r is None:
            return self
        return self.model_copy(update=malora_sizes(self.molora_r, num_experts, self.share_ratio or 0.5))


def _check_sizes(r: int, shared_r: int) -> None:
    if r > shared_r:
        raise ValueError(f"r ({r}) must not exceed shared_r ({shared_r}): P_t has r rows of the shared subspace")


@EXPERTS.register("malora", MaloraExpertConfig)
class MaloraBank(ExpertBank):
    """N MALoRA experts of one linear layer.

    Parameters: `shared_A` (C, I), `malora_P` (N, R, C), `malora_B` (N, R, O).

    Raises:
        ConfigError: r > shared_r, or shared_r > I.
    """

    config: MaloraExpertConfig
    per_sequence: ClassVar[bool] = True
    roles: ClassVar[dict[str, Role]] = {"shared_A": "shared_down", "malora_P": "down", "malora_B": "up"}

    def __init__(
        self,
        config: MaloraExpertConfig,
        in_features: int,
        out_features: int,
        num_experts: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = config.resolve_sizes(num_experts)
        super().__init__(config, in_features, out_features, num_experts, device, dtype)
        assert isinstance(config.r, int)
        assert isinstance(config.shared_r, int)
        self.r, self.shared_r = config.r, config.shared_r
        try:
            _check_sizes(self.r, self.shared_r)
        except ValueError as error:
            raise ConfigError(f"expert.r: {error}") from None
        if self.shared_r > in_features:
            raise ConfigError(
                f"expert.shared_r: {self.shared_r} exceeds the {in_features} input features of the adapted layer; "
                "make it smaller (expert.shared_r takes a map of patterns) or exclude the layer"
            )
        self.scaling = config.scaling()
        self.shared_A = nn.Parameter(torch.empty(self.shared_r, in_features, device=device, dtype=dtype))
        self.malora_P = nn.Parameter(torch.empty(num_experts, self.r, self.shared_r, device=device, dtype=dtype))
        self.malora_B = nn.Parameter(torch.empty(num_experts, self.r, out_features, device=device, dtype=dtype))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Equations 8-10; the decompositions run in fp32 (fp64 for float64 parameters)."""
        self.malora_B.zero_()
        if self.shared_A.is_meta:
            return
        dtype = torch.promote_types(self.shared_A.dtype, torch.float32)
        bound = self.in_features**-0.5  # Kaiming-uniform with a = sqrt(5) and fan-in I
        k_NCI = torch.empty(self.num_experts, self.shared_r, self.in_features, dtype=dtype, device=self.shared_A.device)
        u_NCC, sigma_NC, v_NCI = torch.linalg.svd(k_NCI.uniform_(-bound, bound), full_matrices=False)
        self.malora_P.copy_((u_NCC * sigma_NC.unsqueeze(1))[:, : self.r] / self.config.beta)
        self.shared_A.copy_(self.config.beta * v_NCI[0])

    def forward(self, x_TI: Tensor, routing: Routing, base: Base) -> Tensor:
        """(T, I) -> (T, O); see the base class."""
        self._check_rows(x_TI, routing)
        dropped_TI = self.dropout(x_TI) if self.training and self.dropout.p > 0.0 else None
        if skips_all(routing):
            return base_output(base, x_TI)
        base_TO, z_TC = project_down(base, x_TI, self.shared_A, dropped_TI)
        return mix_tokens(base_TO, z_TC, routing, self.malora_P, self.malora_B, self.scaling)

    def delta_weight(self, expert: int) -> Tensor:
        """s B_t P_t S_A: (O, I)."""
        return self.scaling * self.malora_B[expert].T @ self.malora_P[expert] @ self.shared_A

    def mixed_factors(self, gates_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of s sum_t g_t B_t P_t S_A: (O, C) and (C, I)."""
        gated_NRO = self.malora_B * (self.scaling * gates_N).view(-1, 1, 1)
        b_OC = gated_NRO.flatten(0, 1).T @ self.malora_P.flatten(0, 1).to(gated_NRO.dtype)
        return b_OC, self.shared_A.to(gated_NRO.dtype)

    def num_active_params(self, num_experts_per_tok: int) -> int:
        """d I + K r (d + O)."""
        per_expert = self.r * (self.shared_r + self.out_features)
        return self.shared_r * self.in_features + num_experts_per_tok * per_expert
