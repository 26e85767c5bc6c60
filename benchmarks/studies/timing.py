"""How fast plans are on this device, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from adaskip_fx.plan import SkipPlan
from adaskip_fx.runtime import Runtime


@dataclass
class Times:
    """Seconds of one plan: of a prompt, and of a decode step, one value a round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def speedup(self, full: Times) -> dict[str, float]:
        """How many times as fast as the full model, by medians."""
        return {
            "prefill": median(full.prefill) / median(self.prefill),
            "decode": median(full.decode) / median(self.decode),
        }


def measure_times(
    runtime: Runtime, plans: Sequence[SkipPlan], ids: torch.Tensor, steps: int, rounds: int
) -> list[Times]:
    """Times of each plan: `rounds` times all plans in turn.

    In each turn a first request links the plan, and on a GPU records its graphs; a second one, on
    the same buffers, is timed.

    ids: a prompt int64 [1, T]; steps: decode steps that are timed together after it.
    """
    found = [Times() for _ in plans]
    for _ in range(rounds):
        for plan, times in zip(plans, found, strict=True):
            _once(runtime, plan, ids, steps)
            prefill, decode = _once(runtime, plan, ids, steps)
            times.prefill.append(prefill)
            times.decode.append(decode)
    return found


def _once(runtime: Runtime, plan: SkipPlan, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    capacity = ids.shape[1] + steps
    cache = runtime.new_cache(capacity=capacity, plan=plan)
    token = ids[:, :1].contiguous()
    start = _now(ids.device)
    runtime.step(ids, None, None, cache, 1)
    prompted = _now(ids.device)
    for _ in range(steps):
        runtime.step(token, None, None, cache, 1)
    return prompted - start, (_now(ids.device) - prompted) / steps


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
