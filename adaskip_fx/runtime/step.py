"""One step with a plan that is given: the graph that its inputs need, the program, and its run.

A step is handed views of the filled cache. One of a few tokens may work on whole buffers instead,
at addresses that stay (`static_runner`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from ..capture.arguments import bind_arguments, is_embedded, step_inputs
from ..capture.graph_key import GraphPhase, Surroundings
from ..kv_cache.buffer_pool import BufferPool
from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import SkipPlan, Sublayer
from ..programs.program import Program
from ..programs.program_cache import Graphs
from .inputs import Inputs
from .kept_logits import cut, kept_logits
from .packed import PackedRunner
from .request import Request
from .static_runner import Ran, StaticRunner
from .view_binding import Form, ViewBinding


class Runner:
    """Runs the steps of all requests of one compiled model.

    Attributes:
        graphs: what has been captured, compiled and linked.
        buffer_pool: K/V buffers between requests.
        static: runs steps on a static cache.
        packed: runs prompts of padded rows.
        observer: is told of every step; see `Runtime`.
    """

    def __init__(self, graphs: Graphs, static_cache: bool | None) -> None:
        self.graphs = graphs
        on_gpu = graphs.device.type == "cuda"
        wanted = on_gpu if static_cache is None else static_cache
        self.buffer_pool = BufferPool(wanted, graphs.trained_length, graphs.budget)
        self.static = StaticRunner(graphs, self.buffer_pool, wanted)
        self.packed = PackedRunner(graphs)
        self.observer: Callable[[Program, SkipPlan, int], None] | None = None

    @torch.no_grad()
    def run(
        self,
        phase: GraphPhase,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        inputs: Inputs,
        cache: SkipCache,
        logits_to_keep: int | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run new tokens of a request, which are added to its cache.

        Args:
            phase: which of the captured phases.
            request: keeps what its steps have in common: weights, the binding, ended rows.
            plan: what is skipped.
            probed: sublayers to measure.
            inputs: the new tokens.
            cache: the request's.
            logits_to_keep: 0 for the logits of all new tokens, n for those of the last n; or the
                indices of some, int64 [K] on the model's device.

        Returns:
            Logits [B, kept, V], and the statistics [probed, B, 5] if anything is probed.
        """
        masked, before = inputs.attention_mask is not None, cache.padded
        if masked and cache.lease.buffers is not None:
            cache.lease.buffers.sliding.check_mask()
        cache.padded |= masked
        form = phase, request, plan, probed, inputs, cache, logits_to_keep
        try:
            ran = None
            if request.instrument is None and (not masked or inputs.padding is not None):
                ran = self._without_mask(*form)
            program, logits, statistics = ran or self._on_views(*form)
        except BaseException:
            cache.padded = before
            raise
        if self.observer is not None:
            self.observer(program, plan, inputs.input_ids.numel())
        cache.advance(inputs.input_ids.shape[1])
        return logits, statistics

    def run_prompt(
        self,
        phase: GraphPhase,
        request: Request,
        inputs: Inputs,
        cache: SkipCache,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor:
        """Run a prompt with the request's plan; arguments and logits as of `run`.

        If the plan says `last_token_full`, the last token runs with the decode plan. It is none of
        the turn's decoded tokens: nothing is measured at it.
        """
        plan = request.plan
        if not plan.last_token_full:
            return self.run(phase, request, plan, (), inputs, cache, logits_to_keep)[0]
        if isinstance(logits_to_keep, torch.Tensor):
            return self.run_prompt(phase, request, inputs, cache, 0)[:, logits_to_keep]
        inputs.check_positions()
        head, tail = inputs.cut_last_token()
        before, parts = cache.length, list[torch.Tensor]()
        try:
            if head is not None:
                keep = max(1, logits_to_keep - 1) if logits_to_keep else 0
                parts.append(self.run(phase, request, plan, (), head, cache, keep)[0])
            parts.append(self.run("decode", request, plan, (), tail, cache, 1)[0])
        except BaseException:
            take_back(cache, before)
            raise
        return parts[-1] if logits_to_keep == 1 else torch.cat(parts, 1)

    def _without_mask(
        self,
        phase: GraphPhase,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        inputs: Inputs,
        cache: SkipCache,
        logits_to_keep: int | torch.Tensor,
    ) -> Ran | None:
        """Run a step on a static cache, or a packed prompt; None where neither is possible.

        A turn of which the last token's logits alone are wanted is a prompt: its length may be
        anything, and one graph serves all. Where those of several are, tokens are to be verified.
        """
        if phase == "prefill" and not probed:
            return self.packed.run(request, plan, inputs, cache, logits_to_keep)
        if phase == "extend" and isinstance(logits_to_keep, int) and logits_to_keep == 1:
            return None
        if not self.static.enabled or is_embedded(inputs.input_ids) or inputs.axes:
            return None
        ran = self.static.run(phase, request, plan, probed, inputs, cache)
        if ran is None:
            return None
        program, logits, statistics = ran
        return program, cut(logits, logits_to_keep), statistics

    def _on_views(
        self,
        phase: GraphPhase,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        inputs: Inputs,
        cache: SkipCache,
        logits_to_keep: int | torch.Tensor,
    ) -> Ran:
        graphs, instrument, ids = self.graphs, request.instrument, inputs.input_ids
        forward, (batch, tokens) = graphs.forward, ids.shape[:2]
        kept = kept_logits(forward, logits_to_keep, ids)
        mask, positions = inputs.normal(cache.length)
        views, buffers = cache.step_view(batch, tokens, phase == "prefill"), cache.lease.buffers
        form = Form(
            phase,
            batch,
            tokens == 1,
            cache.length + tokens == 1,
            mask is not None,
            kept.last,
            Surroundings.now(ids.device),
            is_embedded(ids),
            inputs.axes,
            buffers is not None and buffers.by_head,
        )
        given = step_inputs(forward, ids, positions, mask, kept.argument)
        arguments = bind_arguments(graphs.model, forward, views, given)
        binding, wanted = request.on_views, (form, plan, probed, instrument)
        if (
            binding is None
            or not binding.serves(*wanted)
            or not graphs.use(binding.program, arguments)
        ):
            key = form.key(graphs.model.dtype, graphs.device)
            program = graphs.program(key, plan, probed, arguments, request.begun, instrument)
            weights = request.weights_of(program, arguments, cache.length, graphs.states)
            binding = request.on_views = ViewBinding.of(*wanted, program, weights)
        program, weights = binding.program, binding.weights
        valid = _valid(request, phase, ids, mask) if probed else None
        if instrument is not None:
            logits, statistics = instrument.run(program, arguments, weights, valid)
        else:
            logits, statistics = program(arguments, weights, valid)
        return program, kept.of(logits), statistics


def take_back(cache: SkipCache, before: int) -> None:
    """Forget what a step stored that failed; where that cannot be done, its error says more."""
    if not cache.stateful:  # (a mixer's state cannot be taken back)
        with contextlib.suppress(NotImplementedError):  # windows may have let go of what they saw
            cache.keep_first(before)


def _valid(
    request: Request,
    phase: GraphPhase,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Which of the new tokens count for a probe, bool [B, T]."""
    by_id = not is_embedded(input_ids)  # (an embedding ends no row)
    rows = request.valid_rows(input_ids) if by_id and phase == "decode" else None
    if rows is not None:
        return rows
    if mask is not None and phase != "decode":
        return mask[:, -input_ids.shape[1] :]
    return torch.ones(input_ids.shape[:2], dtype=torch.bool, device=input_ids.device)
