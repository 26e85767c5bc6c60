"""What an answer within a bound has cost, counted anew from logits of the original model.

Nothing of the product is asked but what was drafted, and where: which of it was written is read
off the text, and divergences are taken in float64 from logits that transformers' own model gives
for the whole text at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: How much a token's logit may be below the best one's for it to be the full model's own: programs
#: for one token and for several round differently.
_SAME = 1e-3
#: What a mean may be above the bound, in nats, in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Block:
    """Drafts as they were proposed.

    Attributes:
        place: how many tokens were written after the prompt.
        tokens: int64 [k].
        logits: that they were chosen by, [k, V].
    """

    place: int
    tokens: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Account:
    """The divergence of one answer, in nats for each of its tokens.

    Attributes:
        mean: of drafts that were written, but for those which the bound did not allow and the full
            model has chosen as well; of another token that the full model has not chosen it counts
            how unlikely that was.
        drafted: of all drafts that were written.
        fell_back: whether there was a draft that the bound did not allow.
    """

    mean: float
    drafted: float
    fell_back: bool


def account(
    full: torch.Tensor,
    text: torch.Tensor,
    blocks: Sequence[Block],
    most: float,
) -> Account:
    """Return what a text has cost.

    Args:
        full: logits of the original model for each token of the answer, [n, V].
        text: the answer, int64 [n].
        blocks: what was proposed, in order.
        most: the bound, in nats for each token.
    """
    ours = torch.log_softmax(full.to(torch.float64), -1)
    chosen = ours.gather(-1, text.unsqueeze(-1)).squeeze(-1)
    own = (ours.max(-1).values - chosen <= _SAME).tolist()
    costs, refused = _costs(ours, text, blocks)
    spent = drafted = 0.0
    fell_back = False
    for place, unlikely in enumerate((-chosen).tolist()):
        cost = costs.get(place)
        drafted += cost or 0.0
        allowed = cost is not None and spent + cost <= (most + TOLERANCE) * (place + 1)
        fell_back |= (cost is not None and not allowed) or place in refused
        if allowed or not own[place]:
            spent += unlikely if cost is None else cost
    return Account(spent / len(text), drafted / len(text), fell_back)


def _costs(
    ours: torch.Tensor, text: torch.Tensor, blocks: Sequence[Block]
) -> tuple[dict[int, float], set[int]]:
    """Return KL(full || draft) by place of drafts that were written, and where others were not."""
    costs, refused = dict[int, float](), set[int]()
    for block in blocks:
        there = text[block.place : block.place + len(block.tokens)]
        same = there == block.tokens[: len(there)]
        count = int(same.to(torch.int64).cumprod(0).sum())
        theirs = torch.log_softmax(block.logits[:count].to(torch.float64), -1)
        here = ours[block.place : block.place + count]
        apart = (here.exp() * (here - theirs)).sum(-1).clamp_min(0.0)
        costs.update(enumerate(apart.tolist(), block.place))
        if count < len(there):
            refused.add(block.place + count)
    return costs, refused
