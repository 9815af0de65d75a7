"""A language model whose feed-forward blocks are routed experts. Needs torch and transformers, and nothing else.

`config.json` says under `routed_ffn` which blocks, with their numbers of experts, and how the router chooses:

    y = sum of the shared experts + sum over the kept experts of w_i E_i(x),    E_i(x) = act(x gate_i) * (x up_i) down_i

    top_k            keeps the `num_experts_per_tok` experts with the highest scores s = W x + b; `combine` says with
                     which weight: `unit` 1, `softmax` over all, `softmax_renorm` over the kept, or `sigmoid`
    softmax          keeps all, weighed by a softmax
    sigmoid_ste      keeps those with sigmoid(s) > `threshold`, and in any case the best `min_active`
    relu             keeps those with s > 0, weighed by s
    representative   keeps the experts whose representative neuron is most active
    norm_regression  keeps those whose output a small network predicts to be large

`rescale` multiplies the kept experts by a number, N / K (`n_over_k`) or N / (how many are kept) (`n_over_active`).
`threshold` may be changed in `config.json`, for all blocks in `router` or for one of them in its own `router`.

Only kept experts are computed. Gradients flow through the weights of kept experts; the straight-through gradient of
threshold routers in training is not part of this file.

Shapes: T tokens, D hidden size, N experts, K experts per token, M neurons of an expert, P = 2 M (M without a gate).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForLM
from transformers import LlamaModel as BaseModel
from transformers.activations import ACT2FN

FORMAT = 1


class RoutedFFNConfig(BaseConfig):  # type: ignore[misc, valid-type]
    """The base model's config, and `routed_ffn`."""

    model_type = "llama_routed_ffn"
    base_model_tp_plan = None

    def __init__(self, routed_ffn: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routed_ffn = routed_ffn
        super().__init__(**kwargs)


class LinearScores(nn.Module):
    """Scores W x + b of the experts, and what every router shares."""

    def __init__(self, options: dict[str, Any], features: int, num_experts: int, act: Any) -> None:
        super().__init__()
        self.options, self.num_experts = options, num_experts
        self.act = act
        self.add_parameters(features)

    def add_parameters(self, features: int) -> None:
        """`weight` (N, D), and `bias` (N,) with the option `bias`."""
        self.weight = _fp32(self.num_experts, features)
        self.bias = _fp32(self.num_experts) if self.options.get("bias") else None

    def scores(self, x_TD: Tensor) -> Tensor:
        """(T, N) in fp32 or wider."""
        return _linear(x_TD, self.weight, self.bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> weights (T, N) and bool (T, N), which experts are kept."""
        raise TypeError(f"{type(self).__name__} is no router of its own")

    def rescaled(self, weights_TN: Tensor, selected_TN: Tensor) -> Tensor:
        """The weights times the factor that `rescale` names."""
        rescale = self.options.get("rescale", "none")
        if rescale == "none":
            return weights_TN
        if rescale == "n_over_k":
            factor: float = self.num_experts / self.options["num_experts_per_tok"]
            return weights_TN * factor
        if rescale == "n_over_active":
            active_T1 = selected_TN.sum(dim=-1, keepdim=True).clamp(min=1).to(weights_TN.dtype)
            return weights_TN * (self.num_experts / active_T1)
        return weights_TN * float(rescale)


class TopK(LinearScores):
    """Keeps a fixed number of experts."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearScores.forward`."""
        combine = self.options["combine"]
        scaled_TN = self.scores(x_TD) / self.options.get("temperature", 1.0)
        probs_TN = scaled_TN.sigmoid() if combine == "sigmoid" else scaled_TN.softmax(dim=-1)
        indices_TK = probs_TN.topk(self.options["num_experts_per_tok"], dim=-1).indices
        selected_TN = torch.zeros_like(probs_TN, dtype=torch.bool).scatter_(-1, indices_TK, True)
        kept_TK = probs_TN.gather(-1, indices_TK)
        if combine == "softmax_renorm":
            kept_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True)
        elif combine == "unit":
            kept_TK = torch.ones_like(kept_TK)
        weights_TN = torch.zeros_like(probs_TN).scatter(-1, indices_TK, kept_TK)
        return self.rescaled(weights_TN, selected_TN), selected_TN


class Softmax(LinearScores):
    """Keeps all experts."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearScores.forward`."""
        probs_TN = (self.scores(x_TD) / self.options.get("temperature", 1.0)).softmax(dim=-1)
        return probs_TN, torch.ones_like(probs_TN, dtype=torch.bool)


class SigmoidThreshold(LinearScores):
    """Keeps every expert above a threshold."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearScores.forward`."""
        probs_TN = self.scores(x_TD).sigmoid()
        selected_TN = probs_TN > self.options["threshold"]
        if self.options.get("min_active", 0) > 0:
            selected_TN = selected_TN.scatter(-1, probs_TN.topk(self.options["min_active"], dim=-1).indices, True)
        kept_TN = torch.ones_like(probs_TN) if self.options.get("combine") == "unit" else probs_TN
        return self.rescaled(torch.where(selected_TN, kept_TN, 0.0), selected_TN), selected_TN


class ReLU(LinearScores):
    """Keeps every expert with a positive score."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearScores.forward`."""
        scores_TN = self.scores(x_TD)
        selected_TN = scores_TN > 0
        return self.rescaled(torch.where(selected_TN, scores_TN, 0.0), selected_TN), selected_TN


class Representative(LinearScores):
    """Keeps the experts whose representative neuron is most active."""

    def add_parameters(self, features: int) -> None:
        """`weight`, `up_weight` (N, D), `bias`, `up_bias` (N,), and `scale` (N,) with the option `learned_scale`."""
        self.weight, self.bias = _fp32(self.num_experts, features), _fp32(self.num_experts)
        self.up_weight, self.up_bias = _fp32(self.num_experts, features), _fp32(self.num_experts)
        self.scale = _fp32(self.num_experts) if self.options.get("learned_scale") else None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearScores.forward`."""
        scores_TN = self.act(self.scores(x_TD)) * _linear(x_TD, self.up_weight, self.up_bias)
        if self.options.get("absolute"):
            scores_TN = scores_TN.abs()
        indices_TK = scores_TN.topk(self.options["num_experts_per_tok"], dim=-1).indices
        selected_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(-1, indices_TK, True)
        weights_TN = selected_TN.to(scores_TN.dtype)
        if self.scale is not None:
            weights_TN = weights_TN * (1.0 + scores_TN.softmax(dim=-1) * self.scale.to(scores_TN.dtype))
        return self.rescaled(weights_TN, selected_TN), selected_TN


class NormRegression(LinearScores):
    """Keeps the experts whose output is predicted to be large, as many as the token needs."""

    def add_parameters(self, features: int) -> None:
        """`hidden_weight` (H, D), `hidden_bias` (H,), `weight` (N, H), `bias` (N,)."""
        width = self.options["router_width"]
        self.hidden_weight, self.hidden_bias = _fp32(width, features), _fp32(width)
        self.weight, self.bias = _fp32(self.num_experts, width), _fp32(self.num_experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearScores.forward`."""
        hidden_TH = torch.tanh(_linear(x_TD, self.hidden_weight, self.hidden_bias))
        norms_TN = self.scores(hidden_TH).clamp(min=0.0)
        sorted_TN, order_TN = norms_TN.sort(dim=-1, descending=True, stable=True)
        threshold = self.options["threshold"]
        if self.options.get("rule", "max_ratio") == "max_ratio":
            kept_TN = sorted_TN >= threshold * sorted_TN[:, :1]
        else:
            left_out_TN = sorted_TN.flip(-1).cumsum(-1).flip(-1)
            kept_TN = left_out_TN > threshold * sorted_TN.sum(-1, keepdim=True)
            kept_TN[:, 0] = True
        if self.options.get("num_experts_per_tok") is not None:
            kept_TN[:, self.options["num_experts_per_tok"] :] = False
        selected_TN = torch.zeros_like(kept_TN).scatter_(-1, order_TN, kept_TN)
        return self.rescaled(selected_TN.to(norms_TN.dtype), selected_TN), selected_TN


ROUTERS: dict[str, type[LinearScores]] = {
    "top_k": TopK,
    "softmax": Softmax,
    "sigmoid_ste": SigmoidThreshold,
    "relu": ReLU,
    "representative": Representative,
    "norm_regression": NormRegression,
}


class Experts(nn.Module):
    """Stacked experts: `gate_up_proj` (N, P, D), gate rows first, `down_proj` (N, D, M), and `in_bias` (N, P)."""

    def __init__(self, num_experts: int, features: int, width: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.gated: bool = options["gated"]
        self.dropout: float = options.get("dropout", 0.0)
        rows = 2 * width if self.gated else width
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, rows, features))
        self.down_proj = nn.Parameter(torch.empty(num_experts, features, width))
        self.in_bias = nn.Parameter(torch.empty(num_experts, rows)) if options["in_bias"] else None
        self.act_fn = ACT2FN[options["hidden_act"]]

    def forward(self, expert: int, x_TD: Tensor) -> Tensor:
        """One expert's output: (T, D)."""
        bias = None if self.in_bias is None else self.in_bias[expert]
        inner_TP = nn.functional.linear(x_TD, self.gate_up_proj[expert], bias)
        if self.gated:
            gate_TM, up_TM = inner_TP.chunk(2, dim=-1)
            hidden_TM = self.act_fn(gate_TM) * up_TM
        else:
            hidden_TM = self.act_fn(inner_TP)
        if self.dropout > 0.0:
            hidden_TM = nn.functional.dropout(hidden_TM, self.dropout, self.training)
        return nn.functional.linear(hidden_TM, self.down_proj[expert])


class RoutedFeedForward(nn.Module):
    """Takes the place of a feed-forward block."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        features, width, num_shared = options["hidden_size"], options["expert_width"], options["num_shared_experts"]
        num_experts = options["num_experts"]
        self.experts = Experts(num_experts, features, width, options)
        self.shared_experts = Experts(num_shared, features, width, options) if num_shared else None
        self.down_bias = nn.Parameter(torch.empty(features)) if options["down_bias"] else None
        router = options["router"]
        self.router = ROUTERS[router["kind"]](router, features, num_experts, ACT2FN[options["hidden_act"]])
        self.num_shared: int = num_shared
        self.output_dropout: float = options.get("output_dropout", 0.0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TN, selected_TN = self.router(x_TD)
        sum_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for expert in range(self.num_shared):
            assert self.shared_experts is not None
            sum_TD = sum_TD + self.shared_experts(expert, x_TD)
        for expert in selected_TN.any(0).nonzero().flatten().tolist():
            rows_C = selected_TN[:, expert].nonzero().flatten()
            if rows_C.shape[0] == x_TD.shape[0]:
                sum_TD = sum_TD + self.experts(expert, x_TD) * weights_TN[:, expert, None]
            else:
                y_CD = self.experts(expert, x_TD[rows_C]) * weights_TN[rows_C, expert, None]
                sum_TD = sum_TD.index_add(0, rows_C, y_CD.to(sum_TD.dtype))
        if self.down_bias is not None:
            sum_TD = sum_TD + self.down_bias
        y_TD = sum_TD.to(x_TD.dtype)
        if self.output_dropout > 0.0:
            y_TD = nn.functional.dropout(y_TD, self.output_dropout, self.training)
        return y_TD.view(hidden_states.shape)


_OWN = (Experts, LinearScores, RoutedFeedForward)


class _Routed:
    """Mixed into the base model's classes: puts routed blocks in the places that the config names."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, config.routed_ffn)
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, _OWN):
                self._init_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if not isinstance(module, _OWN):
            return
        std = getattr(self.config, "initializer_range", 0.02)  # type: ignore[attr-defined]
        for parameter in module.parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=std)
            else:
                parameter.zero_()


