"""Programs: a captured phase linked for one plan, and the cache of them.

A plan is linked, not compiled: the outer graph is copied, calls are replaced, and the pieces that
were compiled with the capture are called in the new order.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from adaskip_passes import (
    VALID,
    Keep,
    Pass,
    Probe,
    Replacement,
    Skip,
    fuse,
    link,
    run_passes,
    sublayer_calls,
    surrogate_inputs,
)

from ..capture.phase_graph import CapturedPhase
from ..plans.composition import ComposedSurrogate, SurrogateTensors, compose_surrogates
from ..plans.skip_plan import Action, Phase, SkipPlan, Sublayer

Link = Literal["pieces", "fused"]


def plan_phase(graph_phase: str) -> Phase:
    """The phase of a plan that a captured phase runs."""
    return "decode" if graph_phase == "decode" else "prefill"


def rewrite(
    outer: fx.GraphModule,
    sublayers: tuple[Sublayer, ...],
    plan: SkipPlan,
    phase: Phase,
    probed: tuple[Sublayer, ...] = (),
    *,
    keep: Keep = "nothing",
    probe_together: bool = False,
    first: Sequence[Pass] = (),
    surrogates: Mapping[Sublayer, ComposedSurrogate] | None = None,
) -> fx.GraphModule:
    """An outer graph under one phase of a plan.

    Args:
        outer: as captured; it is not changed.
        sublayers: what its calls are, in stream order.
        plan, phase: what to skip.
        probed: sublayers to measure.
        keep: which effects of a skipped sublayer stay; see `adaskip_passes.Replacement`.
        probe_together: see `adaskip_passes.Probe`.
        first: passes that run before the others.
        surrogates: what is put in for sublayers that do not run; by `compose_surrogates` if None.
    """
    put_in = compose_surrogates(plan, phase) if surrogates is None else surrogates
    position = {s: i for i, s in enumerate(sublayers)}
    replacements = {}
    for sublayer in sublayers:
        action = plan.action(phase, sublayer)
        if action is not Action.RUN:
            composed = put_in.get(sublayer)
            replacements[position[sublayer]] = Replacement(
                keep="everything" if action is Action.KV_ONLY else keep,
                surrogate=composed.kind if composed is not None else None,
                rank=composed.rank if composed is not None else 0,
            )
    probe = Probe(tuple(sorted(position[s] for s in probed)), probe_together)
    return run_passes(outer, (*first, Skip(replacements), probe))


def surrogate_tensors(
    outer: fx.GraphModule,
    sublayers: tuple[Sublayer, ...],
    surrogates: Mapping[Sublayer, ComposedSurrogate],
    placed: SurrogateTensors,
) -> dict[str, torch.Tensor]:
    """The tensors of surrogates that a rewritten graph takes, by input name.

    PlanError where one does not fit the model.
    """
    inputs: dict[int, dict[str, str]] = {}
    for name, (index, tensor) in surrogate_inputs(outer.graph).items():
        inputs.setdefault(index, {})[tensor] = name
    nodes = outer.graph.find_nodes(op="placeholder")
    examples = {n.name: n.meta.get("example_value") for n in nodes}
    found = {}
    for index, names in inputs.items():
        like = {tensor: examples[name] for tensor, name in names.items()}
        sublayer = sublayers[index]
        tensors = placed.get(sublayer, surrogates[sublayer], like)
        found.update({name: tensors[tensor] for tensor, name in names.items()})
    return found


class Program:
    """A linked graph with its inputs bound by name.

    Attributes:
        phase: the capture it was linked from.
        probed: the sublayers whose moments it returns, in stream order.
        runs: the sublayers that it calls, read from the graph that was linked.
        surrogates: the tensors that stand in for others, by the names of the graph's inputs.
        seconds: how long linking took.
    """

    first_passes: Sequence[Pass] = ()  #: what else is done to the outer graph
    composed: bool = True  #: whether neighbouring surrogates become one

    def __init__(
        self,
        phase: CapturedPhase,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        how: Link,
        placed: SurrogateTensors,
    ) -> None:
        start = time.perf_counter()
        self.phase = phase
        self.probed = tuple(s for s in phase.sublayers if s in set(probed))
        part = plan_phase(phase.key.phase)
        surrogates = compose_surrogates(plan, part, self.composed)
        outer = rewrite(
            phase.outer,
            phase.sublayers,
            plan,
            part,
            self.probed,
            probe_together=phase.key.static_cache,
            first=self.first_passes,
            surrogates=surrogates,
        )
        self.runs = frozenset(phase.sublayers[i] for i in sublayer_calls(outer.graph))
        inputs = outer.graph.find_nodes(op="placeholder")
        self.surrogates = surrogate_tensors(outer, phase.sublayers, surrogates, placed)
        added = {
            name: len(phase.input_index) + i for i, name in enumerate([*self.surrogates, VALID])
        }
        place = {**phase.input_index, **added}
        self._tensors = tuple(self.surrogates.values())
        self._take = operator.itemgetter(*(place[n.name] for n in inputs))
        self._function = self._link(outer, how)
        self.seconds = time.perf_counter() - start

    def _link(self, outer: fx.GraphModule, how: Link) -> Callable[..., Any]:
        """A function of the outer graph's placeholders."""
        compiler = self.phase.compiler
        return link(outer, compiler) if how == "pieces" else compiler.compile(fuse(outer))

    @property
    def functions(self) -> frozenset[Callable[..., Any]]:
        """The compiled pieces that it calls; of a fused program the one function that it is."""
        functions: frozenset[Callable[..., Any]] = getattr(
            self._function, "functions", frozenset([self._function])
        )
        return functions

    def __call__(
        self,
        arguments: Mapping[str, Any],
        fixed: tuple[Any, ...],
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [B, kept, V], and the moments [probed, B, 5] if anything is probed.

        Args:
            arguments: of the captured function, by name.
            fixed: what ``phase.weights`` gave at the beginning of the request.
            valid: which new tokens count for the moments, bool [B, T].
        """
        outputs = self.run(arguments, fixed, valid)
        return outputs[0], outputs[1] if self.probed else None

    def run(
        self, arguments: Mapping[str, Any], fixed: tuple[Any, ...], valid: torch.Tensor | None
    ) -> tuple[Any, ...]:
        """All that the graph returns; arguments as of a call."""
        values = (*fixed, *self.phase.bind_step(arguments), *self._tensors, valid)
        outputs: tuple[Any, ...] = self._function(*self._take(values))
        return outputs


@dataclass
class Counters:
    """What a compiled model has done so far.

    captures: graphs traced with Dynamo. links: programs linked for a plan, and how long that took
    in all, in seconds, pieces that were compiled meanwhile included. dropped: programs forgotten
    because there were more than ``max_variants``.
    """

    captures: int = 0
    links: int = 0
    link_seconds: float = 0.0
    dropped: int = 0


class VariantCache:
    """Programs by key, of which the least recently used are dropped."""

    def __init__(self, limit: int, counters: Counters) -> None:
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_variants must be at least 1, got {limit!r}")
        self.limit = limit
        self.counters = counters
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = threading.Lock()  # of the order, for moments

    def __len__(self) -> int:
        return len(self._programs)

    def find(self, key: Hashable) -> Program | None:
        """The program for `key`, if it is there."""
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
            return program

    def get(self, key: Hashable, make: Callable[[], Program]) -> Program:
        """The program for `key`, made if it is not there: by one caller at a time."""
        program = self.find(key)
        if program is None:
            program = make()
            self.counters.links += 1
            self.counters.link_seconds += program.seconds
            with self._lock:
                self._programs[key] = program
                while len(self._programs) > self.limit:
                    self._programs.popitem(last=False)
                    self.counters.dropped += 1
        return program
