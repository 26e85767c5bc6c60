"""The compensations that are compared: AdaSkip's, and the ladder fitted in the plan's order.

A new one is a line here: a fit gets the subject, the profile and what is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from adaskip_fx.compensation import Compensation
from adaskip_fx.fitting import Fitter, Rung
from adaskip_fx.plan import SkipPlan, Sublayer
from adaskip_fx.profile import Profile

from .setup import Subject

Fit = Callable[[Subject, Profile, Sequence[Sublayer]], Compensation]


def none(_subject: Subject, _profile: Profile, _skip: Sequence[Sublayer]) -> Compensation:
    """The stream passes through."""
    return Compensation()


def scale(_subject: Subject, profile: Profile, skip: Sequence[Sublayer]) -> Compensation:
    """AdaSkip's (eq. 4), from the profile."""
    factors = profile.compensation().factors
    return Compensation.scale({s: factors[s] for s in skip})


def fitted(rung: Callable[[int], Rung]) -> Fit:
    """A rung of the ladder, of the model's hidden size, fitted on the first text."""

    def fit(subject: Subject, _profile: Profile, skip: Sequence[Sublayer]) -> Compensation:
        hidden = subject.model.get_input_embeddings().weight.shape[1]
        plan = SkipPlan.of(subject.runtime.sublayers, skip)
        return fitter(subject).fit(plan, rung(hidden)).compensation

    return fit


#: name -> how it is fitted
COMPENSATIONS: Mapping[str, Fit] = MappingProxyType(
    {
        "none": none,
        "scale": scale,
        "diagonal": fitted(lambda hidden: Rung("diagonal")),
        "linear": fitted(lambda hidden: Rung("linear")),
        "normalized": fitted(lambda hidden: Rung("normalized")),
        "low_rank": fitted(lambda hidden: Rung("low_rank", rank=max(1, hidden // 9))),
    }
)


def chosen_compensations(names: Sequence[str], usual: Sequence[str] = ()) -> dict[str, Fit]:
    """Those named; if none is, the usual ones, or all. ValueError for an unknown one."""
    unknown = [name for name in names if name not in COMPENSATIONS]
    if unknown:
        raise ValueError(
            f"no compensation {unknown[0]!r}; this version has {', '.join(COMPENSATIONS)}"
        )
    wanted = names or usual or tuple(COMPENSATIONS)
    return {name: fit for name, fit in COMPENSATIONS.items() if name in wanted}


@functools.cache
def fitter(subject: Subject) -> Fitter:
    """What fits on the calibration windows of the subject's first text."""
    windows = subject.windows(subject.texts[0], "first")
    numbered = [str(i) for i in range(len(windows))]
    return Fitter(subject.model, _Windows(windows), numbered, max_length=subject.length)


class _Windows:
    """Stands in for a tokenizer where texts are windows of tokens already, asked for by number."""

    def __init__(self, windows: Sequence[torch.Tensor]) -> None:
        self._windows = windows

    def __call__(self, number: str, **_options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[int(number)]}
