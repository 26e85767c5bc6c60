"""What a round of drafts takes beside its program: the host, the rollback and the controller.

A round of 7 drafts in ``generate`` is compared with the bare program that reads 8 tokens on as many
stored ones. Drafts are what the model itself generates, so that blocks are appended whole; in
bfloat16 some may be rejected, and how many stand is told.

Without a GPU the host does everything, on a static cache and ahead of itself as with one. Times are
those of its own processor, so that others who use it don't count. There `reads` is how often the
host looks at a tensor in a round, which is how often it would wait for a GPU; `gap_us` is what it
does from the first of these to the next program, which is how long a GPU would wait for it, and
`outside_us` all it does outside of programs, much of which a GPU would not notice.
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
from adaskip_fx.programs.program import Program
from adaskip_fx.speculation.chooser import Chooser
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.proposals import Context, Drafts
from adaskip_fx.speculation.speculation import Speculation

from .. import models
from ..ceilings import synchronize

DRAFTS = 7
TARGET = 0.03  # of a decode step
_LENGTHS = {"cuda": (8192, 32768), "cpu": (128,)}
#: What the host looks at a tensor with.
_READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@dataclass
class Known:
    """Proposes what a text goes on with, on the host as what is looked up.

    Attributes:
        text: all of it, by row.
    """

    text: list[list[int]]
    name: str = "known"
    free: bool = True

    def begin(self) -> Known:
        """Draft for another request of the same text."""
        return self

    def propose(self, context: Context, most: int) -> Drafts | None:
        """Return the next tokens."""
        begin = len(context.rows[0])
        tokens = [row[begin : begin + min(most, DRAFTS)] for row in self.text]
        return Drafts.on_host(tokens, "", 0.8) if tokens[0] else None


class Timers:
    """Seconds of host time in some methods, and how often it looks at a tensor between programs.

    Attributes:
        seconds: by name; as "gap" those from the first look after a program to the next one.
        reads: how often.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with nothing."""
        self.seconds: dict[str, float] = {}
        self.reads, self._clock, self._inside = 0, clock, 0
        self._looked: float | None = None  # when, if it was after the last program

    def clear(self) -> None:
        """Begin again."""
        self.seconds.clear()
        self.reads = 0

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = method(*args, **kwargs)
            if not self._inside:
                self.reads += 1
                self._looked = self._looked or self._clock()
            return found

        return call

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method whose calls are counted under a name."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            self._inside += name == "program"
            if self._inside and self._looked is not None:
                self.seconds["gap"] = self.seconds.get("gap", 0.0) + start - self._looked
                self._looked = None
            try:
                return method(*args, **kwargs)
            finally:
                self._inside -= name == "program"
                took = self._clock() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + took

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the controller, the rollback and programs take meanwhile, and the looks."""
        places = {"controller": (Chooser, ("offer", "drafts", "verified", "took"))}
        places["rollback"] = (SkipCache, ("keep_first",))
        places["program"] = (Program, ("__call__",))
        patches = [
            mock.patch.object(kind, method, self.timed(name, getattr(kind, method)))
            for name, (kind, methods) in places.items()
            for method in methods
        ]
        patches += [
            mock.patch.object(torch.Tensor, read, self._counted(getattr(torch.Tensor, read)))
            for read in _READS
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
    before = runtime.speculation, runtime.static_cache, runtime.ahead
    kept, rounds = runtime.buffer_pool.keep, 24
    runtime.static_cache = runtime.ahead = runtime.buffer_pool.keep = True
    try:
        for length in _LENGTHS[fast.device.type]:
            yield _row(fast, length, rounds)
            fast.adaskip.free()
    finally:
        runtime.speculation, runtime.static_cache, runtime.ahead = before
        runtime.buffer_pool.keep = kept


def _clock(device: torch.device) -> Callable[[], float]:
    """Return what tells seconds: of the host's own processor, where it does everything."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def _row(fast: Any, length: int, rounds: int) -> dict[str, Any]:
    runtime, prompt = runtime_of(fast), models.tokens(1, length)
    empty, new = SkipPlan.empty(fast.adaskip.sublayers), rounds * (DRAFTS + 1) + 1
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": fast.config.vocab_size}
    options["attention_mask"] = torch.ones_like(prompt)
    runtime.speculation = None
    text = fast.generate(prompt, **options).tolist()
    clock, parts, stood = _clock(fast.device), dict[str, float](), 0.0
    found, outside, gaps = list[float](), list[float](), list[float]()
    timers = Timers(clock)
    for turn in range(4):  # the first one sets things up
        decoding = Lossless((Known(text),), DRAFTS, adaptive=False)
        runtime.speculation = speculation = Speculation(decoding, empty)
        with timers.watching():
            times = _Times(fast.device, clock, timers)
            fast.generate(prompt, streamer=times, **options)
        done = max(1, speculation.stats.verifications + speculation.stats.steps)
        if turn:
            found.append((times.last - times.first) / done)
            parts = {n: took / done for n, took in timers.seconds.items()}
            outside.append(found[-1] - parts.pop("program", 0.0))
            gaps.append(parts.pop("gap", 0.0))
            stood = speculation.stats.tokens_per_step
    runtime.speculation = None
    step, verified = _bare(fast, prompt, rounds)
    over = statistics.median(found) - verified
    known, here = sum(parts.values()), dict[str, float]()
    if fast.device.type == "cpu":
        here = {"reads": timers.reads / done}
        here |= {"gap_us": 1e6 * min(gaps), "outside_us": 1e6 * min(outside)}
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
            **here,
        },
    }


class _Times:
    """A streamer that takes the time of the first new token, when counting begins, and the end."""

    def __init__(self, device: torch.device, clock: Callable[[], float], timers: Timers) -> None:
        self.first = self.last = 0.0
        self._device, self._clock, self._timers, self._calls = device, clock, timers, 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call is the prompt
            self._timers.clear()
            self.first = self._clock()

    def end(self) -> None:
        synchronize(self._device)
        self.last = self._clock()


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

            found.append(statistics.median(_seconds(run, fast.device)) / rounds)
    return found[0], found[1]


def _seconds(run: Callable[[], None], device: torch.device) -> list[float]:
    """Return what four runs take after one that sets things up, each to its end."""
    clock, found = _clock(device), list[float]()
    for _ in range(5):
        start = clock()
        run()
        synchronize(device)
        found.append(clock() - start)
    return found[1:]
