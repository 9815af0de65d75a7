"""Experts cut from a dense feed-forward block, as DSMoE (2502.12455, eqs. 6-8) and LLaMA-MoE (2406.16554) use them.

The F neurons of the block are dealt out to S shared and N routed experts of M = F / (S + N) neurons each:

    y = sum_s E_s(x) + sum_i w_i E_i(x) + b_down,   E_e(x) = (act(x W_e^T) * (x U_e^T)) V_e   (plain: act(x U_e^T) V_e)

w is the routing's: what a router makes of its scores (`combine` and `rescale`) is final here. With all w_i = 1 this is
the dense block, whatever the partition (its output bias b_down is not routed). The weights are the block's own rows in
another order. They are frozen, trained, or frozen under a LoRA of their own for every expert,

    W_e + s B_e A_e,   s = lora_alpha / r

which folds into the expert and so leaves the checkpoint's form as it is.

Rows are added that are zero, so that every width is a multiple of 8 (what grouped matrix products need); they
contribute nothing, have no gradient, and are not saved as neurons.

Shapes: T tokens, D hidden size, F neurons, S shared and N routed experts, E = S + N, M neurons of one expert, P = 2 M
for gated blocks (M for plain ones), G = 2 or 1 projections into an expert, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from moadapt.errors import ConfigError
from moadapt.experts.base import ExpertBank, ExpertConfig, Role
from moadapt.experts.partition_compute import mix_experts
from moadapt.ffn import PADDING, FeedForward, StackedExperts, join
from moadapt.per_layer import PerLayerCount
from moadapt.registry import EXPERTS, SPLITS, Config, KindConfig, OfKind
from moadapt.routing import Routing

WIDTH_MULTIPLE = 8


class PartitionLoraConfig(Config):
    """A LoRA for every expert, on its projections.

    Attributes:
        r: rank.
        lora_alpha: the delta is scaled by lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        use_rslora: rank-stabilised scaling (2312.03732).
    """

    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0.0)
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """lora_alpha / r or lora_alpha / sqrt(r)."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


class FfnPartitionConfig(ExpertConfig):
    """Options of the `ffn_partition` experts. `num_experts` is the number of routed experts of a block.

    Attributes:
        num_shared_experts: further experts of the same width that are always on, with weight 1.
        split: which neurons form which expert: kind and options.
        padding: allow numbers of experts that do not divide the block's width; some experts have a neuron less then.
        trainable: train the experts' weights; without it they are frozen.
        lora: train a LoRA on every frozen expert instead.
        first_k_dense_replace: leave the feed-forward blocks of this many first layers dense.
        last_k_dense_replace: the same at the end.
    """

    kind: Literal["ffn_partition"] = "ffn_partition"
    num_shared_experts: PerLayerCount = 0
    split: Annotated[KindConfig, OfKind(SPLITS)] = Field(default={"kind": "contiguous"}, validate_default=True)
    padding: bool = False
    trainable: bool = False
    lora: PartitionLoraConfig | None = None
    first_k_dense_replace: int = Field(default=0, ge=0)
    last_k_dense_replace: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_way_to_train(self) -> Self:
        if self.trainable and self.lora is not None:
            raise ValueError("trainable: true trains the experts' weights and lora leaves them frozen; choose one")
        return self


