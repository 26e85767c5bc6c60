"""Captured graphs by key, and the programs linked from them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from adaskip_passes import (
    ShapeGuards,
    UnsupportedError,
    one_at_a_time,
    piece_of,
    start_workers,
    sublayer_calls,
)

from ..capture import phase_graph
from ..capture.arguments import Forward
from ..capture.check_graph import check_graph
from ..capture.example_inputs import example_lengths
from ..capture.graph_key import GraphKey, Surroundings
from ..capture.phase_graph import CapturedPhase, Memory
from ..capture.reference import ReferenceRun, positions
from ..capture.state import Since, State
from ..capture.states import States
from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.views import StaticCacheView
from ..plans.composition import SurrogateTensors
from ..plans.skip_plan import Action, SkipPlan
from ..plans.sublayer import Sublayer
from .program import Counters, Link, Program, VariantCache, plan_phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# As many lengths may break a key's guards before it is an error: code that counts the chunks of a
# prompt (Mamba 2's) is another graph for other counts.
_GRAPHS_PER_KEY = 24


class Graphs:
    """All graphs of one compiled model.

    Attributes:
        counters: captures, links and dropped programs so far.
        max_length: positions of the model; None if it has no limit.
    """

    program_type: type[Program] = Program

    def __init__(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel,
        sample: ReferenceRun,
        backend: str,
        link: Link,
        max_variants: int,
    ) -> None:
        self.model = model
        self.states = States(model, original, sample)
        self.backend = backend
        self.link = link
        self.counters = Counters()
        start_workers(backend, model.device)  # while the first graph is traced
        self.max_length = positions(model)
        self._placed = SurrogateTensors()
        self._programs = VariantCache(max_variants, self.counters)
        self._first: CapturedPhase | None = None
        self._guards: WeakKeyDictionary[CapturedPhase, tuple[int, ShapeGuards]] = (
            WeakKeyDictionary()
        )

    @property
    def forward(self) -> Forward:
        """The function that is traced: the original's class may have got another one."""
        forward: Forward = type(self.states.original).forward
        return forward

    @property
    def first(self) -> CapturedPhase:
        """What was captured first; sublayers are the same in all others."""
        assert self._first is not None
        return self._first

    @property
    def pieces_compiled(self) -> int:
        """How many distinct pieces have been compiled, over all captures."""
        return sum(c.compiler.compiled for c in self._all())

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling pieces."""
        return sum(c.compiler.seconds for c in self._all())

    @property
    def why_traced(self) -> list[str]:
        """Why layers that are alike were traced one by one nevertheless; empty if none were."""
        return sorted({c.capture.why_traced for c in self._all()} - {""})

    @property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """For each sublayer the modules whose outputs are its branch, in stream order."""
        first = self.first
        return {str(s): paths for s, paths in zip(first.sublayers, first.modules, strict=True)}

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All of the model's, in stream order."""
        return self.first.sublayers

    @property
    def width(self) -> int:
        """Of the residual stream."""
        first = sublayer_calls(self.first.outer.graph)[0].args[0]
        assert isinstance(first, fx.Node)
        return int(first.meta["example_value"].shape[-1])

    @property
    def unskippable(self) -> frozenset[Sublayer]:
        """The sublayers that hand more than the residual stream to later ones."""
        first = self.first
        pieces = (piece_of(call) for _, call in sorted(sublayer_calls(first.outer.graph).items()))
        pairs = zip(first.sublayers, pieces, strict=True)
        return frozenset(s for s, piece in pairs if piece is not None and piece.outputs > 1)

    @property
    def memory(self) -> dict[Sublayer, frozenset[Memory]]:
        """For each sublayer what it uses of the cache."""
        first = self.first
        return dict(zip(first.sublayers, first.memory, strict=True))

    @property
    def keys(self) -> dict[Sublayer, tuple[str, ...]]:
        """For each sublayer the key of its piece in each capture: equal ones run the same code."""
        pieces = [
            [piece_of(call) for _, call in sorted(sublayer_calls(c.outer.graph).items())]
            for c in self._all()
        ]
        keys = (tuple(p.key for p in group if p is not None) for group in zip(*pieces, strict=True))
        return dict(zip(self.first.sublayers, keys, strict=True))

    @property
    def specs(self) -> tuple[LayerCacheSpec, ...]:
        """What each layer stores, in the state of the last look."""
        return self.states.current.reference.specs

    def stored(self, plan: SkipPlan) -> list[LayerCacheSpec]:
        """What a request of this plan stores of each layer: nothing for what prompts skip."""
        used = set[Memory]()
        for sublayer, memory in self.memory.items():
            if plan.action("prefill", sublayer) is not Action.SKIP:
                used |= memory
        return [
            spec.only({kind for kind in ("attention", "mixer") if (i, kind) in used})
            for i, spec in enumerate(self.specs)
        ]

    def check_room(self, programs: int) -> None:
        """ValueError when fewer linked programs are kept than are to be run in turn."""
        if self._programs.limit < programs:
            raise ValueError(
                f"{programs} plans are run in turn, but max_variants={self._programs.limit} "
                "programs are kept, so that each turn would link again; compile with a larger "
                "max_variants"
            )

    def capture_prefill(self, device: torch.device) -> None:
        """Capture a prefill graph, so that a model that cannot be cut is refused at once."""
        key = GraphKey(
            "prefill",
            batch=1,
            one_token=False,
            one_stored=False,
            masked=False,
            logits_to_keep=1,
            dtype=self.model.dtype,
            device=device,
            surroundings=Surroundings.now(device),
        )
        self.capture(key)

    def _all(self) -> list[CapturedPhase]:
        kept = [c for s in self.states.known for group in s.captures.values() for c in group]
        return list(dict.fromkeys([*([self._first] if self._first is not None else []), *kept]))

    def program(
        self,
        key: GraphKey,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        arguments: dict[str, Any],
        since: Since,
    ) -> Program:
        """The program for a key and plan whose graph is right for these lengths.

        The first graph of a key is captured with fixed example lengths. Where its guards exclude
        lengths that come up (a compiler may specialise), another is captured with those.

        Args:
            key, plan, probed: what is to run.
            arguments: of the captured function.
            since: the state that the request began with.

        Raises:
            UnsupportedError: there is no such graph yet and the model is in another state now.
        """
        for captured in since.state.captures.get(key, ()):
            program = self._known(captured, plan, probed)
            if program is not None and self._guards_of(captured).hold(arguments):
                return program
        with one_at_a_time:
            return self._made(key, plan, probed, arguments, since)

    def _made(
        self,
        key: GraphKey,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        arguments: dict[str, Any],
        since: Since,
    ) -> Program:
        """As `program`; meanwhile nothing else is captured or compiled."""
        group = since.state.captures.get(key, ())
        for captured in tuple(group) or [self._captured(key, since)]:
            program = self._linked(captured, plan, probed)
            if self._guards_of(captured).hold(arguments):
                return program
        captured = self._captured(key, since, _lengths(arguments))
        program = self._linked(captured, plan, probed)
        if not self._guards_of(captured).hold(arguments):
            broken = "; ".join(self._guards_of(captured).broken(arguments))
            raise UnsupportedError(f"no {key.phase} graph holds for these lengths: {broken}")
        return program

    def _known(
        self, captured: CapturedPhase, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Program | None:
        return self._programs.find(self._key(captured, plan, probed))

    def _linked(
        self, captured: CapturedPhase, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Program:
        key = self._key(captured, plan, probed)
        return self._programs.get(key, lambda: self._program(captured, plan, probed))

    def _key(
        self, captured: CapturedPhase, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Hashable:
        digest = plan.phase_digest(plan_phase(captured.key.phase))
        return self.program_type, captured, digest, probed

    def _program(
        self, captured: CapturedPhase, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Program:
        return self.program_type(captured, plan, probed, self.link, self._placed)

    def _guards_of(self, captured: CapturedPhase) -> ShapeGuards:
        """Guards as of what is compiled now; made again when more has been compiled since."""
        known = self._guards.get(captured)
        if known is None or known[0] != captured.compiler.compiled:
            known = self._guards[captured] = (captured.compiler.compiled, captured.guards())
        return known[1]

    def _check(self, captured: CapturedPhase, state: State) -> None:
        """Refuse a graph that gives other logits than the model does."""
        if not state.has_own_reference or state.reference.device != captured.key.device:
            self.states.run_reference(state)
        try:
            check_graph(state.reference, captured, self.model, self.forward)
        except UnsupportedError:  # weights may have been changed since
            self.states.run_reference(state)
            check_graph(state.reference, captured, self.model, self.forward)

    def capture(self, key: GraphKey) -> CapturedPhase:
        """What the model is now, captured for a key."""
        with one_at_a_time:
            return self._captured(key, Since.of(self.states.look()))

    def _captured(
        self, key: GraphKey, since: Since, lengths: tuple[int, int] | None = None
    ) -> CapturedPhase:
        state = since.state
        self.states.require(since)
        group = state.captures.get(key, ())
        if len(group) >= _GRAPHS_PER_KEY:
            raise UnsupportedError(
                f"{len(group)} {key.phase} graphs were captured and none holds for these lengths; "
                "the model's code branches on them"
            )
        captured = phase_graph.capture_phase(
            self.model,
            self.forward,
            key,
            state.reference.specs,
            lengths or example_lengths(key, self.max_length),
            self.backend,
        )
        self.counters.captures += 1
        if self._first is not None and captured.sublayers != self._first.sublayers:
            raise UnsupportedError(
                f"{type(self.model).__name__} had {len(self._first.sublayers)} sublayers when it "
                f"was compiled and has {len(captured.sublayers)} now, or others; compile it again"
            )
        self._check(captured, state)
        self._first = self._first or captured
        state.add(captured)
        return captured


def _lengths(arguments: dict[str, Any]) -> tuple[int, int]:
    cache = arguments["cache"]
    if isinstance(cache, StaticCacheView):
        return 1, cache.capacity
    return cache.new.shape[0], cache.filled.shape[0]
