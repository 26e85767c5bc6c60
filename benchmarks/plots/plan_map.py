"""Which sublayers each plan leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from adaskip_fx.plans.sublayer import Kind, Sublayer

from .source import Document, items, place

HOW = (
    "a plan map is drawn from plan files, or from 'plans' with name, sublayers, prefill and decode "
    "(sublayer: action), as `python -m benchmarks run study_pareto` writes them"
)
#: what happens to a sublayer -> how its cell is drawn; no colour is needed to tell them apart
_CELLS: Mapping[str, Mapping[str, Any]] = {
    "runs": {"facecolor": "white", "edgecolor": "#bbbbbb"},
    "skipped": {"facecolor": "#222222", "edgecolor": "#222222"},
    "skipped in decode": {"facecolor": "white", "edgecolor": "#222222", "hatch": "/////"},
    "skipped in prefill": {"facecolor": "white", "edgecolor": "#222222", "hatch": "\\\\\\\\\\"},
    "writes K/V only": {"facecolor": "#c8c8c8", "edgecolor": "#222222", "hatch": "...."},
}


def fate(plan: Mapping[str, Any], sublayer: str) -> str:
    """What a plan does with a sublayer, in the words of the legend."""
    prefill, decode = (plan[phase].get(sublayer, "run") for phase in ("prefill", "decode"))
    if prefill == decode == "skip":
        return "skipped"
    if "kv_only" in (prefill, decode):
        return "writes K/V only"
    if "skip" in (prefill, decode):
        return "skipped in decode" if decode == "skip" else "skipped in prefill"
    return "runs"


def figure(documents: Sequence[Document], make: Any) -> Any:
    """One line for each plan and kind of sublayer. PlotError for other data."""
    from matplotlib.patches import Patch, Rectangle

    plans = items(documents, "plans", ("name", "sublayers", "prefill", "decode"), HOW)
    lines = [(plan, kind) for plan in plans for kind in _kinds(plan["sublayers"])]
    layers = 1 + max(Sublayer.parse(s).layer for plan in plans for s in plan["sublayers"])
    drawn = make(
        figsize=(max(3.4 + 0.25 * layers, 7.5), 1.2 + 0.22 * len(lines)), layout="constrained"
    )
    axes = drawn.subplots()
    used: dict[str, None] = {}
    for row, (plan, kind) in enumerate(lines):
        for name in plan["sublayers"]:
            sublayer = Sublayer.parse(name)
            if sublayer.kind == kind:
                what = fate(plan, name)
                used[what] = None
                cell = Rectangle(
                    (sublayer.layer - 0.5, row - 0.42), 1, 0.84, linewidth=0.5, **_CELLS[what]
                )
                axes.add_patch(cell)
    axes.set(xlim=(-0.6, layers - 0.4), ylim=(len(lines) - 0.5, -0.5), xlabel="layer")
    axes.set_xticks(range(0, layers, 1 if layers <= 40 else 4))
    axes.set_yticks(range(len(lines)), [_line_name(plan, kind) for plan, kind in lines])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    handles = [Patch(label=what, **_CELLS[what]) for what in _CELLS if what in used]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def _kinds(names: Sequence[str]) -> list[str]:
    return [k for k in get_args(Kind) if any(Sublayer.parse(n).kind == k for n in names)]


def _line_name(plan: Mapping[str, Any], kind: str) -> str:
    first = kind == _kinds(plan["sublayers"])[0]
    return f"{plan['name']}   {kind}" if first else kind
