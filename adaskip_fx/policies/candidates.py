"""What searching policies share: the evaluator of a plan, and how a candidate is made."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol, TypeVar

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.policies.base import plan_without

if TYPE_CHECKING:
    from adaskip_fx.plans.surrogates import Surrogates
    from adaskip_fx.profiles.profile import Profile


class Evaluator(Protocol):
    """The loss of a plan on calibration data, such as `calibration.loss.CalibrationLoss`."""

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        """Return the loss on the first `samples` samples, or on all; lower is better.

        Args:
            plan: the candidate.
            samples: how many samples to judge on; None for all.
        """
        ...


class FitSurrogates(Protocol):
    """Fits surrogates for a set of sublayers, such as `adaskip_fx.fitting.SurrogateFitter`."""

    def __call__(self, skip: tuple[Sublayer, ...], known: tuple[Sublayer, ...] = ()) -> Surrogates:
        """Return a surrogate for each sublayer of `skip`.

        Args:
            skip: the sublayers that are skipped, in stream order.
            known: those of `skip` that other candidates have in common; their fits may be kept.
        """
        ...


Item = TypeVar("Item")


def cheapest(known: dict[Item, float], judge: Callable[[Item], float], shortlist: int) -> Item:
    """Return the item that costs the least now, by what each cost when it was last judged.

    Those that were cheapest are judged again until one is no dearer than the next one was: Minoux's
    accelerated greedy algorithm (1978), which judges few where costs grow with what is chosen.

    Args:
        known: of each item that is left, at least one; what is judged again is noted here.
        judge: what an item costs beside what is chosen now.
        shortlist: how many are judged again at most, at least one.
    """
    fresh: dict[Item, float] = {}
    for item in sorted(known, key=lambda item: (known[item], item))[:shortlist]:
        if fresh and min(fresh.values()) <= known[item]:
            break
        fresh[item] = judge(item)
    known.update(fresh)
    return min(fresh, key=lambda item: (fresh[item], item))


def candidate(
    profile: Profile,
    skip: Collection[Sublayer],
    fit_surrogates: FitSurrogates | None,
    scaled: bool,
    known: tuple[Sublayer, ...] = (),
) -> SkipPlan:
    """Return the plan that skips `skip`, with surrogates fitted for this set.

    Args:
        profile: what calibration measured on the model.
        skip: the sublayers to skip, in any order.
        fit_surrogates: fits the surrogates; None for AdaSkip's scale if `scaled`, else for none.
        scaled: whether a skipped sublayer becomes `scale * x` where nothing is fitted.
        known: those of `skip` that other candidates have in common.
    """
    ordered = tuple(s for s in profile.sublayers if s in skip)
    if fit_surrogates is None or not ordered:
        return plan_without(profile, ordered, scaled)
    return SkipPlan.of(profile.sublayers, ordered, surrogates=fit_surrogates(ordered, known))


def skippable(
    profile: Profile, protected: bool, never: Collection[Sublayer], count: int, name: str
) -> tuple[Sublayer, ...]:
    """Return the sublayers among which a policy may choose `count` to skip, in stream order.

    Args:
        profile: what calibration measured on the model.
        protected: whether the first two layers and the last always run.
        never: other sublayers that always run.
        count: how many are to be skipped.
        name: the policy's name, for the message.

    Raises:
        ValueError: there are fewer than `count`.
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
