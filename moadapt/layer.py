"""The mixture layers: a frozen base layer, or a feed-forward block cut into experts, and the routing that rules it.

Shapes: B batch, S sequence, T tokens, I in features, O out features, D hidden size, J turns of a sequence, G rows of a
routing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.experts.base import ExpertBank
from moadapt.experts.ffn_partition import PartitionBank
from moadapt.registry import ROUTERS
from moadapt.routers.activation import build_activation
from moadapt.routers.base import Router, RouterConfig
from moadapt.routers.pooling import build_pooler
from moadapt.routing import AdapterSwitch, Granularity, Routing, RoutingContext, Stream, current_context
from moadapt.temporary import apply_weight, merged_weight
from moadapt.turns import Turns


class RouterSite(nn.Module):
    """A router at its place: routes, records the decision, and keeps it for the layers that share it.

    What is one row for the router depends on the granularity: a token; the pooled prompt of a turn; a task.

    Args:
        name: unique name of this router in the model.
        router: the router.
        stream: whose tokens it reads.
        pooler: for granularity `prompt`, (B, S, D) and a mask (B, J, S) to (B, J, D).
        activation: for granularity `prompt`, what the pooled states go through.
    """

    def __init__(
        self,
        name: str,
        router: Router,
        stream: Stream,
        pooler: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.router = router
        self.stream = stream
        self.pooler = pooler
        self.activation = activation

    @property
    def granularity(self) -> Granularity:
        """What one row is."""
        return self.router.config.granularity

    def forward(self, hidden_states: Tensor) -> Routing:
        """Route (..., D) in the running context: T rows for granularity `token`, else one for each sequence or turn.

        Raises:
            ConfigError: nothing is known to decide from: no prompt in the pass and no decision kept, or no task ids.
        """
        context = current_context()
        batch_size = hidden_states.shape[0] if hidden_states.dim() > 2 else context.batch_size
        if self.granularity != "token":
            return self._route_sequences(hidden_states.reshape(batch_size, -1, hidden_states.shape[-1]), context)
        rows_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: Routing = self.router(rows_TD, context)
        context.add_record(self.name, routing, self.stream, batch_size)
        return routing

    def _route_sequences(self, hidden_BSD: Tensor, context: RoutingContext) -> Routing:
        batch_size, length, _ = hidden_BSD.shape
        if self.granularity == "task":
            kept = context.kept.get(self.name) if context.task_ids_B is None else None
            routing = self._decide(hidden_BSD[:, 0], context) if kept is None else kept
            context.add_record(self.name, routing, self.stream, batch_size)
            context.decided[self.name] = routing.detach()
            return routing
        turns = context.turns(self.stream, batch_size, length, hidden_BSD.device)
        kept = context.kept.get(self.name)
        if kept is None and (turns.mask_BJS is None or context.kept):
            raise ConfigError(
                f"router {self.name} decides from prompts, and the cache was filled without its decision (with the "
                "adapter off, or by another model); start again from the prompt"
            )
        if turns.mask_BJS is None:
            assert kept is not None
            return kept
        assert self.pooler is not None
        assert self.activation is not None
        pooled_BJD = self.activation(self.pooler(hidden_BSD, turns.mask_BJS.to(hidden_BSD.device)))
        routing = self._decide(pooled_BJD.flatten(0, 1), context)
        exists_G = None if turns.exists_BJ is None else turns.exists_BJ.flatten()
        context.add_record(self.name, routing, self.stream, batch_size, exists_G)
        if turns.turn_BS is None:
            context.decided[self.name] = routing.detach()
            return routing
        return self._spread(routing, turns, kept, context)

    def _decide(self, rows_GD: Tensor, context: RoutingContext) -> Routing:
        routing: Routing = self.router(rows_GD, context)
        routing = replace(routing, granularity=self.granularity)
        if torch.is_grad_enabled():
            return routing
        active = routing.selected_TN.any(0).nonzero().flatten().tolist()  # waits for the device, once for each decision
        return replace(routing, active=tuple(active))

    def _spread(self, routing: Routing, turns: Turns, kept: Routing | None, context: RoutingContext) -> Routing:
        """Several turns: their rows behind those kept of each sequence, and for each token its row."""
        assert turns.mask_BJS is not None
        assert turns.turn_BS is not None
        assert turns.last_B is not None
        batch_size, most, _ = turns.mask_BJS.shape
        device = routing.weights_TN.device
        turn_BS, turns_last_B = turns.turn_BS.to(device), turns.last_B.to(device)
        sequence_B = torch.arange(batch_size, device=device)
        offset = 0 if kept is None else batch_size
        own_B1 = (offset + sequence_B * most).unsqueeze(-1)
        rows_BS = own_B1 + turn_BS
        last_B = own_B1.squeeze(-1) + turns_last_B
        if kept is not None:
            routing = Routing.concatenate(kept, routing)
            rows_BS = torch.where(turn_BS < 0, sequence_B.unsqueeze(-1), rows_BS)
            last_B = torch.where(turns_last_B < 0, sequence_B, last_B)
        context.decided[self.name] = routing.select(last_B).detach()
        return replace(routing, rows_T=rows_BS.flatten())


def build_site(
    name: str,
    config: RouterConfig,
    in_features: int,
    num_experts: int,
    stream: Stream,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> RouterSite:
    """A router at its place, with what its granularity needs around it.

    Args:
        name: unique name of the router in the model.
        config: its options, with one value for every per-layer option.
        in_features: D.
        num_experts: N.
        stream: whose tokens it reads.
        device: where to create the parameters.
        dtype: their dtype.
    """
    router = ROUTERS.build(config, in_features, num_experts, device=device).to(dtype)
    if config.granularity != "prompt":
        return RouterSite(name, router, stream)
    pooler, activation = build_pooler(config, in_features, device), build_activation(config, device)
    return RouterSite(name, router, stream, pooler.to(dtype), activation.to(dtype))


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
        member: with `expert_unit: module`, which expert of that router this layer is; its bank has one.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        experts: ExpertBank,
        router: RouterSite | None,
        ruled_by: str,
        switch: AdapterSwitch,
        member: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.experts = experts
        self.router = router
        self.ruled_by = ruled_by
        self.switch = switch
        self.member = member

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if not self.switch.enabled:
            output: Tensor = self.base_layer(x)
            return output
        context = current_context()
        merges = context.temporary is not None and context.phase == "decode"
        weight = context.temporary.get(self) if merges else None  # type: ignore[union-attr]
        if weight is not None:
            return apply_weight(self.base_layer, weight, x)
        routing = self._routing(x, context)
        if merges and routing.rows_T is None:
            weight = merged_weight(self, routing, context)
            if weight is not None:
                return apply_weight(self.base_layer, weight, x)
        if routing.active == ():  # no row of the batch has selected this layer
            output = self.base_layer(x)
            return output
        x_TI = x.reshape(-1, x.shape[-1])
        if routing.granularity != "token" and not self.experts.per_sequence:
            routing = routing.per_token(x_TI.shape[0])
        y_TO: Tensor = self.experts(x_TI, routing, self.base_layer)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _routing(self, x: Tensor, context: RoutingContext) -> Routing:
        if self.router is not None:
            routing: Routing = self.router(x)
        elif self.ruled_by in context.shared:
            routing = context.shared[self.ruled_by]
        else:
            raise RuntimeError(
                f"this layer is ruled by the router {self.ruled_by!r}, which has not run in this pass; call the whole "
                "model, not a part of it (or use scope: linear)"
            )
        return routing if self.member is None else routing.column(self.member)

    def delta_weight(self, gates_N: Tensor) -> Tensor:
        """(O, I): sum of the experts' deltas with these gates, in fp32 or fp64."""
        return self.experts.mixed_delta(gates_N)

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
            y_TD: Tensor = self.experts(x_TD, self.router(x).per_token(x_TD.shape[0]))
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
