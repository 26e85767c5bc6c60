"""Programs: a captured phase linked for one plan, and the cache of them.

A plan is linked, not compiled: the outer graph is copied, calls are replaced, and the pieces that
were compiled with the capture are called in the new order.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from adaskip_passes import Probe, Replacement, Skip, fuse, link, run_passes

from .phases import GraphPhaseCapture
from .plan import Action, Phase, SkipPlan, Sublayer

Link = Literal["pieces", "fused"]


def plan_phase(graph_phase: str) -> Phase:
    """The phase of a plan that a captured phase runs."""
    return "decode" if graph_phase == "decode" else "prefill"


def rewrite(
    phase: GraphPhaseCapture, plan: SkipPlan, probed: tuple[Sublayer, ...] = ()
) -> fx.GraphModule:
    """The outer graph of a phase under a plan, with probes on `probed`."""
    position = {s: i for i, s in enumerate(phase.sublayers)}
    replacements = {}
    for sublayer in phase.sublayers:
        action = plan.action(plan_phase(phase.key.phase), sublayer)
        if action is Action.RUN:
            continue
        compensated = plan.compensation.factor(sublayer) is not None
        replacements[position[sublayer]] = Replacement(
            keep="everything" if action is Action.KV_ONLY else "nothing",
            compensation=plan.compensation.kind if compensated else None,
        )
    probe = Probe(tuple(sorted(position[s] for s in probed)))
    return run_passes(phase.outer, (Skip(replacements), probe))


class Program:
    """A linked graph with its inputs bound by name.

    Attributes:
        seconds: how long linking took.
        probed: the sublayers whose moments it returns, in stream order.
    """

    def __init__(
        self,
        phase: GraphPhaseCapture,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        how: Link,
    ) -> None:
        start = time.perf_counter()
        self.probed = tuple(s for s in phase.sublayers if s in set(probed))
        outer = rewrite(phase, plan, probed)
        inputs = outer.graph.find_nodes(op="placeholder")
        self._fixed, self._factors, sources = _sort_inputs(phase, plan, inputs)
        self._bind_fixed = phase.capture.binder(self._fixed)
        self._bind = phase.capture.binder(sources)
        if how == "pieces":
            self._function = link(outer, phase.compiler)
        else:
            self._function = phase.compiler.compile(fuse(outer))
        self.seconds = time.perf_counter() - start

    def fixed(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """What stays the same during a request (weights, factors); looked up once for it."""
        return self._bind_fixed(arguments) + self._factors

    def __call__(
        self, arguments: Mapping[str, Any], fixed: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [B, kept, V], and the moments [probed, B, 5] if anything is probed."""
        outputs = self._function(*self._bind({**arguments, "fixed": fixed}))
        return outputs[0], outputs[1] if self.probed else None


def _sort_inputs(
    phase: GraphPhaseCapture, plan: SkipPlan, inputs: list[fx.Node]
) -> tuple[list[str], tuple[torch.Tensor, ...], list[str]]:
    """Sources that are fixed in a request, factor tensors, and a source for every input."""
    placeholders = phase.capture.graph.graph.find_nodes(op="placeholder")
    known = {n.name: source for n, source in zip(placeholders, phase.capture.sources, strict=True)}
    factor_names = [n.name for n in inputs if n.name.startswith("factor_")]
    values = [
        plan.compensation.factor(phase.sublayers[int(name.rsplit("_", 1)[1])])
        for name in factor_names
    ]
    factors = torch.tensor(values, dtype=torch.float32).to(phase.key.device).unbind()
    fixed = [known[n.name] for n in inputs if n.name in known and _is_fixed(known[n.name])]
    place = {source: i for i, source in enumerate(fixed)}
    place |= {name: len(fixed) + i for i, name in enumerate(factor_names)}
    sources = []
    for node in inputs:
        source = known.get(node.name, node.name)
        at = place.get(source)
        if at is not None:
            sources.append(f"L['fixed'][{at}]")
        else:
            sources.append(source if node.name in known else f"L[{node.name!r}]")
    return fixed, tuple(factors), sources


def _is_fixed(source: str) -> bool:
    return not source.startswith(("L['cache']", "L['inputs']"))


@dataclass
class Counters:
    """What a compiled model has done so far.

    captures: graphs traced with Dynamo. pieces: pieces compiled. links: programs linked for a
    plan. dropped: programs forgotten because there were more than ``max_variants``.
    """

    captures: int = 0
    pieces: int = 0
    links: int = 0
    dropped: int = 0


class VariantCache:
    """Programs by key, of which the least recently used are dropped."""

    def __init__(self, limit: int, counters: Counters) -> None:
        if limit < 1:
            raise ValueError(f"max_variants must be at least 1, got {limit}")
        self.limit = limit
        self.counters = counters
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, key: Hashable, make: Callable[[], Program]) -> Program:
        """The program for `key`, made if it is not there."""
        program = self._programs.get(key)
        if program is None:
            program = make()
            self.counters.links += 1
            self._programs[key] = program
            while len(self._programs) > self.limit:
                self._programs.popitem(last=False)
                self.counters.dropped += 1
        else:
            self._programs.move_to_end(key)
        return program
