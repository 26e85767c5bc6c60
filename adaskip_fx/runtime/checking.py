"""``ADASKIP_CHECK=1``: every step is compared with the eager model, at whatever it costs.

The model runs beside the request, on a cache of its own, with the sublayers left out that the plan
in force leaves out. Decode steps also look whether the model is still what the request began with,
which they do not do otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from adaskip_passes.errors import AdaskipError
from adaskip_passes.tracing.dynamo import one_at_a_time

from ..capture.arguments import step_inputs
from ..capture.check_graph import relative_error
from ..capture.layer_memory import new_cache
from ..capture.reference import tolerance
from ..capture.state import State
from ..kv_cache.argument_names import cache_argument
from ..kv_cache.cache import SkipCache
from ..kv_cache.padding import of_real_tokens
from ..plans.skip_plan import Action, Phase, SkipPlan
from .inputs import Inputs

if TYPE_CHECKING:
    from ..programs.program_cache import Graphs


class CheckError(AdaskipError, AssertionError):
    """A step gave other logits than the eager model."""


def checks() -> bool:
    """Whether the environment asks for it, now."""
    return os.environ.get("ADASKIP_CHECK", "") not in ("", "0")


@dataclass
class _Beside:
    """transformers' cache of a request's tokens, how many there are, and of which rows."""

    cache: Any
    rows: int
    length: int = 0

    def keep_first(self, tokens: int) -> bool:
        """Forget the others; False where that cannot be done."""
        layers = self.cache.layers
        if any(getattr(layer, "conv_states", None) is not None for layer in layers):
            return False
        for layer in layers:
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = (t[:, :, :tokens] for t in (layer.keys, layer.values))
        self.length = tokens
        return True


class Checker:
    """Runs the eager model beside requests and compares logits.

    Attributes:
        worst: the largest difference so far, in units of a step's largest logit; None before the
            first comparison.
        compared: how many steps were compared.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.worst: float | None = None
        self.compared = 0
        self._graphs = graphs
        self._beside: WeakKeyDictionary[SkipCache, _Beside] = WeakKeyDictionary()

    @torch.no_grad()
    def compare(
        self,
        plan: SkipPlan,
        phase: Phase,
        inputs: Inputs,
        cache: SkipCache,
        state: State,
        logits: torch.Tensor,
        keep: int | torch.Tensor,
    ) -> None:
        """Compare one step, which is counted in `cache` already.

        A request whose earlier steps were not seen (a cache that was loaded, copied or put in
        another order) is not compared.

        Args:
            plan: what was in force.
            phase: of the plan.
            inputs: the new tokens.
            cache: the request's.
            state: what it began with.
            logits: [B, kept, V].
            keep: what was asked for, as of `Runner.run`.

        Raises:
            CheckError: they are others than the model's.
        """
        before = cache.length - inputs.input_ids.shape[1]
        theirs = self._of(cache, before)
        if theirs is None:
            return
        cut = plan.last_token_full and phase == "prefill"
        head, tail = inputs.cut_last_token() if cut else (inputs, None)
        parts = [self._logits(plan, phase, head, theirs, state)] if head is not None else []
        if tail is not None:
            parts.append(self._logits(plan, "decode", tail, theirs, state))
        expected = torch.cat(parts, 1)
        kept = keep if isinstance(keep, torch.Tensor) else slice(-logits.shape[1], None)
        mask = inputs.attention_mask
        real = None if mask is None else mask[:, -inputs.input_ids.shape[1] :][:, kept]
        got, want = (of_real_tokens(t, real) for t in (logits, expected[:, kept]))
        error = relative_error(got, want) if want.numel() else 0.0
        self.compared += 1
        self.worst = max(error, self.worst or 0.0)
        reference = self._graphs.states.current.reference
        own = logits.dtype == reference.dtype
        if not error <= (reference.tolerance if own else tolerance(logits.dtype)):
            new = inputs.input_ids.shape[1]
            raise CheckError(
                f"ADASKIP_CHECK: the logits of {new} token(s) after {before} ({phase}, plan "
                f"{plan.digest[:8]}) differ from the eager model's by {error:.1e} of the largest"
            )

    def _of(self, cache: SkipCache, before: int) -> _Beside | None:
        """What has the `before` tokens that a request has stored; None if there is none."""
        if not before:
            self._beside[cache] = _Beside(new_cache(self._graphs.model), cache.reordered)
        beside = self._beside.get(cache)
        if beside is not None and beside.rows != cache.reordered:
            del self._beside[cache]
            return None
        if beside is None or beside.length == before:
            return beside
        if before < beside.length and beside.keep_first(before):
            return beside
        del self._beside[cache]
        return None

    def _logits(
        self, plan: SkipPlan, phase: Phase, inputs: Inputs, beside: _Beside, state: State
    ) -> torch.Tensor:
        """Of all new tokens, [B, T, V]."""
        from .oracle import Oracle

        left_out = (s for s in plan.sublayers if plan.action(phase, s) is not Action.RUN)
        skips = {str(s): plan.surrogates.get(s) for s in left_out}
        forward = self._graphs.forward
        mask, positions = inputs.normal(beside.length)
        given = step_inputs(forward, inputs.input_ids, positions, mask, 0)
        with self._eager(state) as model:
            seen = self._graphs.structure.heads(plan.windows.of_phase(phase))
            oracle = Oracle(model, self._graphs.structure.modules, skips, skips, seen, seen)
            with oracle.watching():
                oracle.begin(decoding=phase == "decode")
                named = {cache_argument(forward): beside.cache}
                logits: torch.Tensor = forward(model, **given, **named, use_cache=True).logits
        beside.length += inputs.input_ids.shape[1]
        return logits

    @contextmanager
    def _eager(self, state: State) -> Iterator[Any]:
        """The original; the compiled model's own modules where it was changed and that was not."""
        states, model = self._graphs.states, self._graphs.model
        with one_at_a_time:
            if state is states.first:
                yield states.original
                return
            with state.reference.implementations_of(model):
                yield model
