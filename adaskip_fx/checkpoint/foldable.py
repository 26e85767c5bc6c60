"""What of a plan a plain checkpoint can say; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaskip_passes import UnsupportedError

from ..plans.actions import Action, PlanError
from ..plans.skip_plan import SkipPlan
from ..plans.sublayer import Kind, Sublayer
from ..plans.windows import Window
from .layout import Layout

_PLAIN = "export it without surrogates (plan.with_surrogates(NO_SURROGATES))"
_RUN = "run the plan with adaskip_fx.compile"


@dataclass(frozen=True)
class Foldable:
    """What a plan says, in the words that a checkpoint has.

    Attributes:
        runs: The sublayers that run, in stream order.
        windows: By layer, what its attention sees.
        divisors: By layer and branch of those that run, what the branch is divided by, where scales
            stand in for sublayers before it; empty where there are none.
    """

    runs: list[Sublayer]
    windows: Mapping[int, Window]
    divisors: Mapping[tuple[int, Kind], float]


def foldable(plan: Any, fold_scales: bool) -> Foldable:
    """Return what a plan says, if a checkpoint can say it.

    A scale multiplies the stream. What comes after reads it through a norm, which gives the same of
    ``x`` and of ``c x`` but for its epsilon: ``norm(c x; eps) = norm(x; eps / c^2)``. So the stream
    may be kept as it was, if each branch after it is divided by c, the product of the factors so
    far; the norm in front of the head ends it.

    Raises:
        TypeError: `plan` is no `SkipPlan`.
        PlanError: Prompts and decode differ.
        UnsupportedError: Names the first sublayer with a surrogate or window that cannot be said.
    """
    if not isinstance(plan, SkipPlan):
        raise TypeError(
            f"a checkpoint is of one plan, got {type(plan).__name__}; export one of its plans"
        )
    _check_phases(plan)
    runs, divisors, product = [], {}, 1.0
    for sublayer in plan.sublayers:
        if plan.action("prefill", sublayer) is Action.RUN:
            runs.append(sublayer)
            if product != 1.0:
                divisors[sublayer.layer, sublayer.kind] = product
            continue
        product *= _factor(plan, sublayer, fold_scales)
    windows = plan.windows.prefill.items()
    return Foldable(runs, {s.layer: _whole(s, w) for s, w in windows}, divisors)


def check_scales(divisors: Mapping[tuple[int, Kind], float], layout: Layout) -> None:
    """Refuse scales where a branch cannot be divided, because a norm is behind it.

    Raises:
        UnsupportedError: Names the norm.
    """
    if divisors and layout.norm_behind is not None:
        raise UnsupportedError(
            f"scales cannot be folded into this model: {layout.norm_behind} is behind a branch and "
            f"undoes what its weights are divided by; {_PLAIN}, or {_RUN}"
        )


def _check_phases(plan: SkipPlan) -> None:
    for sublayer in plan.sublayers:
        prefill, decode = plan.action("prefill", sublayer), plan.action("decode", sublayer)
        runs = prefill is Action.RUN, decode is Action.RUN
        seen = plan.window("prefill", sublayer), plan.window("decode", sublayer)
        if runs[0] != runs[1] or seen[0] != seen[1]:
            said = [str(w or a) for w, a in zip(seen, (prefill, decode), strict=True)]
            raise PlanError(
                f"{sublayer}: {said[0]} in prefill but {said[1]} in decode; a checkpoint has no "
                f"phases, so a plan must be the same in both: {_RUN}, or export the part of one "
                "phase (SkipPlan.of(plan.sublayers, plan.skipped('prefill')))"
            )


def _factor(plan: SkipPlan, sublayer: Sublayer, fold_scales: bool) -> float:
    """Return what the stream is multiplied by in place of a skipped sublayer."""
    surrogate = plan.surrogates.get(sublayer)
    if surrogate is None:
        return 1.0
    if surrogate.factor is None:
        raise UnsupportedError(
            f"{sublayer}: a plain checkpoint has no place for its {surrogate.kind} surrogate; "
            f"{_PLAIN}, or {_RUN}"
        )
    if surrogate.factor != 1.0 and not fold_scales:
        raise UnsupportedError(
            f"{sublayer}: its scale {surrogate.factor:.3g} can be folded into the weights that "
            "follow, but for the epsilon of their norms, so not exactly: allow that with "
            f"fold_scales=True (--fold-scales), which says how far logits are off; or {_PLAIN}"
        )
    return surrogate.factor


def _whole(sublayer: Sublayer, window: Window) -> Window:
    """Return a window that is of the whole layer and has no sinks."""
    if window.sinks or window.full_heads:
        what = f"{window.sinks} sinks" if window.sinks else "K/V heads that see everything"
        raise UnsupportedError(
            f"{sublayer}: {window} has {what}, which a plain checkpoint has no words for; {_RUN}, "
            "or make windows of whole layers without sinks (adaskip-fx windows --layers --sinks 0)"
        )
    return window
