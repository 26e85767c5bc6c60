"""``torch.compile(model, backend="adaskip")``: the same passes inside somebody else's pipeline.

Dynamo captures and guards, the user's own ``StaticCache`` is in the graph, and this backend skips
sublayers in it. A skipped attention's K/V writes are dropped and its length counter is kept. A
request begins with a prefill call (more than one token); decode calls after it measure, decide and
switch plans as :func:`adaskip_fx.compile` does, also by a schedule, except that padding and rows
that have ended count in the window like any other: the backend cannot see them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from adaskip_passes import (
    PieceCompiler,
    RefusedError,
    canonicalize,
    describe,
    find_sublayers,
    fuse,
    link,
    outline,
)

from .decisions import Decision, Schedule, plans_of
from .folding import Placed, folds
from .online import Window, probed_in_decode
from .plan import Phase, SkipPlan, Sublayer
from .policies import AdaSkip, OnlinePolicy
from .profile import Profile
from .programs import rewrite, stand_in_tensors

_OPTIONS = ("profile", "alpha", "policy", "plan", "inner_backend", "link")


@dataclass
class _Model:
    """What the graphs of one compiled model share: its plan, and the request that is running."""

    decision: SkipPlan | Schedule
    profile: Profile | None
    policy: OnlinePolicy | None
    decode_plan: SkipPlan = field(init=False)
    decoded: int = field(init=False, default=0)
    window: Window | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.begin()

    @property
    def plan(self) -> SkipPlan:
        """What a request begins with."""
        return plans_of(self.decision)[0]

    def begin(self) -> None:
        """A new request: the window opens again, a schedule begins again."""
        self.decode_plan, self.decoded, self.window = self.plan, 0, None
        if self.policy is not None and self.policy.online and self.plan.skipped("prefill"):
            probed = probed_in_decode(self.plan)
            self.window = Window(probed, self.policy.window) if probed else None

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


#: by identity of torch.compile's options and of the model's first parameter; the options are kept
#: so that no other dictionary can take their identity
_models: dict[tuple[int, int], tuple[dict[str, Any], _Model]] = {}


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
        RefusedError: gradients are required, or the graph is not a decoder of the profile's shape.
    """
    given = options or {}
    if torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs
    ):
        raise RefusedError(
            "backend adaskip is for inference: call the model under torch.no_grad() or "
            "torch.inference_mode()"
        )
    model = _model(given, example_inputs)
    return _Graph(graph, model, given).run


def reset() -> None:
    """Forget every compiled model; called by ``torch._dynamo.reset``."""
    _models.clear()


adaskip.reset = reset  # type: ignore[attr-defined]


class _Graph:
    """One captured graph and its programs."""

    def __init__(self, graph: fx.GraphModule, model: _Model, options: dict[str, Any]) -> None:
        capture = describe(graph)
        canonicalize(graph.graph)
        found = find_sublayers(graph.graph)
        self.model = model
        self.sublayers = model.plan.sublayers
        names = [f"{s.layer}.{s.kind}" for s in found]
        if names != [str(s) for s in self.sublayers]:
            raise RefusedError(
                f"the graph has {len(names)} sublayers, the profile or plan {len(self.sublayers)}, "
                "or their order differs: it was made for another model"
            )
        self.outer = outline(graph, found)
        self.placed = Placed()
        self.inputs = [n.name for n in graph.graph.find_nodes(op="placeholder")]
        stream = found[0].stream.meta["example_value"]
        self.device: torch.device = stream.device
        self.phase: Phase = "decode" if _is_one(stream.shape[1]) else "prefill"
        self.compiler = PieceCompiler(capture, options.get("inner_backend", "inductor"))
        self.fused = options.get("link", "pieces") == "fused"
        self.programs: dict[tuple[str, tuple[Sublayer, ...]], Callable[..., Any]] = {}
        # now, inside Dynamo's call, so that the guards of every piece are recorded
        for plan in plans_of(model.decision):
            self._program(plan, ())
        if self.phase == "decode":
            self._program(model.plan, model.probed())

    def run(self, *values: Any) -> Any:
        """What Dynamo calls: the graph's inputs in order, to its outputs."""
        if self.phase == "prefill":
            self.model.begin()
            return self._program(self.model.plan, ())(values)
        probed = self.model.probed()
        outputs = self._program(self.model.next(), probed)(values)
        if probed:
            *outputs, moments = outputs
            self.model.learn(moments)
        return tuple(outputs)

    def _program(
        self, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Callable[[Sequence[Any]], Any]:
        key = (plan.phase_digest(self.phase), probed)
        if key not in self.programs:
            self.programs[key] = self._link(plan, probed)
        return self.programs[key]

    def _link(self, plan: SkipPlan, probed: tuple[Sublayer, ...]) -> Callable[[Sequence[Any]], Any]:
        stand_ins = folds(plan, self.phase)
        outer = rewrite(
            self.outer,
            self.sublayers,
            plan,
            self.phase,
            probed,
            keep="counters",
            stand_ins=stand_ins,
        )
        inputs = outer.graph.find_nodes(op="placeholder")
        factors = stand_in_tensors(outer, self.sublayers, stand_ins, self.placed)
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


def _model(options: dict[str, Any], inputs: Sequence[Any]) -> _Model:
    first = next((t for t in inputs if isinstance(t, torch.nn.Parameter)), None)
    key = (id(options), id(first))
    if key not in _models:
        _models[key] = (options, _make_model(options))
    return _models[key][1]


def _make_model(options: dict[str, Any]) -> _Model:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ValueError(
            f"backend adaskip has no option {', '.join(unknown)}; it has {', '.join(_OPTIONS)}"
        )
    profile = options.get("profile")
    if profile is not None and not isinstance(profile, Profile):
        profile = Profile.load(profile)
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
