"""Converted models for tests, and a feed-forward block as loops over tokens, experts and neurons in float64.

Nothing of moadapt is used in the loops. Names: T tokens, D hidden size, F neurons, E experts, shared ones first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tiny import VOCAB, base_model, batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt import MixtureModel
from moadapt.convert import convert_ffn_to_experts

GATED_T5: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}


@dataclass(frozen=True)
class Family:
    """Where a family keeps its blocks, and what these are made of.

    `up`, `gate` and `down` name layers inside of `owner`, which holds them for layer 0 and 1 (T5: encoder and decoder).
    """

    family: str
    owners: tuple[str, ...]
    up: str
    down: str
    gate: str | None = None
    act: str = "silu"
    fused: bool = False
    inline: bool = False
    changes: dict[str, Any] | None = None

    def model(self, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
        return base_model(self.family, dtype, **{**(self.changes or {}), **more})

    def names(self) -> list[str]:
        """Of the modules whose place the experts take."""
        return [f"{owner}.{self.up}" if self.inline else owner for owner in self.owners]


_LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
_T5 = tuple(
    f"{side}.block.{i}.layer.{n}.DenseReluDense" for side, n in (("encoder", 1), ("decoder", 2)) for i in (0, 1)
)
FAMILIES: dict[str, Family] = {
    **{
        name: Family(name, _LAYERS, "up_proj", "down_proj", "gate_proj")
        for name in ("llama", "qwen2", "qwen3", "mistral")
    },
    "llama_bias": Family("llama", _LAYERS, "up_proj", "down_proj", "gate_proj", changes={"mlp_bias": True}),
    "gemma": Family("gemma", _LAYERS, "up_proj", "down_proj", "gate_proj", act="gelu_tanh"),
    "phi3": Family("phi3", _LAYERS, "gate_up_proj", "down_proj", fused=True),
    "gpt2": Family("gpt2", tuple(f"transformer.h.{i}.mlp" for i in (0, 1)), "c_fc", "c_proj", act="gelu_tanh"),
    "gpt_neox": Family(
        "gpt_neox", tuple(f"gpt_neox.layers.{i}.mlp" for i in (0, 1)), "dense_h_to_4h", "dense_4h_to_h", act="gelu"
    ),
    "opt": Family("opt", tuple(f"model.decoder.layers.{i}" for i in (0, 1)), "fc1", "fc2", act="relu", inline=True),
    "t5": Family("t5", _T5, "wi", "wo", act="relu"),
    "t5_gated": Family("t5", _T5, "wi_1", "wo", "wi_0", act="gelu_tanh", changes=GATED_T5),
}


def block_function(model: PreTrainedModel, owner: str, row: Family) -> Callable[[Tensor], Tensor]:
    """What the dense block computes, by its own modules."""
    module = model.get_submodule(owner)
    if not row.inline:
        return lambda x_TD: module(x_TD[None])[0]
    return lambda x_TD: module.fc2(module.activation_fn(module.fc1(x_TD)))


def inputs_of(family: str, rows: int = 2, length: int = 6, seed: int = 3) -> dict[str, Tensor]:
    return batch(rows, length, seed, "t5" if family.startswith("t5") else family)


def calibration_batches(
    count: int = 3, rows: int = 4, length: int = 12, seed: int = 11, family: str = "llama"
) -> list[dict[str, Tensor]]:
    """Texts with some padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[number % rows, length - 3 :] = 0
        item = {"input_ids": ids, "attention_mask": mask}
        if family == "t5":
            item["labels"] = torch.randint(3, VOCAB, (rows, length - 4), generator=generator)
        made.append(item)
    return made


def partition(**options: Any) -> dict[str, Any]:
    """Options of the experts."""
    return {"kind": "ffn_partition", **options}


