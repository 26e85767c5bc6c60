"""Steps of a request that nobody waits for, so that those of the first request are ready to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..kv_cache.cache import SkipCache
from ..kv_cache.drafting import Drafting
from ..plans.decisions import Schedule
from ..plans.skip_plan import SkipPlan
from ..speculation.controller import LENGTHS
from ..speculation.speculation import Speculation

if TYPE_CHECKING:
    from .runtime import Runtime


def warm_up(runtime: Runtime, begin: SkipPlan | Schedule, max_length: int, batch: int) -> None:
    """Run a short prompt and one decode step with every program that requests will need.

    Args:
        runtime: of a compiled model.
        begin: what the requests begin with.
        max_length: tokens of the longest of them.
        batch: rows.
    """
    cache = runtime.new_cache(capacity=max_length, plan=begin)
    size = batch, max(2, min(max_length - 1, 16))
    prompt = torch.zeros(size, dtype=torch.int64, device=runtime.device)
    token = prompt[:, :1]
    for ids in (prompt, token):
        runtime.step(ids, None, None, cache, 1)
    if cache.request.window is not None:  # the program after the window as well
        cache.request.decode_with(cache.request.decode_plan)
        runtime.step(token, None, None, cache, 1)
    for first, _ in begin.steps[1:] if isinstance(begin, Schedule) else ():
        if not cache.stateful:
            cache.keep_first(prompt.shape[1])  # as far as there may be room
        cache.request.decoding_from = cache.length - first
        runtime.step(token, None, None, cache, 1)
    if runtime.speculation is not None:
        _warm_up_drafts(runtime, cache, runtime.speculation, prompt)


def _warm_up_drafts(
    runtime: Runtime, cache: SkipCache, speculation: Speculation, prompt: torch.Tensor
) -> None:
    """Run a verification of each length that may come, and a draft."""
    stored, longest = prompt.shape[1], speculation.decoding.longest
    room = runtime.graphs.max_length or 2**62
    proposers = speculation.decoding.proposers
    plans = dict.fromkeys(getattr(p, "plan", None) or speculation.plan for p in proposers)
    drafting, token = Drafting(stored), prompt[:, :1]
    with cache.verifying(drafting):
        for count in sorted({k for k in LENGTHS if k < longest} | {longest}):
            cache.keep_first(stored)
            if stored + count + 1 <= room:
                block = token.expand(-1, count + 1).contiguous()
                runtime.step(block, None, None, cache, count + 1)
        for plan in plans:
            cache.keep_first(stored)
            if plan.decode or plan.windows.decode:
                drafting.plan = plan
                runtime.step(token, None, None, cache, 1)
