"""The clock behind a latency table: whole prompts and decode steps of a compiled model.

Pieces are never timed alone: on a GPU a decode step is one graph, and what a sublayer costs is
what a step takes longer with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of

from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import Phase, SkipPlan
from ..runtime.runtime import Runtime

_SHORT = 0.1  # seconds


class StepTimer:
    """Seconds of one prompt or of one decode step; call it with (phase, context, plan).

    All decode steps of a context run on one request, whose last tokens are taken back, so that
    going from plan to plan costs nothing.

    steps: decode steps that are timed, after one that is not. A GPU runs them without a pause and
        is waited for once; on a CPU the quickest counts, since others may interrupt the rest.
    """

    def __init__(self, runtime: Runtime, batch: int = 1, steps: int = 8) -> None:
        self.runtime = runtime
        self.batch = batch
        self.steps = steps
        self._held: tuple[int, SkipCache] | None = None

    def __call__(self, phase: Phase, context: int, plan: SkipPlan) -> float:
        if phase == "prefill":
            self._held = None  # its memory
            return self._prompt(context, plan)
        return self._step(context, plan)

    def _prompt(self, context: int, plan: SkipPlan) -> float:
        """Short prompts run a few times, and the quickest counts: the others were interrupted."""
        ids = self._tokens(context)

        def prompt() -> None:
            cache = self.runtime.new_cache(capacity=context + 1, plan=plan)
            self.runtime.step(ids, None, None, cache, 1)

        took = [self._timed(prompt)]
        while sum(took) < _SHORT and len(took) < self.steps:
            took.append(self._timed(prompt))
        return min(took)

    def _step(self, context: int, plan: SkipPlan) -> float:
        """The last of the steps is the one that stores token number `context`."""
        before = max(2, context - self.steps - 1)
        cache = self._request(before)
        cache.request.decode_with(plan)
        token = self._tokens(1)

        def step() -> None:
            self.runtime.step(token, None, None, cache, 1)

        step()  # links the plan, or looks it up
        if self.runtime.device.type == "cuda":
            took = self._timed(step, self.steps)
        else:
            took = min(self._timed(step) for _ in range(self.steps))
        if not cache.stateful:
            cache.keep_first(before)
        return took

    def _timed(self, run: Callable[[], None], times: int = 1) -> float:
        """Seconds of one of so many runs in a row."""
        self._wait()
        start = time.perf_counter()
        for _ in range(times):
            run()
        self._wait()
        return (time.perf_counter() - start) / times

    def _request(self, before: int) -> SkipCache:
        """A request of the full model with `before` tokens stored, and room for the steps."""
        if self._held is not None:
            length, cache = self._held
            if length == before and cache.length + self.steps + 1 < cache.capacity:
                return cache
        self._held = None  # before another is made
        full = SkipPlan.empty(self.runtime.sublayers)
        # states cannot be taken back: a model that has some goes on for a few rounds
        stateful = any(spec.mixes for spec in self.runtime.graphs.specs)
        room = before + (16 if stateful else 1) * (self.steps + 1)
        cache = self.runtime.new_cache(capacity=room, plan=full, learn=False)
        self.runtime.step(self._tokens(before), None, None, cache, 1)
        self._held = before, cache
        return cache

    def _tokens(self, count: int) -> torch.Tensor:
        words = int(self.runtime.model.config.get_text_config().vocab_size)
        generator = torch.Generator(device="cpu").manual_seed(count)
        size = self.batch, count
        ids = torch.randint(0, words, size, generator=generator, device="cpu")
        return ids.to(self.runtime.device)

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)


def conditions(model: Any, batch: int) -> dict[str, Any]:
    """What the times of a compiled model depend on besides the model."""
    import transformers

    from ..latency.table import device_name

    on_cpu = model.device.type == "cpu"
    return {
        "device": device_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": batch,
        "backend": runtime_of(model).graphs.backend,
        **({"threads": torch.get_num_threads()} if on_cpu else {}),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
