"""Quality against measured speed-up, for every policy, with the front of what is best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .source import Document, items, place
from .style import look, plain

HOW = (
    "a Pareto picture is drawn from a list, or 'points', of {policy, alpha or skipped, speedup: "
    "{prefill, decode}, quality (a number, or one a phase)}, as `python -m benchmarks run "
    "study_pareto` writes them"
)
PHASES = ("prefill", "decode")
_HOPELESS = 100.0  # times the best quality, where lower is better: not shown
_LOG_FROM = 8.0  # times between the best and the worst, from which a log scale shows more


def front(points: Sequence[tuple[float, float]], lower_is_better: bool) -> list[int]:
    """The points (speed, quality) that no other beats in both, as indices, slowest first.

    Of equal points the first counts.
    """
    sign = -1 if lower_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -sign * points[i][1], i))
    best, kept = float("-inf"), []
    for i in order:
        if sign * points[i][1] > best:
            best = sign * points[i][1]
            kept.append(i)
    return kept[::-1]


def figure(documents: Sequence[Document], make: Any) -> Any:
    """One panel a phase; hollow markers have no compensation. PlotError for other data.

    Documents may say ``quality_name`` (default: perplexity ratio), ``lower_is_better`` (true) and
    ``levels``, qualities to compare with, by name.
    """
    points = items(documents, "points", ("policy", "speedup", "quality"), HOW)
    name = documents[0].get("quality_name", "perplexity ratio")
    lower = bool(documents[0].get("lower_is_better", True))
    phases = [p for p in PHASES if any(p in point["speedup"] for point in points)]
    drawn = make(figsize=(1.8 + 4.6 * len(phases), 4.8), layout="constrained")
    axes = drawn.subplots(1, len(phases), squeeze=False, sharey=True)[0]
    for one, phase in zip(axes, phases, strict=True):
        _panel(one, [p for p in points if phase in p["speedup"]], phase, lower)
        for level, quality in documents[0].get("levels", {}).items():
            if quality is not None:
                one.axhline(quality, color="#666666", linestyle=":", linewidth=1.2, label=level)
        one.set_xlabel(f"{phase} speed-up over the full model (measured, times)")
    axes[0].set_ylabel(f"{name} ({'lower' if lower else 'higher'} is better)")
    drawn.legend(*_legend(axes), loc="outside right center", frameon=False)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def _panel(axes: Any, points: Sequence[Document], phase: str, lower: bool) -> None:
    policies = list(dict.fromkeys(p["policy"] for p in points))
    values = [(float(p["speedup"][phase]), quality_of(p, phase)) for p in points]
    for point, (speed, quality) in zip(points, values, strict=True):
        looks = look(policies.index(point["policy"]))
        axes.plot(
            speed,
            quality,
            label=label_of(point),
            **{**looks, "linestyle": "none"},
            fillstyle="none" if _bare(point) else "full",
            markersize=7,
        )
        axes.annotate(
            _size(point),
            (speed, quality),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=6.5,
            annotation_clip=True,
        )
    best = [values[i] for i in front(values, lower)]
    axes.plot(
        *zip(*best, strict=True),
        color="black",
        linewidth=1,
        drawstyle="steps-pre",  # what at least this speed can have
        label="best of all",
        zorder=1,
    )
    qualities = [q for _, q in values]
    if min(qualities) > 0 and max(qualities) / min(qualities) > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.margins(0.08)
    if lower:
        _cut(axes, points, qualities)
    plain(axes)


def quality_of(point: Document, phase: str) -> float:
    """Of one phase, where a point has one for each."""
    quality = point["quality"]
    return float(quality[phase] if isinstance(quality, dict) else quality)


def _cut(axes: Any, points: Sequence[Document], qualities: Sequence[float]) -> None:
    """Leave out of sight what is hopeless, and say so."""
    best = min(qualities)
    limit = _HOPELESS * best
    pairs = zip(points, qualities, strict=True)
    gone = dict.fromkeys(str(p["policy"]) for p, quality in pairs if quality > limit)
    if limit <= 0 or not gone:
        return
    axes.set_ylim(best / 1.3, limit)
    text = "\n".join(["off the scale:", *gone])
    axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", fontsize=7)


def _bare(point: Document) -> bool:
    return str(point.get("compensation", "none")) == "none"


def label_of(point: Document) -> str:
    """The policy, with its compensation if it has one."""
    return str(point["policy"]) if _bare(point) else f"{point['policy']} + {point['compensation']}"


def _size(point: Document) -> str:
    return str(point["skipped"]) if "skipped" in point else f"{point.get('alpha', ''):.4g}"


def _legend(axes: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Each label once, the front last."""
    known: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    last = known.pop("best of all")
    return [*known.values(), last], [*known, "best of all"]
