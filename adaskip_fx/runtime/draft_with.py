"""Whether a model can have drafts, and with which plan: `compile(decoding=...)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaskip_passes import UnsupportedError

from ..plans.skip_plan import SkipPlan
from ..plans.tables import by_kind
from ..speculation.frontier import check_weaker
from ..speculation.options import Bounded, Lossless
from ..speculation.speculation import Speculation

if TYPE_CHECKING:
    from .runtime import Runtime


def draft_with(runtime: Runtime, decoding: Lossless) -> None:
    """Have requests run in full from now on, and drafts with the plan that there is.

    Raises:
        TypeError: `decoding` is something else.
        ValueError: Drafts cannot be made with that plan, or a proposer's is another model's.
        UnsupportedError: The model cannot take back a token.
        RanksError: The model is on several ranks, which are given other options.
    """
    if not isinstance(decoding, Lossless):
        raise TypeError(f"decoding must be adaskip_fx.Lossless(...), got {decoding!r}")
    runtime.ranks.agree("decoding=", _facts(decoding))
    if any(spec.mixes for spec in runtime.graphs.specs):
        raise UnsupportedError(
            f"{type(runtime.model).__name__} has mixers with a state, which cannot forget a token "
            "that was drafted and is not accepted; leave decoding= out"
        )
    plan = runtime.plan
    if not isinstance(plan, SkipPlan):
        raise ValueError(
            f"drafts are decoded with one plan, but a {plan.kind} has several; give one of them"
        )
    try:
        refines = _check_proposers(runtime, decoding, plan)
    except Exception:
        runtime.plan = plan  # what is refused has changed nothing
        raise
    runtime.set_plan(SkipPlan.empty(runtime.sublayers))
    runtime.policy = runtime.describe = None
    profile = runtime.profile
    similarity = None
    if profile is not None:
        similarity = dict(zip(profile.sublayers, profile.similarity().tolist(), strict=True))
    choices = dict[str, Any]()
    if refines:
        kept = runtime.graphs.structure.unskippable
        choices["skippable"] = [s for s in runtime.sublayers if s not in kept]
        if profile is not None:
            choices["surrogates"] = profile.scales()
    runtime.speculation = Speculation(decoding, plan, similarity=similarity, **choices)


def _facts(decoding: Lossless) -> tuple[object, ...]:
    """Return what all ranks must have; of proposers rank 0 alone asks its own."""
    given = vars(decoding)
    return (
        type(decoding).__name__,
        *(given[name] for name in sorted(given) if name != "proposers"),
        *(proposer.name for proposer in decoding.proposers),
    )


def _check_proposers(runtime: Runtime, decoding: Lossless, plan: SkipPlan) -> bool:
    """Refuse proposers whose plans cannot be drafted with; returns whether some are refined."""
    sampled = isinstance(decoding, Bounded) and decoding.verify_share < 1
    refines = False
    for proposer in decoding.proposers:
        own, weaker = getattr(proposer, "plan", None), getattr(proposer, "weaker", None)
        if own is not None:
            runtime.set_plan(own)  # which refuses what cannot be linked
        drafted = own if own is not None else plan
        if weaker:
            check_weaker((drafted, *weaker))
        if sampled and hasattr(proposer, "plan"):
            _check_written(drafted)
        if getattr(proposer, "refine", None) is not None:
            if sampled:
                raise ValueError(
                    "with verify_share below 1 the K/V of drafts stay, and refine= tries plans "
                    "that write none; leave one of the two out"
                )
            refines = True
    return refines


def _check_written(plan: SkipPlan) -> None:
    """Refuse a plan that leaves K/V out which nobody writes where a block is not verified."""
    missing = [s for s in plan.skipped("decode") if s.kind != "ffn"]
    if missing:
        raise ValueError(
            f"with verify_share below 1 the K/V of drafts stay, but the plan skips attention "
            f"({by_kind(missing)}); give one that skips ffn, has windows or is kv_only there, or "
            "leave verify_share out"
        )
