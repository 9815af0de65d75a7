"""ReLU routing: an expert takes part when its score is positive, with that score as its weight.

    g = max(0, W x)         in fp32; no softmax, no top-k, not renormalised

ReMoE (2412.14711). Continuous in x and W, so nothing estimates a gradient; an expert that is off for a token gets none
from it. How many experts are on is up to the loss `target_sparsity`. A row may have no expert: its weights are zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from moadapt.registry import ROUTERS
from moadapt.routers.gates import RescaleActive, rescaled
from moadapt.routers.linear import LinearRouter, LinearRouterConfig
from moadapt.routing import Routing, RoutingContext


class ReLURouterConfig(LinearRouterConfig):
    """Options of the `relu` router.

    Attributes:
        rescale: factor for all kept experts: `none` (as the paper), `n_over_active` or a number.
    """

    kind: Literal["relu"] = "relu"
    rescale: RescaleActive = "none"

    @model_validator(mode="after")
    def _router_must_learn(self) -> Self:
        if self.init == "zeros" or (self.init == "normal" and self.init_std == 0.0):
            option = "init: zeros" if self.init == "zeros" else "init_std: 0"
            raise ValueError(
                f"{option} makes every gate relu(0) = 0, whose gradient is 0 as well: no expert would ever be active; "
                "use init: normal with init_std: 0.02"
            )
        return self


@ROUTERS.register("relu", ReLURouterConfig)
class ReLURouter(LinearRouter):
    """Keeps every expert with a positive score. `probs_TN` of its routing are the ReLUs before `rescale`."""

    config: ReLURouterConfig

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """(T, D) -> Routing with the experts selected whose score is positive."""
        logits_TN = self.logits(hidden_states)
        selected_TN = context.decide(lambda: logits_TN > 0)
        gates_TN = torch.where(selected_TN, logits_TN, 0.0)
        weights_TN = rescaled(gates_TN, selected_TN, self.config.rescale)
        return Routing(weights_TN=weights_TN, selected_TN=selected_TN, logits_TN=logits_TN, probs_TN=gates_TN)
