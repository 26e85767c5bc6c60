"""One graph that Dynamo captured, and its programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from adaskip_passes import (
    PieceCompiler,
    UnsupportedError,
    canonicalize,
    find_sublayers,
    fuse,
    link,
    outline,
)
from adaskip_passes.analysis.effects import written
from adaskip_passes.tracing.capture import Capture, describe

from ..plans.compose_surrogates import SurrogateTensors, compose_surrogates
from ..plans.decisions import plans_of
from ..plans.skip_plan import Phase, SkipPlan
from ..plans.sublayer import Sublayer
from ..programs.rewrite import rewrite, surrogate_tensors
from .requests import BackendRequest, Requests, is_empty

_CACHE_LAYER = re.compile(r"\.layers\[(\d+)\]\.")  # in the source of a cache's tensor


class BackendGraph:
    """One captured graph and its programs."""

    def __init__(self, graph: fx.GraphModule, requests: Requests, options: dict[str, Any]) -> None:
        capture = describe(graph)
        self.requests, model = requests, requests.first
        self.cache, in_place = _cache_inputs(capture)
        canonicalize(graph)
        found = find_sublayers(graph.graph)
        self.sublayers = model.plan.sublayers
        names = [f"{s.layer}.{s.kind}" for s in found]
        if names != [str(s) for s in self.sublayers]:
            raise UnsupportedError(
                f"the graph has {len(names)} sublayers, the profile or plan {len(self.sublayers)}, "
                "or their order differs: it was made for another model"
            )
        self.outer = outline(graph, found)
        self.placed = SurrogateTensors()
        self.inputs = [n.name for n in graph.graph.find_nodes(op="placeholder")]
        stream = found[0].stream.meta["example_value"]
        self.device: torch.device = stream.device
        self.one_token = _is_one(stream.shape[1])
        if self.one_token and self.cache and not in_place and model.remembers:
            raise UnsupportedError(
                "backend adaskip tells requests apart by their cache, and this one is made anew in "
                "every step (a DynamicCache is): use a StaticCache, or adaskip_fx.compile"
            )
        self.compiler = PieceCompiler(capture, options.get("inner_backend", "inductor"))
        self.fused = options.get("link", "pieces") == "fused"
        self.programs: dict[tuple[Phase, str, tuple[Sublayer, ...]], Callable[..., Any]] = {}
        # now, inside Dynamo's call, so that the guards of every piece are recorded
        if not self.one_token or model.remembers:
            self._program("prefill", model.plan, ())
        if self.one_token:
            for plan in plans_of(model.decision):
                self._program("decode", plan, ())
            self._program("decode", model.plan, model.decode.probed)

    def run(self, *values: Any) -> Any:
        """What Dynamo calls: the graph's inputs in order, to its outputs."""
        cache = [values[place] for place in self.cache]
        request = self.requests.going_on(cache) if self.one_token else None
        prompt = not self.one_token or (request is None and is_empty(cache))
        if request is None:
            request = self.requests.first.begun()
        outputs = self._prompt(request, values) if prompt else self._step(request, values)
        self.requests.keep(cache, request)
        return outputs

    def _prompt(self, request: BackendRequest, values: Sequence[Any]) -> Any:
        return self._program("prefill", request.plan, ())(values)

    def _step(self, request: BackendRequest, values: Sequence[Any]) -> Any:
        probed = request.decode.probed
        outputs = self._program("decode", request.next_plan(), probed)(values)
        if probed:
            *outputs, statistics = outputs
            request.decode.learn(statistics)
        return tuple(outputs)

    def _program(
        self, phase: Phase, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Callable[[Sequence[Any]], Any]:
        key = (phase, plan.phase_digest(phase), probed)
        if key not in self.programs:
            self.programs[key] = self._link(phase, plan, probed)
        return self.programs[key]

    def _link(
        self, phase: Phase, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Callable[[Sequence[Any]], Any]:
        surrogates = compose_surrogates(plan, phase)
        outer = rewrite(
            self.outer,
            self.sublayers,
            plan,
            phase,
            probed,
            keep="counters",
            surrogates=surrogates,
        )
        inputs = outer.graph.find_nodes(op="placeholder")
        factors = surrogate_tensors(outer, self.sublayers, surrogates, self.placed)
        place = {name: i for i, name in enumerate(self.inputs)}
        takes = [place.get(n.name, n.name) for n in inputs]
        function = self.compiler.compile(fuse(outer)) if self.fused else link(outer, self.compiler)
        stream = self.outer.graph

        def program(values: Sequence[Any]) -> Any:
            def value(at: int | str) -> Any:
                if isinstance(at, int):
                    return values[at]
                return factors[at] if at in factors else _all_valid(values, stream)

            return function(*(value(at) for at in takes))

        return program


def _all_valid(values: Sequence[Any], graph: fx.Graph) -> torch.Tensor:
    """In decode every row's one token counts, bool [B, 1]."""
    ids = next(v for v in values if isinstance(v, torch.Tensor) and v.dtype == torch.int64)
    return torch.ones(ids.shape[0], 1, dtype=torch.bool, device=ids.device)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _cache_inputs(capture: Capture) -> tuple[list[int], bool]:
    """Places of the graph's inputs that are the first layer of a cache, and whether it is written.

    Every step writes to each layer, so one is enough to tell a step by.
    """
    graph = capture.graph.graph
    changed = {written(node) for node in graph.nodes}
    layers: dict[int, list[int]] = {}
    found: dict[int, bool] = {}
    nodes = graph.find_nodes(op="placeholder")
    for place, (node, source) in enumerate(zip(nodes, capture.sources, strict=True)):
        in_cache = _CACHE_LAYER.search(source)
        is_tensor = isinstance(node.meta.get("example_value"), torch.Tensor)
        if is_tensor and "_modules[" not in source and (in_cache or node in changed):
            layer = int(in_cache[1]) if in_cache else 0
            layers.setdefault(layer, []).append(place)
            found[layer] = found.get(layer, False) or node in changed
    first = min(layers, default=0)
    return layers.get(first, []), found.get(first, False)
