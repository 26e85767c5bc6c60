"""What the loop around the steps costs: tokens a second of `generate` against 1 / step time."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan

from . import models
from .ceilings import seconds


@torch.inference_mode()
def measure(context: int | None = None, tokens: int | None = None) -> dict[str, Any]:
    """`generate`, greedy and sampling, against the bare step at the same length.

    The time of a token is that of ``tokens + 1`` new tokens less that of one, which is the prompt.
    """
    device = models.device()
    on_gpu = device.type == "cuda"
    context, tokens = context or (8192 if on_gpu else 64), tokens or (128 if on_gpu else 8)
    _, compiled = models.pair()
    compiled.adaskip.plan = SkipPlan.empty(compiled.adaskip.sublayers)
    ids = models.tokens(1, context)
    mask = torch.ones_like(ids)
    step = _step(compiled, ids, tokens)
    result: dict[str, Any] = {"context": context, "tokens": tokens, "step_s": step}
    for name, sample in (("greedy", False), ("sampling", True)):
        long, short = (
            statistics.median(seconds(_generation(compiled, ids, mask, n, sample), device, 3, 1))
            for n in (tokens + 1, 1)
        )
        took = (long - short) / tokens
        result[name] = {"token_s": took, "of_step_rate": step / took}
    return result


def _generation(
    compiled: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: int, sample: bool
) -> Callable[[], Any]:
    return functools.partial(
        compiled.generate,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=sample,
    )


def _step(compiled: Any, ids: torch.Tensor, tokens: int) -> float:
    """Median seconds of a step at about the length that `generate` reaches."""
    runtime, device = runtime_of(compiled), compiled.device
    cache = runtime.new_cache(capacity=ids.shape[1] + tokens + 64)
    compiled(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, :1].clone()

    def one() -> None:
        compiled(input_ids=token, past_key_values=cache)

    return statistics.median(seconds(one, device, tokens, 3))
