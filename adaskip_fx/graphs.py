"""Captured graphs by key, and the programs linked from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from adaskip_passes import RefusedError, ShapeGuards, piece_of, start_workers, sublayer_calls

from . import phases
from .folding import Placed
from .phases import Forward, GraphKey, GraphPhaseCapture, Memory, active_autocast
from .plan import Action, SkipPlan
from .programs import Counters, Link, Program, VariantCache, plan_phase
from .sample import Sample
from .step_cache import WholeCache
from .storage import Slot
from .sublayer import Sublayer

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
        forward: Forward,
        sample: Sample,
        backend: str,
        link: Link,
        max_variants: int,
    ) -> None:
        self.model = model
        self.forward = forward
        self.sample = sample
        self.backend = backend
        self.link = link
        self.counters = Counters()
        start_workers(backend, model.device)  # while the first graph is traced
        self.max_length = _positions(model)
        self._placed = Placed()
        self._programs = VariantCache(max_variants, self.counters)
        self._captures: dict[GraphKey, list[GraphPhaseCapture]] = {}
        self._guards: dict[int, tuple[int, ShapeGuards]] = {}

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
        first = self._all()[0]
        return {str(s): paths for s, paths in zip(first.sublayers, first.modules, strict=True)}

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All of the model's, in stream order."""
        return self._all()[0].sublayers

    @property
    def width(self) -> int:
        """Of the residual stream."""
        first = sublayer_calls(self._all()[0].outer.graph)[0].args[0]
        assert isinstance(first, fx.Node)
        return int(first.meta["example_value"].shape[-1])

    @property
    def unskippable(self) -> frozenset[Sublayer]:
        """The sublayers that hand more than the residual stream to later ones."""
        first = self._all()[0]
        pieces = (piece_of(call) for _, call in sorted(sublayer_calls(first.outer.graph).items()))
        pairs = zip(first.sublayers, pieces, strict=True)
        return frozenset(s for s, piece in pairs if piece is not None and piece.outputs > 1)

    @property
    def memory(self) -> dict[Sublayer, frozenset[Memory]]:
        """For each sublayer what it uses of the cache."""
        first = self._all()[0]
        return dict(zip(first.sublayers, first.memory, strict=True))

    @property
    def keys(self) -> dict[Sublayer, tuple[str, ...]]:
        """For each sublayer the key of its piece in each capture: equal ones run the same code."""
        pieces = [
            [piece_of(call) for _, call in sorted(sublayer_calls(c.outer.graph).items())]
            for c in self._all()
        ]
        keys = (tuple(p.key for p in group if p is not None) for group in zip(*pieces, strict=True))
        return dict(zip(self._all()[0].sublayers, keys, strict=True))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What each layer stores; states have dtypes of their own, which follow the model's."""
        if self.sample.dtype != self.model.dtype:
            self.sample = self.sample.again(self.model, self.forward)
        return self.sample.slots

    def stored(self, plan: SkipPlan) -> list[Slot]:
        """What a request of this plan stores of each layer: nothing for what prompts skip."""
        used = set[Memory]()
        for sublayer, memory in self.memory.items():
            if plan.action("prefill", sublayer) is not Action.SKIP:
                used |= memory
        return [
            slot.only({kind for kind in ("attention", "mixer") if (i, kind) in used})
            for i, slot in enumerate(self.slots)
        ]

    def check_room(self, programs: int) -> None:
        """ValueError when fewer linked programs are kept than are to be run in turn."""
        if self._programs.limit < programs:
            raise ValueError(
                f"{programs} plans are run in turn, but max_variants={self._programs.limit} "
                "programs are kept, so that each turn would link again; compile with a larger "
                "max_variants"
            )

    def prove(self, device: torch.device) -> None:
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
            autocast=active_autocast(device),
        )
        self.capture(key)

    def _all(self) -> list[GraphPhaseCapture]:
        return [c for group in self._captures.values() for c in group]

    def program(
        self,
        key: GraphKey,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        arguments: dict[str, Any],
    ) -> Program:
        """The program for a key and plan whose graph is right for these lengths.

        The first graph of a key is captured with fixed example lengths. Where its guards exclude
        lengths that come up (a compiler may specialise), another is captured with those.
        """
        group = self._captures.setdefault(key, [])
        for captured in group or [self.capture(key)]:
            program = self._linked(captured, plan, probed)
            if self._guards_of(captured).hold(arguments):
                return program
        captured = self.capture(key, _lengths(arguments))
        program = self._linked(captured, plan, probed)
        if not self._guards_of(captured).hold(arguments):
            broken = "; ".join(self._guards_of(captured).broken(arguments))
            raise RefusedError(f"no {key.phase} graph holds for these lengths: {broken}")
        return program

    def _linked(
        self, captured: GraphPhaseCapture, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Program:
        key = (
            self.program_type,
            id(captured),
            plan.phase_digest(plan_phase(captured.key.phase)),
            probed,
        )
        return self._programs.get(key, lambda: self._program(captured, plan, probed))

    def _program(
        self, captured: GraphPhaseCapture, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Program:
        return self.program_type(captured, plan, probed, self.link, self._placed)

    def _guards_of(self, captured: GraphPhaseCapture) -> ShapeGuards:
        """Guards as of what is compiled now; made again when more has been compiled since."""
        known = self._guards.get(id(captured))
        if known is None or known[0] != captured.compiler.compiled:
            known = self._guards[id(captured)] = (captured.compiler.compiled, captured.guards())
        return known[1]

    def _check(self, captured: GraphPhaseCapture) -> None:
        """Refuse a graph that gives other logits than the model does."""
        if self.sample.device != captured.key.device:
            self.sample = self.sample.again(self.model, self.forward)
        try:
            self.sample.check(captured, self.model, self.forward)
        except RefusedError:
            self.sample = self.sample.again(self.model, self.forward)
            self.sample.check(captured, self.model, self.forward)

    def capture(self, key: GraphKey, lengths: tuple[int, int] | None = None) -> GraphPhaseCapture:
        group = self._captures.setdefault(key, [])
        if len(group) >= _GRAPHS_PER_KEY:
            raise RefusedError(
                f"{len(group)} {key.phase} graphs were captured and none holds for these lengths; "
                "the model's code branches on them"
            )
        captured = phases.capture_phase(
            self.model,
            self.forward,
            key,
            self.slots,
            lengths or phases.example_lengths(key, self.max_length),
            self.backend,
        )
        self.counters.captures += 1
        self._check(captured)
        group.append(captured)
        return captured


def _lengths(arguments: dict[str, Any]) -> tuple[int, int]:
    cache = arguments["cache"]
    if isinstance(cache, WholeCache):
        return 1, cache.capacity
    return cache.new.shape[0], cache.filled.shape[0]


def _positions(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and longest > 0:
            return longest
    return None
