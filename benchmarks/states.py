"""What it costs that a compiled model knows its state: a look before each request."""

from __future__ import annotations

import time
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of

from . import models
from .conditions import spread


@torch.inference_mode()
def measure(repeats: int = 200) -> dict[str, Any]:
    """Microseconds of a look that finds nothing changed, and what another state costs.

    An attribute is edited, a prompt captures the new state; it is edited back and forth, and
    prompts find the graphs that are there.

    Args:
        repeats: looks that are timed.
    """
    _, compiled = models.pair()
    runtime, norm = runtime_of(compiled), compiled.model.norm
    states, first = runtime.graphs.states, norm.variance_epsilon
    ids = models.tokens(1, 16)

    def prompt() -> float:
        start = time.perf_counter()
        compiled(input_ids=ids, logits_to_keep=1)
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    prompt()
    looks = []
    for _ in range(repeats):
        start = time.perf_counter()
        states.look()
        looks.append(1e6 * (time.perf_counter() - start))
    known, before = spread([1e3 * prompt() for _ in range(5)]), runtime.counters.captures
    norm.variance_epsilon = 2 * first
    new = prompt()
    switched = []
    for epsilon in (first, 2 * first, first):
        norm.variance_epsilon = epsilon
        switched.append(1e3 * prompt())
    return {
        "layers": len(compiled.model.layers),
        "look_us": spread(looks),
        "short_prompt_ms": known,
        "new_state_s": new,
        "known_state_ms": spread(switched),
        "new_captures": runtime.counters.captures - before,
    }
