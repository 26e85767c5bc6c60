"""How fast plans are on this device, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.runtime import Runtime


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
    runtime: Runtime,
    plans: Sequence[SkipPlan],
    ids: torch.Tensor,
    steps: int,
    rounds: int,
    rows: int = 1,
) -> list[Times]:
    """Times of each plan: `rounds` times all plans in turn.

    In each turn a first request links the plan, and on a GPU records its graphs; a second one, on
    the same buffers, is timed.

    Args:
        ids: a prompt int64 [1, T].
        steps: decode steps of one row that are timed together after it.
        rows: how many such prompts make a prefill that is timed: launching the kernels of a small
            model's prompt takes a host longer than running them takes a GPU.
    """
    found = [Times() for _ in plans]
    wide = ids.expand(rows, -1).contiguous()
    for _ in range(rounds):
        for plan, times in zip(plans, found, strict=True):
            # One after the other: the buffers that are kept, with their graphs, are those of the
            # last request.
            times.prefill.append([_prefill(runtime, plan, wide) for _ in range(2)][-1])
            times.decode.append([_decode(runtime, plan, ids, steps) for _ in range(2)][-1])
    return found


def _prefill(runtime: Runtime, plan: SkipPlan, ids: torch.Tensor) -> float:
    cache = runtime.new_cache(capacity=ids.shape[1], plan=plan)
    start = _now(ids.device)
    runtime.step(ids, None, None, cache, 1)
    return _now(ids.device) - start


def _decode(runtime: Runtime, plan: SkipPlan, ids: torch.Tensor, steps: int) -> float:
    """Of one step."""
    cache = runtime.new_cache(capacity=ids.shape[1] + steps, plan=plan)
    runtime.step(ids, None, None, cache, 1)
    token = ids[:, :1].contiguous()
    start = _now(ids.device)
    for _ in range(steps):
        runtime.step(token, None, None, cache, 1)
    return (_now(ids.device) - start) / steps


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
