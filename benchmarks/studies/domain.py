"""A profile of one domain, used on another: what it costs."""

from __future__ import annotations

from typing import Any

from adaskip_fx.policies import AdaSkip
from adaskip_fx.policies.adaskip import skip_count

from . import transfer
from .quality import costs
from .setup import Options, Subject, open_subject

PICTURES = ("matrix",)


def measure(options: Options) -> dict[str, Any]:
    """For each alpha the perplexity ratio, calibrated on each text, evaluated on each."""
    subject = open_subject(options)
    return {**subject.about(), **domain(subject)}


def domain(subject: Subject) -> dict[str, Any]:
    """Panels as the picture takes them; `kl` holds KL to the full model likewise.

    Calibrated on the first half of a text, evaluated on the second half; the diagonal of a book is
    therefore a part of the same book.
    """
    names, alphas = [text.name for text in subject.texts], subject.options.alphas
    plans = [
        AdaSkip().plan(subject.profile(text), alpha) for alpha in alphas for text in subject.texts
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
                "title": f"alpha {alpha:g}: {skip_count(alpha, total)} of {total}",
                "alpha": alpha,
                "rows": names,
                "columns": names,
                "values": [
                    [column[i * len(names) + row][key] for column in columns]
                    for row in range(len(names))
                ],
            }
            for i, alpha in enumerate(alphas)
        ]

    return {
        "value_name": "perplexity ratio",
        "row_name": "calibrated on (first half)",
        "column_name": "evaluated on (second half)",
        "panels": panels("perplexity_ratio"),
        "kl": panels("kl"),
        "full_perplexity": perplexity,
    }


summary = transfer.summary
