"""One step with a plan that is given: the graph that its inputs need, the program, and its run.

A step is handed views of the filled cache. A decode step may work on whole buffers instead, at
addresses that stay: it needs no padding and no autocast region, and a model that can be captured
that way (`static_step`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from adaskip_passes import Recorder, UnsupportedError

from ..capture.arguments import bind_arguments, step_inputs
from ..capture.graph_key import GraphKey, GraphPhase, Surroundings
from ..capture.state import ChangedError, Since
from ..kv_cache.buffer_pool import BufferPool
from ..kv_cache.buffers import CacheBuffers
from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import SkipPlan, Sublayer
from ..programs.program import Program
from ..programs.program_cache import Graphs
from .inputs import Inputs
from .kept_logits import KeptLogits, kept_logits
from .request import Request
from .static_step import DecodeBinding, StaticDecodeStep

#: What ran, its logits [B, kept, V], and the statistics [probed, B, 5] if anything was probed.
_Ran: TypeAlias = tuple[Program, torch.Tensor, torch.Tensor | None]


class Runner:
    """Runs the steps of all requests of one compiled model.

    Attributes:
        graphs: what has been captured, compiled and linked.
        buffer_pool: K/V buffers between requests.
        static_cache: whether decode steps work on a static cache; see `Runtime`.
        why_no_static_cache: why the model could not be captured that way; None if it could.
        observer: is told of every step; see `Runtime`.
    """

    def __init__(self, graphs: Graphs, static_cache: bool | None) -> None:
        self.graphs = graphs
        on_gpu = self.device.type == "cuda"
        self.static_cache = on_gpu if static_cache is None else static_cache
        self.why_no_static_cache: str | None = None
        self.buffer_pool = BufferPool(keep=self.static_cache)
        self.observer: Callable[[Program, SkipPlan, int], None] | None = None
        self._recorder: Recorder | None = None  # on a GPU, at the first decode step

    @property
    def device(self) -> torch.device:
        """Where the parameters are now (`PreTrainedModel.device` looks at all modules for that)."""
        device: torch.device = next(self.graphs.model.parameters()).device
        return device

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
        ran, masked = None, inputs.attention_mask is not None
        plain = request.instrument is None and not masked
        kept = kept_logits(self.graphs.forward, logits_to_keep, inputs.input_ids)
        if self.static_cache and phase == "decode" and plain:
            ran = self._on_static_cache(request, plan, probed, inputs, cache)
        if ran is None:
            ran = self._on_views(phase, request, plan, probed, inputs, cache, kept)
        program, logits, statistics = ran
        if self.observer is not None:
            self.observer(program, plan, inputs.input_ids.numel())
        cache.advance(inputs.input_ids.shape[1])
        cache.padded |= masked
        return kept.of(logits), statistics

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
            if not cache.stateful:  # (a mixer's state cannot be taken back)
                cache.keep_first(before)
            raise
        return parts[-1] if logits_to_keep == 1 else torch.cat(parts, 1)

    def _on_views(
        self,
        phase: GraphPhase,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        inputs: Inputs,
        cache: SkipCache,
        kept: KeptLogits,
    ) -> _Ran:
        batch, tokens = inputs.input_ids.shape
        mask, positions = inputs.normal(cache.length)
        key = GraphKey(
            phase,
            batch,
            one_token=tokens == 1,
            one_stored=cache.length + tokens == 1,
            masked=mask is not None,
            last_logits=kept.last,
            dtype=self.graphs.model.dtype,
            device=self.device,
            surroundings=Surroundings.now(self.device),
        )
        model, forward = self.graphs.model, self.graphs.forward
        given = step_inputs(forward, inputs.input_ids, positions, mask, kept.argument)
        views = cache.step_view(batch, tokens, phase == "prefill")
        arguments = bind_arguments(model, forward, views, given)
        instrument = request.instrument
        program = self.graphs.program(key, plan, probed, arguments, _since(request), instrument)
        weights = self._weights(request, program, arguments, cache)
        valid = _valid(request, phase, inputs.input_ids, mask) if probed else None
        if instrument is not None:
            return program, *instrument.run(program, arguments, weights, valid)
        return program, *program(arguments, weights, valid)

    def _on_static_cache(
        self,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        inputs: Inputs,
        cache: SkipCache,
    ) -> _Ran | None:
        """A decode step; None in an autocast region, and where the model cannot be captured so."""
        surroundings = Surroundings.now(self.device)
        if surroundings.autocast:
            return None
        inputs.check_positions()
        ids, _, positions = inputs
        buffers = cache.reserve(ids.shape[0], 1)
        static = self._static_step(buffers)
        binding, wanted = request.binding, (buffers, plan, probed, surroundings)
        if binding is None or not binding.serves(*wanted, self.graphs.counters):
            try:
                binding = request.binding = self._bind(static, *wanted, request)
            except ChangedError:
                raise
            except UnsupportedError as error:
                self._give_up_static_cache(error)
                return None
        program, arguments = binding.program, binding.arguments
        weights = self._weights(request, program, arguments, cache)
        valid = request.valid_rows(ids) if probed else None
        outputs = static.run(program, arguments, weights, ids, positions, cache.length, valid)
        return program, *outputs

    def _weights(
        self, request: Request, program: Program, arguments: dict[str, Any], cache: SkipCache
    ) -> tuple[Any, ...]:
        """The inputs that stay the same during a request, looked up at the graph's first step."""
        captured = program.captured
        weights = request.weights.get(captured)
        if weights is None:
            if cache.length:  # at its beginning the model was looked at just now
                self.graphs.states.require(_since(request))
            weights = request.weights[captured] = captured.weights(arguments)
        return weights

    def _static_step(self, buffers: CacheBuffers) -> StaticDecodeStep:
        """The steps that work on these buffers."""
        if buffers.decoder is None:
            if self._recorder is None and self.device.type == "cuda":
                self._recorder = Recorder(self.device)
            dtype = self.graphs.model.dtype
            buffers.decoder = StaticDecodeStep(
                buffers, self.graphs.specs, dtype, self.device, self._recorder
            )
        return buffers.decoder

    def _bind(
        self,
        static: StaticDecodeStep,
        buffers: CacheBuffers,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        surroundings: Surroundings,
        request: Request,
    ) -> DecodeBinding:
        graphs = self.graphs
        key = GraphKey(
            "decode",
            buffers.batch,
            one_token=True,
            one_stored=False,
            masked=False,
            last_logits=True,
            dtype=graphs.model.dtype,
            device=self.device,
            surroundings=surroundings,
            static_cache=True,
        )
        given = step_inputs(graphs.forward, static.tokens, static.positions, None, 1)
        arguments = bind_arguments(graphs.model, graphs.forward, static.cache, given)
        program = graphs.program(key, plan, probed, arguments, _since(request))
        return DecodeBinding(
            buffers, plan, probed, surroundings, program, arguments, graphs.counters.links
        )

    def _give_up_static_cache(self, error: UnsupportedError) -> None:
        """Decode on views of the filled cache from now on, as on a CPU; `report` says why."""
        self.static_cache = self.buffer_pool.keep = False
        self.why_no_static_cache = str(error)
        self.buffer_pool.clear()


def _since(request: Request) -> Since:
    assert request.since is not None, "a request begins with a prompt"
    return request.since


def _valid(
    request: Request,
    phase: GraphPhase,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Which of the new tokens count for a probe, bool [B, T]."""
    rows = request.valid_rows(input_ids) if phase == "decode" else None
    if rows is not None:
        return rows
    if mask is not None and phase != "decode":
        return mask[:, -input_ids.shape[1] :]
    return torch.ones_like(input_ids, dtype=torch.bool)
