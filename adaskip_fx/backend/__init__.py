"""``torch.compile(model, backend="adaskip")``: the same passes inside somebody else's pipeline.

Dynamo captures and guards, the user's own ``StaticCache`` is in the graph, and this backend skips
sublayers in it. A skipped attention's K/V writes are dropped and its length counter is kept. Decode
calls measure, decide and switch plans as :func:`adaskip_fx.compile` does, also by a schedule,
except that padding and rows that have ended count in the window like any other: the backend cannot
see them.

What is measured and decided belongs to a request, and a request is told by its cache
(`requests.Requests`): several may be decoded in turn, one cache may serve one after the other, and
prefill may run elsewhere, as where transformers' ``CompileConfig`` compiles decode alone. A prompt
is a call of several tokens, or of one on an empty cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from adaskip_passes import UnsupportedError

from ..parallel.ranks import Ranks
from ..plans.decisions import Decision, Schedule, plans_of
from ..plans.skip_plan import SkipPlan
from ..policies import AdaSkip, OnlinePolicy
from ..profiles.profile import Profile
from ..runtime.window import Learner
from .graph import BackendGraph
from .requests import BackendRequest, Requests

_OPTIONS = ("profile", "alpha", "policy", "plan", "inner_backend", "link")

#: By the model's first parameter, which they do not keep alive, and by the content of the options.
_models: MutableMapping[torch.Tensor, dict[Hashable, Requests]] = WeakIdKeyDictionary()


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
    return BackendGraph(graph, _requests_of(given, example_inputs), given).run


def reset() -> None:
    """Forget every compiled model; called by ``torch._dynamo.reset``."""
    _models.clear()


adaskip.reset = reset  # type: ignore[attr-defined]


def _requests_of(options: dict[str, Any], inputs: Sequence[Any]) -> Requests:
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
    known: dict[Hashable, Requests] = {} if first is None else _models.setdefault(first, {})
    key = frozenset((name, _hashable(value)) for name, value in options.items())
    if key not in known:
        ranks = Ranks.holding(inputs)
        request = ranks.together("the options of a backend", lambda: _first_request(options, ranks))
        ranks.agree("the options of a backend", request.decision.digest)
        known[key] = Requests(request, options)
    return known[key]


def _hashable(value: Any) -> Hashable:
    """Equal for equal options; an object that cannot be hashed equals itself."""
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return value  # type: ignore[no-any-return]


def _first_request(options: dict[str, Any], ranks: Ranks) -> BackendRequest:
    profile = options.get("profile")
    plan, policy = options.get("plan"), options.get("policy", AdaSkip())
    if plan is not None:
        return BackendRequest(_usable(plan))
    if profile is None:
        raise ValueError(
            'backend adaskip needs options={"profile": path, "alpha": 1.2} or {"plan": plan}'
        )
    decision = _usable(policy.plan(profile, options.get("alpha", 1.2)))
    learner = Learner(policy, profile, ranks=ranks) if isinstance(policy, OnlinePolicy) else None
    return BackendRequest(decision, learner)


def _usable(decision: Decision) -> SkipPlan | Schedule:
    if isinstance(decision, SkipPlan | Schedule):
        plans = plans_of(decision)
        if any(plan.windows for plan in plans):
            raise ValueError(
                "backend adaskip cannot run a plan with windows yet: attention is the user's own "
                "there, over a cache whose heads it may repeat; use adaskip_fx.compile"
            )
        if not plans[0].last_token_full:
            return decision
        what = "a plan with last_token_full"
    else:
        what = f"a {decision.kind}"
    raise ValueError(
        f"backend adaskip cannot run {what}: it sees a prompt as one graph and no request; use "
        "adaskip_fx.compile"
    )
