"""Families whose mixers keep a state: steps and prompts over their floors, and beside eager.

A step must read all weights but embeddings and experts that it did not choose, read and write the
states, and read keys and values. A prompt must multiply its tokens with the weights, put each of
them into the states and read it from there; scans in chunks multiply more than that. A state cannot
forget a token, so that caches grow while steps are timed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of

from .. import models
from ..ceilings import seconds
from . import families
from .bench import Bench
from .families import ROWS, Shape
from .rows import Row, over

_SLOW = 2.0  # seconds of a prompt

_TINY_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}

SHAPES: Mapping[str, Shape] = {
    "mamba2": Shape(  # of 2.7B
        {
            **{"hidden_size": 2560, "num_hidden_layers": 64, "state_size": 128},
            **{"num_heads": 80, "head_dim": 64, "n_groups": 1},
        },
        1.6,
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 64},
    ),
    "falcon_h1": Shape(  # of 7B
        {
            **{"hidden_size": 3072, "num_hidden_layers": 44, "intermediate_size": 12288},
            **{"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128},
            **{"mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128},
            **{"mamba_d_state": 256, "mamba_n_groups": 1},
        },
        1.6,
        {**_TINY_MAMBA2, "mamba_d_ssm": 128},
    ),
    "qwen3_next": Shape(  # of 80B, a quarter of its layers
        {"num_hidden_layers": 12},
        1.6,
        {
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_experts": 8},
            **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


def mixer(main: Bench, name: str) -> Iterator[Row]:
    """A family's step of one row and of several, its prompt, and prompts of other lengths."""
    shape = SHAPES[name]
    model = families.made(main.device, name, shape)
    backend = "inductor" if main.device.type == "cuda" else "eager"
    bench = Bench((model, build(model, None, backend=backend)))
    context = bench.sizes.short
    right = dict(zip(("eager_error", "allowed_error"), families.errors(bench), strict=True))
    prompt, step = _eager(bench, context)
    for rows, target in ((1, shape.step), (ROWS, 1.6)):
        took, moved = _step(bench, context, rows)
        floor = moved / bench.copy_rate()
        what = f"{name}: step of {rows} at {context}"
        yield over(f"{what}: floor", took, floor, target, **right)
        if rows == 1:
            yield over(f"{what}: eager", took, step, 1.0)
    yield from _prompt(bench, name, right, prompt)
    yield _lengths(bench, name)


def _step(bench: Bench, context: int, rows: int) -> tuple[float, float]:
    """Return the seconds of a step, and the bytes that it must move."""
    times = bench.sizes.rounds + 2
    cache = bench.filled(models.tokens(rows, context), room=times * bench.sizes.steps + 1)
    token = models.tokens(rows, 1)

    def block() -> None:
        for _ in range(bench.sizes.steps):
            bench.fast(input_ids=token, past_key_values=cache)

    took = statistics.median(seconds(block, bench.device, bench.sizes.rounds, 2))
    model = bench.model
    stored = sum(spec.nbytes(rows, context, model.dtype.itemsize) for spec in cache.specs)
    moved = stored + _state_bytes(cache, rows) + families.weight_bytes(model, rows)
    bench.begin()
    return took / bench.sizes.steps, moved


def _state_bytes(cache: Any, rows: int) -> int:
    """Return the bytes of the states, which a step writes as well."""
    return sum(int(spec.nbytes(rows, 0, 0)) for spec in cache.specs)


def _eager(bench: Bench, context: int) -> tuple[float, float]:
    """Return the seconds of a prompt and of a step of the eager model.

    A prompt may take many seconds, where it is a loop over tokens or chunks; then it runs once.
    """
    found = list[float]()
    while not found or (len(found) < 3 and found[0] < _SLOW):
        cache = DynamicCache(config=bench.model.config)
        given = {runtime_of(bench.fast).cache_argument: cache}
        ids = models.tokens(1, context)
        prompt = functools.partial(bench.model, input_ids=ids, logits_to_keep=1, **given)
        found += seconds(prompt, bench.device, 1, 0)
    step = functools.partial(bench.model, input_ids=models.tokens(1, 1), **given)
    return min(found), statistics.median(seconds(step, bench.device, 10, 3))


def _prompt(bench: Bench, name: str, right: Mapping[str, float], theirs: float) -> Iterator[Row]:
    context = bench.sizes.short
    ids = models.tokens(1, context)
    prompts, rate = bench.times({"ours": functools.partial(bench.filled, ids)}, settle=2)
    floor = _prompt_flop(bench, context) / rate
    what = f"{name}: prompt of {context}"
    yield over(f"{what}: floor", prompts["ours"], floor, None, **right)
    yield over(f"{what}: eager", prompts["ours"], theirs, 1.0)


def _prompt_flop(bench: Bench, tokens: int) -> float:
    """Return the operations of a prompt, logits for the last token."""
    model, flop = bench.model, 0.0
    for spec in bench.fast.adaskip.new_cache().specs:
        recurrent = (s for s in spec.states if s.kind == "recurrent")
        flop += 4 * tokens * sum(torch.Size(s.shape).numel() for s in recurrent)
        if spec.attends:
            heads = model.config.num_attention_heads
            flop += tokens**2 * heads * (spec.key_dim + spec.value_dim)
    return flop + families.product_flop(model, tokens)


def _lengths(bench: Bench, name: str) -> Row:
    """Graphs that prompts of other lengths need, beside those of the first."""
    stats, sizes = bench.fast.adaskip.stats, bench.sizes
    bench.filled(models.tokens(1, sizes.first))
    before = stats().captures
    for i in range(1, 6):
        bench.filled(models.tokens(1, sizes.first + i * sizes.apart))
    made = stats().captures - before
    what = f"{name}: captures for five other lengths"
    return Row(what, made, None, 0, of="measured", unit="captures")
