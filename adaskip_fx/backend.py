"""``torch.compile(model, backend="adaskip")``: the same passes inside somebody else's pipeline.

Dynamo captures and guards, the user's own ``StaticCache`` is in the graph, and this backend skips
sublayers in it. A skipped attention's K/V writes are dropped and its length counter is kept. Decode
calls measure, decide and switch plans as :func:`adaskip_fx.compile` does, also by a schedule,
except that padding and rows that have ended count in the window like any other: the backend cannot
see them.

What is measured and decided belongs to a request, and a request is told by its cache (`_Requests`):
several may be decoded in turn, one cache may serve one after the other, and prefill may run
elsewhere, as where transformers' ``CompileConfig`` compiles decode alone. A prompt is a call of
several tokens, or of one on an empty cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

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

from .plans.composition import SurrogateTensors, compose_surrogates
from .plans.decisions import Decision, Schedule, plans_of
from .plans.skip_plan import Phase, SkipPlan, Sublayer
from .policies import AdaSkip, OnlinePolicy
from .profiles.profile import Profile
from .programs.program import rewrite, surrogate_tensors
from .runtime.request import Window, probed_in_decode

_OPTIONS = ("profile", "alpha", "policy", "plan", "inner_backend", "link")
_CACHE_LAYER = re.compile(r"\.layers\[(\d+)\]\.")  # in the source of a cache's tensor


@dataclass
class _Model:
    """What a compiled model is to do, and how far one request is with it."""

    decision: SkipPlan | Schedule
    profile: Profile | None
    policy: OnlinePolicy | None
    decode_plan: SkipPlan = field(init=False)
    decoded: int = field(init=False, default=0)
    window: Window | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.decode_plan, self.decoded, self.window = self.plan, 0, None
        if self.policy is not None and self.policy.online and self.plan.skipped("prefill"):
            probed = probed_in_decode(self.plan)
            self.window = Window(probed, self.policy.window) if probed else None

    @property
    def plan(self) -> SkipPlan:
        """What a request begins with."""
        return plans_of(self.decision)[0]

    @property
    def remembers(self) -> bool:
        """Whether it matters for a step what its request did before, or that it is a prompt."""
        changes = isinstance(self.decision, Schedule) or self.window is not None
        return changes or self.plan.prefill != self.plan.decode

    def probed(self) -> tuple[Sublayer, ...]:
        """What the next decode step measures."""
        if self.window is None or self.window.closed:
            return ()
        return self.window.probed

    def next(self) -> SkipPlan:
        """The plan of the next decode step, which is counted."""
        if isinstance(self.decision, Schedule):
            self.decode_plan = self.decision.at(self.decoded)
        self.decoded += 1
        return self.decode_plan

    def learn(self, moments: torch.Tensor) -> None:
        """Count a step's moments; at the end of the window, decide."""
        assert self.window is not None
        assert self.policy is not None
        assert self.profile is not None
        self.window.add(moments)
        if self.window.closed:
            self.decode_plan = self.policy.online_plan(
                self.profile, self.plan, self.window.read(), self.window.probed
            )


@dataclass
class _Requests:
    """The requests of one compiled model, each known by the tensors of its cache.

    Every tensor counts the writes to it. A request goes on if nobody has written to its cache since
    its last step. If somebody has (a reset, a prefill that ran elsewhere, another model), or the
    cache is not known, a new one begins. Tensors made under ``torch.inference_mode`` do not count;
    of these a hash of the content is taken, before and after every step, for which the host waits.

    Attributes:
        first: every request as it begins.
        options: kept, so that nothing else can take the identity of a part of them.
        known: for each tensor of a cache its request, and its mark after the request's last step.
            A cache that is freed takes them along.
    """

    first: _Model
    options: dict[str, Any]
    known: MutableMapping[torch.Tensor, tuple[_Model, int]] = field(
        default_factory=WeakIdKeyDictionary
    )

    def begun(self) -> _Model:
        """A new request."""
        return replace(self.first) if self.first.remembers else self.first

    def going_on(self, cache: Sequence[torch.Tensor]) -> _Model | None:
        """The request that was the last to write to this cache; None where it is none of ours."""
        if not self.first.remembers:
            return self.first
        found = [(t, *self.known[t]) for t in cache if t in self.known]
        if not found or any(mark != _mark(t) for t, _, mark in found):
            return None
        requests = {id(request): request for _, request, _ in found}
        return next(iter(requests.values())) if len(requests) == 1 else None

    def keep(self, cache: Sequence[torch.Tensor], request: _Model) -> None:
        """A step of `request` has just written to this cache."""
        if self.first.remembers:
            for tensor in cache:
                self.known[tensor] = request, _mark(tensor)


