"""What a round of drafts takes beside its program: the host, the rollback and the controller.

A round of 7 drafts in ``generate`` is compared with the bare program that reads 8 tokens on as many
stored ones. Drafts are what the model itself generates, so that blocks are appended whole; in
bfloat16 some may be rejected, and how many stand is told.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.kv_cache.drafting import Drafting
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.speculation.chooser import Chooser
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.proposals import Context, Drafts
from adaskip_fx.speculation.speculation import Speculation

from .. import models
from ..ceilings import seconds, synchronize

DRAFTS = 7
TARGET = 0.03  # of a decode step
_LENGTHS = {"cuda": (8192, 32768), "cpu": (128,)}


@dataclass
class Known:
    """Proposes what a text goes on with.

    Attributes:
        text: all of it, int64 [B, T].
    """

    text: torch.Tensor
    name: str = "known"
    free: bool = True

    def begin(self) -> Known:
        """Draft for another request of the same text."""
        return self

    def propose(self, context: Context, most: int) -> Drafts | None:
        """Return the next tokens."""
        begin = context.input_ids.shape[1]
        tokens = self.text[:, begin : begin + min(most, DRAFTS)]
        return Drafts(tokens) if tokens.numel() else None


class Timers:
    """Seconds of host time in some methods."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method whose calls are counted under a name."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + took

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the controller and the rollback take meanwhile."""
        places = {"controller": (Chooser, ("offer", "drafts", "verified", "took"))}
        places["rollback"] = (SkipCache, ("keep_first",))
        patches = [
            mock.patch.object(kind, method, self.timed(name, getattr(kind, method)))
            for name, (kind, methods) in places.items()
            for method in methods
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def rows(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row for each length.

    Args:
        name: of a model, which is for other parts.
    """
    _, fast = models.pair()
    runtime = runtime_of(fast)
    before, rounds = runtime.speculation, 24 if fast.device.type == "cuda" else 8
    try:
        for length in _LENGTHS[fast.device.type]:
            yield _row(fast, length, rounds)
            fast.adaskip.free()
    finally:
        runtime.speculation = before


def _row(fast: Any, length: int, rounds: int) -> dict[str, Any]:
    runtime, prompt = runtime_of(fast), models.tokens(1, length)
    empty, new = SkipPlan.empty(fast.adaskip.sublayers), rounds * (DRAFTS + 1) + 1
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    options["attention_mask"] = torch.ones_like(prompt)
    runtime.speculation = None
    text = fast.generate(prompt, **options)
    found, parts, timers, stood = list[float](), dict[str, float](), Timers(), 0.0
    for turn in range(4):  # the first one sets things up
        decoding = Lossless((Known(text),), DRAFTS, adaptive=False)
        runtime.speculation = speculation = Speculation(decoding, empty)
        timers.seconds.clear()
        with timers.watching():
            times = _Times(fast.device)
            fast.generate(prompt, streamer=times, **options)
        done = max(1, speculation.stats.verifications + speculation.stats.steps)
        if turn:
            found.append((times.last - times.first) / done)
            parts = {n: took / done for n, took in timers.seconds.items()}
            stood = speculation.stats.tokens_per_step
    runtime.speculation = None
    step, verified = _bare(fast, prompt, rounds)
    over = statistics.median(found) - verified
    known = sum(parts.values())
    return {
        "what": f"loop overhead of a round of {DRAFTS} drafts on {length}: decode step",
        "ratio": over / step,
        "target": TARGET,
        "notes": {
            "step_ms": 1000 * step,
            "verify_ms": 1000 * verified,
            "round_ms": 1000 * statistics.median(found),
            **{f"{n}_ms": 1000 * took for n, took in sorted(parts.items())},
            "host_ms": 1000 * (over - known),
            "tokens_per_round": stood,
        },
    }


class _Times:
    """A streamer that takes the time of the first new token and of the end."""

    def __init__(self, device: torch.device) -> None:
        self.first = self.last = 0.0
        self._device, self._calls = device, 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call is the prompt
            self.first = time.perf_counter()

    def end(self) -> None:
        synchronize(self._device)
        self.last = time.perf_counter()


@torch.inference_mode()
def _bare(fast: Any, prompt: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Return the median seconds of a decode step, and of the program that reads a block."""
    length = prompt.shape[1]
    cache = fast.adaskip.new_cache(capacity=length + 2 * rounds * (DRAFTS + 1))
    fast(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    found = []
    with cache.verifying(Drafting(length)):
        for tokens in (1, DRAFTS + 1):
            ids = models.tokens(1, tokens)

            def run(ids: torch.Tensor = ids) -> None:
                for _ in range(rounds):
                    fast(input_ids=ids, past_key_values=cache)
                cache.keep_first(length)

            found.append(statistics.median(seconds(run, fast.device, 4, 1)) / rounds)
    return found[0], found[1]
