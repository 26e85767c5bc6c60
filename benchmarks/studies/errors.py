"""Do the errors of skipped sublayers add up? Together, against the sum of each alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer

from .fits import Fit, chosen_surrogates
from .quality import Cost, add, normalised
from .setup import Options, Subject, open_subject
from .streams import prompt_streams, relative_errors

PICTURES = ("growth",)


def measure(options: Options) -> dict[str, Any]:
    """Errors at every number of sublayers, for every compensation."""
    subject = open_subject(options)
    return {**subject.about(), **errors(subject)}


def errors(subject: Subject) -> dict[str, Any]:
    """Rows as the picture takes them.

    Calibrated on the first text, evaluated on the last. ``error_sum`` and ``kl_sum`` add up what
    each sublayer costs when it is skipped alone; ``error_root`` is the root of the sum of squares,
    which is what errors would make that point into unrelated directions.
    """
    calibration, evaluation = subject.texts[0], subject.texts[-1]
    profile = subject.profile(calibration)
    order = [profile.sublayers[i] for i in np.argsort(-profile.similarity(), kind="stable")]
    order = order[: min(subject.options.most, len(order) - 1)]
    rows = []
    for name, fit in chosen_surrogates(subject.options.surrogates).items():
        rows += [{"compensation": name, **row} for row in _growth(subject, order, fit)]
    return {
        "calibrated_on": calibration.name,
        "evaluated_on": evaluation.name,
        "order": [str(s) for s in order],
        "rows": rows,
    }


def _growth(subject: Subject, order: Sequence[Sublayer], fit: Fit) -> list[dict[str, float]]:
    text, all_ = subject.texts[0], subject.runtime.sublayers

    def plan(skip: Sequence[Sublayer]) -> SkipPlan:
        return SkipPlan.of(all_, skip, surrogates=fit(subject, text, skip))

    singles = [plan([s]) for s in order]
    together = [plan(order[: k + 1]) for k in range(len(order))]
    found = _measured(subject, [*singles, *together])
    return growth(found[: len(order)], found[len(order) :])


def growth(
    singles: Sequence[tuple[float, float]], together: Sequence[tuple[float, float]]
) -> list[dict[str, float]]:
    """Rows of (error, KL): of each sublayer alone, and of the first k together."""
    rows = []
    for k, (error, kl) in enumerate(together, 1):
        alone, kls = zip(*singles[:k], strict=True)
        rows.append(
            {
                "skipped": k,
                "error": error,
                "error_sum": sum(alone),
                "error_root": math.hypot(*alone),
                "kl": kl,
                "kl_sum": sum(kls),
                "alone": {"error": alone[-1], "kl": kls[-1]},
            }
        )
    return rows


def _measured(subject: Subject, plans: Sequence[SkipPlan]) -> list[tuple[float, float]]:
    """Of each plan the mean relative error of the final stream, and KL in nats a token."""
    runtime = subject.runtime
    empty = SkipPlan.empty(runtime.sublayers)
    sums, cost = torch.zeros(len(plans), dtype=torch.float64), [Cost() for _ in plans]
    tokens = 0
    for ids in subject.windows(subject.texts[-1], "second"):
        logits, streams = prompt_streams(runtime, empty, ids)
        expected, final = normalised(logits), streams[-1]
        tokens += ids.shape[1]
        for i, plan in enumerate(plans):
            logits, streams = prompt_streams(runtime, plan, ids)
            sums[i] += float(relative_errors(streams[-1], final).double().sum())
            add(cost[i], normalised(logits), expected, ids)
    return [(float(s) / tokens, c.kl / c.tokens) for s, c in zip(sums, cost, strict=True)]


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    lines = [f"calibrated on {result['calibrated_on']}, evaluated on {result['evaluated_on']}"]
    lines += [
        f"{row['compensation']}, {row['skipped']} skipped: error {row['error']:.4f} (sum "
        f"{row['error_sum']:.4f}, root of squares {row['error_root']:.4f}), KL {row['kl']:.4f} "
        f"(sum {row['kl_sum']:.4f})"
        for row in result["rows"]
    ]
    return "\n".join(lines)
