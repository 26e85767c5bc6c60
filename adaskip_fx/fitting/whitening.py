"""Directions of equal importance, in which gradient descent gets along.

A few directions of the residual stream are a hundred times larger than the others, so one learning
rate is too high for these or too low for those. In coordinates in which the stream's weighted
second moments are one, a step changes what each direction adds by as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer

from .fitter import Fitter
from .second_moments import SecondMoments
from .spec import SurrogateSpec

_RIDGE = 1e-2  # of the mean square


@dataclass(frozen=True, eq=False)
class Whitening:
    """What a change of a linear map is made of, `change = size * step @ root`.

    root: float32 [H, H], the inverse root of the second moments of what the map is given.
    size: of what the sublayer adds, in units of the stream's norm.
    """

    root: torch.Tensor
    size: float

    @classmethod
    def of(cls, moments: SecondMoments) -> Whitening:
        """By the moments of a sublayer's tokens."""
        weight = moments.inputs[-1, -1]
        second = moments.inputs[:-1, :-1] / weight
        second.diagonal().add_(_RIDGE * second.diagonal().mean())
        values, directions = torch.linalg.eigh(second)
        root = (directions * values.clamp_min(1e-300).rsqrt()) @ directions.T
        size = float((moments.targets / weight / moments.hidden).sqrt())
        return cls(root.float(), max(size, 1e-6))


def whitenings(fitter: Fitter, plan: SkipPlan) -> Mapping[Sublayer, Whitening]:
    """For each skipped sublayer with a linear map, as the stream is there under the plan."""
    left_out = [s for s in plan.sublayers if plan.action("prefill", s) is not Action.RUN]
    found: dict[Sublayer, Whitening] = {}
    for kind in ("linear", "normalized"):
        known = plan.surrogates.by_sublayer
        wanted = [s for s in left_out if s in known and known[s].kind == kind]
        if wanted:
            moments = fitter.moments(plan.surrogates, left_out, wanted, SurrogateSpec(kind))
            found.update({s: Whitening.of(_total(folds)) for s, folds in moments.items()})
    return found


def _total(folds: list[SecondMoments]) -> SecondMoments:
    first, *others = folds
    for other in others:
        first = first.plus(other)
    return first
