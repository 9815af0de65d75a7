"""What TensorBoard gets at an evaluation: heat maps and histograms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routing_helpers import counts_of, make_trainer, routing_of

from moadapt.train.routing_pictures import draw_heat_map, heat_maps, histograms


def test_tensorboard_gets_numbers_histograms_and_heat_maps(tmp_path: Path) -> None:
    """At step 4 of what was counted since step 2, however entries of the log lie; none at step 0."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "logging_steps": 3}
    trainer = make_trainer(tmp_path / "run", max_steps=4, report_to=["tensorboard"], **changes)
    rows: list[int] = []
    gathered = trainer._routing.gather

    def gather() -> None:
        gathered()
        if trainer._routing._drawn is not None:
            counts = trainer._routing._drawn.routers
            rows.append(int(next(iter(counts.values())).rows.sum()))

    trainer._routing.gather = gather
    history = trainer.train().history
    found = EventAccumulator(str(tmp_path / "run" / "logs" / "run"), size_guidance={"images": 0, "histograms": 0})
    found.Reload()
    tags = found.Tags()
    modules = ("self_attn.q_proj", "mlp.down_proj")
    assert set(tags["images"]) == {f"routing/load/{module}" for module in modules}
    kinds = ("decision_entropy", "expert_load")
    assert set(tags["histograms"]) == {f"routing/{kind}/{module}" for kind in kinds for module in modules}
    logged = [entry for entry in history if "routing/entropy" in entry]
    for name in routing_of(logged[0]):
        expected = [entry[name] for entry in logged if name in entry]  # not all tasks have rows in the last step
        assert [item.value for item in found.Scalars(name)] == pytest.approx(expected)
    for tag in tags["images"]:
        assert [image.step for image in found.Images(tag)] == [2, 4]
    tokens = [
        sum(
            len(trainer.tasks[task].train[row].input_ids)
            for micro in range(4 * step, 4 * step + 4)
            for task, row in trainer.sampler.batch(micro)
        )
        for step in (0, 1)
    ]
    for module in modules:
        entropies = found.Histograms(f"routing/decision_entropy/{module}")
        assert [item.histogram_value.num for item in entropies] == [2 * count for count in tokens]  # two layers
        loads = found.Histograms(f"routing/expert_load/{module}")
        assert [item.histogram_value.num for item in loads] == [8, 8]
        assert [item.histogram_value.sum for item in loads] == pytest.approx([8, 8])  # means of 1
    assert tokens[0] in rows


def test_without_tensorboard_nothing_is_kept_for_pictures(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert trainer._routing._drawn is None
    assert not (tmp_path / "logs").exists()


def test_a_heat_map_shows_each_load_in_its_place() -> None:
    """Brightness follows the load, in the row of its layer and the column of its expert, whatever text lies over it."""
    routers = {
        f"layers.{layer}.mlp": counts_of(f"layers.{layer}.mlp", loads, layer=layer)
        for layer, loads in ((1, [0, 0, 100, 100]), (0, [200, 100, 60, 40]))
    }
    [(tag, picture)] = heat_maps(routers).items()
    assert tag == "routing/load/mlp"
    assert picture.dtype == np.uint8
    loads = [np.array([2.0, 1.0, 0.6, 0.4]), np.array([0.0, 0.0, 2.0, 2.0])]
    assert np.array_equal(picture, draw_heat_map("mlp", ["layer 0", "layer 1"], loads))
    corners = picture[[41, 61]][:, :, :].astype(int).sum(-1)  # the first line of pixels of each cell, above its text
    colours = [[line[0] for line in np.split(row[row < 765], 4)] for row in corners]
    assert np.array_equal(np.argsort(colours[0]), [3, 2, 1, 0])
    assert colours[1][0] == colours[1][1] < colours[0][3]
    assert colours[1][2] == colours[1][3] == colours[0][0]


def test_heat_maps_of_odd_shapes_can_be_drawn() -> None:
    """Many experts, layers with different numbers of them, a router outside of any layer, and one that selects none."""
    assert draw_heat_map("wide", ["layer 0"], [np.ones(2000)]).shape[1] > 2000
    routers = [
        counts_of("layers.0.mlp", [5, 5]),
        counts_of("layers.1.mlp", [5, 5, 5], layer=1),
        counts_of("router", [1, 2], layer=None, module=""),
    ]
    nothing = counts_of("layers.2.mlp", [0, 0], layer=2)
    nothing.rows[0, 0, 0] = 7
    maps = heat_maps({counts.name: counts for counts in [*routers, nothing]})
    assert set(maps) == {"routing/load/mlp", "routing/load/layer"}
    assert maps["routing/load/mlp"].shape[0] > maps["routing/load/layer"].shape[0]


def test_histograms_hold_the_counts() -> None:
    routers = {name: counts_of(name, [30, 10], layer=layer) for layer, name in enumerate(("layers.0.m", "layers.1.m"))}
    found = histograms(routers)
    entropy = found["routing/decision_entropy/mlp"]
    assert entropy.counts == [0, 0, 0, 80, *[0] * 28]
    assert (entropy.edges[0], entropy.edges[-1], len(entropy.edges)) == (1 / 32, 1.0, 32)
    assert entropy.total == pytest.approx(80 * 0.25 / math.log(2))
    assert entropy.squares == pytest.approx(80 * (0.25 / math.log(2)) ** 2)
    assert found["routing/expert_load/mlp"].tolist() == [1.5, 0.5, 1.5, 0.5]
