"""What a new plan costs while a request runs: the pause in the token stream, and memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan

from . import models
from .ceilings import synchronize
from .conditions import spread


@torch.inference_mode()
def measure(context: int | None = None, repeats: int = 10) -> dict[str, Any]:
    """Milliseconds of the step that changes to a plan never seen, beyond a step without change.

    Each plan skips the same attention and other FFN sublayers, as plans that are learned while
    decoding do. The step links the plan, records it as a CUDA graph and replays that;
    `new_captures` counts graphs traced anew, and is 0.
    """
    device = models.device()
    on_gpu = device.type == "cuda"
    context = context or (8192 if on_gpu else 64)
    _, compiled = models.pair()
    runtime = runtime_of(compiled)
    ffn = [s for s in runtime.sublayers[2:-2] if s.kind == "ffn"]
    base = models.random_plan(runtime.sublayers, len(runtime.sublayers) // 8)
    runtime.plan = base
    ids = models.tokens(1, context)
    token = ids[:, :1].clone()
    cache = runtime.new_cache(capacity=context + 256)
    compiled(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    new = [s for s in ffn if s not in base.decode][:repeats]
    plans = [base.with_decode_extra([s], {s: 1.01}) for s in new]

    def timed(plan: SkipPlan) -> float:
        cache.request.decode_with(plan)
        synchronize(device)
        start = time.perf_counter()
        compiled(input_ids=token, past_key_values=cache)
        synchronize(device)
        return 1000 * (time.perf_counter() - start)

    for plan in (base, plans[0], base):  # kernels, and the piece that scales
        timed(plan)
    steady = [timed(base) for _ in range(10)]
    before = (runtime.counters.captures, runtime.pieces_compiled, _reserved(device))
    linked = runtime.counters.link_seconds
    changes = [timed(plan) for plan in plans[1:]]
    links = 1000 * (runtime.counters.link_seconds - linked) / len(changes)
    after = (runtime.counters.captures, runtime.pieces_compiled, _reserved(device))
    return {
        "context": context,
        "step_ms": spread(steady),
        "step_with_new_plan_ms": spread(changes),
        "link_ms_mean": links,
        "new_captures": after[0] - before[0],
        "new_pieces": after[1] - before[1],
        "memory_per_plan_bytes": (after[2] - before[2]) / len(changes),
    }


def _reserved(device: torch.device) -> int:
    """Bytes of the device in use by anybody: a graph's own memory is not in torch's statistics."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