def mixture_options(num_experts: Any = 4, router: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Options of a mixture, without any of the defaults of a conversion."""
    expert = partition(**more.pop("expert", {}))
    router = {"kind": "top_k", "num_experts_per_tok": 2} if router is None else router
    return {"num_experts": num_experts, "expert": expert, "router": router, **more}


ALL_ON: dict[str, Any] = {"kind": "top_k", "combine": "unit", "init_std": 0.5}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax", "init_std": 0.5},
    "top_2": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "softmax", "init": "normal", "init_std": 0.5},
    "top_2_renorm": {
        "kind": "top_k",
        "num_experts_per_tok": 2,
        "combine": "softmax_renorm",
        "rescale": "n_over_k",
        "init": "normal",
        "init_std": 0.5,
    },
    "top_2_sigmoid": {
        "kind": "top_k",
        "num_experts_per_tok": 2,
        "combine": "sigmoid",
        "rescale": "n_over_k",
        "bias": True,
        "init": "normal",
        "init_std": 0.5,
    },
    "mean_gate": {"kind": "top_k", "num_experts_per_tok": 2, "combine": "unit", "init": "mean_gate"},
    "prior": {
        "kind": "top_k",
        "num_experts_per_tok": 2,
        "combine": "unit",
        "rescale": "n_over_k",
        "fit": {"kind": "prior_approximate", "steps": 20},
    },
    "sigmoid_ste": {"kind": "sigmoid_ste", "init_std": 0.5},
    "sigmoid_min": {
        "kind": "sigmoid_ste",
        "init_std": 0.5,
        "threshold": 0.7,
        "min_active": 1,
        "combine": "unit",
        "rescale": "none",
    },
    "relu": {"kind": "relu", "init_std": 0.5},
    "representative": {"kind": "representative", "num_experts_per_tok": 2, "learned_scale": True},
    "norm_regression": {"kind": "norm_regression", "threshold": 0.8, "router_width": 8, "fit": {"steps": 30}},
    "norm_cumulative": {
        "kind": "norm_regression",
        "rule": "cumulative",
        "threshold": 0.3,
        "router_width": 8,
        "rescale": "n_over_active",
        "fit": {"steps": 30},
    },
}
"""Every kind of router, with gates that differ from token to token."""
CALIBRATED = {"prior", "representative", "norm_regression", "norm_cumulative"}
UNTRAINED = {"mean_gate", "prior", "norm_regression", "norm_cumulative"}
"""Routers that get no gradient from the task."""


def converted(
    options: dict[str, Any],
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    calibration: Iterable[dict[str, Tensor]] | None = None,
    seed: int = 5,
    **changes: Any,
) -> MixtureModel:
    """A converted tiny model; the draws of its routers depend on the seed only."""
    row = FAMILIES[family]
    model = row.model(dtype, **changes)
    torch.manual_seed(seed)
    return convert_ffn_to_experts(model, options, None if calibration is None else list(calibration))


def by_router(name: str, dtype: torch.dtype = torch.float64, seed: int = 5, **more: Any) -> MixtureModel:
    """A converted tiny Llama under one of `ROUTERS`."""
    given = calibration_batches() if name in CALIBRATED else None
    return converted(mixture_options(router=ROUTERS[name], **more), dtype=dtype, calibration=given, seed=seed)


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, type], dict[str, bool], dict[str, bool], int]:
    """Everything that a refused or undone conversion must leave as it was."""
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return (
        state_copy(model),
        {name: type(module) for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        hooks,
    )


def same_snapshot(model: nn.Module, before: Any) -> None:
    after = snapshot(model)
    assert list(after[0]) == list(before[0])
    for name, tensor in before[0].items():
        assert torch.equal(after[0][name], tensor), name
        assert after[0][name].dtype == tensor.dtype, name
    assert after[1:] == before[1:]


# -- loops ---------------------------------------------------------------------------------------------------------


def activation(name: str, value: Tensor) -> Tensor:
    """The activation functions of the families, of a scalar, from their definitions."""
    if name == "silu":
        return value / (1.0 + torch.exp(-value))
    if name == "relu":
        return value if value.item() > 0 else torch.zeros_like(value)
    if name == "gelu":
        return 0.5 * value * (1.0 + torch.erf(value / math.sqrt(2.0)))
    assert name == "gelu_tanh"
    return 0.5 * value * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))


@dataclass
class NaiveNeurons:
    """A block's neurons: rows of its matrices, as float64 leaves that take gradients."""

    up_FD: Tensor
    down_FD: Tensor
    act: str
    gate_FD: Tensor | None = None
    up_bias_F: Tensor | None = None
    gate_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, owner: str, row: Family) -> NaiveNeurons:
        """Read from the dense model's own parameters."""

        def layer(name: str) -> tuple[Tensor, Tensor | None]:
            module = model.get_submodule(f"{owner}.{name}")
            weight = module.weight.detach().double()
            bias = getattr(module, "bias", None)
            out_in = weight.T if type(module).__name__ == "Conv1D" else weight
            return out_in.clone(), None if bias is None else bias.detach().double().clone()

        up, up_bias = layer(row.up)
        down, down_bias = layer(row.down)
        gate, gate_bias = layer(row.gate) if row.gate else (None, None)
        if row.fused:
            half = len(up) // 2
            gate, up = up[:half].clone(), up[half:].clone()
        made = cls(up, down.T.clone(), row.act, gate, up_bias, gate_bias, down_bias)
        for tensor in made.tensors().values():
            tensor.requires_grad_()
        return made

    def tensors(self) -> dict[str, Tensor]:
        names = ("up_FD", "down_FD", "gate_FD", "up_bias_F", "gate_bias_F", "down_bias_D")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def neuron(self, f: int, x_D: Tensor, delta: dict[str, Tensor] | None = None) -> Tensor:
        """What neuron f adds to the output of one token: (D,). `delta` is added to its rows."""

        def row(name: str) -> Tensor:
            tensor: Tensor = getattr(self, name)[f]
            return tensor if delta is None else tensor + delta[name]

        inner = (row("up_FD") * x_D).sum()
        if self.up_bias_F is not None:
            inner = inner + self.up_bias_F[f]
        if self.gate_FD is None:
            return activation(self.act, inner) * row("down_FD")
        gate = (row("gate_FD") * x_D).sum()
        if self.gate_bias_F is not None:
            gate = gate + self.gate_bias_F[f]
        return activation(self.act, gate) * inner * row("down_FD")

    def mixture(
        self,
        x_TD: Tensor,
        gates_TE: Tensor,
        experts: list[list[int]],
        delta: Callable[[int, int], dict[str, Tensor]] | None = None,
    ) -> Tensor:
        """sum over experts of gate * sum over their neurons, plus the output bias: (T, D)."""
        rows = []
        for t, x_D in enumerate(x_TD):
            y_D = torch.zeros_like(x_D)
            for e, neurons in enumerate(experts):
                for place, f in enumerate(neurons):
                    y_D = y_D + gates_TE[t, e] * self.neuron(f, x_D, None if delta is None else delta(e, place))
            rows.append(y_D if self.down_bias_D is None else y_D + self.down_bias_D)
        return torch.stack(rows)


def neuron_lists(indices_EM: Tensor) -> list[list[int]]:
    """Index lists without padding."""
    return [[f for f in row if f >= 0] for row in indices_EM.tolist()]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)
