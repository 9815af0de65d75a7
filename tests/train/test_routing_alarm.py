"""The alarm for routers that collapse, in runs and by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from routing_helpers import ALARM, collapsed_model, counts_of, make_trainer, set_bias
from trainer_helpers import make_base, make_model, make_prompt_model, weights

from moadapt.errors import ConfigError
from moadapt.model import MixtureModel
from moadapt.train.callbacks import TrainerCallback
from moadapt.train.checkpoint import list_checkpoints
from moadapt.train.routing_alarm import RoutingAlarm
from moadapt.train.training_config import RoutingAlarmConfig, training_config_from_dict


def test_a_collapsed_router_stops_the_run(tmp_path: Path) -> None:
    """After the third entry in a row, with the checkpoint from before and the final adapter whole."""
    alarm = {"max_share": 0.95, "patience": 3, "action": "stop"}
    trainer = make_trainer(
        tmp_path,
        collapsed_model(),
        max_steps=30,
        logging_steps=5,
        save_strategy="steps",
        save_steps=10,
        routing_alarm=alarm,
    )
    result = trainer.train()
    assert result.global_step == 15
    assert trainer.state.stop_reason == result.stop_reason
    assert result.stop_reason == (
        "routing alarm: layer 1 q_proj: experts 0, 3 take 100.0 % of selections (3 times in a row)"
    )
    assert [entry["routing/alarms"] for entry in result.history] == [0, 0, 1]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10"]
    for folder in (tmp_path, tmp_path / "checkpoint-10"):
        found = weights(MixtureModel.from_pretrained(make_base(), folder))
        for name, value in weights(trainer.model).items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-20), (folder, name)


class Heals(TrainerCallback):
    """Mends the router at one step, and breaks it again at another."""

    def on_step_end(self, trainer: Any, state: Any) -> None:
        if state.global_step == 20:
            set_bias(trainer.model, [0.0] * 4)
        if state.global_step == 25:
            set_bias(trainer.model, [0.0, 1e3, 1e3, 0.0])


def test_a_warning_comes_once_until_the_router_recovers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    alarm = {**ALARM, "patience": 2}
    trainer = make_trainer(tmp_path, collapsed_model(), [Heals()], max_steps=40, logging_steps=5, routing_alarm=alarm)
    history = trainer.train().history
    assert len(history) == 8
    assert trainer.state.stop_reason is None
    assert [entry["routing/alarms"] for entry in history] == [0, 1, 1, 1, 0, 0, 1, 1]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "routing alarm" in line]
    assert [line.split(": routing alarm: ")[0] for line in warnings] == ["warning: step 10", "warning: step 35"]
    assert "layer 1 q_proj: experts 0, 3 take 100.0 %" in warnings[0]
    assert "layer 1 q_proj: experts 1, 2 take 100.0 %" in warnings[1]


def test_healthy_routers_raise_no_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where an entry has hardly any rows, as of two prompts."""
    for name, model in (("token", make_model()), ("prompt", make_prompt_model())):
        alarm = {**ALARM, "patience": 1, "action": "stop"}
        changes: dict[str, Any] = {"gradient_accumulation_steps": 1, "learning_rate": 1e-3}
        trainer = make_trainer(tmp_path / name, model, max_steps=50, routing_alarm=alarm, **changes)
        assert trainer.train().global_step == 50, trainer.state.stop_reason
    assert "alarm" not in capsys.readouterr().err


def judged(alarm: RoutingAlarm, loads: list[int], **more: Any) -> str | None:
    return alarm.judge({"layers.0.mlp": counts_of("layers.0.mlp", loads, **more)})


def test_thresholds_of_the_alarm() -> None:
    config = RoutingAlarmConfig(max_share=0.9, dead_fraction=0.5, patience=1)
    assert judged(RoutingAlarm(config), [89, 4, 4, 3]) is None
    assert judged(RoutingAlarm(config), [4, 90, 3, 3]) == "layer 0 mlp: expert 1 takes 90.0 % of selections"
    assert judged(RoutingAlarm(config), [60, 40, 0, 0]) == "layer 0 mlp: 2 of 4 experts are dead"
    assert judged(RoutingAlarm(config), [50, 30, 20, 0]) is None
    assert judged(RoutingAlarm(config.model_copy(update={"max_share": None})), [90, 4, 3, 3]) is None
    assert judged(RoutingAlarm(config.model_copy(update={"dead_fraction": None})), [60, 40, 0, 0]) is None
    assert judged(RoutingAlarm(config), [100, 0, 0, 0], granularity="task") is None


def test_few_rows_wait_for_more() -> None:
    """20 rows for each of the 4 experts: judged at 80, and from nothing again."""
    alarm = RoutingAlarm(RoutingAlarmConfig(patience=2, **ALARM))
    assert [judged(alarm, [40, 0, 0, 0]) is not None for _ in range(4)] == [False, False, False, True]
    assert alarm.ringing == ["layers.0.mlp"]
    alarm = RoutingAlarm(RoutingAlarmConfig(patience=1, **ALARM))
    assert judged(alarm, [79, 0, 0, 0]) is None
    twin = RoutingAlarm(RoutingAlarmConfig(patience=1, **ALARM))
    twin.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert judged(alarm, [1, 0, 0, 0]) == judged(twin, [1, 0, 0, 0]) is not None


def test_many_routers_make_one_short_message() -> None:
    routers = {f"layers.{i}.mlp": counts_of(f"layers.{i}.mlp", [100, 0, 0, 0], layer=i) for i in range(7)}
    text = RoutingAlarm(RoutingAlarmConfig(patience=1, **ALARM)).judge(routers)
    assert text is not None
    assert text.count("expert 0 takes") == 3
    assert "; and 4 more" in text


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"routing_alarm needs routing_statistics: true"):
        training_config_from_dict({"routing_statistics": False, "routing_alarm": ALARM})
    with pytest.raises(ConfigError, match=r"nothing to watch for; give max_share .* dead_fraction"):
        training_config_from_dict({"routing_alarm": {}})
    with pytest.raises(ConfigError, match=r"unknown option"):
        training_config_from_dict({"routing_alarm": {"patiance": 3}})
    assert training_config_from_dict({}).routing_alarm is None
    for given in ({"max_share": 0.9}, {"dead_fraction": 0.5, "action": "stop"}):
        config = training_config_from_dict({"routing_alarm": given})
        assert training_config_from_dict(config.model_dump(mode="json", exclude_none=True)) == config
