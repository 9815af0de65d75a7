"""Draws the pictures of docs/routing.md: `python docs/img/draw.py` writes the SVG files beside this one.

Every picture has a card of its own behind it, so that it can be read on light and on dark pages. Colours never carry a
meaning alone: decisions have letters, modules that are off have dashed borders.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTH = 880

_LIGHT = {
    "card": "#ffffff", "edge": "#d0d7de", "text": "#1f2328", "soft": "#59636e", "line": "#59636e", "plain": "#f1f3f5",
    "a": "#cfe3ff", "a-line": "#1f5fbf", "b": "#ffe0bd", "b-line": "#a85400", "c": "#d3f0d8", "c-line": "#23753a",
    "d": "#e6dbff", "d-line": "#6a43c0",
}  # fmt: skip
_DARK = {
    "card": "#0d1117", "edge": "#3d444d", "text": "#f0f6fc", "soft": "#a9b4c0", "line": "#9198a1", "plain": "#21262d",
    "a": "#123d73", "a-line": "#79b0ff", "b": "#66370a", "b-line": "#ffad5c", "c": "#14492a", "c-line": "#6fd58b",
    "d": "#42307a", "d-line": "#c0a6ff",
}  # fmt: skip
_FONT = "font-family: -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
_MONO = "font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"


def _rules(colours: dict[str, str]) -> str:
    fills = [f".{name} {{ fill: {colours[name]}; stroke: {colours[f'{name}-line']} }}" for name in "abcd"]
    lines = [f".{name}-line {{ fill: none; stroke: {colours[f'{name}-line']} }}" for name in "abcd"]
    tips = [f".{name}-tip {{ fill: {colours[f'{name}-line']}; stroke: none }}" for name in "abcd"]
    return " ".join([
        f".card {{ fill: {colours['card']}; stroke: {colours['edge']} }}",
        f".plain {{ fill: {colours['plain']}; stroke: {colours['line']} }}",
        f".line {{ fill: none; stroke: {colours['line']} }} .tip {{ fill: {colours['line']}; stroke: none }}",
        f".edge {{ stroke: {colours['edge']} }}",
        f".off {{ fill: none; stroke: {colours['line']}; stroke-dasharray: 4 3 }}",
        f"text {{ fill: {colours['text']} }} text.soft {{ fill: {colours['soft']} }}",
        *fills, *lines, *tips,
    ])  # fmt: skip


class Picture:
    """Shapes on a card, written as one SVG file."""

    def __init__(self, title: str, description: str, height: int) -> None:
        self.height = height
        self.head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        self.shapes: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, look: str, label: str = "", round: float = 4
    ) -> None:
        """A rectangle with a label in its middle."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round:g}" class="{look}"/>'
        )
        if label:
            self.text(x + width / 2, y + height / 2 + 4.5, label, anchor="middle", look="soft" if look == "off" else "")

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", look: str = "", size: int = 13) -> None:
        """One line of text; `look` may hold `soft`, `bold` and `mono`."""
        style = f' class="{look}"' if look else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{style}>{escape(words)}</text>'
        )

    def note(self, x: float, y: float, words: str, *, anchor: str = "start") -> None:
        """One line of softer text."""
        self.text(x, y, words, anchor=anchor, look="soft")

    def path(self, points: list[tuple[float, float]], look: str = "line", *, arrow: bool = False) -> None:
        """A line through points, with an arrow head at its end if wanted; that stretch is level or upright."""
        self.shapes.append(f'<path d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}" class="{look}"/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            left = (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx)
            right = (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)
            tip = look.split()[0].removesuffix("line") + "tip"
            self.shapes.append(
                f'<path d="M{x:g} {y:g} L{left[0]:g} {left[1]:g} L{right[0]:g} {right[1]:g} Z" class="{tip}"/>'
            )

    def router(self, x: float, y: float, look: str, label: str = "R", radius: float = 11) -> None:
        """A router: a circle with a letter."""
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{look}"/>')
        self.text(x, y + 4.5, label, anchor="middle", look="bold")

    def write(self, name: str) -> None:
        """Write the file."""
        style = (
            f"text {{ {_FONT} }} .mono {{ {_MONO} }} .bold {{ font-weight: 600 }} "
            "rect, circle, path { stroke-width: 1.4 } .thick { stroke-width: 2.2 } "
            f"{_rules(_LIGHT)} @media (prefers-color-scheme: dark) {{ {_rules(_DARK)} }}"
        )
        card = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" class="card"/>'
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', self.head, f"<style>{style}</style>"]
        (HERE / name).write_text("\n".join([*lines, card, *self.shapes, "</svg>", ""]), encoding="utf-8")


def granularity() -> None:
    """Fifteen tokens of a conversation, and which decision each of them follows."""
    picture = Picture(
        "Granularity: token, prompt and task",
        "A conversation of two turns. Granularity token: every token has a decision of its own. Granularity prompt: "
        "one decision per turn, made from the prompt tokens of the turn, is followed by its prompt and its answer. "
        "Granularity task: the task id alone decides, for all tokens.",
        454,
    )
    words = ["How", "many", "legs", "has", "a", "spider", "?", "Eight", ".", "And", "a", "bee", "?", "Six", "."]
    left, step, runs = 134, 48.4, [(0, 7, "prompt"), (7, 9, "answer"), (9, 13, "prompt"), (13, 15, "answer")]

    def at(token: int) -> float:
        return left + step * token

    for first, last, who in runs:
        turn = f"{who}, turn {1 + (first >= 9)}"
        picture.text((at(first) + at(last)) / 2, 24, turn, anchor="middle", look="bold")
        picture.path([(at(first) + 3, 36), (at(first) + 3, 31), (at(last) - 3, 31), (at(last) - 3, 36)])
        for token in range(first, last):
            picture.box(at(token) + 2, 42, step - 4, 28, "plain" if who == "prompt" else "off")
            picture.text(at(token) + step / 2, 60.5, words[token], anchor="middle")
    picture.text(16, 60.5, "tokens")

    top = 92
    picture.text(16, top + 18, "token", look="mono bold", size=15)
    picture.note(16, top + 38, "each token")
    picture.note(16, top + 55, "for itself")
    looks = "acbdabcdbadcbad"
    for token, look in enumerate(looks):
        picture.path([(at(token) + step / 2, top), (at(token) + step / 2, top + 20)], f"{look}-line", arrow=True)
        picture.box(at(token) + 2, top + 22, step - 4, 32, look, look.upper())

    top = 172
    picture.path([(16, top), (WIDTH - 16, top)], "edge line")
    picture.text(16, top + 36, "prompt", look="mono bold", size=15)
    picture.note(16, top + 56, "one decision")
    picture.note(16, top + 73, "for each turn")
    for read, end, look, experts in [((0, 7), 9, "a", "1 and 3"), ((9, 13), 15, "b", "0 and 2")]:
        x0, x1 = at(read[0]) + 3, at(read[1]) - 3
        picture.path([(x0, top + 16), (x0, top + 22), (x1, top + 22), (x1, top + 16)], f"{look}-line")
        middle = (x0 + x1) / 2
        picture.path([(middle, top + 22), (middle, top + 62)], f"{look}-line", arrow=True)
        picture.box(middle - 54, top + 30, 46, 20, "plain")
        picture.text(middle - 31, top + 44.5, "pool", anchor="middle")
        picture.router(middle, top + 40, look)
        picture.box(at(read[0]) + 2, top + 64, step * (end - read[0]) - 4, 32, look)
        picture.text(at(read[0]) + 14, top + 84.5, look.upper(), look="bold")
        picture.text(at(read[0]) + 32, top + 84.5, f"experts {experts}")
        picture.path([(at(read[1]), top + 64), (at(read[1]), top + 96)], f"{look}-line")
        tail = "kept" if end - read[1] < 3 else "kept for the answer"
        picture.text((at(read[1]) + at(end)) / 2, top + 84.5, tail, anchor="middle")
    picture.note(at(11) - 62, top + 44.5, "answers are never pooled", anchor="end")

    top = 292
    picture.path([(16, top), (WIDTH - 16, top)], "edge line")
    picture.text(16, top + 36, "task", look="mono bold", size=15)
    picture.note(16, top + 56, "by task id,")
    picture.note(16, top + 73, "not by text")
    picture.box(at(0) + 2, top + 24, 150, 28, "plain", "task id of the row: 2")
    picture.path([(at(0) + 152, top + 38), (at(0) + 186, top + 38)], arrow=True)
    for row, weights in enumerate(["0.4  0.3  0.2  0.1", "0.1  0.1  0.5  0.3", "0.0  0.6  0.1  0.3"]):
        picture.box(at(0) + 188, top + 10 + 19 * row, 138, 19, "c" if row == 2 else "plain", round=0)
        picture.text(at(0) + 198, top + 24 + 19 * row, f"{row}:  {weights}", look="bold" if row == 2 else "soft")
    picture.note(at(0) + 342, top + 30, "a table of gates, one row per task;")
    picture.note(at(0) + 342, top + 48, "no hidden state is read")
    picture.path([(at(0) + 257, top + 67), (at(0) + 257, top + 82)], "c-line", arrow=True)
    picture.box(at(0) + 2, top + 84, step * 15 - 4, 32, "c")
    picture.text(at(0) + 14, top + 104.5, "C", look="bold")
    picture.text(at(0) + 32, top + 104.5, "the gates of task 2, for every token of every turn")
    picture.note(16, 436, "A, B, C, D: decisions, that is, which experts are at work and with which gates.  R: router.")
    picture.write("granularity.svg")


# Left edge and top of each linear in a panel, relative to the panel's left edge and to the top of its linears.
_SIZE = (44, 28)
_PLACES = {
    "q": (72, 0),
    "k": (72, 40),
    "v": (72, 80),
    "o": (152, 40),
    "gate": (276, 20),
    "up": (276, 60),
    "down": (348, 40),
}
_ATTENTION, _FFN = ("q", "k", "v", "o"), ("gate", "up", "down")


def _layer(picture: Picture, x: float, top: float, ruled: dict[str, str]) -> None:
    """One transformer layer: residual stream with its two norms and sums, and the seven linears."""
    stream, middle = top - 46, top + 54
    picture.path([(x + 4, stream), (x + 416, stream)], arrow=True)
    for branch, split, inner, merge, last, plus in [
        (20, 52, ("q", "k", "v"), 130, "o", 208),
        (228, 256, ("gate", "up"), 334, "down", 406),
    ]:
        picture.path([(x + branch, stream), (x + branch, middle), (x + split, middle)])
        picture.box(x + branch - 10, stream + 11, 20, 20, "plain", "n")
        for name in inner:
            dx, dy = _PLACES[name]
            height = top + dy + _SIZE[1] / 2
            picture.path([(x + split, middle), (x + split, height), (x + dx - 1, height)], arrow=True)
            picture.path([(x + dx + _SIZE[0], height), (x + merge, height), (x + merge, middle)])
        dx = _PLACES[last][0]
        picture.path([(x + merge, middle), (x + dx - 1, middle)], arrow=True)
        picture.path([(x + dx + _SIZE[0], middle), (x + plus, middle), (x + plus, stream + 9)], arrow=True)
        picture.router(x + plus, stream, "plain", "+", 8)
    for name, (dx, dy) in _PLACES.items():
        picture.box(x + dx, top + dy, *_SIZE, ruled.get(name, "off"), name)


def scope() -> None:
    """One Llama layer four times: who reads what, and whose decision rules which linears."""
    picture = Picture(
        "Router scope: linear, attention, ffn and block",
        "One Llama layer with its linears q, k, v, o, gate, up and down. Scope linear: each linear has a router that "
        "reads the linear's own input. Scope attention: one router reads the input of the attention block and rules q, "
        "k, v and o. Scope ffn: one router reads the input of the feed-forward block and rules gate, up and down. "
        "Scope block: one router reads the input of the layer, before the norm, and rules all seven.",
        582,
    )

    def panel(x: float, y: float, name: str, what: str) -> float:
        picture.text(x, y + 18, name, look="mono bold", size=15)
        picture.note(x, y + 38, what)
        return y + 104

    looks = dict(zip(_PLACES, "abcdabc", strict=True))
    x, top = 14.0, panel(14, 10, "linear", "a router for each linear; it reads that linear's own input")
    _layer(picture, x, top, looks)
    for letter, (name, (dx, dy)) in zip("ABCDEFG", _PLACES.items(), strict=True):
        picture.router(x + dx, top + dy, looks[name], letter, 10)

    def frame(x: float, top: float, letter: str, reads: tuple[float, float], left: float, right: float) -> None:
        """A router under the layer that reads at a point, and a frame around the linears that it rules."""
        look = letter.lower()
        across, height = x + reads[0], top + 144
        picture.path([(across, top + reads[1]), (across, height)], f"{look}-line thick")
        picture.shapes.append(f'<circle cx="{across:g}" cy="{top + reads[1]:g}" r="4" class="{look}-tip"/>')
        picture.shapes.append(
            f'<rect x="{x + left:g}" y="{top - 9:g}" width="{right - left:g}" height="126" rx="8" '
            f'class="{look}-line thick"/>'
        )
        rises = x + max(left + 24, reads[0] + 34)
        picture.path([(across, height), (rises, height), (rises, top + 118)], f"{look}-line thick", arrow=True)
        picture.router(across, height, look, letter)

    x, top = 450.0, panel(450, 10, "attention", "reads the attention block's input; only q, k, v, o can be targets")
    _layer(picture, x, top, dict.fromkeys(_ATTENTION, "a"))
    frame(x, top, "A", (36, 54), 59, 201)
    x, top = 14.0, panel(14, 286, "ffn", "reads the feed-forward block's input; only gate, up, down")
    _layer(picture, x, top, dict.fromkeys(_FFN, "b"))
    frame(x, top, "B", (242, 54), 263, 398)
    x, top = 450.0, panel(450, 286, "block", "reads the layer's input, before the norm; rules all seven")
    _layer(picture, x, top, dict.fromkeys(_PLACES, "c"))
    frame(x, top, "C", (3, -46), 59, 398)
    picture.note(14, 566, "Circles: routers.  Frames: the linears that follow.  Dashed: cannot be targets.  n: norm.")
    picture.write("scope.svg")


def unit() -> None:
    """The same seven linears, once with four experts each, once as the experts themselves."""
    picture = Picture(
        "Expert unit: bank and module",
        "Unit bank: each of the seven linears of a layer holds four experts, and one decision switches experts 1 and 3 "
        "on in all of them. Unit module: each linear has one adapter, the seven adapters are the experts, and the "
        "decision switches those of q, v and down on; the other four do no work.",
        404,
    )
    x, first, step = 16, 130, 34
    picture.text(x, 28, "expert_unit: bank", look="mono bold", size=15)
    picture.note(x, 48, "each linear holds N experts (here 4)")
    picture.router(x + 12, 78, "a")
    picture.path([(x + 24, 78), (x + 52, 78)], "a-line", arrow=True)
    picture.box(x + 54, 64, 354, 28, "a", "experts 1 and 3, with gates 0.7 and 0.3, in all seven")
    for expert in range(4):
        across = x + 188 + 56 * expert
        if expert in (1, 3):
            picture.path([(across, 92), (across, 124)], "a-line", arrow=True)
        picture.text(across - 10, 116, str(expert), anchor="end", look="" if expert in (1, 3) else "soft")
    for row, name in enumerate(_PLACES):
        y = first + step * row
        picture.text(x, y + 18.5, name, look="mono")
        picture.box(x + 54, y, 66, 28, "plain", "W0")
        picture.text(x + 140, y + 19, "+", anchor="middle", size=15)
        for expert, gate in enumerate(["", "0.7", "", "0.3"]):
            picture.box(x + 164 + 56 * expert, y, 48, 28, "a" if gate else "off", gate)

    x = 464
    picture.path([(440, 20), (440, 376)], "edge line")
    picture.text(x, 28, "expert_unit: module", look="mono bold", size=15)
    picture.note(x, 48, "the linears' adapters are the experts (N = 7)")
    on = {"q": "0.5", "v": "0.3", "down": "0.2"}
    bus = x + 376
    picture.router(x + 12, 78, "b")
    picture.path([(x + 24, 78), (x + 52, 78)], "b-line", arrow=True)
    picture.box(x + 54, 64, 262, 28, "b", "3 of 7: q 0.5, v 0.3, down 0.2")
    picture.path([(x + 316, 78), (bus, 78), (bus, first + step * 6 + 14)], "b-line")
    for row, name in enumerate(_PLACES):
        y = first + step * row
        share = on.get(name)
        picture.text(x, y + 18.5, name, look="mono")
        picture.box(x + 54, y, 66, 28, "plain", "W0")
        if share is None:
            picture.box(x + 164, y, 152, 28, "off", "off: no work")
            continue
        picture.text(x + 140, y + 19, "+", anchor="middle", size=15)
        picture.box(x + 164, y, 152, 28, "b", f"{share} × adapter")
        picture.path([(bus, y + 14), (x + 318, y + 14)], "b-line", arrow=True)
    picture.note(
        16, 390, "Filled: at work, with its gate.  Dashed: not selected.  W0: the frozen weight, always at work."
    )
    picture.write("unit.svg")


if __name__ == "__main__":
    granularity()
    scope()
    unit()
