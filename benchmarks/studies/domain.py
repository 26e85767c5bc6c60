"""A profile and its surrogates, of one domain, used on another: what that costs."""

from __future__ import annotations

from typing import Any

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from adaskip_fx.policies.adaskip import skip_count

from . import transfer
from .fits import Fit, chosen_surrogates
from .quality import costs
from .setup import Options, Subject, Text, open_subject

PICTURES = ("matrix",)
_USUAL = ("scale",)  # surrogates, if no others are asked for


def measure(options: Options) -> dict[str, Any]:
    """For each compensation and alpha the perplexity ratio, by what was calibrated on and read."""
    subject = open_subject(options)
    return {**subject.about(), **domain(subject)}


def domain(subject: Subject) -> dict[str, Any]:
    """Panels as the picture takes them; `kl` holds KL to the full model likewise.

    Calibrated on the first half of a text, evaluated on the second half; the diagonal of a book is
    therefore a part of the same book.
    """
    names = [text.name for text in subject.texts]
    fits = chosen_surrogates(subject.options.surrogates, _USUAL)
    kinds = [(name, alpha) for name in fits for alpha in subject.options.alphas]
    plans = [
        _plan(subject, text, alpha, fits[name]) for name, alpha in kinds for text in subject.texts
    ]
    columns, perplexity = [], {}
    for text in subject.texts:
        full, found = costs(subject.runtime, plans, subject.windows(text, "second"))
        perplexity[text.name] = full.perplexity
        columns.append([cost.against(full) for cost in found])
    total = len(subject.runtime.sublayers)

    def panels(key: str) -> list[dict[str, Any]]:
        return [
            {
                "title": f"{name}, alpha {alpha:g}: {skip_count(alpha, total)} of {total}",
                "compensation": name,
                "alpha": alpha,
                "rows": names,
                "columns": names,
                "values": [
                    [column[i * len(names) + row][key] for column in columns]
                    for row in range(len(names))
                ],
            }
            for i, (name, alpha) in enumerate(kinds)
        ]

    return {
        "value_name": "perplexity ratio",
        "row_name": "calibrated on (first half)",
        "column_name": "evaluated on (second half)",
        "panels": panels("perplexity_ratio"),
        "kl": panels("kl"),
        "full_perplexity": perplexity,
    }


def _plan(subject: Subject, text: Text, alpha: float, fit: Fit) -> SkipPlan:
    plan = AdaSkip().plan(subject.profile(text), alpha)
    return plan.with_surrogates(fit(subject, text, list(plan.prefill)))


summary = transfer.summary
