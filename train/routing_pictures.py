"""Pictures of routing for TensorBoard: heat maps of the load, layer by expert, and histograms.

Shapes: H height, W width, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moadapt.statistics import RouterCounts
from moadapt.train.routing_monitor import layer_names, used

Picture = NDArray[np.uint8]

# Cividis at ten places: it grows brighter all the way, and reads the same without seeing red or green.
_SCALE = np.array(
    [
        *((0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115)),
        *((138, 134, 120), (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56)),
    ],
    dtype=np.float64,
)
_MISSING = (255, 255, 255)
_INK = (0, 0, 0)
_ROW, _FONT, _GAP = 20, 12, 8
_SCALE_WIDTH = 120  # at least
_WIDEST = 1600  # of all cells together


@dataclass(frozen=True)
class Histogram:
    """Numbers that were counted in bins already.

    Attributes:
        edges: right ends of the bins; the first begins at 0.
        counts: of the bins.
        total: sum of the numbers.
        squares: sum of their squares.
    """

    edges: list[float]
    counts: list[int]
    total: float
    squares: float


def by_module(routers: Mapping[str, RouterCounts]) -> dict[str, list[RouterCounts]]:
    """Routers that rule the same in their layers, by its name; those of whole layers are `layer`."""
    groups: dict[str, list[RouterCounts]] = {}
    for counts in routers.values():
        if bool(counts.rows.any()):
            groups.setdefault(counts.module or "layer", []).append(counts)
    for group in groups.values():
        group.sort(key=lambda counts: -1 if counts.layer is None else counts.layer)
    return groups


def heat_maps(routers: Mapping[str, RouterCounts]) -> dict[str, Picture]:
    """For each module, as `routing/load/MODULE`, how much of the load each expert of each layer has.

    Args:
        routers: counts by router.

    Returns:
        uint8 (H, W, 3) by tag. 100 is an expert's fair share; the scale goes to 200, or to the largest load.
    """
    places = layer_names([counts for group in by_module(routers).values() for counts in group])
    pictures = {}
    for module, group in by_module(routers).items():
        names = [places[counts.name].rstrip("/").replace("layer_", "layer ") or counts.name for counts in group]
        loads = [_relative_load(counts) for counts in group]
        pictures[f"routing/load/{module}"] = draw_heat_map(module, names, loads)
    return pictures


def histograms(routers: Mapping[str, RouterCounts]) -> dict[str, Histogram | NDArray[np.float64]]:
    """For each module the entropy of all decisions over its maximum, and the load of all experts over the fair share.

    Args:
        routers: counts by router.

    Returns:
        By tag, `routing/decision_entropy/MODULE` and `routing/expert_load/MODULE`.
    """
    found: dict[str, Histogram | NDArray[np.float64]] = {}
    for module, group in by_module(routers).items():
        counted = [counts.entropy_histogram for counts in group]
        bins = [sum(numbers) for numbers in zip(*(item.tolist() for item in counted), strict=True)]
        edges = [(place + 1) / len(bins) for place in range(len(bins))]
        sums = [counts.entropy.sum(0).tolist() for counts in group]
        widest = [float(np.log(counts.num_experts)) for counts in group]
        total = sum(first / width for (first, _), width in zip(sums, widest, strict=True))
        squares = sum(second / width**2 for (_, second), width in zip(sums, widest, strict=True))
        found[f"routing/decision_entropy/{module}"] = Histogram(edges, bins, total, squares)
        found[f"routing/expert_load/{module}"] = np.concatenate([_relative_load(counts) for counts in group])
    return found


def _relative_load(counts: RouterCounts) -> NDArray[np.float64]:
    """N f_e: 1 for an expert with its fair share; all zero where nothing is selected."""
    used_N = used([counts])[0][0].numpy()
    total = float(used_N.sum())
    return used_N * (len(used_N) / total) if total > 0 else np.zeros_like(used_N)


def draw_heat_map(title: str, names: Sequence[str], loads: Sequence[NDArray[np.float64]]) -> Picture:
    """One row for each name, one cell for each expert, with its load in percent of the fair share.

    Args:
        title: above the map.
        names: of the rows.
        loads: of the rows' experts, where 1 is the fair share; they need not be equally many.

    Returns:
        uint8 (H, W, 3).
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    columns = max(len(load_N) for load_N in loads)
    top = max(2.0, *(float(load_N.max()) for load_N in loads))
    texts = [[f"{100 * value:.0f}" for value in load_N] for load_N in loads]

    def width_of(text: str) -> int:
        return int(np.ceil(font.getlength(text)))

    needed = max(width_of(text) for row in texts for text in row) + _GAP
    written = needed * columns <= _WIDEST
    cell = max(needed, 28) if written else max(2, _WIDEST // columns)
    left = max(width_of(name) for name in (*names, "expert")) + 2 * _GAP
    under = _ROW * (2 + len(names))
    head = f"{title}: load in % of the fair share"
    width = max(left + cell * columns, width_of(head) + _GAP, left + _SCALE_WIDTH + _GAP) + _GAP
    picture = Image.new("RGB", (width, under + 2 * _ROW + _GAP), _MISSING)
    draw = ImageDraw.Draw(picture)

    def write(x: float, y: float, text: str, anchor: str, ink: tuple[int, int, int] = _INK) -> None:
        draw.text((x, y), text, fill=ink, font=font, anchor=anchor)

    write(_GAP, _ROW / 2, head, "lm")
    write(left - _GAP, 1.5 * _ROW, "expert", "rm")
    every = max(1, -(-width_of(str(columns)) // max(1, cell - 2)))
    for expert in range(0, columns, every):
        write(left + cell * (expert + 0.5), 1.5 * _ROW, str(expert), "mm")
    for row, (name, load_N) in enumerate(zip(names, loads, strict=True)):
        y = _ROW * (2 + row)
        write(left - _GAP, y + _ROW / 2, name, "rm")
        for expert, value in enumerate(load_N):
            x, colour = left + cell * expert, _colour(float(value) / top)
            draw.rectangle((x, y, x + cell - 1, y + _ROW - 1), fill=colour)
            if written:
                ink = (255, 255, 255) if sum(colour) < 330 else _INK
                write(x + cell / 2, y + _ROW / 2, texts[row][expert], "mm", ink)
    _draw_scale(draw, write, left, under + _GAP, width - left - 2 * _GAP, top)
    return np.asarray(picture, dtype=np.uint8).copy()


def _draw_scale(draw: Any, write: Any, left: int, y: int, length: int, top: float) -> None:
    """The colours from 0 to the largest load, with both ends and the fair share below."""
    for x in range(length):
        draw.line((left + x, y + 4, left + x, y + _ROW - 5), fill=_colour(x / max(1, length - 1)))
    write(left, y + 1.5 * _ROW - 5, "0", "lm")
    write(left + length, y + 1.5 * _ROW - 5, f"{100 * top:.0f}", "rm")
    fair = left + length / top
    draw.line((fair, y + 2, fair, y + _ROW - 3), fill=_INK)
    if 24 < fair - left < length - 36:  # beside both ends
        write(fair, y + 1.5 * _ROW - 5, "100", "mm")


def _colour(value: float) -> tuple[int, int, int]:
    """Of a number from 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(_SCALE) - 1)
    first = min(int(place), len(_SCALE) - 2)
    mixed = _SCALE[first] + (place - first) * (_SCALE[first + 1] - _SCALE[first])
    red, green, blue = (round(part) for part in mixed.tolist())
    return red, green, blue
