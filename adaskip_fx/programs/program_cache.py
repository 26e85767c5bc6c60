"""Captured graphs by key, and the programs linked from them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from adaskip_passes import UnsupportedError
from adaskip_passes.linking.piece_compiler import start_workers
from adaskip_passes.tracing.dynamo import one_at_a_time

from ..capture import attention, phase_graph
from ..capture.arguments import Forward
from ..capture.example_inputs import Lengths, example_lengths, lengths_of
from ..capture.graph_key import GraphKey
from ..capture.obstacles import named_obstacles
from ..capture.phase_graph import CapturedPhase
from ..capture.reference import ReferenceRun, positions, relies_on_length
from ..capture.state import ChangedError, Since
from ..capture.states import States
from ..capture.traced_part import decoder_name, traced_forward
from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.retention import Retention
from ..parallel.ranks import Ranks
from ..parallel.shards import head_shares
from ..plans.compose_surrogates import SurrogateTensors
from ..plans.skip_plan import PlanError, SkipPlan
from ..plans.sublayer import Sublayer
from ..utils.memory_budget import MemoryBudget
from .instruments import Instrument
from .kept_graphs import KeptGraphs
from .program import Link, Program, program_key
from .proofs import Proofs
from .structure import ModelStructure, piece_keys
from .variants import Counters, VariantCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# As many lengths may break a key's guards before it is an error: code that counts the chunks of a
# prompt is another graph for other counts, and so may be a model's own.
_GRAPHS_PER_KEY = 24

#: A plan, the sublayers to measure, and what the program is to do besides.
_Wanted: TypeAlias = tuple[SkipPlan, tuple[Sublayer, ...], Instrument]


class Graphs:
    """All graphs of one compiled model.

    Attributes:
        counters: captures, links and dropped programs so far.
        budget: what is kept for later, and how much of it there may be.
        ranks: the processes that run the model together.
        trained_length: positions that the model's config says; None if it says nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel,
        sample: ReferenceRun,
        backend: str,
        link: Link,
        budget: MemoryBudget,
    ) -> None:
        self.model = model
        self.states = States(model, original, sample)
        self.ranks = Ranks.of(original)
        self._decoder = decoder_name(original)
        self.backend = backend
        self.link = link
        self.counters = Counters()
        start_workers(backend, model.device)  # while the first graph is traced
        self.trained_length = positions(model)
        self._placed = SurrogateTensors()
        self.budget = budget
        self._programs = VariantCache(budget, self.counters)
        self._kept = KeptGraphs(self.states, budget)
        self._structure: ModelStructure | None = None
        self._proofs = Proofs(model, self.states, self.ranks)

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def forward(self) -> Forward:
        """The function that is traced: the original's class may have got another one."""
        return traced_forward(self.states.original, self._decoder)

    @property
    def structure(self) -> ModelStructure:
        """What the first capture says of the model."""
        assert self._structure is not None, "a prefill graph is captured first"
        return self._structure

    @cached_property
    def max_length(self) -> int | None:
        """Positions that the model has a table of; None if a formula makes them, without end."""
        has_table = self.structure.has_position_table or relies_on_length(self.model)
        return self.trained_length if has_table else None

    @property
    def pieces_compiled(self) -> int:
        """How many distinct pieces have been compiled, over all captures."""
        return self._kept.pieces + sum(c.compiler.compiled for c in self._kept.all())

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling pieces."""
        return self._kept.seconds + sum(c.compiler.seconds for c in self._kept.all())

    @property
    def why_traced(self) -> list[str]:
        """Why layers that are alike were traced one by one nevertheless; empty if none were."""
        return sorted({c.capture.why_traced for c in self._kept.all()} - {""})

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers of the model, in stream order."""
        return self.structure.sublayers

    @property
    def keys(self) -> dict[Sublayer, tuple[str, ...]]:
        """For each sublayer the key of its piece in each capture: equal ones run the same code."""
        return piece_keys(self._kept.all())

    @property
    def specs(self) -> tuple[LayerCacheSpec, ...]:
        """What each layer stores, in the state of the last look."""
        return self.states.current.reference.specs

    def stored(self, plan: SkipPlan) -> list[LayerCacheSpec]:
        """What a request of this plan stores of each layer: nothing for what prompts skip."""
        return self.structure.stored(plan, self.specs)

    def retention(self, plans: Sequence[SkipPlan]) -> Retention:
        """Return which tokens of each layer a request may read that runs with any of `plans`."""
        return self.structure.retention(plans, self.specs)

    def check_room(self, programs: int) -> None:
        """ValueError when fewer linked programs can be kept than are to be run in turn.

        That is told by the largest one there is.
        """
        graphs = sum(captured.nbytes for captured in self._kept.all())
        largest = max((p.nbytes for p in self._programs.all()), default=1)
        if graphs + programs * largest > self.budget.limit:
            raise ValueError(
                f"{programs} plans are run in turn, but memory_budget={self.budget.limit} holds "
                f"{max(0, self.budget.limit - graphs) // largest} programs of {largest} bytes "
                f"beside {graphs} bytes of graphs, so that each turn would link again; compile "
                "with a larger memory_budget"
            )

    def capture_prefill(self, device: torch.device) -> None:
        """Capture a prefill graph, so that a model that cannot be cut is refused at once."""
        self.capture(GraphKey.plain("prefill", self.model.dtype, device))

    def program(
        self,
        key: GraphKey,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        arguments: dict[str, Any],
        since: Since,
        instrument: Instrument | None = None,
    ) -> Program:
        """Return the program for a key and plan whose graph is right for these lengths.

        The first graph of a key is captured with fixed example lengths and rows. Where its guards
        exclude those that come up (a compiler may specialise), another is captured with them.

        Args:
            key: What is captured.
            plan: It decides what is skipped.
            probed: The sublayers to measure.
            arguments: Those of the captured function.
            since: The state that the request began with.
            instrument: What the program is to do besides.

        Raises:
            UnsupportedError: there is no such graph yet and the model is in another state now.
        """
        wanted = plan, probed, instrument or Instrument()
        if key in since.state.one_batch:
            key = key.of_rows(lengths_of(arguments).rows)
        for captured in since.state.captures.get(key, ()):
            program = self._programs.find(program_key(captured, *wanted))
            if program is not None and self._proofs.guards(captured).hold(arguments):
                return program
        with one_at_a_time:
            return self._made(key, wanted, arguments, since)

    def _made(
        self, key: GraphKey, wanted: _Wanted, arguments: dict[str, Any], since: Since
    ) -> Program:
        """Do what `program` does; meanwhile nothing else is captured or compiled.

        Where code depends on how many rows there are, or a compiler cannot leave them open, there
        is a graph for every number of them.
        """
        try:
            return self._made_as(key, wanted, arguments, since)
        except (ChangedError, PlanError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not key.batch.vary:
                raise
            alone = key.of_rows(lengths_of(arguments).rows)
            program = self._made_as(alone, wanted, arguments, since)
            logger.info("a %s graph for each number of rows: %s", key.phase, error)
            since.state.one_batch.add(key)
            self.counters.one_batch += 1
            return program

    def _made_as(
        self, key: GraphKey, wanted: _Wanted, arguments: dict[str, Any], since: Since
    ) -> Program:
        group = since.state.captures.get(key, ())
        for captured in tuple(group) or [self._captured(key, since)]:
            program = self._linked(captured, wanted)
            if self._proofs.hold(captured, arguments):
                return program
        captured = self._captured(key, since, lengths_of(arguments))
        program = self._linked(captured, wanted)
        if not self._proofs.hold(captured, arguments):
            broken = "; ".join(self._proofs.guards(captured).broken(arguments))
            raise UnsupportedError(f"no {key.phase} graph holds for these lengths: {broken}")
        return program

    def _linked(self, captured: CapturedPhase, wanted: _Wanted) -> Program:
        plan, probed, instrument = wanted
        how = self.link, self._placed, instrument, self.structure.local
        make = partial(Program, captured, plan, probed, *how)
        key = program_key(captured, *wanted)
        return self._programs.get(key, lambda: self.ranks.together("a program", make))

    def use(self, program: Program, arguments: dict[str, Any] | None = None) -> bool:
        """Say that a program runs again; returns if it is kept, and right for any `arguments`."""
        holds = arguments is None or self._proofs.guards(program.captured).hold(arguments)
        return holds and self._programs.use(program)

    def takes_padding(self, captured: CapturedPhase) -> bool:
        """Return whether a graph for a static cache is right for padding; that is tried once."""
        return self._proofs.takes_padding(captured, self.forward)

    def capture(self, key: GraphKey) -> CapturedPhase:
        """What the model is now, captured for a key."""
        with one_at_a_time:
            return self._captured(key, Since.of(self.states.look()))

    def _captured(
        self, key: GraphKey, since: Since, lengths: Lengths | None = None
    ) -> CapturedPhase:
        state = since.state
        self.states.require(since)
        group = state.captures.get(key, ())
        if len(group) >= _GRAPHS_PER_KEY:
            raise UnsupportedError(
                f"{len(group)} {key.phase} graphs were captured and none holds for these lengths; "
                "the model's code branches on them"
            )
        start = time.perf_counter()
        specs, lengths = state.reference.specs, lengths or example_lengths(key, self.trained_length)
        to_trace = self.model, self.forward, key, specs, lengths, self.backend
        with named_obstacles(self.model):
            trace = partial(phase_graph.capture_phase, *to_trace)
            captured = self.ranks.together("a graph", trace)
        self.counters.captures += 1
        first = self._kept.first
        if first is not None and captured.sublayers != first.sublayers:
            raise UnsupportedError(
                f"{type(self.model).__name__} had {len(first.sublayers)} sublayers when it "
                f"was compiled and has {len(captured.sublayers)} now, or others; compile it again"
            )
        with named_obstacles(self.model):
            self._proofs.check(captured, state, self.forward)
        logger.info(
            "captured %s of %s in %.2f s: %d sublayers",
            key.phase,
            type(self.model).__name__,
            time.perf_counter() - start,
            len(captured.sublayers),
        )
        if first is None:
            own = attention.is_own(self.states.original)
            shares = None if self.ranks.alone else head_shares(self.states.original)
            self._structure = ModelStructure(captured, own, shares)
        self._kept.keep(captured, state)
        return captured
