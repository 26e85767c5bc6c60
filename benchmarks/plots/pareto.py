"""Quality against measured speed-up, for every policy, with the front of what is best."""

from __future__ import annotations

from collections import Counter
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
_FILLS = ("full", "bottom", "left", "top", "right")  # of markers, by compensation
_KINDS = {"none": "no compensation"}
_LEVEL = {"color": "#666666", "linestyle": ":", "linewidth": 1.2}
_BEST = {  # steps: what at least this speed can have
    **{"color": "black", "linewidth": 1, "zorder": 1},
    "drawstyle": "steps-pre",
}
_ROOM = (20.0, 10.0)  # pixels that a number beside a point takes
_LOG_FROM = 8.0  # times between the best and the worst, from which a log scale shows more

#: keyword arguments by policy, fill styles by compensation
Looks = tuple[dict[str, dict[str, Any]], dict[str, str]]


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
    """One panel a phase. PlotError for other data.

    The marker is the policy, its filling the compensation, the number what is skipped (or alpha),
    where there is room for it; a letter after it is a variant of the policy. Points may say
    ``surrogates`` and ``variant``. Documents may say ``quality_name`` (default: perplexity
    ratio), ``lower_is_better`` (true) and ``levels``, qualities to compare with, by name.
    """
    points = items(documents, "points", ("policy", "speedup", "quality"), HOW)
    name = documents[0].get("quality_name", "perplexity ratio")
    lower = bool(documents[0].get("lower_is_better", True))
    levels = {k: v for k, v in documents[0].get("levels", {}).items() if v is not None}
    phases = [p for p in PHASES if any(p in point["speedup"] for point in points)]
    looks = _looks(points)
    drawn = make(figsize=(1.8 + 4.6 * len(phases), 4.8), layout="constrained")
    axes = drawn.subplots(1, len(phases), squeeze=False, sharey=True)[0]
    for one, phase in zip(axes, phases, strict=True):
        for level, quality in levels.items():
            one.axhline(quality, label=level, **_LEVEL)
        _panel(one, [p for p in points if phase in p["speedup"]], phase, lower, looks)
        one.set_xlabel(f"{phase} speed-up over the full model (measured, times)")
    axes[0].set_ylabel(f"{name} ({'lower' if lower else 'higher'} is better)")
    handles = _legend(points, looks, levels)
    drawn.legend(handles=handles, loc="outside right center", frameon=False)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def _looks(points: Sequence[Document]) -> Looks:
    """How each policy and compensation are drawn."""
    policies = dict.fromkeys(str(p["policy"]) for p in points)
    kinds = sorted({_surrogates(p) for p in points} - {"none"})
    fills = {"none": "none", **{k: _FILLS[i % len(_FILLS)] for i, k in enumerate(kinds)}}
    marks = {
        policy: {**look(i), "linestyle": "none", "markersize": 7}
        for i, policy in enumerate(policies)
    }
    return marks, fills


def _surrogates(point: Document) -> str:
    return str(point.get("compensation", "none"))


def label_of(point: Document) -> str:
    """The policy, with its variant and its compensation if it has them."""
    name = ", ".join(filter(None, (str(point["policy"]), point.get("variant"))))
    kind = _surrogates(point)
    return name if kind == "none" else f"{name} + {kind}"


def _panel(axes: Any, points: Sequence[Document], phase: str, lower: bool, looks: Looks) -> None:
    marks, fills = looks
    values = [(float(p["speedup"][phase]), quality_of(p, phase)) for p in points]
    for point, (speed, quality) in zip(points, values, strict=True):
        shape = marks[str(point["policy"])]
        fill = fills[_surrogates(point)]
        axes.plot(speed, quality, label=label_of(point), fillstyle=fill, **shape)
    best = front(values, lower)
    axes.plot(*zip(*(values[i] for i in best), strict=True), label="best of all", **_BEST)
    qualities = [q for _, q in values]
    if min(qualities) > 0 and max(qualities) / min(qualities) > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.margins(0.08)
    if lower:
        _cut(axes, points, qualities)
    _number(axes, points, values, best)
    plain(axes)


def _number(
    axes: Any,
    points: Sequence[Document],
    values: Sequence[tuple[float, float]],
    best: Sequence[int],
) -> None:
    """Write sizes beside points, those of the front first; none over another."""
    import numpy as np

    axes.autoscale_view()  # limits are only worked out when they are asked for
    where = axes.transData.transform(values)
    written = np.empty((0, 2))
    for i in dict.fromkeys((*best, *range(len(points)))):
        if (abs(written - where[i]) < _ROOM).all(1).any():
            continue
        written = np.vstack((written, where[i]))
        axes.annotate(
            _size(points[i]),
            values[i],
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=6.5,
            annotation_clip=True,
        )


def quality_of(point: Document, phase: str) -> float:
    """Of one phase, where a point has one for each."""
    quality = point["quality"]
    return float(quality[phase] if isinstance(quality, dict) else quality)


def _cut(axes: Any, points: Sequence[Document], qualities: Sequence[float]) -> None:
    """Leave out of sight what is hopeless, and say so."""
    best = min(qualities)
    limit = _HOPELESS * best
    pairs = zip(points, qualities, strict=True)
    gone = Counter(str(p["policy"]) for p, quality in pairs if quality > limit)
    if limit <= 0 or not gone:
        return
    axes.set_ylim(best / 1.3, 2 * max(q for q in qualities if q <= limit))
    counted = (f"{policy} ({count})" for policy, count in gone.items())
    text = "\n".join(["off the scale (points):", *counted])
    axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", fontsize=7)


def _size(point: Document) -> str:
    size = str(point["skipped"]) if "skipped" in point else f"{point.get('alpha', ''):.4g}"
    return size + str(point.get("variant") or "")[:1]


def _legend(points: Sequence[Document], looks: Looks, levels: dict[str, float]) -> list[Any]:
    """Policies, then surrogates, variants, levels and the front."""
    from matplotlib.lines import Line2D

    marks, fills = looks
    square = {"marker": "s", "linestyle": "none", "color": "#444444", "markersize": 7}
    variants = dict.fromkeys(str(p["variant"]) for p in points if p.get("variant"))
    entries: list[tuple[str, dict[str, Any]]] = [
        *((policy, {**mark, "fillstyle": "none"}) for policy, mark in marks.items()),
        *((_KINDS.get(k, k), {**square, "fillstyle": fill}) for k, fill in fills.items()),
        *((f"{v[:1]}: {v}", {"linestyle": "none"}) for v in variants),
        *((level, _LEVEL) for level in levels),
        ("best of all", _BEST),
    ]
    return [Line2D([], [], label=label, **style) for label, style in entries]