def install(model: Any, routed_ffn: dict[str, Any] | None) -> None:
    """Replace the blocks that `routed_ffn` names, by their names in the model without a head.

    Raises:
        ValueError: another format, or a router that this file does not know.
    """
    if not routed_ffn or routed_ffn.get("format") != FORMAT:
        raise ValueError(f"config.routed_ffn: needs format {FORMAT}, found {(routed_ffn or {}).get('format')}")
    base = getattr(model, model.base_model_prefix, model)
    for name, own in routed_ffn["blocks"].items():
        options = {**routed_ffn["experts"], **own, "router": {**routed_ffn["router"], **own.get("router", {})}}
        kind = options["router"]["kind"]
        if kind not in ROUTERS:
            raise ValueError(f"config.routed_ffn.router.kind: {kind!r} is none of {', '.join(ROUTERS)}")
        base.set_submodule(name, RoutedFeedForward(options))
        for other in own.get("taken_over", []):  # layers of the block that have no module of their own around them
            base.set_submodule(other, nn.Identity())


def _fp32(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


def _linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` in fp32 or wider, also under autocast."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        y = nn.functional.linear(x_TD.to(dtype), weight.to(dtype))
    return y if bias is None else y + bias.to(dtype)


def _with_router(base: Any) -> set[str]:
    """Modules that stay in fp32 in a half-precision model."""
    return {*(base._keep_in_fp32_modules_strict or ()), "router"}


class RoutedFFNModel(_Routed, BaseModel):  # type: ignore[misc, valid-type]
    """The model without a head."""

    config_class = RoutedFFNConfig
    _keep_in_fp32_modules_strict = _with_router(BaseModel)


class RoutedFFNForLM(_Routed, BaseForLM):  # type: ignore[misc, valid-type]
    """The language model."""

    config_class = RoutedFFNConfig
    _keep_in_fp32_modules_strict = _with_router(BaseForLM)
