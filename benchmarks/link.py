"""How long a new plan takes: rewriting and linking, with no capture and no compile."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates

from .conditions import spread


def measure(layers: int = 30, repeats: int = 20, seed: int = 0) -> dict[str, Any]:
    """Milliseconds to link a random plan that skips a sixth of all sublayers, on one core.

    A model of `layers` decoder layers; the width does not matter, since no weight is touched. For
    each repeat a plan that was never seen is used for one prefill and for one decoded token; what
    is timed is the linking inside these calls.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=4096,
    )
    model = build(LlamaForCausalLM(config).eval(), None, backend="eager")
    runtime, draw = runtime_of(model), random.Random(seed)
    runtime.warmup(64)
    _use(model, _random_plan(runtime.sublayers, draw))  # compiles the compensation piece
    before = (runtime.counters.captures, runtime.pieces_compiled)
    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(repeats):
        for phase, seconds in _use(model, _random_plan(runtime.sublayers, draw)).items():
            times[phase].append(1000 * seconds)
    after = (runtime.counters.captures, runtime.pieces_compiled)
    return {
        "layers": layers,
        "sublayers": len(runtime.sublayers),
        "link_ms": {phase: spread(values) for phase, values in times.items()},
        "new_captures": after[0] - before[0],
        "new_pieces": after[1] - before[1],
    }


def _random_plan(sublayers: tuple[Any, ...], draw: random.Random) -> SkipPlan:
    skip = draw.sample(sublayers, len(sublayers) // 6)
    return SkipPlan.of(
        sublayers,
        skip,
        surrogates=Surrogates.scale({s: draw.uniform(0.9, 1.1) for s in skip}),
    )


def _use(model: Any, plan: SkipPlan) -> dict[str, float]:
    """Seconds that linking took in a prefill and in a decode step under a new plan."""
    runtime = runtime_of(model)
    runtime.plan = plan
    cache, ids = runtime.new_cache(), torch.zeros(1, 16, dtype=torch.int64)
    seconds = {}
    for phase, tokens in (("prefill", ids), ("decode", ids[:, :1])):
        before = runtime.counters.link_seconds
        runtime.step(tokens, None, None, cache, 1)
        seconds[phase] = runtime.counters.link_seconds - before
    return seconds