@EXPERTS.register("ffn_partition", FfnPartitionConfig)
class PartitionBank(ExpertBank):
    """The experts of one feed-forward block.

    Parameters, the shared experts first: `in_proj` (E, P, D), gate rows before up rows; `out_proj` (E, M, D); `in_bias`
    (E, P) and `out_bias` (D) where the block has biases; with LoRA `lora_in_A` (E, G*R, D), `lora_in_B` (E, P, R),
    `lora_out_A` (E, R, M) and `lora_out_B` (E, R, D). Buffer: `neuron_indices` (E, ceil(F / E)) int64.

    Args:
        config: the options, with one value for every per-layer option.
        in_features: D.
        out_features: D.
        num_experts: N.
        device: ignored; the weights stay where the block's are.
        dtype: of the LoRA parameters; the others keep the block's.
        ffn: the dense block.
        neuron_indices: (E, ceil(F / E)) index lists.
    """

    replaces_block: ClassVar[bool] = True
    roles: ClassVar[dict[str, Role]] = {
        "lora_in_A": "down",
        "lora_out_A": "down",
        "lora_in_B": "up",
        "lora_out_B": "up",
    }
    config: FfnPartitionConfig

    def __init__(
        self,
        config: FfnPartitionConfig,
        in_features: int,
        out_features: int,
        num_experts: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        ffn: FeedForward,
        neuron_indices: Tensor,
    ) -> None:
        super().__init__(config, in_features, out_features, num_experts, device, dtype)
        assert isinstance(config.num_shared_experts, int)
        self.num_shared = config.num_shared_experts
        self.num_neurons = ffn.num_neurons
        self.act: Any = ffn.act
        self.gated, self.dropout = ffn.gated, ffn.dropout
        padded_EM = _pad_width(neuron_indices.cpu())
        self.register_buffer("neuron_indices", neuron_indices.to(ffn.up_FD.device), persistent=True)
        stacked = StackedExperts.cut(ffn, padded_EM)
        self.in_proj = nn.Parameter(stacked.in_NPD, requires_grad=config.trainable)
        self.out_proj = nn.Parameter(stacked.out_NMD, requires_grad=config.trainable)
        bias_EP, bias_D = stacked.in_bias_NP, ffn.down_bias_D
        self.in_bias = None if bias_EP is None else nn.Parameter(bias_EP, requires_grad=config.trainable)
        self.out_bias = None if bias_D is None else nn.Parameter(bias_D.clone(), requires_grad=config.trainable)
        self._folded: tuple[tuple[int, ...], StackedExperts] | None = None
        if config.lora is not None:
            self._add_lora(config.lora, dtype, padded_EM)

    def _add_lora(self, lora: PartitionLoraConfig, dtype: torch.dtype, padded_EM: Tensor) -> None:
        total, width, features = self.out_proj.shape
        device, parts = self.out_proj.device, 2 if self.gated else 1

        def parameter(*shape: int, fan_in: int | None = None) -> nn.Parameter:
            tensor = torch.zeros(shape, device=device, dtype=dtype)
            return nn.Parameter(tensor if fan_in is None else tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5))

        self.lora_in_A = parameter(total, parts * lora.r, features, fan_in=features)
        self.lora_in_B = parameter(total, parts * width, lora.r)
        self.lora_out_A = parameter(total, lora.r, width, fan_in=width)
        self.lora_out_B = parameter(total, lora.r, features)
        real_EM1 = (padded_EM != PADDING).unsqueeze(-1).to(device)
        self.register_buffer("_real_EM1", real_EM1, persistent=False)

    # -- weights --------------------------------------------------------------------------------------------------

    def stacked(self) -> StackedExperts:
        """All experts, the shared ones first, with LoRA folded in."""
        if self.config.lora is None:
            return self._stack(self.in_proj, self.out_proj)
        parameters = (self.in_proj, self.out_proj, self.lora_in_A, self.lora_in_B, self.lora_out_A, self.lora_out_B)
        if torch.is_grad_enabled() or any(p.is_inference() for p in parameters):  # these have no versions
            self._folded = None  # a training step may follow, whose writes need not show in the versions below
            return self._fold()
        # Between two steps nothing changes, and generation calls this once per token.
        key = tuple(value for p in parameters for value in (p._version, p.data_ptr()))
        if self._folded is None or self._folded[0] != key:
            self._folded = key, self._fold()
        return self._folded[1]

    def _fold(self) -> StackedExperts:
        lora = self.config.lora
        assert lora is not None
        width, dtype = self.out_proj.shape[1], self.in_proj.dtype
        real_EM1: Any = self._real_EM1
        pairs = zip(torch.split(self.lora_in_B, width, 1), torch.split(self.lora_in_A, lora.r, 1), strict=True)
        in_delta_EPD = torch.cat([lora.scaling * (b_EMR @ a_ERD) * real_EM1 for b_EMR, a_ERD in pairs], dim=1)
        out_delta_EMD = lora.scaling * (self.lora_out_A.transpose(1, 2) @ self.lora_out_B) * real_EM1
        return self._stack(self.in_proj + in_delta_EPD.to(dtype), self.out_proj + out_delta_EMD.to(dtype))

    def _stack(self, in_EPD: Tensor, out_EMD: Tensor) -> StackedExperts:
        return StackedExperts(in_EPD, out_EMD, self.in_bias, self.act, self.gated, self.dropout)

    def halves(self) -> tuple[StackedExperts | None, StackedExperts]:
        """(shared or None, routed)."""
        stacked = self.stacked()
        if self.num_shared == 0:
            return None, stacked
        return _slice(stacked, slice(None, self.num_shared)), _slice(stacked, slice(self.num_shared, None))

    def feed_forward(self) -> FeedForward:
        """The block that all experts together are, without LoRA, in its original order of neurons; a copy."""
        indices_EM, bias_D = _pad_width(self.neuron_indices), self.out_bias  # type: ignore[arg-type]
        with torch.no_grad():
            experts = self._stack(self.in_proj, self.out_proj)
            return join(experts, indices_EM, self.num_neurons, None if bias_D is None else bias_D.clone())

    def keep_original(self) -> None:
        """Keep a frozen copy of weights that are about to be trained, for `dense`; it is not saved."""
        if self.config.trainable and not hasattr(self, "_original_in_proj"):
            for name in ("in_proj", "out_proj", "in_bias", "out_bias"):
                weight = getattr(self, name)
                copied = None if weight is None else weight.detach().clone()
                self.register_buffer(f"_original_{name}", copied, persistent=False)

    # -- computing ------------------------------------------------------------------------------------------------

    def forward(
        self,
        x_TI: Tensor,
        routing: Routing | None,
        base: Tensor | Callable[[Tensor], Tensor] | None = None,
        *,
        dropout: bool = True,
    ) -> Tensor:
        """(T, D) -> (T, D). The block is replaced, so `base` is not used. Without a routing: `dense(x, dropout)`.

        Both are one call of the module, since ZeRO-3 lends it its weights for that long.
        """
        if routing is None:
            return self.dense(x_TI, dropout=dropout)
        self._check_rows(x_TI, routing)
        shared, routed = self.halves()
        y_TD = mix_experts(x_TI, routing, routed, training=self.training)
        if shared is not None:
            y_TD = y_TD + self._sum(shared, x_TI).to(y_TD.dtype)
        return y_TD if self.out_bias is None else y_TD + self.out_bias.to(y_TD.dtype)

    def dense(self, x_TD: Tensor, *, dropout: bool = True) -> Tensor:
        """What the block made of x before it was split: (T, D). LoRA takes no part.

        Weights that were trained since give what they are now, unless `keep_original` was called before.

        Args:
            x_TD: the block's input.
            dropout: drop neurons in training, as the block did.
        """
        prefix = "_original_" if hasattr(self, "_original_in_proj") else ""
        names = ("in_proj", "out_proj", "in_bias", "out_bias")
        in_EPD, out_EMD, bias_EP, bias_D = (getattr(self, prefix + name) for name in names)
        rate = self.dropout if dropout else 0.0
        y_TD = self._sum(StackedExperts(in_EPD, out_EMD, bias_EP, self.act, self.gated, rate), x_TD)
        return y_TD if bias_D is None else y_TD + bias_D.to(y_TD.dtype)

    def _sum(self, experts: StackedExperts, x_TD: Tensor) -> Tensor:
        """The ungated sum, with the block's dropout in training. Trained weights may be wider than x."""
        if experts.in_NPD.dtype != x_TD.dtype:
            bias = experts.in_bias_NP
            experts = StackedExperts(
                experts.in_NPD.to(x_TD.dtype),
                experts.out_NMD.to(x_TD.dtype),
                None if bias is None else bias.to(x_TD.dtype),
                experts.act,
                experts.gated,
                experts.dropout,
            )
        hidden_TF = experts.hidden(x_TD).flatten(1)
        if self.training and experts.dropout > 0.0:
            hidden_TF = nn.functional.dropout(hidden_TF, experts.dropout)
        return hidden_TF @ experts.out_NMD.flatten(0, 1).to(hidden_TF.dtype)

    # -- the contract of every bank -------------------------------------------------------------------------------

    def delta_weight(self, expert: int) -> Tensor:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("ffn_partition experts replace their block; they are no delta of a weight")

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained here: the LoRA, the experts themselves, or nothing."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def num_params(self) -> int:
        """All parameters, zero rows left out."""
        lora = sum(p.numel() for name, p in self.named_parameters() if name.startswith("lora_"))
        return self._size(self.num_neurons) + lora

    def num_active_params(self, num_experts_per_tok: int) -> int:
        """Parameters of the shared and K routed experts, zero rows left out."""
        total = self.num_shared + self.num_experts
        active = self.num_shared + num_experts_per_tok
        lora = sum(p.numel() for name, p in self.named_parameters() if name.startswith("lora_"))
        return self._size(self.num_neurons * active // total) + lora * active // total

    def _size(self, neurons: int) -> int:
        """Parameters of so many neurons and the output bias."""
        parts = 3 if self.gated else 2
        biases = 0 if self.in_bias is None else parts - 1
        return neurons * (parts * self.in_features + biases) + (0 if self.out_bias is None else self.out_bias.numel())

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        shared = f", num_shared_experts={self.num_shared}" if self.num_shared else ""
        return f"{super().extra_repr()}{shared}, width={self.neuron_indices.shape[1]}"  # type: ignore[index, union-attr]


def check_padding(config: FfnPartitionConfig, ffn: FeedForward, width: int) -> None:
    """See to it that zero rows contribute nothing, also under training.

    Raises:
        ConfigError: rows have to be added to a plain block whose activation of zero is not zero.
    """
    uneven = ffn.num_neurons % width != 0 or width % WIDTH_MULTIPLE != 0
    if uneven and config.trainable and not ffn.gated and float(ffn.act(torch.zeros(1))[0]) != 0.0:
        raise ConfigError(
            "expert.trainable: an activation with act(0) != 0 would move the zero rows that fill up an expert's width; "
            f"choose a number of experts that gives widths that are multiples of {WIDTH_MULTIPLE}"
        )


def _pad_width(indices_EM: Tensor) -> Tensor:
    """Index lists whose width is a multiple of `WIDTH_MULTIPLE`."""
    missing = -indices_EM.shape[1] % WIDTH_MULTIPLE
    return nn.functional.pad(indices_EM, (0, missing), value=PADDING) if missing else indices_EM


def _slice(stacked: StackedExperts, part: slice) -> StackedExperts:
    bias = stacked.in_bias_NP
    return StackedExperts(
        stacked.in_NPD[part],
        stacked.out_NMD[part],
        None if bias is None else bias[part],
        stacked.act,
        stacked.gated,
        stacked.dropout,
    )
