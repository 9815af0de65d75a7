"""From the hidden states of a prompt to the one vector that a router of granularity `prompt` reads.

    self_attention:  u = H w;  a = softmax(u) over the prompt's tokens;  h = a^T H      w (D,) is learned
    mean:            h = mean of the rows of H
    last:            h = the last row of H
    max:             h = the largest value of every column of H

MiLoRA (2410.18035, appendix C; the experts of a layer are chosen once for a prompt). H holds the real
prompt tokens of one turn and nothing else: neither padding nor the answer, so that training sees what generation sees,
and a row of the batch does not see its batch mates.

The paper gives no initial value of w. Zeros would learn (the gradient of a softmax at zero is not zero) and start as
the mean. w is drawn like the router's weights, from N(0, init_std²), so that the poolers of a model differ from the
start; `init_std: 0` still gives the start at the mean.

Shapes: B batch, J turns, S sequence, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moadapt.routers.base import RouterConfig
from moadapt.routing import router_dtype


def build_pooler(config: RouterConfig, in_features: int, device: torch.device | None = None) -> nn.Module:
    """The pooler that a config of granularity `prompt` names.

    Args:
        config: the router's options.
        in_features: D.
        device: where to create the parameters.

    Returns:
        A module `pooler(hidden_BSD, mask_BJS) -> (B, J, D)`. `hidden_BSD` has any floating dtype; `mask_BJS` is bool,
        True at the real prompt tokens of turn j. The result is fp32 (fp64 for float64 hidden states), also under
        autocast; a turn without any token gives zeros.
    """
    assert config.pooler is not None, "the config is of another granularity"
    if config.pooler == "self_attention":
        return SelfAttentionPooler(in_features, config.init_std, device)
    plain: dict[str, type[nn.Module]] = {"mean": MeanPooler, "last": LastPooler, "max": MaxPooler}
    return plain[config.pooler]()


class SelfAttentionPooler(nn.Module):
    """Weighs the tokens of a prompt by a softmax of one learned score each.

    Args:
        in_features: D.
        init_std: standard deviation of the initial `weight` (D,).
        device: where to create it.
    """

    def __init__(self, in_features: int, init_std: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(in_features, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, init_std²)."""
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, hidden_BSD: Tensor, mask_BJS: Tensor) -> Tensor:
        """(B, S, D), (B, J, S) -> (B, J, D)."""
        dtype = router_dtype(hidden_BSD)
        hidden_BSD = hidden_BSD.to(dtype)
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            scores_BS = hidden_BSD @ self.weight.to(dtype)
        # The lowest number and not -inf: the softmax of a turn without tokens is then finite, and the mask clears it.
        scores_BJS = scores_BS.unsqueeze(1).masked_fill(~mask_BJS, torch.finfo(dtype).min)
        return _weighted_sum(scores_BJS.softmax(dim=-1) * mask_BJS, hidden_BSD)

    def extra_repr(self) -> str:
        """The size, for `print(model)`."""
        return f"in_features={self.weight.shape[0]}"


class MeanPooler(nn.Module):
    """The mean of the prompt's tokens."""

    def forward(self, hidden_BSD: Tensor, mask_BJS: Tensor) -> Tensor:
        """(B, S, D), (B, J, S) -> (B, J, D)."""
        dtype = router_dtype(hidden_BSD)
        mask_BJS = mask_BJS.to(dtype)
        share_BJS = mask_BJS / mask_BJS.sum(dim=-1, keepdim=True).clamp(min=1.0)
        return _weighted_sum(share_BJS, hidden_BSD.to(dtype))


class LastPooler(nn.Module):
    """The last token of the prompt. It is gathered: no copy of the hidden states is made, nothing is rounded."""

    def forward(self, hidden_BSD: Tensor, mask_BJS: Tensor) -> Tensor:
        """(B, S, D), (B, J, S) -> (B, J, D)."""
        place_S = torch.arange(1, mask_BJS.shape[-1] + 1, device=mask_BJS.device)
        last_BJ1 = (mask_BJS * place_S).argmax(dim=-1, keepdim=True)
        rows_BJD = hidden_BSD.gather(1, last_BJ1.expand(-1, -1, hidden_BSD.shape[-1])).to(router_dtype(hidden_BSD))
        return torch.where(mask_BJS.any(dim=-1, keepdim=True), rows_BJD, 0.0)


class MaxPooler(nn.Module):
    """The largest value of every feature over the prompt's tokens. Equal largest values share the gradient."""

    def forward(self, hidden_BSD: Tensor, mask_BJS: Tensor) -> Tensor:
        """(B, S, D), (B, J, S) -> (B, J, D)."""
        # Turn by turn: (B, J, S, D) would be J copies of the hidden states.
        dtype = router_dtype(hidden_BSD)
        turns = [
            hidden_BSD.masked_fill(~mask_BS.unsqueeze(-1), -torch.inf).amax(dim=1).to(dtype)
            for mask_BS in mask_BJS.unbind(1)
        ]
        rows_BJD = torch.stack(turns, dim=1)
        return torch.where(mask_BJS.any(dim=-1, keepdim=True), rows_BJD, 0.0)


def _weighted_sum(share_BJS: Tensor, hidden_BSD: Tensor) -> Tensor:
    """One product for all turns, never in a lower precision: (B, J, S), (B, S, D) -> (B, J, D)."""
    with torch.autocast(hidden_BSD.device.type, enabled=False):
        return torch.bmm(share_BJS, hidden_BSD)
