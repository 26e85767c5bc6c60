"""Programs: a captured phase linked for one plan, and the cache of them.

A plan is linked, not compiled: the outer graph is copied, calls are replaced, and the pieces that
were compiled with the capture are called in the new order.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import torch
from torch import fx

from adaskip_passes import UnsupportedError, fuse, link
from adaskip_passes.partition.outer import sublayer_calls
from adaskip_passes.transforms.probe import VALID
from adaskip_passes.transforms.skip import surrogate_inputs
from adaskip_passes.windows.window_attention import windowed_calls

from ..capture.phase_graph import CapturedPhase
from ..plans.compose_surrogates import SurrogateTensors, compose_surrogates
from ..plans.skip_plan import PlanError, SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.windows import Window
from .instruments import Instrument
from .rewrite import plan_phase, rewrite, surrogate_tensors, window_tensors

Link = Literal["pieces", "fused"]

#: What a call of a linked program takes of main memory.
_CALL_BYTES = 1200


class Program:
    """A linked graph with its inputs bound by name.

    Attributes:
        captured: The capture it was linked from.
        probed: The sublayers whose similarity statistics it returns, in stream order.
        runs: The sublayers that it calls, read from the graph that was linked.
        windowed: Those of them whose attention sees a window, likewise.
        surrogates: The tensors of surrogates, by the names of the graph's inputs.
        surrogate_names: For each of them its sublayer and its name there, in the same order.
        windows: The tables of windows, likewise by the names of the graph's inputs.
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
        local: Callable[[Mapping[Sublayer, Window]], Mapping[Sublayer, Window]] = dict,
    ) -> None:
        """Link `captured` for a plan.

        Args:
            captured: A capture of the model.
            plan: It decides what is skipped.
            probed: The sublayers to measure.
            how: Whether pieces are called, or the whole graph is compiled.
            placed: The tensors of surrogates on the device, shared among programs.
            instrument: What the program is to do besides.
            local: Gives windows as they are for the K/V heads of this rank.

        Raises:
            PlanError: The graph cannot be rewritten for this plan.
        """
        start = time.perf_counter()
        instrument = instrument or Instrument()
        self.captured, self._how = captured, how
        self.probed = tuple(s for s in captured.sublayers if s in set(probed))
        phase = plan_phase(captured.key.phase)
        surrogates = compose_surrogates(plan, phase, instrument.composes)
        try:
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
        except UnsupportedError as error:  # of this plan: the graph is as good for others
            raise PlanError(f"plan {plan.digest[:8]} cannot be linked: {error}") from error
        called = sublayer_calls(outer.graph), windowed_calls(outer.graph)
        self.runs, self.windowed = (frozenset(captured.sublayers[i] for i in c) for c in called)
        self.surrogates = surrogate_tensors(outer, captured.sublayers, surrogates, placed)
        inputs = surrogate_inputs(outer.graph)
        self.surrogate_names = tuple(
            (captured.sublayers[inputs[n][0]], inputs[n][1]) for n in self.surrogates
        )
        windows = local(plan.windows.of_phase(phase))
        self.windows = window_tensors(outer, captured.sublayers, windows)
        self._tensors, self._tables = (tuple(t.values()) for t in (self.surrogates, self.windows))
        compiled = captured.nbytes if how == "fused" else 0
        self._calls = compiled + _CALL_BYTES * len(outer.graph.nodes)
        self._take = self._in_order(outer.graph)
        self._function = instrument.link(self, outer)
        self.seconds = time.perf_counter() - start

    def _in_order(self, graph: fx.Graph) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """Return what picks inputs from `(*weights, *step, *surrogates, *windows, valid)`."""
        captured = self.captured.input_index
        names = [*self.surrogates, *self.windows, VALID]
        added = {name: len(captured) + i for i, name in enumerate(names)}
        index = {**captured, **added}
        return operator.itemgetter(*(index[n.name] for n in graph.find_nodes(op="placeholder")))

    def link(self, outer: fx.GraphModule) -> Callable[..., Any]:
        """Return a compiled function of the placeholders of a rewritten outer graph."""
        compiler = self.captured.compiler
        return link(outer, compiler) if self._how == "pieces" else compiler.compile(fuse(outer))

    @property
    def nbytes(self) -> int:
        """Bytes of its calls, of what was compiled for it alone, and of its tensors."""
        return self._calls + sum(t.nbytes for t in (*self._tensors, *self._tables))

    def parts(self) -> dict[int, int]:
        """Return its bytes by identity, for the budget: of itself, its graph and its tensors."""
        tensors = {id(t): t.nbytes for t in (*self._tensors, *self._tables)}
        return {**self.captured.parts(), id(self): self._calls, **tensors}

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
        """Return all that the graph returns.

        Args:
            arguments: Those of the captured function, by name.
            weights: What ``captured.weights`` gave at the beginning of the request.
            valid: Which new tokens count for the statistics, bool [B, T].
            surrogates: Other tensors in the place of `self.surrogates`, in the same order.
        """
        tensors = self._tensors if surrogates is None else surrogates
        step = self.captured.bind_step(arguments)
        values = (*weights, *step, *tensors, *self._tables, valid)
        outputs: tuple[Any, ...] = self._function(*self._take(values))
        return outputs


def program_key(
    captured: CapturedPhase, plan: SkipPlan, probed: tuple[Sublayer, ...], instrument: Instrument
) -> Hashable:
    """Return what a program depends on: its capture, what of the plan counts, what is measured."""
    digest = plan.phase_digest(plan_phase(captured.key.phase))
    return instrument.key, captured, digest, probed
