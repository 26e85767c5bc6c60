"""Steps of a few tokens on whole buffers, at addresses that stay: on a GPU one recorded graph each.

Decoding is a step of one token of each row. Drafts that are to be verified are steps of a few:
there are some sizes of them (`SIZES`), and what is shorter runs as the next size.
What comes after its tokens is written where the next step writes, so it is never seen.

Rows may begin with padding, as attention is told by the first token of each. A step needs no
autocast region, and a model that can be captured that way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeAlias
from weakref import WeakSet

import torch

from adaskip_passes import Recorder, UnsupportedError

from ..capture.arguments import bind_arguments, step_inputs
from ..capture.batch_sizes import BatchSizes
from ..capture.graph_key import GraphKey, GraphPhase, Surroundings
from ..capture.state import ChangedError
from ..kv_cache.buffer_pool import BufferPool
from ..kv_cache.buffers import CacheBuffers
from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import SkipPlan, Sublayer
from ..programs.program import Program
from ..programs.program_cache import Graphs
from .inputs import Inputs
from .request import Request
from .static_step import StaticBinding, StaticStep

logger = logging.getLogger(__name__)

#: What ran, its logits [B, kept, V], and the statistics [probed, B, 5] if anything was probed.
Ran: TypeAlias = tuple[Program, torch.Tensor, torch.Tensor | None]

#: New tokens of steps that are not decoding: the last token and drafts of 3, 7, 15, 16 and 31.
SIZES = (4, 8, 16, 17, 32)


def size_of(tokens: int) -> int:
    """Return how many tokens the step has that several tokens run in, no more than the largest."""
    return next(size for size in SIZES if size >= tokens)


class StaticRunner:
    """Runs the steps on a static cache of all requests of one compiled model.

    Attributes:
        enabled: whether there are any; see `Runtime.static_cache`.
        why_not: why the model could not be captured that way; None if it could.
    """

    def __init__(self, graphs: Graphs, buffer_pool: BufferPool, enabled: bool) -> None:
        self.enabled = enabled
        self.why_not: str | None = None
        self._graphs = graphs
        self._buffer_pool = buffer_pool
        self._recorder: Recorder | None = None  # on a GPU, at the first step
        self._refused: set[GraphPhase] = set()  # that cannot be captured so
        self._steps: WeakSet[StaticStep] = WeakSet()
        graphs.ranks.at_end(self._let_go)

    @property
    def recorded(self) -> int:
        """How many CUDA graphs have been recorded so far."""
        return self._recorder.recorded if self._recorder is not None else 0

    @property
    def begun(self) -> int:
        """How many of them have been launched so far, which takes long the first time."""
        return self._recorder.begun if self._recorder is not None else 0

    def run(
        self,
        phase: GraphPhase,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        inputs: Inputs,
        cache: SkipCache,
    ) -> Ran | None:
        """Run a step as `Runner.run` does, logits of all new tokens; None where it cannot be."""
        size = self._size(phase, inputs.input_ids.shape[1], cache)
        surroundings = Surroundings.now(inputs.input_ids.device)
        if size is None or surroundings.autocast:
            return None
        inputs.check_positions()
        ids, _, positions, padding = inputs
        binding, step = self._bound(phase, request, plan, probed, surroundings, cache, ids, size)
        if binding is None:
            return None
        program, arguments = binding.program, binding.arguments
        if padding is not None and not self._graphs.takes_padding(program.captured):
            return None
        weights = request.weights_of(program, arguments, cache.length, self._graphs.states)
        valid = request.valid_rows(ids) if probed else None
        logits, statistics = step.run(
            program, arguments, weights, ids, positions, cache.length, padding, valid
        )
        return program, logits[:, : ids.shape[1]], statistics

    def look_up(self, request: Request, plan: SkipPlan, cache: SkipCache) -> None:
        """Look up now what steps of several tokens repeat, of those the buffers have seen before.

        A device may be busy with the prompt meanwhile; later it would wait for that.

        Args:
            request: the request, whose prompt has been run.
            plan: what such steps will run with.
            cache: its cache.
        """
        buffers, surroundings = cache.lease.buffers, Surroundings.now(self._graphs.device)
        for tokens, step in self._of_several(cache, surroundings):
            if buffers is not None and step.has_run:
                form = step, buffers, plan, (), surroundings, request
                binding = request.bindings[tokens, plan] = self._bind("extend", *form)
                known = binding.program, binding.arguments, cache.length
                request.weights_of(*known, self._graphs.states)

    def bound(
        self, request: Request, plan: SkipPlan, cache: SkipCache
    ) -> Iterator[tuple[int, StaticStep, StaticBinding]]:
        """Yield the steps of several tokens that the request has what they repeat of.

        Args:
            request: the request.
            plan: what such steps run with.
            cache: its cache.

        Yields:
            How many tokens a step has, the step, and what it repeats.
        """
        buffers, surroundings = cache.lease.buffers, Surroundings.now(self._graphs.device)
        for tokens, step in self._of_several(cache, surroundings):
            binding = request.bindings.get((tokens, plan))
            if buffers is None or binding is None:
                continue
            serves = binding.serves(buffers, plan, (), surroundings)
            if serves and self._graphs.use(binding.program):
                yield tokens, step, binding

    def _of_several(
        self, cache: SkipCache, surroundings: Surroundings
    ) -> list[tuple[int, StaticStep]]:
        """Return the steps of several tokens that a request's buffers know, by how many."""
        buffers = cache.lease.buffers
        possible = self.enabled and "extend" not in self._refused and not cache.stateful
        if buffers is None or not possible or surroundings.autocast:
            return []
        usual = buffers.whole == self._buffer_pool.whole
        return [(n, step) for n, step in buffers.steps.items() if n > 1 and usual]

    def _bound(
        self,
        phase: GraphPhase,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        surroundings: Surroundings,
        cache: SkipCache,
        ids: torch.Tensor,
        size: int,
    ) -> tuple[StaticBinding | None, StaticStep]:
        """Return the step of the request's buffers and what it repeats; None if it cannot be."""
        while True:
            buffers = cache.reserve(ids.shape[0], size)
            step = self._step(buffers, size)
            binding = request.bindings.get((size, plan))
            wanted = buffers, plan, probed, surroundings
            if (
                binding is not None
                and binding.serves(*wanted)
                and self._graphs.use(binding.program)
            ):
                return binding, step
            try:
                binding = self._bind(phase, step, *wanted, request)
            except ChangedError:
                raise
            except UnsupportedError as error:
                if phase == "decode" and not self._buffer_pool.whole:
                    self._buffer_pool.whole = True  # code that makes masks of its own may do so
                    continue
                self._give_up(phase, error)
                return None, step
            request.bindings[size, plan] = binding
            return binding, step

    def _size(self, phase: GraphPhase, tokens: int, cache: SkipCache) -> int | None:
        """Return the tokens of the step that runs `tokens` new ones; None for views of them."""
        if not self.enabled or phase in self._refused or phase == "prefill":
            return None
        if phase == "decode":
            return 1
        if cache.stateful or tokens > SIZES[-1]:  # a state cannot forget what is no token
            return None
        size = size_of(tokens)
        longest = self._graphs.max_length
        return size if longest is None or cache.length + size <= longest else None

    def _step(self, buffers: CacheBuffers, tokens: int) -> StaticStep:
        """Return the steps of so many tokens that work on these buffers."""
        step = buffers.steps.get(tokens)
        if step is None:
            device = self._graphs.device
            if self._recorder is None and device.type == "cuda":
                self._recorder = Recorder(device)
            how = self._recorder, self._graphs.budget
            step = StaticStep(buffers, self._graphs.specs, tokens, device, *how)
            buffers.steps[tokens] = step
            self._steps.add(step)
        return step

    def _let_go(self) -> None:
        """Free every CUDA graph: the process group whose collectives are in them ends."""
        for step in list(self._steps):
            step.let_go()

    def _bind(
        self,
        phase: GraphPhase,
        step: StaticStep,
        buffers: CacheBuffers,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        surroundings: Surroundings,
        request: Request,
    ) -> StaticBinding:
        graphs, inputs = self._graphs, step.inputs
        tokens = inputs.tokens.shape[1]
        key = GraphKey(
            phase,
            BatchSizes.around(buffers.batch, tokens),
            one_token=tokens == 1,
            one_stored=False,
            masked=False,
            last_logits=tokens == 1,
            dtype=graphs.model.dtype,
            device=graphs.device,
            surroundings=surroundings,
            static_tokens=tokens,
            whole=buffers.whole,
            by_head=buffers.by_head,
        )
        keep = int(key.last_logits)
        given = step_inputs(graphs.forward, inputs.tokens, inputs.positions, None, keep)
        arguments = bind_arguments(graphs.model, graphs.forward, step.cache, given)
        program = graphs.program(key, plan, probed, arguments, request.begun)
        return StaticBinding(buffers, plan, probed, surroundings, program, arguments)

    def _give_up(self, phase: GraphPhase, error: UnsupportedError) -> None:
        """Run steps of this phase on views of the filled cache from now on; `report` says why."""
        logger.info("no static cache for %s: %s", phase, error)
        self._refused.add(phase)
        if phase == "decode":
            self.enabled = self._buffer_pool.keep = self._buffer_pool.whole = False
            self.why_not = str(error)
            self._buffer_pool.clear()
