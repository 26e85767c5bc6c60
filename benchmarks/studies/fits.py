"""The surrogates that are compared: AdaSkip's, and all kinds fitted in the plan's order.

A new one is a line here: a fit gets the subject, the text to fit on and what is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from adaskip_fx.fitting import Fitter, SurrogateSpec
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates

from .setup import Subject, Text

Fit = Callable[[Subject, Text, Sequence[Sublayer]], Surrogates]


def none(_subject: Subject, _text: Text, _skip: Sequence[Sublayer]) -> Surrogates:
    """The stream passes through."""
    return Surrogates()


def scale(subject: Subject, text: Text, skip: Sequence[Sublayer]) -> Surrogates:
    """AdaSkip's (eq. 4), from the profile."""
    factors = subject.profile(text).scales().factors
    return Surrogates.scale({s: factors[s] for s in skip})


def fitted(spec: Callable[[int], SurrogateSpec]) -> Fit:
    """Return a fit of a kind of surrogate, which may depend on the hidden size."""

    def fit(subject: Subject, text: Text, skip: Sequence[Sublayer]) -> Surrogates:
        hidden = subject.model.get_input_embeddings().weight.shape[1]
        plan = SkipPlan.of(subject.runtime.sublayers, skip)
        return fitter(subject, text).fit(plan, spec(hidden)).surrogates

    return fit


#: name -> how it is fitted
SURROGATES: Mapping[str, Fit] = MappingProxyType(
    {
        "none": none,
        "scale": scale,
        "diagonal": fitted(lambda hidden: SurrogateSpec("diagonal")),
        "linear": fitted(lambda hidden: SurrogateSpec("linear")),
        "normalized": fitted(lambda hidden: SurrogateSpec("normalized")),
        "low_rank": fitted(lambda hidden: SurrogateSpec("low_rank", rank=max(1, hidden // 9))),
    }
)


def chosen_surrogates(names: Sequence[str], usual: Sequence[str] = ()) -> dict[str, Fit]:
    """Those named; if none is, the usual ones, or all. ValueError for an unknown one."""
    unknown = [name for name in names if name not in SURROGATES]
    if unknown:
        raise ValueError(f"no surrogate {unknown[0]!r}; this version has {', '.join(SURROGATES)}")
    wanted = names or usual or tuple(SURROGATES)
    return {name: fit for name, fit in SURROGATES.items() if name in wanted}


@functools.cache
def fitter(subject: Subject, text: Text) -> Fitter:
    """What fits on the calibration windows of a text, with one compiled model for all texts."""
    first = subject.texts[0]
    windows = subject.windows(text, "first")
    if text is not first:
        return fitter(subject, first).with_texts(windows)
    return Fitter(subject.model, None, windows, max_length=subject.length)
