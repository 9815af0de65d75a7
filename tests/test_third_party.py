"""Kinds that are registered from outside: a custom expert, router and loss, trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import reference
import torch
from pydantic import Field
from tiny import base_model, batch, gradients, randomize_adapter
from torch import Tensor, nn

from moadapt import EXPERTS, LOSSES, ROUTERS, MixtureConfig, MixtureModel, get_mixture_model, registry
from moadapt.errors import AdapterError, ConfigError
from moadapt.experts import ExpertBank, ExpertConfig
from moadapt.losses import AuxiliaryLoss, LossConfig
from moadapt.per_layer import PerLayerInt
from moadapt.routers import Router, RouterConfig
from moadapt.routing import Routing, RoutingContext, RoutingRecord

CONFIG: dict[str, Any] = {
    "num_experts": 3,
    "expert": {"kind": "test_scale", "power": [1, 2], "penalty": 0.25},
    "router": {"kind": "test_by_norm"},
    "losses": [{"kind": "test_first_expert", "coef": 2.0}],
}


class ScaleConfig(ExpertConfig):
    kind: Literal["test_scale"] = "test_scale"
    power: PerLayerInt = 1
    penalty: float = Field(default=0.0, ge=0.0)


class ScaleBank(ExpertBank):
    """E_e(x) = l_e * base(x): an expert that is neither low-rank nor additive in x."""

    config: ScaleConfig
    roles: ClassVar = {"scale": "up"}

    def __init__(
        self, config: ScaleConfig, i: int, o: int, n: int, device: Any = None, dtype: Any = torch.float32
    ) -> None:
        super().__init__(config, i, o, n, device, dtype)
        self.scale = nn.Parameter(torch.zeros(n, o, device=device, dtype=dtype))

    def forward(self, x_TI: Tensor, routing: Routing, base: Any) -> Tensor:
        y_TO = base if isinstance(base, Tensor) else base(x_TI)
        return y_TO + y_TO * (routing.weights_TN @ self.scale.double()).to(y_TO.dtype)

    def delta_weight(self, expert: int) -> Tensor:
        raise ConfigError("test_scale has no delta of its own: it scales the base output")

    def num_active_params(self, num_experts_per_tok: int) -> int:
        return num_experts_per_tok * self.out_features

    def regularization(self) -> Tensor | None:
        return self.config.penalty * self.scale.square().sum() if self.config.penalty else None


class NormConfig(RouterConfig):
    kind: Literal["test_by_norm"] = "test_by_norm"


class NormRouter(Router):
    """Top-1 with a sigmoid gate."""

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        logits = hidden_states.double() @ self.weight.double().T
        probs = torch.sigmoid(logits)
        best = context.decide(lambda: probs.argmax(-1, keepdim=True))
        selected = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, best, True)
        return Routing(probs * selected, selected, logits, probs)


class FirstExpertConfig(LossConfig):
    kind: Literal["test_first_expert"] = "test_first_expert"


class FirstExpertLoss(AuxiliaryLoss):
    """Mean probability of expert 0 over the real tokens of all routers."""

    def __call__(self, records: Sequence[RoutingRecord]) -> Tensor:
        values = []
        for record in records:
            probs = record.routing.probs_TN[:, 0]
            values.append(probs.mean() if record.mask_T is None else probs[record.mask_T].mean())
        return torch.stack(values).mean()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    tables = (EXPERTS, ROUTERS, LOSSES)
    before = [dict(table._kinds) for table in tables]
    EXPERTS.register("test_scale", ScaleConfig)(ScaleBank)
    ROUTERS.register("test_by_norm", NormConfig)(NormRouter)
    LOSSES.register("test_first_expert", FirstExpertConfig)(FirstExpertLoss)
    yield
    for table, kinds in zip(tables, before, strict=True):
        table._kinds = kinds


def build() -> MixtureModel:
    model = get_mixture_model(base_model(), CONFIG)
    randomize_adapter(model)
    return model


def test_they_train_under_checkpointing_too() -> None:
    model = build().train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        output = model(**batch())
        output.loss.backward()
        found.append((output.loss.detach(), gradients(model)))
        parts = model.last_losses
        banks = [layer.experts for layer in model.injection.layers.values()]
        penalty = 0.25 * sum(bank.scale.detach().double().square().sum() for bank in banks)
        reference.close(parts["regularization"], penalty, 1e-5, "regularization")
        assert 0 < parts["test_first_expert"] < 1
        want = parts["lm"] + 2.0 * parts["test_first_expert"] + parts["regularization"]
        reference.close(output.loss, want, 1e-6, "loss")
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name])
        assert grad.abs().max() > 0


def test_regularization_without_any_loss_kind() -> None:
    model = get_mixture_model(base_model(), {**CONFIG, "losses": []}).train()
    randomize_adapter(model)
    output = model(**batch())
    assert output.loss > model.last_losses["lm"]
    assert set(model.last_losses) == {"lm", "regularization", "aux"}
    assert torch.equal(model.eval()(**batch()).loss, model.last_losses["lm"])


def test_per_layer_options_and_roles() -> None:
    model = build()
    powers = {name: layer.experts.config.power for name, layer in model.injection.layers.items()}
    assert all(power == (1 if ".0." in name else 2) for name, power in powers.items())
    assert {model.parameter_role(name) for name, _ in model.adapter_parameters()} == {"up", "router"}


def test_save_and_load(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    again = MixtureModel.from_pretrained(base_model(), tmp_path)
    assert isinstance(again.mixture_config.expert, ScaleConfig)
    assert again.mixture_config == model.mixture_config
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_loading_without_the_plugin_says_what_is_missing(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    for table, name in ((EXPERTS, "test_scale"), (ROUTERS, "test_by_norm"), (LOSSES, "test_first_expert")):
        del table._kinds[name]
    with pytest.raises(AdapterError) as caught:
        MixtureModel.from_pretrained(base_model(), tmp_path)
    for part in ("test_scale", "test_by_norm", "test_first_expert", "Valid kinds: ffn_partition, lora, malora"):
        assert part in str(caught.value)


def test_merging_explains_itself() -> None:
    with pytest.raises(AdapterError, match="routing depends on the input"):
        build().merge_and_unload()


def test_schema_contains_them() -> None:
    assert '"test_scale"' in str(MixtureConfig.model_json_schema()).replace("'", '"')


def test_a_taken_name_is_refused() -> None:
    class Other(ExpertBank):
        pass

    with pytest.raises(ConfigError, match=r"'lora' is already registered by moadapt\.experts\.lora"):
        EXPERTS.register("lora", ScaleConfig)(Other)
    EXPERTS.register("test_scale", ScaleConfig)(ScaleBank)  # again, as a reloaded module does


def test_entry_points_are_loaded_when_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    del EXPERTS._kinds["test_scale"]
    calls = []

    def load() -> None:
        calls.append(1)
        EXPERTS.register("test_scale", ScaleConfig)(ScaleBank)

    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [SimpleNamespace(load=load)] if group == "moadapt.plugins" else []
    )
    assert EXPERTS.parse({"kind": "lora"}).kind == "lora"
    assert calls == [], "a known name needs no plugin"
    assert isinstance(EXPERTS.parse({"kind": "test_scale"}), ScaleConfig)
    assert calls == [1]


def test_plugin_modules_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_moadapt_plugin.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugins(["my_moadapt_plugin"])
    import sys

    assert sys.modules.pop("my_moadapt_plugin").LOADED
    with pytest.raises(ConfigError, match="plugins: cannot import 'no_such_plugin'"):
        registry.load_plugins(["no_such_plugin"])
