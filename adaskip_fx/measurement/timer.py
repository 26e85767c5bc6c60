"""Clocks of whole prompts and decode steps, of a compiled model and of one as it is.

Pieces are never timed alone: on a GPU a decode step is one graph, and what a sublayer costs is
what a step takes longer with it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of

from ..kv_cache.argument_names import cache_argument
from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import Phase, SkipPlan
from ..profiles.fingerprint import unusual_layers
from ..runtime.runtime import Runtime
from .environment import environment

_SHORT = 0.1  # seconds


class _Clock:
    """Times calls on one device, and draws the tokens that are put to a model.

    Attributes:
        device: where the model runs.
        batch: rows of a prompt.
        steps: decode steps that are timed, after one that is not. A GPU runs them without a pause
            and is waited for once; on a CPU the quickest counts, since others may interrupt the
            rest.
    """

    def __init__(self, model: Any, batch: int, steps: int) -> None:
        self.device: torch.device = model.device
        self.batch = batch
        self.steps = steps
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    def _quickest(self, prompt: Callable[[], None]) -> float:
        """Return the seconds of a prompt; short ones run a few times and the quickest counts."""
        took = [self._timed(prompt)]
        while sum(took) < _SHORT and len(took) < self.steps:
            took.append(self._timed(prompt))
        return min(took)

    def _of_steps(self, step: Callable[[], None]) -> float:
        """Return the seconds of one decode step out of several."""
        if self.device.type == "cuda":
            return self._timed(step, self.steps)
        return min(self._timed(step) for _ in range(self.steps))

    def _timed(self, run: Callable[[], None], times: int = 1) -> float:
        """Return the seconds of one of so many runs in a row."""
        self._wait()
        start = time.perf_counter()
        for _ in range(times):
            run()
        self._wait()
        return (time.perf_counter() - start) / times

    def _tokens(self, count: int) -> torch.Tensor:
        generator = torch.Generator(device="cpu").manual_seed(count)
        size = self.batch, count
        ids = torch.randint(0, self._vocabulary, size, generator=generator, device="cpu")
        return ids.to(self.device)

    def _stored_before(self, context: int) -> int:
        """Return how many tokens to store first: the last timed step stores token `context`."""
        return max(2, context - self.steps - 1)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class StepTimer(_Clock):
    """Seconds of one prompt or of one decode step of a compiled model.

    All decode steps of a context run on one request, whose last tokens are taken back, so that
    going from plan to plan costs nothing.

    Attributes:
        runtime: the compiled model's.
    """

    def __init__(self, runtime: Runtime, batch: int = 1, steps: int = 8) -> None:
        super().__init__(runtime.model, batch, steps)
        self.runtime = runtime
        self._held: tuple[int, SkipCache] | None = None

    def __call__(self, phase: Phase, context: int, plan: SkipPlan) -> float:
        """Return the seconds of a prompt of `context` tokens, or of a step that stores the last."""
        if phase == "prefill":
            self._held = None  # its memory
            return self._prompt(context, plan)
        return self._step(context, plan)

    def _prompt(self, context: int, plan: SkipPlan) -> float:
        ids = self._tokens(context)

        def prompt() -> None:
            cache = self.runtime.new_cache(capacity=context + 1, plan=plan, learn=False)
            self.runtime.step(ids, None, None, cache, 1)

        return self._quickest(prompt)

    def _step(self, context: int, plan: SkipPlan) -> float:
        before = self._stored_before(context)
        cache = self._request(before)
        cache.request.decode_with(plan)
        token = self._tokens(1)

        def step() -> None:
            self.runtime.step(token, None, None, cache, 1)

        step()  # links the plan, or looks it up
        took = self._of_steps(step)
        if not cache.stateful:
            cache.keep_first(before)
        return took

    def _request(self, before: int) -> SkipCache:
        """Return a request of the full model that stores `before` tokens and has room for steps."""
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


class EagerTimer(_Clock):
    """Seconds of one prompt or of one decode step of a model as transformers runs it.

    It uses the cache that the model makes for itself. Every decode time begins with a prompt of
    its own, since not every such cache can take tokens back.

    Attributes:
        model: a transformers decoder in evaluation mode.
    """

    def __init__(self, model: Any, batch: int = 1, steps: int = 8) -> None:
        super().__init__(model, batch, steps)
        self.model = model
        self._cache_name = cache_argument(model.forward)
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {
            "use_cache": True,
            **({"logits_to_keep": 1} if keeps else {}),
        }

    @torch.no_grad()
    def __call__(self, phase: Phase, context: int) -> float:
        """Return the seconds of a prompt of `context` tokens, or of a step that stores the last."""
        if phase == "prefill":
            ids = self._tokens(context)
            return self._quickest(lambda: self._run(ids, None))
        cache = self._run(self._tokens(self._stored_before(context)), None)
        token = self._tokens(1)
        self._run(token, cache)  # one that is not timed
        return self._of_steps(lambda: self._run(token, cache))

    def _run(self, ids: torch.Tensor, cache: Any) -> Any:
        """Run the model and return its cache, which grows in place."""
        given = {} if cache is None else {self._cache_name: cache}
        output = self.model(input_ids=ids, **self._options, **given)
        return getattr(output, self._cache_name)


def conditions(model: Any, batch: int) -> dict[str, Any]:
    """Return what the times of a compiled model depend on besides the model."""
    about = environment(model)
    on_cpu = model.device.type == "cpu"
    return {
        "device": about["device"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": unusual_layers(model),
        "batch": batch,
        "backend": runtime_of(model).graphs.backend,
        **({"threads": about["threads"]} if on_cpu else {}),
        "torch": about["torch"],
        "transformers": about["transformers"],
    }
