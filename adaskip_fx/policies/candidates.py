"""What policies share that try plans out: who judges them, and how a candidate is made."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.policies.base import plan_without

if TYPE_CHECKING:
    from adaskip_fx.plans.surrogates import Surrogates
    from adaskip_fx.profiles.profile import Profile


class Evaluator(Protocol):
    """The loss of a plan on calibration data, such as `calibration.loss.CalibrationLoss`."""

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        """The loss on the first `samples` samples, on all when None; the less the better."""
        ...


class FitSurrogates(Protocol):
    """Fits what stands in for sublayers, such as `adaskip_fx.fitting.SurrogateFitter`."""

    def __call__(self, skip: tuple[Sublayer, ...], known: tuple[Sublayer, ...] = ()) -> Surrogates:
        """Surrogates for what is skipped, in stream order.

        known: those of `skip` that other candidates have in common; their fits may be kept.
        """
        ...


def candidate(
    profile: Profile,
    skip: Collection[Sublayer],
    fit_surrogates: FitSurrogates | None,
    scaled: bool,
    known: tuple[Sublayer, ...] = (),
) -> SkipPlan:
    """The plan that skips `skip`, with surrogates fitted for it; it shares `known` with another.

    Without `fit_surrogates`: AdaSkip's scale if `scaled`, else nothing.
    """
    ordered = tuple(s for s in profile.sublayers if s in skip)
    if fit_surrogates is None or not ordered:
        return plan_without(profile, ordered, scaled)
    return SkipPlan.of(profile.sublayers, ordered, surrogates=fit_surrogates(ordered, known))


def skippable(
    profile: Profile, protected: bool, never: Collection[Sublayer], count: int, name: str
) -> tuple[Sublayer, ...]:
    """The sublayers among which a policy called `name` may choose `count`.

    protected: leaves out the first two layers and the last; never: leaves out these.

    ValueError when they are fewer than `count`.
    """
    layers = profile.layer_numbers
    always = {*layers[:2], layers[-1]} if protected else set[int]()
    free = tuple(s for s in profile.sublayers if s.layer not in always and s not in never)
    if count > len(free):
        raise ValueError(
            f"{count} of {len(profile.sublayers)} sublayers are to be skipped, but {name} may skip "
            f"{len(free)}: take a smaller alpha"
        )
    return free
