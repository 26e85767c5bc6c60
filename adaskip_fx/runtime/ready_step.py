"""Steps of several tokens that have been looked at beforehand: they need their tokens alone.

Between two blocks of drafts a device waits for the host. What a step looks at before it runs is
whether the model and the request are as they were, which program it needs and whether there is
room; none of that depends on how many drafts stand. So it is looked at while the device still
verifies the block before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..kv_cache.cache import SkipCache
from ..plans.decisions import Schedule
from ..plans.phase_split import as_decode
from .checking import checks
from .static_step import StaticBinding, StaticStep

if TYPE_CHECKING:
    from .runtime import Runtime


@dataclass(frozen=True, eq=False)
class ReadyStep:
    """A step of a few tokens of each row of one request, after those that are stored by then.

    Attributes:
        cache: the request's.
        room: tokens up to which its buffers have room, and nothing is to be said of so many.
    """

    cache: SkipCache
    room: int
    _step: StaticStep
    _binding: StaticBinding
    _weights: tuple[Any, ...]

    def run(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Run the step.

        Args:
            tokens: int64 [B, n], as many as the step has or fewer, on the host or the device.

        Returns:
            Their logits [B, n, V], which the next step of as many tokens overwrites; None where
            there is no room.
        """
        cache, binding, size = self.cache, self._binding, self._step.inputs.tokens.shape[1]
        length, new = cache.length, tokens.shape[1]
        if length + size > self.room or cache.lease.buffers is not binding.buffers:
            return None
        form = binding.program, binding.arguments, self._weights, tokens, None, length, None, None
        logits, _ = self._step.run(*form, own=False)
        cache.advance(new)
        return logits if new == size else logits[:, :new]


def ready_steps(runtime: Runtime, cache: SkipCache) -> dict[int, ReadyStep]:
    """Return the steps that a request may run next, by how many tokens each has.

    There are those that it has run, where nothing has to be looked at once more or told to others.

    Args:
        runtime: the model's.
        cache: the request's, whose next tokens are drafts; fewer of its tokens may be stored then.
    """
    request, drafting, graphs = cache.request, cache.drafting, runtime.graphs
    since, length = request.since, cache.length
    verifies = drafting is not None and not drafting.ended and length >= drafting.prompt
    usual = verifies and request.decoding and not isinstance(request.decision, Schedule)
    if not usual or since is None or since.weights_were_written:
        return {}
    watched = runtime.runner.observer is not None or request.instrument is not None or checks()
    if watched or not runtime.ranks.alone or torch.is_grad_enabled():
        return {}
    plan, found = as_decode(request.plan_at(length)), dict[int, ReadyStep]()
    for size, step, binding in runtime.runner.static.bound(request, plan, cache):
        weights, buffers = request.weights.get(binding.program.captured), binding.buffers
        room = min(buffers.capacity, buffers.sliding.reached)
        room = room if graphs.trained_length is None else min(room, graphs.trained_length)
        if weights is not None:
            found[size] = ReadyStep(cache, room, step, binding, weights)
    return found
