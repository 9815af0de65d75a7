"""Which tokens a prompt-level decision is made from, and which follow it.

A *turn* is a run of prompt tokens and the answer tokens behind it: a row of instruction data is one, a conversation
has one for each message of the user. Each turn is routed from its own prompt tokens; these and its answer follow the
decision. An answer never takes part in the decision about itself, nor in a later one but through the attention of the
base model, so continuing a conversation with a KV cache gives what one pass over all of it gives.

Shapes: B batch, S sequence, J most turns of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.errors import ConfigError


@dataclass(frozen=True)
class Turns:
    """The turns of one pass.

    Attributes:
        mask_BJS: bool, True at the prompt tokens of each turn; None when no token of the pass is of a prompt, so that
            all follow earlier decisions.
        turn_BS: int64, the turn of each token; -1 for tokens that follow the decision of an earlier pass. None when
            every sequence is one turn.
        exists_BJ: bool, False where a sequence has fewer turns than J; None when all have J.
        last_B: int64, the last turn of each sequence, -1 where there is none. None when every sequence is one turn.
    """

    mask_BJS: Tensor | None
    turn_BS: Tensor | None = None
    exists_BJ: Tensor | None = None
    last_B: Tensor | None = None


def find_turns(prompt_BS: Tensor, real_BS: Tensor | None, *, continues: bool) -> Turns:
    """Split the sequences of a pass into turns. Waits once for the device.

    Args:
        prompt_BS: bool, True at prompt tokens.
        real_BS: bool, False at padding; None when there is none.
        continues: whether decisions of earlier passes exist, for tokens in front of the first prompt token.

    Raises:
        ConfigError: a sequence has no prompt token, or an answer in front of it, and nothing was decided before.
    """
    prompt_BS = prompt_BS if real_BS is None else prompt_BS & real_BS
    answer_BS = ~prompt_BS if real_BS is None else real_BS & ~prompt_BS
    answered_BS = answer_BS.cumsum(-1)
    # A prompt token opens a turn when an answer token lies between it and the prompt token before it.
    before_BS = torch.where(prompt_BS, answered_BS, -1).cummax(-1).values.roll(1, -1)
    before_BS[:, 0] = -1
    turn_BS = (prompt_BS & (answered_BS > before_BS)).cumsum(-1) - 1
    early_BS = answer_BS & (turn_BS < 0)
    most, fewest, num_early = torch.stack([turn_BS[:, -1].max(), turn_BS[:, -1].min(), early_BS.sum()]).tolist()
    if not continues and (fewest < 0 or num_early > 0):
        row = int((early_BS.any(-1) | (turn_BS[:, -1] < 0)).nonzero()[0])
        what = "an answer in front of its first prompt token" if fewest >= 0 else "no prompt token"
        raise ConfigError(
            f"router.granularity: prompt decides from the prompt, but row {row} of the batch has {what}. Pass "
            "prompt_mask, or labels of -100 at the prompt; text without prompts needs granularity: token"
        )
    if most < 0:
        return Turns(None)
    if most == 0 and fewest == 0 and num_early == 0:
        return Turns(prompt_BS.unsqueeze(1))
    # Padding in front of a sequence's first turn belongs to nothing that anyone reads; it may follow that turn.
    padded_BS = turn_BS.clamp(min=0) if real_BS is None else torch.where(real_BS, turn_BS, turn_BS.clamp(min=0))
    number_J = torch.arange(most + 1, device=turn_BS.device)
    return Turns(
        mask_BJS=(turn_BS.unsqueeze(1) == number_J.view(1, -1, 1)) & prompt_BS.unsqueeze(1),
        turn_BS=turn_BS if num_early else padded_BS,
        exists_BJ=None if fewest == most else number_J <= turn_BS[:, -1:],
        last_B=turn_BS[:, -1],
    )
