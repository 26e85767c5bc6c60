"""What policies share that try plans out: who judges them, and how a candidate is made."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol, TypeAlias

from adaskip_fx.plan import SkipPlan, Sublayer
from adaskip_fx.policies.baseline import plan_without

if TYPE_CHECKING:
    from adaskip_fx.compensation import Compensation
    from adaskip_fx.profile import Profile


class Evaluator(Protocol):
    """The loss of a plan on calibration data, such as `adaskip_fx.search.CalibrationLoss`."""

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        """The loss on the first `samples` samples, on all when None; the less the better."""
        ...


#: From the sublayers that are skipped, in stream order, to what stands in for them.
Compensate: TypeAlias = "Callable[[tuple[Sublayer, ...]], Compensation]"


def candidate(
    profile: Profile,
    skip: Collection[Sublayer],
    compensate: Compensate | None,
    compensated: bool,
) -> SkipPlan:
    """The plan that skips `skip`, with what `compensate` fits for it.

    Without `compensate`: AdaSkip's scale if `compensated`, else nothing.
    """
    ordered = tuple(s for s in profile.sublayers if s in skip)
    if compensate is None or not ordered:
        return plan_without(profile, ordered, compensated)
    return SkipPlan.of(profile.sublayers, ordered, compensation=compensate(ordered))


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