def _mark(tensor: torch.Tensor) -> int:
    """What changes when somebody writes to it."""
    if tensor.is_inference():
        return int(torch.hash_tensor(tensor).view(torch.int64))  # from 64 bits without a sign
    return tensor._version


def _is_empty(cache: Sequence[torch.Tensor]) -> bool:
    """Whether nothing is stored; waits for the device. Empty caches and reset ones hold zeros."""
    return not any(bool(t.any()) for t in sorted(cache, key=torch.Tensor.numel))


#: by the model's first parameter, which they do not keep alive, and by the content of the options
_models: MutableMapping[torch.Tensor, dict[Hashable, _Requests]] = WeakIdKeyDictionary()


def adaskip(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend, registered as ``adaskip``.

    Options:
        profile: a `Profile`, or the path of a saved one.
        alpha: acceleration ratio, 1.2 if not given.
        policy: an `AdaSkip`, or another; plan: an explicit `SkipPlan` or `Schedule` instead.
        inner_backend: what compiles the pieces, ``"inductor"`` if not given.
        link: ``"pieces"`` or ``"fused"``.

    Raises:
        ValueError: unknown or missing options, or a decision that needs `adaskip_fx.compile`.
        UnsupportedError: gradients are required, the graph is not a decoder of the profile's shape,
            or its cache is not written in place, where requests have to be told apart.
    """
    given = options or {}
    if torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs
    ):
        raise UnsupportedError(
            "backend adaskip is for inference: call the model under torch.no_grad() or "
            "torch.inference_mode()"
        )
    return _Graph(graph, _requests(given, example_inputs), given).run


def reset() -> None:
    """Forget every compiled model; called by ``torch._dynamo.reset``."""
    _models.clear()


adaskip.reset = reset  # type: ignore[attr-defined]


class _Graph:
    """One captured graph and its programs."""

    def __init__(self, graph: fx.GraphModule, requests: _Requests, options: dict[str, Any]) -> None:
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
            self._program("decode", model.plan, model.probed())

    def run(self, *values: Any) -> Any:
        """What Dynamo calls: the graph's inputs in order, to its outputs."""
        cache = [values[place] for place in self.cache]
        request = self.requests.going_on(cache) if self.one_token else None
        prompt = not self.one_token or (request is None and _is_empty(cache))
        if request is None:
            request = self.requests.begun()
        outputs = self._prompt(request, values) if prompt else self._step(request, values)
        self.requests.keep(cache, request)
        return outputs

    def _prompt(self, request: _Model, values: Sequence[Any]) -> Any:
        return self._program("prefill", request.plan, ())(values)

    def _step(self, request: _Model, values: Sequence[Any]) -> Any:
        probed = request.probed()
        outputs = self._program("decode", request.next(), probed)(values)
        if probed:
            *outputs, moments = outputs
            request.learn(moments)
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


def _requests(options: dict[str, Any], inputs: Sequence[Any]) -> _Requests:
    """Those of the model that the graph's inputs belong to, under these options."""
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ValueError(
            f"backend adaskip has no option {', '.join(unknown)}; it has {', '.join(_OPTIONS)}"
        )
    profile = options.get("profile")
    if profile is not None and not isinstance(profile, Profile):
        options = {**options, "profile": Profile.load(profile)}
    first = next((t for t in inputs if isinstance(t, torch.nn.Parameter)), None)
    known: dict[Hashable, _Requests] = {} if first is None else _models.setdefault(first, {})
    key = frozenset((name, _hashable(value)) for name, value in options.items())
    if key not in known:
        known[key] = _Requests(_make_model(options), options)
    return known[key]


def _hashable(value: Any) -> Hashable:
    """Equal for equal options; an object that cannot be hashed equals itself."""
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return value  # type: ignore[no-any-return]


def _make_model(options: dict[str, Any]) -> _Model:
    profile = options.get("profile")
    plan, policy = options.get("plan"), options.get("policy", AdaSkip())
    if plan is not None:
        return _Model(_usable(plan), profile, None)
    if profile is None:
        raise ValueError(
            'backend adaskip needs options={"profile": path, "alpha": 1.2} or {"plan": plan}'
        )
    decision = _usable(policy.plan(profile, options.get("alpha", 1.2)))
    return _Model(decision, profile, policy if isinstance(policy, OnlinePolicy) else None)


def _usable(decision: Decision) -> SkipPlan | Schedule:
    if isinstance(decision, SkipPlan | Schedule):
        if not plans_of(decision)[0].last_token_full:
            return decision
        what = "a plan with last_token_full"
    else:
        what = f"a {decision.kind}"
    raise ValueError(
        f"backend adaskip cannot run {what}: it sees a prompt as one graph and no request; use "
        "adaskip_fx.compile"
    )
