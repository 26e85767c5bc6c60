"""A row of the result: what was measured, beside what, and the number that is aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

#: What of a row its target is of: measured over reference, measured less reference, or measured.
Of = Literal["ratio", "difference", "measured"]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: In words, with lengths and rows.
        measured, reference: In `unit`; no reference where the target is of the measured alone.
        target: None where a row only says what something else takes.
        of: What the target is of.
        at_least: Whether more is better.
        unit: Of measured and reference.
        chosen: What the target is of, where it is none of `of` of these two numbers but, say, a
            median of differences.
        eager_error: Of the logits against the eager model's, relative; None if not compared.
        allowed_error: What that may be; None: as of all situations.
        notes: More numbers, for the JSON.
    """

    what: str
    measured: float
    reference: float | None
    target: float | None
    of: Of = "ratio"
    at_least: bool = False
    unit: str = "ms"
    chosen: float | None = None
    eager_error: float | None = None
    allowed_error: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The number that the target is of."""
        if self.chosen is not None:
            return self.chosen
        if self.of == "measured" or self.reference is None:
            return self.measured
        if self.of == "difference":
            return self.measured - self.reference
        return self.measured / self.reference

    def document(self, tolerance: float) -> dict[str, Any]:
        """Everything, for the JSON.

        Args:
            tolerance: Relative error of the logits beyond which no target is met, where the row
                says none.
        """
        if self.allowed_error is not None:
            tolerance = self.allowed_error
        right = self.eager_error is None or self.eager_error <= tolerance
        met = None
        if self.target is not None:
            reached = self.value >= self.target if self.at_least else self.value <= self.target
            met = right and reached
        return {
            "what": self.what,
            "unit": self.unit,
            "measured": self.measured,
            "reference": self.reference,
            "ratio": self.measured / self.reference if self.reference else None,
            "of": self.of,
            "value": self.value,
            "target": self.target,
            "at_least": self.at_least,
            "met": met,
            "eager_error": self.eager_error,
            "allowed_error": None if self.eager_error is None else tolerance,
            **self.notes,
        }


def over(what: str, seconds: float, reference: float, target: float | None, **more: Any) -> Row:
    """Return a row of two times in seconds, whose ratio is to be the target at most."""
    return Row(what, 1000 * seconds, 1000 * reference, target, **more)


def beyond(what: str, seconds: float, reference: float, target_ms: float, **more: Any) -> Row:
    """Return a row of two times in seconds, whose difference is to be so many ms at most."""
    return Row(what, 1000 * seconds, 1000 * reference, target_ms, of="difference", **more)


HEAD = f"{'situation':15s} {'what':58s} {'measured':>10s} {'reference':>10s} {'unit':8s}"
HEAD += f" {'value':>9s} {'target':>8s} met"


def line(row: dict[str, Any]) -> str:
    """Return one row of a result as text."""
    if "failed" in row:
        return f"{row['situation']:15s} failed: {row['failed'].splitlines()[0]}"
    cells = [f"{row['situation']:15s} {row['what']:58s} {row['measured']:10.3f}"]
    cells += [f"{_number(row['reference'], 10)} {row['unit']:8s} {row['value']:9.3f}"]
    bound = ">=" if row["at_least"] else ""
    target = "-" if row["target"] is None else f"{bound}{row['target']:.2f}"
    cells += [f"{target:>8s}", {None: "", True: "yes", False: "NO"}[row["met"]]]
    if row["eager_error"] is not None:
        cells += [f"(logits off by {row['eager_error']:.1e})"]
    return " ".join(cells).rstrip()


def _number(value: float | None, width: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.3f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of a result as text, and how many targets are met."""
    targets = [row["met"] for row in rows if row.get("met") is not None]
    failed = sum("failed" in row for row in rows)
    end = f"{sum(targets)} of {len(targets)} targets met"
    return "\n".join([HEAD, *map(line, rows), f"{end}, {failed} situations failed"])
