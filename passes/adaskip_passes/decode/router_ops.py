"""A router's choice among groups of experts, as one operator, and how plain torch computes it."""

from __future__ import annotations

import torch


@torch.library.custom_op("adaskip::choose_in_groups", mutates_args=())
def choose_in_groups(
    logits: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    groups: int,
    kept: int,
    share: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts of the best groups by their affinity, as DeepSeek-V3 (section 2.1) does.

    An expert's affinity is the sigmoid of its logit. What is compared is the affinity and a bias; a
    group is as good as the sum of its two best experts. Where some are equal, the first are chosen.

    Args:
        logits: Of each token, [T, E], in float32.
        bias: Added to what is compared, [E].
        count: How many experts a token chooses, at most those of the groups that are kept.
        groups: Of how many groups the experts are, one group after the other.
        kept: Among how many of them a token chooses.
        share: Whether affinities are divided by the sum of those that were chosen.
        factor: By which they are multiplied then.

    Returns:
        The affinities of those that were chosen, [T, count] in float32, and their places, int64.

    """
    scores = logits.sigmoid()
    compared = scores + bias
    by_group = compared.view(logits.shape[0], groups, -1)
    best = by_group.topk(2, dim=-1)[0].sum(-1).topk(kept, dim=-1)[1]
    left_out = torch.ones(by_group.shape[:2], dtype=torch.bool, device=logits.device)
    left_out.scatter_(1, best, False)
    compared = by_group.masked_fill(left_out.unsqueeze(-1), float("-inf")).flatten(1)
    places = compared.topk(count, dim=-1)[1]
    values = scores.gather(1, places)
    if share:
        values = values / (values.sum(-1, keepdim=True) + 1e-20)
    return values * factor, places


@choose_in_groups.register_fake
def _(
    logits: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    groups: int,
    kept: int,
    share: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], count)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)
