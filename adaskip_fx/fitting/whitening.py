"""Directions of equal importance, in which gradient descent makes even progress.

A few directions of the residual stream are a hundred times larger than the others, so one learning
rate is too high for these or too low for those. In coordinates in which the stream's weighted
second moments are one, a step changes what each direction adds by as much.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import SurrogateKind

from .fitter import Fitter
from .second_moments import SecondMoments
from .spec import SurrogateSpec

_RIDGE = 1e-2  # of the mean square
_WHITENED: tuple[SurrogateKind, ...] = ("linear", "normalized")


@dataclass(frozen=True, eq=False)
class Whitening:
    """The coordinates of a change of a linear map, `change = size * step @ root`.

    Attributes:
        root: float32 [H, H], the inverse root of the second moments of the map's inputs.
        size: of what the sublayer adds, in units of the stream's norm.
    """

    root: torch.Tensor
    size: float

    @classmethod
    def of(cls, moments: SecondMoments) -> Whitening:
        """Return the whitening of the tokens of `moments`."""
        weight = moments.inputs[-1, -1]
        second = moments.inputs[:-1, :-1] / weight
        second.diagonal().add_(_RIDGE * second.diagonal().mean())
        values, directions = torch.linalg.eigh(second)
        root = (directions * values.clamp_min(1e-300).rsqrt()) @ directions.T
        size = float((moments.targets / weight / moments.hidden).sqrt())
        return cls(root.float(), max(size, 1e-6))


def whitenings(fitter: Fitter, plan: SkipPlan) -> Mapping[Sublayer, Whitening]:
    """Return a whitening for each skipped sublayer whose surrogate is a linear map.

    Args:
        fitter: the model and the texts.
        plan: what is skipped, and the surrogates; they determine the stream at each sublayer.
    """
    skipped = [s for s in plan.sublayers if plan.action("prefill", s) is not Action.RUN]
    known = plan.surrogates.by_sublayer
    found: dict[Sublayer, Whitening] = {}
    for kind in _WHITENED:
        wanted = [s for s in skipped if s in known and known[s].kind == kind]
        if wanted:
            moments = fitter.second_moments(plan.surrogates, skipped, wanted, SurrogateSpec(kind))
            totals = {
                s: functools.reduce(SecondMoments.plus, folds) for s, folds in moments.items()
            }
            found.update({s: Whitening.of(total) for s, total in totals.items()})
    ranks = fitter.runtime.ranks
    sizes = ranks.first("the sizes of steps", lambda: [one.size for one in found.values()])
    pairs = zip(found.items(), sizes, strict=True)
    return {s: Whitening(ranks.of_first(one.root), size) for (s, one), size in pairs}
