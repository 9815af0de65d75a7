"""Single texts with the gates of every token, for reading: what `text` of a routing document holds.

Shapes: T tokens of a text, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.experts.base import ExpertBank
from moadapt.model import MixtureModel
from moadapt.passes import observing_passes
from moadapt.routing import Routing, RoutingContext, Stream
from moadapt.statistics.similarity import delta_similarity
from moadapt.statistics.stock import hooked

MOST_TOKENS = 256
"""Tokens of one text that are kept, around the start of its answer."""
MOST_ENTRIES = 400_000
"""Tokens times routers, over all texts: bounds the document."""
Gates = list[list[list[float]]]


def text_budget(num_routers: int, num_texts: int) -> int:
    """How many tokens of each text a document has room for."""
    return max(16, min(MOST_TOKENS, MOST_ENTRIES // max(1, num_routers * num_texts)))


@contextmanager
def watching(model: nn.Module, observer: Callable[[RoutingContext], None]) -> Iterator[None]:
    """Inside the `with` block the observer is given every pass, of a mixture or a stock model."""
    with ExitStack() as stack:
        base: Any = model.base_model if isinstance(model, MixtureModel) else model
        if not isinstance(model, MixtureModel):
            stack.enter_context(hooked(base))
        stack.enter_context(observing_passes(base, observer))
        yield


def gates_of_text(
    model: nn.Module,
    run: Callable[[], Any],
    task: str,
    part: Sequence[int] | None,
    decode: Callable[[Sequence[int]], str],
    most_tokens: int = MOST_TOKENS,
) -> dict[str, Any]:
    """One text of a document.

    Args:
        model: a mixture, or a stock mixture-of-experts model.
        run: makes one pass over one sequence without padding.
        task: its task.
        part: of each token, 0 prompt, 1 answer; None behind an encoder, where all but the start token is answer.
        decode: token ids to text.
        most_tokens: keep so many, around the start of the answer. All tokens are read by the model.

    Raises:
        ConfigError: a router gave gate weights that are no numbers, which no page can show.
    """
    passes: list[RoutingContext] = []
    with watching(model, passes.append), torch.no_grad():
        run()
    context = passes[-1]
    streams: list[Stream] = ["encoder", "decoder"] if context.has_encoder else ["decoder"]
    ids = {stream: context.input_ids[stream][0].tolist() for stream in streams}
    first = {"encoder": 0, "decoder": len(ids.get("encoder", ()))}
    tokens = [token for stream in streams for token in ids[stream]]
    if part is None:
        part = [int(position > first["decoder"]) for position in range(len(tokens))]
    window = _window(part, most_tokens)
    routers = {}
    for record in context.records:
        if not bool(record.routing.weights_TN.isfinite().all()):
            raise ConfigError(
                f"texts: the router {record.name} gives gate weights that are no numbers (NaN or infinite), so the "
                "model's weights or its dtype are broken; take an earlier checkpoint or another dtype (--dtype "
                "float32), or show no texts (--texts 0)"
            )
        stream = _stream(model, record.name)
        gates: Gates = [[] for _ in tokens]
        found = _pairs(record.routing.per_token(len(ids[stream])))
        gates[first[stream] : first[stream] + len(found)] = found
        routers[record.name] = {"all": gates[window]}
    return {
        "task": task,
        "tokens": pieces(tokens[window], decode),
        "part": list(part[window]),
        "start": window.start,
        "total": len(tokens),
        "routers": routers,
    }


def _stream(model: nn.Module, router: str) -> Stream:
    return model.injection.routers[router].stream if isinstance(model, MixtureModel) else "decoder"


def _pairs(routing: Routing) -> Gates:
    """For each token its experts and their weights, to six digits."""
    selected_TN, weights_TN = routing.selected_TN.cpu(), routing.weights_TN.detach().double().cpu()
    return [
        [[expert, float(f"{float(weights_N[expert]):.6g}")] for expert in selected_N.nonzero().flatten().tolist()]
        for selected_N, weights_N in zip(selected_TN, weights_TN, strict=True)
    ]


def _window(part: Sequence[int], most: int) -> slice:
    """Around the start of the first answer."""
    total = len(part)
    start = part.index(1) if 1 in part else total
    start = min(max(start - most // 2, 0), max(total - most, 0))
    return slice(start, min(start + most, total))


def pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to those before it.

    Args:
        tokens: ids.
        decode: ids to text; a tokenizer joins them with spaces, or makes characters of several.
    """
    found: list[str] = []
    before = ""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        same = next((at for at, pair in enumerate(zip(before, text, strict=False)) if pair[0] != pair[1]), None)
        found.append(text[min(len(before), len(text)) if same is None else same :])
        before = text
    return found


def similarities(model: nn.Module) -> dict[str, Tensor]:
    """By router, how alike the experts are that it chooses from: (N, N) float64.

    The mean of `delta_similarity` over the modules that it rules. Routers whose experts have no deltas of their own,
    as those cut from feed-forward blocks, and those whose experts are modules are left out.
    """
    if not isinstance(model, MixtureModel) or model.mixture_config.expert_unit == "module":
        return {}
    found: dict[str, list[Tensor]] = {}
    for layer in model.injection.layers.values():
        bank = layer.experts
        if not isinstance(bank, ExpertBank) or bank.num_experts < 2:
            continue
        try:
            found.setdefault(layer.ruled_by, []).append(delta_similarity(bank).cpu())
        except ConfigError:
            continue
    return {router: torch.stack(matrices).nanmean(0) for router, matrices in found.items() if matrices}
