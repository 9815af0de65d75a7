"""The mixture layers: a frozen base layer, or a feed-forward block cut into experts, and the routing that rules it.

Shapes: T tokens, I in features, O out features, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moadapt.experts.base import ExpertBank
from moadapt.experts.ffn_partition import PartitionBank
from moadapt.routers.base import Router
from moadapt.routing import AdapterSwitch, Routing, RoutingContext, Stream, current_context


class RouterSite(nn.Module):
    """A router at its place: routes, records the decision, and keeps it for the layers that share it.

    Args:
        name: unique name of this router in the model.
        router: the router.
        stream: whose tokens it reads.
    """

    def __init__(self, name: str, router: Router, stream: Stream) -> None:
        super().__init__()
        self.name = name
        self.router = router
        self.stream = stream

    def forward(self, hidden_states: Tensor) -> Routing:
        """Route (..., D) as T rows in the running context."""
        context = current_context()
        rows_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: Routing = self.router(rows_TD, context)
        batch_size = hidden_states.shape[0] if hidden_states.dim() > 2 else context.batch_size
        context.add_record(self.name, routing, self.stream, batch_size)
        return routing


class SharedRouterHook:
    """Forward pre-hook of a block: its router reads the block's input and leaves the decision in the context."""

    def __init__(self, site: RouterSite, switch: AdapterSwitch) -> None:
        self.site = site
        self.switch = switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Route on the first tensor that the block is given."""
        if not self.switch.enabled:
            return
        named = kwargs.get("hidden_states")
        hidden_states = next((value for value in (*args, named, *kwargs.values()) if isinstance(value, Tensor)), None)
        if hidden_states is None:
            raise RuntimeError(f"router {self.site.name}: its block was called without a tensor to route on")
        current_context().shared[self.site.name] = self.site(hidden_states)


class MixtureLayer(nn.Module):
    """Takes the place of a linear layer: `y = base_layer(x)` plus the mixture of its experts.

    Args:
        base_layer: the frozen layer that is adapted.
        experts: its expert bank.
        router: its own router (scope `linear`), or None when another one rules it.
        ruled_by: the name of the router that rules it.
        switch: turns the mixture off for the whole model.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        experts: ExpertBank,
        router: RouterSite | None,
        ruled_by: str,
        switch: AdapterSwitch,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.experts = experts
        self.router = router
        self.ruled_by = ruled_by
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if not self.switch.enabled:
            output: Tensor = self.base_layer(x)
            return output
        routing = self._routing(x, current_context())
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO: Tensor = self.experts(x_TI, routing, self.base_layer)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _routing(self, x: Tensor, context: RoutingContext) -> Routing:
        if self.router is not None:
            routing: Routing = self.router(x)
            return routing
        if self.ruled_by not in context.shared:
            raise RuntimeError(
                f"this layer is ruled by the router {self.ruled_by!r}, which has not run in this pass; call the whole "
                "model, not a part of it (or use scope: linear)"
            )
        shared: Routing = context.shared[self.ruled_by]
        return shared

    def delta_weight(self, gates_N: Tensor) -> Tensor:
        """(O, I): sum of the experts' deltas with these gates, in fp32 or fp64."""
        deltas = [gate * self.experts.delta_weight(expert) for expert, gate in enumerate(gates_N)]
        return torch.stack(deltas).sum(0)

    # Some models read these of a linear layer before they call it (T5 looks at the dtype of `wo.weight`).
    @property
    def weight(self) -> Any:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """I."""
        return self.experts.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.experts.out_features


class PartitionLayer(nn.Module):
    """Takes the place of a feed-forward block: routed experts that its neurons were dealt out to.

    Args:
        experts: the bank.
        router: its router.
        switch: with the adapter off, the layer is the dense block.
        output_dropout: probability of dropping an output in training, as the block did.
    """

    def __init__(
        self, experts: PartitionBank, router: RouterSite, switch: AdapterSwitch, output_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.experts = experts
        self.router = router
        self.ruled_by = router.name
        self.switch = switch
        self.output_dropout = output_dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        if self.switch.enabled:
            y_TD: Tensor = self.experts(x_TD, self.router(x))
            context = current_context()
            if context.wants_reconstruction:
                context.add_output(self.router.name, "reconstruction", self._reconstruction(x_TD, y_TD))
        else:
            y_TD = self.experts(x_TD, None)
        if self.training and self.output_dropout > 0.0:
            y_TD = nn.functional.dropout(y_TD, self.output_dropout)
        return y_TD.view(*x.shape[:-1], y_TD.shape[-1])

    def _reconstruction(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """||y - dense(x)||² / ||dense(x)||² of every token, in fp32 or fp64: (T,). The dense block is the teacher."""
        with torch.no_grad():
            want_TD = self.experts(x_TD.detach(), None, dropout=False)
        dtype = torch.promote_types(y_TD.dtype, torch.float32)
        want_TD = want_TD.to(dtype)
        error_T: Tensor = (y_TD.to(dtype) - want_TD).square().sum(-1)
        norm_T: Tensor = want_TD.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
        return error_T / norm_T


class TrainableCopy(nn.Module):
    """A module of `modules_to_save`: a copy that is trained, and the original for when the adapter is off."""

    def __init__(self, original_module: nn.Module, copy: nn.Module, switch: AdapterSwitch) -> None:
        super().__init__()
        self.original_module = original_module
        self.copy = copy
        self.switch = switch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the active one of both does."""
        return self.active(*args, **kwargs)

    @property
    def active(self) -> nn.Module:
        """The copy while the adapter is on."""
        return self.copy if self.switch.enabled else self.original_module

    @property
    def weight(self) -> Any:
        """The active module's weight."""
        return self.active.weight

    @property
    def bias(self) -> Any:
        """The active module's bias."""
        return self.active.bias
