"""Measure a model, compiled or not, the same way: through ``generate`` and ``forward``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers.generation.streamers import BaseStreamer

from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.kv_cache.names import cache_of
from adaskip_fx.plans.decisions import plans_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.runtime import Runtime

from ...data.reference_text import Passkey
from .result import Answer, Counts, Quality


@dataclass
class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Notes when each token arrives; ``generate`` hands it the prompt first."""

    ticks: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass


def ask(
    model: Any, tokenizer: Any, passkey: Passkey, new_tokens: int
) -> tuple[Answer, SkipPlan | None]:
    """Generate exactly `new_tokens` tokens greedily.

    Returns:
        The answer, and the plan of the last decode steps (None for a model that is not compiled).
    """
    ids = torch.tensor([passkey.ids], device=model.device)
    clock = _Clock()
    start = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=clock,
    )
    tokens = clock.ticks[1:]
    text = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    cache = cache_of(output)
    answer = Answer(
        key=passkey.key,
        depth=passkey.depth,
        text=text,
        found=passkey.key in text,
        prefill_seconds=tokens[0] - start,
        step_seconds=tuple(b - a for a, b in pairwise(tokens)),
        cache_bytes=cache_bytes(cache),
    )
    return answer, cache.request.decode_plan if isinstance(cache, SkipCache) else None


def cache_bytes(cache: Any) -> int:
    """Bytes of K/V storage that a request's cache holds."""
    if isinstance(cache, SkipCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def compare(model: Any, skipped: Any, windows: Sequence[Sequence[int]]) -> Quality:
    """Perplexity of both models on windows of tokens, and how often they predict the same."""
    tokens, agreed = 0, 0
    losses = [0.0, 0.0]
    for window in windows:
        ids = torch.tensor([window], device=model.device)
        predictions = []
        for i, one in enumerate((model, skipped)):
            logits = one(input_ids=ids, use_cache=False).logits[0, :-1]
            losses[i] += float(cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
            predictions.append(logits.argmax(-1))
        agreed += int((predictions[0] == predictions[1]).sum())
        tokens += len(window) - 1
    full, part = (float(torch.tensor(loss / tokens).exp()) for loss in losses)
    return Quality(tokens, full, part, agreed / tokens)


def counts(runtime: Runtime) -> Counts:
    """What a compiled model has done until now."""
    counters = runtime.counters
    return Counts(
        captures=counters.captures,
        pieces=runtime.pieces_compiled,
        links=counters.links,
        dropped=counters.dropped,
        compile_seconds=runtime.compile_seconds,
    )


@torch.no_grad()
def link_new_plans(runtime: Runtime, repeats: int) -> tuple[tuple[float, ...], int]:
    """Link several plans that differ from all before, as decode steps do it.

    Each skips one more ffn than the runtime's plan.

    Returns:
        Seconds for each, and how many pieces were compiled for all of them.
    """
    plan = plans_of(runtime.plan)[0]
    running = [s for s in plan.sublayers if s not in plan.decode]
    extra = [s for s in running if s.kind == "ffn"][:repeats] if len(running) > 1 else []
    cache = runtime.new_cache(learn=False)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=runtime.model.device)
    runtime.step(ids, None, None, cache, 1)
    runtime.step(ids[:, :1], None, None, cache, 1)
    seconds, pieces = [], runtime.pieces_compiled
    for sublayer in extra:
        cache.request.decode_with(plan.with_decode_extra([sublayer]))
        before = runtime.counters.link_seconds
        runtime.step(ids[:, :1], None, None, cache, 1)
        seconds.append(runtime.counters.link_seconds - before)
    return tuple(seconds), runtime.pieces_compiled - pieces
