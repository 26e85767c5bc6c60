"""The matchness of a plan: how many of the last tokens of a text it would have drafted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..kv_cache.read_again import read_again
from ..plans.skip_plan import PlanError, SkipPlan

if TYPE_CHECKING:
    from .drafted import DraftedRequest


def has(request: DraftedRequest, tokens: int) -> bool:
    """Return whether so many tokens of a request were written, and are as plain as it takes.

    Rows that begin with padding, or whose positions do not count on, are not measured.
    """
    kwargs = request.model_kwargs
    plain = not any(isinstance(value, torch.Tensor) for value in kwargs.values())
    return plain and request.cache.length - request.call.input_ids.shape[1] >= tokens


def matchness(request: DraftedRequest, plan: SkipPlan, tokens: int) -> float:
    """Return the share of the last tokens that a plan would have drafted, 0 to 1, of all rows.

    One program reads them; their K/V are those from before afterwards. It is 0 where the request
    does not store what the plan reads. (SWIFT, arXiv 2410.06916, section 4.1.)

    Args:
        request: all but its last token are stored.
        plan: any.
        tokens: how many.
    """
    cache = request.cache
    try:
        cache.request.check_stored(plan)
    except PlanError:
        return 0.0
    assert cache.drafting is not None
    stored, text = cache.length, request.input_ids
    with read_again(cache, tokens):
        cache.drafting.plan = plan
        try:
            logits = request.read(text[:, :stored], request.model_kwargs, tokens)
        finally:
            cache.drafting.plan = None
    drafted = logits[:, -tokens:].argmax(-1)
    return float((drafted == text[:, stored - tokens + 1 : stored + 1]).to(torch.float32).mean())
