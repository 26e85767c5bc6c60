"""Plans and profiles as text, and the pieces of text that reports and the command line share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, get_args

from .actions import Action, Phase
from .sublayer import Kind, Sublayer

if TYPE_CHECKING:
    from .skip_plan import SkipPlan

TIMES = "\N{MULTIPLICATION SIGN}"
_DOT = "\N{MIDDLE DOT}"


def plan_table(plan: SkipPlan) -> str:
    """Return a heading and one row per layer, plain text."""
    return f"{_heading(plan)}\n{layer_table(plan.sublayers, lambda s: _cell(plan, s))}"


def layer_table(
    sublayers: Sequence[Sublayer], cell: Callable[[Sublayer], str], unit: str = ""
) -> str:
    """Return one row per layer and one column per kind of sublayer.

    Args:
        sublayers: those that have a cell.
        cell: returns the text for a sublayer.
        unit: follows each kind's name in the head of its column.
    """
    kinds = [kind for kind in get_args(Kind) if any(s.kind == kind for s in sublayers)]
    cells = {(s.layer, s.kind): cell(s) for s in sublayers}
    layers = dict.fromkeys(s.layer for s in sublayers)
    rows = [["layer", *(f"{kind}{unit}" for kind in kinds)]]
    rows += [[str(n), *(cells.get((n, kind), "") for kind in kinds)] for n in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        " | ".join([row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def by_kind(sublayers: Iterable[Sublayer]) -> str:
    """Return ``attention 3 7-9, ffn 12``; empty for no sublayer."""
    layers: dict[str, list[int]] = {}
    for sublayer in sorted(sublayers):
        layers.setdefault(sublayer.kind, []).append(sublayer.layer)
    return ", ".join(f"{kind} {_ranges(layers[kind])}" for kind in sorted(layers))


def storage(count: int) -> str:
    """Return a number of bytes as text: ``12.3 MiB``."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _heading(plan: SkipPlan) -> str:
    skipped = plan.skipped("prefill")
    counts = Counter(s.kind for s in skipped)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in get_args(Kind) if counts[kind])
    total = len(plan.sublayers)
    return (
        f"SkipPlan {plan.digest[:8]}: prefill skips {len(skipped)} of {total} sublayers"
        f"{f' ({kinds})' if kinds else ''}, decode {len(plan.skipped('decode'))} of {total}"
        f"{_windowed(plan)}"
        f"{'; the last token of a prompt runs as in decode' if plan.last_token_full else ''}"
    )


def _windowed(plan: SkipPlan) -> str:
    """Return how many attention sublayers have windows, by phase; empty where none has one."""
    if not plan.windows:
        return ""
    counts = len(plan.windows.prefill), len(plan.windows.decode)
    return f"; attention has windows in {counts[0]} sublayers of prefill, {counts[1]} of decode"


def _cell(plan: SkipPlan, sublayer: Sublayer) -> str:
    def text(phase: Phase) -> str:
        action = plan.action(phase, sublayer)
        if action is Action.RUN:
            return str(plan.windows.get(phase, sublayer) or _DOT)
        words, surrogate = action.value.replace("_", " "), plan.surrogates.get(sublayer)
        return words if surrogate is None else f"{words} {surrogate}"

    prefill, decode = text("prefill"), text("decode")
    return prefill if prefill == decode else f"prefill {prefill}, decode {decode}"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
