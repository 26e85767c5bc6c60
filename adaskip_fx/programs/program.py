"""Programs: a captured phase linked for one plan, and the cache of them.

A plan is linked, not compiled: the outer graph is copied, calls are replaced, and the pieces that
were compiled with the capture are called in the new order.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from adaskip_passes import Probe, Replacement, Skip, fuse, link, run_passes
from adaskip_passes.infra.pass_base import Pass
from adaskip_passes.partition.outer import sublayer_calls
from adaskip_passes.transforms.probe import VALID
from adaskip_passes.transforms.residue import Keep
from adaskip_passes.transforms.skip import surrogate_inputs

from ..capture.phase_graph import CapturedPhase
from ..plans.composition import ComposedSurrogate, SurrogateTensors, compose_surrogates
from ..plans.skip_plan import Action, Phase, SkipPlan, Sublayer
from .instruments import Instrument

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
        captured: The capture it was linked from.
        probed: The sublayers whose similarity statistics it returns, in stream order.
        runs: The sublayers that it calls, read from the graph that was linked.
        surrogates: The tensors of surrogates, by the names of the graph's inputs.
        surrogate_names: For each of them its sublayer and its name there, in the same order.
        seconds: How long linking took.
    """

    def __init__(
        self,
        captured: CapturedPhase,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        how: Link,
        placed: SurrogateTensors,
        instrument: Instrument | None = None,
    ) -> None:
        """Link `captured` for a plan.

        Args:
            captured: A capture of the model.
            plan: It decides what is skipped.
            probed: The sublayers to measure.
            how: Whether pieces are called, or the whole graph is compiled.
            placed: The tensors of surrogates on the device, shared among programs.
            instrument: What the program is to do besides.
        """
        start = time.perf_counter()
        instrument = instrument or Instrument()
        self.captured, self._how = captured, how
        self.probed = tuple(s for s in captured.sublayers if s in set(probed))
        phase = plan_phase(captured.key.phase)
        surrogates = compose_surrogates(plan, phase, instrument.composes)
        outer = rewrite(
            captured.outer,
            captured.sublayers,
            plan,
            phase,
            self.probed,
            probe_together=captured.key.static_cache,
            first=instrument.passes,
            surrogates=surrogates,
        )
        self.runs = frozenset(captured.sublayers[i] for i in sublayer_calls(outer.graph))
        self.surrogates = surrogate_tensors(outer, captured.sublayers, surrogates, placed)
        inputs = surrogate_inputs(outer.graph)
        self.surrogate_names = tuple(
            (captured.sublayers[inputs[n][0]], inputs[n][1]) for n in self.surrogates
        )
        self._tensors = tuple(self.surrogates.values())
        self._take = self._in_order(outer.graph)
        self._function = instrument.link(self, outer)
        self.seconds = time.perf_counter() - start

    def _in_order(self, graph: fx.Graph) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """Return what picks a graph's inputs from `(*weights, *step, *surrogates, valid)`."""
        captured = self.captured.input_index
        added = {name: len(captured) + i for i, name in enumerate([*self.surrogates, VALID])}
        index = {**captured, **added}
        return operator.itemgetter(*(index[n.name] for n in graph.find_nodes(op="placeholder")))

    def link(self, outer: fx.GraphModule) -> Callable[..., Any]:
        """Return a compiled function of the placeholders of a rewritten outer graph."""
        compiler = self.captured.compiler
        return link(outer, compiler) if self._how == "pieces" else compiler.compile(fuse(outer))

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
        weights: tuple[Any, ...],
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits [B, kept, V], and the statistics [probed, B, 5] if anything is probed.

        Args:
            arguments: Those of the captured function, by name.
            weights: What ``captured.weights`` gave at the beginning of the request.
            valid: Which new tokens count for the statistics, bool [B, T].
        """
        outputs = self.run(arguments, weights, valid)
        return outputs[0], outputs[1] if self.probed else None

    def run(
        self,
        arguments: Mapping[str, Any],
        weights: tuple[Any, ...],
        valid: torch.Tensor | None,
        surrogates: tuple[torch.Tensor, ...] | None = None,
    ) -> tuple[Any, ...]:
        """Return all that the graph returns; other arguments are those of a call.

        Args:
            surrogates: Other tensors in the place of `self.surrogates`, in the same order.
        """
        tensors = self._tensors if surrogates is None else surrogates
        values = (*weights, *self.captured.bind_step(arguments), *tensors, valid)
        outputs: tuple[Any, ...] = self._function(*self._take(values))
        return outputs
