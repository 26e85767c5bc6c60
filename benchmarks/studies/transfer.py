"""Do other texts choose the same sublayers? (The paper's Table 1.)"""

from __future__ import annotations

from typing import Any

from adaskip_fx.policies import AdaSkip
from adaskip_fx.policies.adaskip import skip_count

from .setup import Options, Subject, open_subject
from .stats import hit_rate

PICTURES = ("matrix",)


def measure(options: Options) -> dict[str, Any]:
    """For each alpha the hit rate of every text's choice among every other's."""
    subject = open_subject(options)
    return {**subject.about(), **transfer(subject)}


def transfer(subject: Subject) -> dict[str, Any]:
    """Panels as the picture takes them.

    Rows choose by the first half of their text and columns by the second half of theirs, so that
    the diagonal says how far two samples of one text agree.
    """
    names = [text.name for text in subject.texts]
    panels = []
    for alpha in subject.options.alphas:
        first, second = (
            [set(AdaSkip().plan(subject.profile(t, half), alpha).prefill) for t in subject.texts]
            for half in ("first", "second")
        )
        total = len(subject.runtime.sublayers)
        panels.append(
            {
                "title": f"alpha {alpha:g}: {skip_count(alpha, total)} of {total}",
                "alpha": alpha,
                "rows": names,
                "columns": names,
                "values": [[hit_rate(a, b) for b in second] for a in first],
            }
        )
    return {
        "value_name": "hit rate",
        "row_name": "skipped by calibration on (first half)",
        "column_name": "also skipped by (second half)",
        "panels": panels,
    }


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    lines = []
    for panel in result["panels"]:
        lines.append(f"{panel['title']}; columns {', '.join(panel['columns'])}")
        for name, values in zip(panel["rows"], panel["values"], strict=True):
            lines.append(f"  {name}: " + " ".join(f"{v:.3f}" for v in values))
    return "\n".join(lines)
