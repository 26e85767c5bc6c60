"""Small pieces of text that reports, tables and the command line share."""

from __future__ import annotations

from collections.abc import Iterable

from .skip_plan import TIMES
from .sublayer import Sublayer

__all__ = ["TIMES", "by_kind", "storage"]


def by_kind(sublayers: Iterable[Sublayer]) -> str:
    """``attention 3 7-9, ffn 12``; empty for no sublayer."""
    layers: dict[str, list[int]] = {}
    for sublayer in sorted(sublayers):
        layers.setdefault(sublayer.kind, []).append(sublayer.layer)
    return ", ".join(f"{kind} {_ranges(layers[kind])}" for kind in sorted(layers))


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def storage(count: int) -> str:
    """A number of bytes: ``12.3 MiB``."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
