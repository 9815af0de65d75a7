"""The routers of transformers' own mixture-of-experts models, seen as moadapt's.

Mixtral, Qwen-MoE, OLMoE and the families like them have a router module that returns for T tokens the scores (T, N),
the gate weights (T, K) and the experts (T, K). It is found as transformers finds it for `output_router_logits`.

Shapes: T tokens, N experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.errors import ConfigError
from moadapt.passes import PassRequest, install_hooks, requesting
from moadapt.routing import Routing, current_context

_FAR = 0.05
"""Gate weights as shares of their sum may be this far from those of the scores: they are rounded to half precision."""

_HOOKED: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""How many blocks a model's hooks are wanted by, and their handles."""
_LOCK = Lock()


def find_stock_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The router modules of a model, by name.

    Raises:
        ConfigError: there is none, or one of a family that returns something else; or the model has an encoder, whose
            routers are of another manner in all families that there are.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            f"record_routing: the routers of {type(model).__name__} cannot be read: of encoder-decoder models only "
            "mixtures (get_mixture_model) can be recorded"
        )
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter") or _is_recorded(model, name, module):
            if _num_experts(module) is None:
                raise ConfigError(
                    f"record_routing: the router {name} ({type(module).__name__}) does not tell its number of experts; "
                    "only routers in the manner of Mixtral, Qwen-MoE and OLMoE can be read"
                )
            found[name] = module
    if not found:
        raise ConfigError(
            f"record_routing: {type(model).__name__} has no routers; pass a mixture (get_mixture_model, or "
            "MixtureModel.from_pretrained), or a mixture-of-experts model of transformers"
        )
    return found


def _is_recorded(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether transformers reads `router_logits` from this module."""
    for owner in model.modules():
        wanted = (getattr(type(owner), "_can_record_outputs", None) or {}) if isinstance(owner, PreTrainedModel) else {}
        specs = wanted.get("router_logits", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            kind = getattr(spec, "target_class", spec)
            inside = getattr(spec, "layer_name", None)
            if isinstance(kind, type) and isinstance(module, kind):
                return inside is None or f".{inside.strip('.')}." in f".{name}."
    return False


def num_experts(router: nn.Module) -> int:
    """N of a router that was found."""
    number = _num_experts(router)
    assert number is not None
    return number


def _num_experts(router: nn.Module) -> int | None:
    number, weight = getattr(router, "num_experts", None), getattr(router, "weight", None)
    if isinstance(number, int):
        return number
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


@contextmanager
def hooked(model: PreTrainedModel) -> Iterator[None]:
    """Inside the `with` block the model's passes have a context, and its routers add their records to it.

    Blocks that overlap, in one thread or in several, share one set of hooks.
    """
    with _LOCK:
        if model not in _HOOKED:
            routers = find_stock_routers(model)
            handles = [router.register_forward_hook(_RouterHook(name)) for name, router in routers.items()]
            _HOOKED[model] = [0, *install_hooks(model, keeps=False), *handles]
        _HOOKED[model][0] += 1
    try:
        yield
    finally:
        with _LOCK:
            _HOOKED[model][0] -= 1
            if _HOOKED[model][0] == 0:
                for handle in _HOOKED.pop(model)[1:]:
                    handle.remove()


@contextmanager
def describing(prompt_mask: Tensor | None = None, task_ids: Tensor | None = None) -> Iterator[None]:
    """Tell the passes of a stock model what it does not take itself; a `MixtureModel` is given it as arguments.

    Args:
        prompt_mask: (B, S) bool, True at prompt tokens. It begins at the sequences' first tokens, also for passes that
            continue a cache; what lies beyond it, as generated tokens do, is answer.
        task_ids: (B,) int64.
    """
    request = PassRequest(prompt_mask, task_ids)
    if prompt_mask is not None:
        request.generates = True
        request.padding_mask_BP = torch.ones_like(prompt_mask, dtype=torch.bool)  # where the model is given no mask
    with requesting(request):
        yield


class _RouterHook:
    """Forward hook of one router."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._scoring: str | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        context = current_context()
        if not context.record:
            return
        with torch.no_grad():
            context.add_record(self.name, self._routing(module, output), "decoder", context.batch_size)

    def _routing(self, module: nn.Module, output: Any) -> Routing:
        logits_TN, weights_TK, indices_TK = self._parts(module, output)
        logits_TN = logits_TN.detach().float()
        weights_TK = weights_TK.detach().float()
        if self._scoring is None:
            self._scoring = self._find_scoring(logits_TN, weights_TK, indices_TK)
        selected_TN = torch.zeros_like(logits_TN, dtype=torch.bool).scatter_(-1, indices_TK, True)
        return Routing(
            weights_TN=torch.zeros_like(logits_TN).scatter_(-1, indices_TK, weights_TK),
            selected_TN=selected_TN,
            logits_TN=logits_TN,
            probs_TN=_SCORES[self._scoring](logits_TN),
            indices_TK=indices_TK,
        )

    def _parts(self, module: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (T, N), weights (T, K) and experts (T, K)."""
        tensors = [item for item in output if isinstance(item, Tensor)] if isinstance(output, tuple) else []
        whole = [item.flatten(0, -2) for item in tensors if not item.is_floating_point() and item.dim() > 1]
        real = [item.flatten(0, -2) for item in tensors if item.is_floating_point() and item.dim() > 1]
        if len(whole) == 1 and len(real) == 2 and real[0].shape[-1] == num_experts(module):
            logits_TN, weights_TK = real
            if weights_TK.shape == whole[0].shape:
                return logits_TN, weights_TK, whole[0].long()
        raise ConfigError(
            f"record_routing: the router {self.name} ({type(module).__name__}) does not return scores, weights and "
            "experts; only routers in the manner of Mixtral, Qwen-MoE and OLMoE can be read"
        )

    def _find_scoring(self, logits_TN: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> str:
        """Which function of the scores the weights are in proportion to. Waits once for the device."""
        rows_T = weights_TK.isfinite().all(-1) & (weights_TK.sum(-1) > 0)
        given_TK = _shares(weights_TK)
        distances = {}
        for kind, function in _SCORES.items():
            expected_TK = _shares(function(logits_TN).gather(-1, indices_TK))
            far_T = (expected_TK - given_TK).abs().amax(-1)
            distances[kind] = torch.where(rows_T & far_T.isfinite(), far_T, 0.0).max()
        values = dict(zip(distances, torch.stack(list(distances.values())).tolist(), strict=True))
        nearest = min(values, key=lambda kind: values[kind])
        if values[nearest] > _FAR:
            raise ConfigError(
                f"record_routing: the gate weights of the router {self.name} are neither a softmax nor a sigmoid of "
                "its scores, so its probabilities are not known; such a family cannot be read"
            )
        return nearest


def _shares(values_TK: Tensor) -> Tensor:
    return values_TK / values_TK.sum(-1, keepdim=True)


def _softmax(logits_TN: Tensor) -> Tensor:
    return logits_TN.softmax(-1)


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": _softmax, "sigmoid": torch.sigmoid}
