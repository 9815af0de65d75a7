"""Makes a routing document small enough to sit inside one page.

Numbers keep five significant digits, integers stay exact, and what JSON has no word for (NaN, infinity) becomes null.

The gates of the texts are most of a document: T tokens x routers x selected experts. They are packed as strings over
64 characters. A pair (expert, weight) takes `digits` characters for the expert (1 up to 64 experts, else 2) and three
for the weight, an 18-bit whole number q that stands for (q - 131072) / 131071 * scale, with scale the largest |weight|
of that text and router: an error of at most 3.9e-6 of the scale.

    packed router = {"scale": float, "digits": 1 | 2,
                     "counts": K or [K per entry]     pairs of each entry, largest |weight| first
                     "runs": null or [tokens per entry]   null: one entry per token
                     "pairs": str}

A decision that holds for a whole turn is one entry with a long run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_HALF = 131072

Pairs = Sequence[tuple[int, float]]


def rounded(value: Any) -> Any:
    """The same document with floats at five significant digits; NaN and infinities are None."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.5g}")
        return int(short) if short.is_integer() and abs(short) < 1e5 else short
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def _digits(number: int, length: int) -> str:
    """`number` in base 64, the highest digit first."""
    return "".join(ALPHABET[(number >> 6 * place) & 63] for place in reversed(range(length)))


def pack_gates(tokens: Sequence[Pairs]) -> dict[str, Any]:
    """The gates of one router over one text.

    Args:
        tokens: for every token its (expert, weight) pairs.

    Raises:
        ValueError: an expert id of 4096 or more, or a weight that is not finite.
    """
    ordered = [
        tuple(sorted(((int(e), float(w)) for e, w in pairs), key=lambda p: (-abs(p[1]), p[0]))) for pairs in tokens
    ]
    weights = [weight for pairs in ordered for _, weight in pairs]
    if not all(map(math.isfinite, weights)):
        raise ValueError("a gate weight is not finite")
    largest = max((expert for pairs in ordered for expert, _ in pairs), default=0)
    if largest >= 4096:
        raise ValueError(f"expert id {largest}: at most 4096 experts can be shown")
    digits = 1 if largest < 64 else 2
    scale = max(map(abs, weights), default=0.0) or 1.0
    runs = [(pairs, sum(1 for _ in group)) for pairs, group in groupby(ordered)]
    by_run = 2 * len(runs) <= len(ordered)
    entries = [pairs for pairs, _ in runs] if by_run else ordered
    counts = [len(pairs) for pairs in entries]
    return {
        "scale": scale,
        "digits": digits,
        "counts": counts[0] if len(set(counts)) == 1 and counts[0] else counts,
        "runs": [length for _, length in runs] if by_run else None,
        "pairs": "".join(
            _digits(expert, digits) + _digits(round(weight / scale * (_HALF - 1)) + _HALF, 3)
            for pairs in entries
            for expert, weight in pairs
        ),
    }


def _window(parts: Sequence[int], cap: int) -> tuple[int, int]:
    """The `cap` tokens to keep of a text: around the start of its first answer, where routing is of most interest."""
    total = len(parts)
    if total <= cap:
        return 0, total
    border = next((position for position, part in enumerate(parts) if part == 1), total)
    start = min(max(border - cap // 2, 0), total - cap)
    return start, start + cap


def pack_text(text: Mapping[str, Any], cap: int) -> dict[str, Any]:
    """One text of the document, cut to at most `cap` tokens, its gates packed.

    Args:
        text: {"task", "tokens", "part", "routers": {name: {"expert", "weight", "all"}}}; without "all" a router's
            single expert and weight per token are taken. With "start" and "total" it is part of a longer one already.
        cap: most tokens to keep.
    """
    start, end = _window(text["part"], cap)
    routers = {}
    for name, gates in text["routers"].items():
        pairs = gates.get("all")
        if pairs is None:
            pairs = [[pair] for pair in zip(gates["expert"], gates["weight"], strict=True)]
        routers[name] = pack_gates(pairs[start:end])
    return {
        "task": text["task"],
        "tokens": list(text["tokens"][start:end]),
        "part": list(text["part"][start:end]),
        "start": text.get("start", 0) + start,
        "total": text.get("total", len(text["tokens"])),
        "routers": routers,
    }
